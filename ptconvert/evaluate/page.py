"""The evaluation as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ptconvert import __version__
from ptconvert.evaluate.harness import Settings
from ptconvert.evaluate.run import Report, Row
from ptconvert.evaluate.terminal import (
    closeness_cells,
    metric_name,
    speculation_rows,
    speculation_title,
)
from ptconvert.measure.divergence import Block, Bucket, Divergence
from ptconvert.measure.statistics import Estimate
from ptconvert.report.charts import Interval, Series, interval_plot, line_chart
from ptconvert.report.html import render
from ptconvert.report.html_schedule import schedule_diagram
from ptconvert.report.numbers import (
    between,
    number,
    p_value,
    perplexity_of,
    signed,
)
from ptconvert.schedule.schedule import Schedule
from ptconvert.shorten import few, without_middle


def evaluation_page(report: Report) -> str:
    """The whole document."""
    against = f" against {report.baseline}" if report.baseline else ""
    return render(
        "evaluate.html",
        title=f"{report.checkpoint}{against}",
        subtitle=f"ptconvert eval {__version__}: what the conversion changed, with 95% intervals",
        notes=report.notes,
        diagram=schedule_diagram(
            Schedule.parse(report.schedule), report.tracks, report.dense_all_reduces
        ),
        tasks=_tasks(report.rows),
        divergence=report.divergence and _divergence(report.divergence),
        speculation=report.speculation
        and {
            "title": speculation_title(report.speculation),
            "rows": list(speculation_rows(report.speculation)),
        },
        settings=_settings(report.settings, bool(report.rows)),
        digests=report.digests,
    )


def _tasks(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows of the table, and of a compared model the charts."""
    if any(row.difference is None for row in rows):
        alone = [
            [*_named(row), number(row.converted.value), between(row.converted, number)]
            for row in rows
        ]
        return {"compared": False, "rows": alone}
    return {
        "compared": True,
        "rows": [_task_cells(row) for row in rows],
        "groups": [i for i, row in enumerate(rows) if row.group],
        "charts": list(_task_charts(rows)),
    }


def _task_charts(rows: Sequence[Row]) -> Iterator[Markup]:
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
    return without_middle(row.task if alone else f"{row.task} ({row.filter})", 26)


def _drawable(found: Estimate) -> bool:
    return found.interval is not None and max(map(abs, found.interval)) < 1e5


def _bounds(found: Estimate | None) -> tuple[float, float, float]:
    assert found is not None and found.interval is not None
    return found.interval[0], found.value, found.interval[1]


def _divergence(found: Divergence) -> dict[str, Any]:
    whole = found.whole
    return {
        "found": found,
        "texts": few(found.texts),
        "facts": {
            "loss, source": _with_perplexity(whole.source_loss),
            "loss, converted": _with_perplexity(whole.converted_loss),
            "difference": f"{signed(whole.loss.value)}  ({between(whole.loss, signed)})",
            "KL": f"{number(whole.kl.value)}  ({between(whole.kl, number)})",
            "same first choice": f"{whole.agreement.value:.2%}",
            **_routing(whole.rerouted),
        },
        "charts": list(_position_charts(found.by_position)),
        "positions": [
            [
                f"{b.first:,} to {b.last:,}",
                *closeness_cells(b.closeness),
                f"{b.closeness.agreement.value:.1%}",
            ]
            for b in found.by_position
        ],
        "block_chart": _block_chart(found.by_block),
        "blocks": [_block_cells(block) for block in found.by_block],
    }


def _routing(found: Estimate | None) -> dict[str, str]:
    """Of mixtures of experts only."""
    if found is None:
        return {}
    return {"other experts than the source's, of layers and tracks": f"{found.value:.2%}"}


def _with_perplexity(loss: Estimate) -> str:
    return f"{number(loss.value)}  (perplexity {perplexity_of(loss.value)})"


def _position_charts(buckets: Sequence[Bucket]) -> Iterator[Markup]:
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


def _points(xs: Sequence[float], estimates: Sequence[Estimate]) -> list[tuple[float, float]]:
    return [(x, e.value) for x, e in zip(xs, estimates, strict=True)]


def _block_chart(blocks: Sequence[Block]) -> Markup | None:
    drawn = [
        Interval(_layers(block), *_bounds(block.closeness.kl))
        for block in blocks
        if _drawable(block.closeness.kl)
    ]
    return interval_plot(drawn, "KL, nats per token", reference=0.0) if drawn else None


def _block_cells(block: Block) -> list[str]:
    return [
        _layers(block).split(" ", 1)[1],
        without_middle(block.stages, 24),
        f"{block.waited_before} → {block.waited_after}",
        *closeness_cells(block.closeness),
    ]


def _layers(block: Block) -> str:
    if block.first_layer == block.last_layer:
        return f"layer {block.first_layer}"
    return f"layers {block.first_layer} to {block.last_layer}"


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
