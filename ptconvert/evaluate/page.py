"""The evaluation as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ptconvert import __version__
from ptconvert.evaluate.harness import Settings
from ptconvert.evaluate.report import Report, Row
from ptconvert.evaluate.terminal import metric_name
from ptconvert.measure.divergence import Block, Bucket, Closeness, Divergence
from ptconvert.measure.statistics import Estimate
from ptconvert.report.html import (
    Html,
    Interval,
    Series,
    bullets,
    code,
    facts,
    interval_plot,
    line_chart,
    note,
    page,
    paragraph,
    section,
    table,
)
from ptconvert.report.html_schedule import schedule_diagram
from ptconvert.report.numbers import (
    between,
    number,
    p_value,
    perplexity_of,
    shortened,
    signed,
    text_names,
)
from ptconvert.schedule.schedule import Schedule


def evaluation_page(report: Report) -> str:
    """The whole document."""
    against = f" against {report.baseline}" if report.baseline else ""
    return page(
        f"{report.checkpoint}{against}",
        f"ptconvert eval {__version__}: what the conversion changed, with 95% intervals",
        _sections(report),
    )


def _sections(report: Report) -> Iterator[Html]:
    schedule = Schedule.parse(report.schedule)
    if report.notes:
        yield section("To be kept in mind", *(note(text) for text in report.notes))
    yield section("Schedule", schedule_diagram(schedule, report.tracks))
    if report.rows:
        yield section("Tasks", *_tasks(report.rows))
    if report.divergence is not None:
        yield section("Divergence on text", *_divergence(report.divergence))
    yield section("How this was measured", *_method(report))


def _tasks(rows: Sequence[Row]) -> Iterator[Html]:
    if any(row.difference is None for row in rows):
        yield table(
            ["task", "metric", "documents", "score", "95% interval"],
            [
                [*_named(row), number(row.converted.value), between(row.converted, number)]
                for row in rows
            ],
            text_columns=(0, 1),
        )
        return
    yield table(
        ["task", "metric", "docs", "source → converted", "difference", "95% interval", "p"],
        [_task_cells(row) for row in rows],
        text_columns=(0, 1),
        highlight=[i for i, row in enumerate(rows) if row.group],
        caption="Difference is converted less source, on the same documents; * marks p < 0.05.",
    )
    for metric in dict.fromkeys(row.metric for row in rows):
        some = [row for row in rows if row.metric == metric]
        drawn = [
            Interval(_label(row, some), *_bounds(row.difference))
            for row in some
            if row.difference is not None and _drawable(row.difference)
        ]
        if drawn:
            better = {True: ": higher is better", False: ": lower is better", None: ""}
            yield interval_plot(
                drawn,
                f"{metric}, converted less source{better[some[0].higher_is_better]}",
                reference=0.0,
            )


def _task_cells(row: Row) -> list[str]:
    assert row.source is not None and row.difference is not None
    return [
        *_named(row),
        f"{number(row.source.value)} → {number(row.converted.value)}",
        signed(row.difference.value),
        between(row.difference, signed),
        p_value(row.difference.p_value).strip(),
    ]


def _named(row: Row) -> list[str]:
    return [row.task, metric_name(row), f"{row.documents:,}"]


def _label(row: Row, among: Sequence[Row]) -> str:
    alone = sum(other.task == row.task for other in among) == 1
    return shortened(row.task if alone else f"{row.task} ({row.filter})", 26)


def _drawable(found: Estimate) -> bool:
    return found.interval is not None and max(map(abs, found.interval)) < 1e5


def _bounds(found: Estimate | None) -> tuple[float, float, float]:
    assert found is not None and found.interval is not None
    return found.interval[0], found.value, found.interval[1]


def _divergence(found: Divergence) -> Iterator[Html]:
    whole = found.whole
    yield paragraph(
        f"{found.windows} windows of {found.length:,} tokens of {text_names(found.texts)} "
        f"({found.tokens:,} tokens). Losses and KL are in nats per token; KL is of the converted "
        "model's predictions from the source's, KL(source || converted)."
    )
    yield facts(
        [
            ("loss, source", _with_perplexity(whole.source_loss)),
            ("loss, converted", _with_perplexity(whole.converted_loss)),
            ("difference", f"{signed(whole.loss.value)}  ({between(whole.loss, signed)})"),
            ("KL", f"{number(whole.kl.value)}  ({between(whole.kl, number)})"),
            ("same first choice", f"{whole.agreement.value:.2%}"),
        ]
    )
    yield from _positions(found.by_position)
    if found.by_block:
        yield from _blocks(found.by_block, found.block_windows)


def _with_perplexity(loss: Estimate) -> str:
    return f"{number(loss.value)}  (perplexity {perplexity_of(loss.value)})"


def _positions(buckets: Sequence[Bucket]) -> Iterator[Html]:
    finite = all(
        math.isfinite(loss.value)
        for bucket in buckets
        for loss in (bucket.closeness.source_loss, bucket.closeness.converted_loss)
    )
    if len(buckets) > 1 and finite:
        ends = [float(bucket.last + 1) for bucket in buckets]
        losses = [
            Series("source", _points(ends, [b.closeness.source_loss for b in buckets])),
            Series("converted", _points(ends, [b.closeness.converted_loss for b in buckets])),
        ]
        yield line_chart(
            losses, "position in the window, up to", "loss, nats per token", log_x=True, height=260
        )
        kl = [bucket.closeness.kl for bucket in buckets]
        yield line_chart(
            [Series("KL", _points(ends, kl), [e.interval or (e.value, e.value) for e in kl])],
            "position in the window, up to",
            "KL, nats per token",
            log_x=True,
            from_zero=True,
            height=260,
            caption="With 95% intervals over windows.",
        )
    yield table(
        ["position", *_CLOSENESS],
        [[f"{b.first:,} to {b.last:,}", *_closeness(b.closeness)] for b in buckets],
    )


_CLOSENESS = ("loss difference", "95% interval", "KL", "95% interval", "same first choice")


def _closeness(found: Closeness) -> list[str]:
    return [
        signed(found.loss.value),
        between(found.loss, signed),
        number(found.kl.value),
        between(found.kl, number),
        f"{found.agreement.value:.1%}",
    ]


def _points(xs: Sequence[float], estimates: Sequence[Estimate]) -> list[tuple[float, float]]:
    return [(x, e.value) for x, e in zip(xs, estimates, strict=True)]


def _blocks(blocks: Sequence[Block], windows: int) -> Iterator[Html]:
    yield paragraph(
        f"What each block of the schedule costs by itself, all other sublayers run as in the dense "
        f"model, on {windows} of the windows. Where one block stands out, keeping its layers dense "
        "buys the most."
    )
    drawable = [block for block in blocks if _drawable(block.closeness.kl)]
    if drawable:
        yield interval_plot(
            [Interval(_layers(block), *_bounds(block.closeness.kl)) for block in drawable],
            "KL, nats per token",
            reference=0.0,
        )
    yield table(
        ["layers", "stages", "waited for", *_CLOSENESS[:-1]],
        [
            [
                _layers(b).split(" ", 1)[1],
                code(shortened(b.stages, 24)),
                f"{b.waited_before} → {b.waited_after}",
                *_closeness(b.closeness)[:-1],
            ]
            for b in blocks
        ],
        text_columns=(0, 1),
    )


def _layers(block: Block) -> str:
    if block.first_layer == block.last_layer:
        return f"layer {block.first_layer}"
    return f"layers {block.first_layer} to {block.last_layer}"


def _method(report: Report) -> Iterator[Html]:
    yield facts(list(_settings(report.settings, bool(report.rows))))
    yield bullets(
        [
            "Intervals: bootstrap over documents (over windows for the divergence), percentile.",
            "p: McNemar's exact test where each document is right or wrong, else the paired "
            "bootstrap. Both models answered the same documents.",
        ]
    )
    if report.digests:
        yield table(
            ["model", "SHA-256 of its weights, config and tokenizer"],
            [[label, code(digest)] for label, digest in report.digests.items()],
            text_columns=(0, 1),
        )


def _settings(settings: Settings, tasks: bool) -> Iterator[tuple[str, str]]:
    yield "device", settings.device
    yield "dtype", settings.dtype
    if tasks:
        yield "batch size", str(settings.batch_size or "auto")
        yield "limit", "none" if settings.limit is None else f"{settings.limit:g}"
        shots = settings.num_fewshot
        yield "few-shot examples asked for", "the tasks' own" if shots is None else str(shots)
        yield "chat template", "applied" if settings.apply_chat_template else "not applied"
    yield "seed", "lm-eval's own" if settings.seed is None else str(settings.seed)
