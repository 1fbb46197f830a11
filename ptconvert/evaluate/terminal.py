"""The evaluation on a terminal: tables of tasks and of the divergence."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptconvert.evaluate.acceptance import LAYER, Accepted, Speculation
from ptconvert.evaluate.run import Report, Row
from ptconvert.measure.divergence import Closeness, Divergence
from ptconvert.report.numbers import (
    between,
    number,
    p_value,
    perplexity_of,
    signed,
)
from ptconvert.report.terminal import figures_table
from ptconvert.shorten import few, without_middle

_STYLES = {"worse": "bold red", "better": "bold green", "no difference found": "dim"}


def print_evaluation(console: Console, report: Report) -> None:
    """Prints the report: tasks, divergence, speculative decoding, notes."""
    against = f" against {report.baseline}" if report.baseline else ""
    console.print(Text(f"{report.checkpoint}{against}", style="bold"))
    if report.rows:
        console.print(tasks_table(report.rows))
    if report.divergence is not None:
        _print_divergence(console, report.divergence)
    if report.speculation is not None:
        _print_speculation(console, report.speculation)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def tasks_table(rows: tuple[Row, ...]) -> Table:
    """One row per metric: both models, their difference, its interval and p-value."""
    paired = any(row.difference is not None for row in rows)
    names = ["task", "metric", "docs", *(["source"] if paired else []), "converted"]
    names += ["difference", "95% interval", "p"] if paired else ["95% interval"]
    table = figures_table(*names, text=2, no_wrap=True)
    table.add_column("")
    shown = ""
    for row in rows:
        name = row.task if row.task != shown else ""
        cells = [name, metric_name(row), f"{row.documents:,}"]
        shown = row.task
        if row.source is not None and row.difference is not None:
            cells += [number(row.source.value), number(row.converted.value)]
            cells += [signed(row.difference.value), between(row.difference, signed)]
            cells += [p_value(row.difference.p_value)]
        else:
            cells += [number(row.converted.value), between(row.converted, number)]
        verdict = Text(short_verdict(row), style=_STYLES.get(row.verdict, ""))
        table.add_row(*cells, verdict, style="bold" if row.group else "")
    return table


def metric_name(row: Row) -> str:
    """A metric, lm-eval's filter of the answers where there is one, and which way is better."""
    arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    return row.metric + (f" ({row.filter})" if row.filter != "none" else "") + arrow


def short_verdict(row: Row) -> str:
    """The verdict in the width of a column."""
    return {"no difference found": "none found"}.get(row.verdict, row.verdict)


def _print_divergence(console: Console, found: Divergence) -> None:
    console.print()
    console.print(
        Text(
            f"divergence on {few(found.texts)}: {found.windows} windows of {found.length} "
            f"tokens (of {found.tokens:,}); losses and KL in nats per token",
            style="bold",
        ),
        soft_wrap=True,
    )
    console.print(_whole_table(found.whole))
    console.print()
    by_position = _closeness_table("position", "same first choice")
    for bucket in found.by_position:
        place = f"{bucket.first}-{bucket.last}" if bucket.last > bucket.first else f"{bucket.first}"
        agree = f"{bucket.closeness.agreement.value:.1%}"
        by_position.add_row(place, *closeness_cells(bucket.closeness), agree)
    console.print(by_position)
    if found.by_block:
        console.print()
        alone = "each block of the schedule converted alone, the rest dense"
        console.print(
            Text(f"{alone} ({found.block_windows} windows):", style="bold"), soft_wrap=True
        )
        by_block = _closeness_table("stages", "waited for")
        for block in found.by_block:
            waits = f"{block.waited_before} → {block.waited_after}"
            stages = without_middle(block.stages, 30)
            by_block.add_row(stages, *closeness_cells(block.closeness), waits)
        console.print(by_block)


def _whole_table(found: Closeness) -> Table:
    table = figures_table("", "value", "95% interval", "p")
    for label, one in (
        ("loss, source", found.source_loss),
        ("loss, converted", found.converted_loss),
    ):
        perplexity = f"perplexity {perplexity_of(one.value)}"
        table.add_row(f"{label} ({perplexity})", number(one.value), between(one, number))
    loss = found.loss
    table.add_row(
        "loss, difference", signed(loss.value), between(loss, signed), p_value(loss.p_value)
    )
    table.add_row("KL(source || converted)", number(found.kl.value), between(found.kl, number))
    table.add_row(
        "same first choice", f"{found.agreement.value:.2%}", between(found.agreement, _share)
    )
    if found.rerouted is not None:
        share = f"{found.rerouted.value:.2%}"
        table.add_row("other experts, of layers and tracks", share, between(found.rerouted, _share))
    return table


def _closeness_table(first: str, last: str) -> Table:
    return figures_table(first, "loss", "95% interval", "KL", "95% interval", last, no_wrap=True)


def closeness_cells(found: Closeness) -> Iterator[str]:
    """Difference of the losses and KL, each with its interval."""
    yield signed(found.loss.value)
    yield between(found.loss, signed)
    yield number(found.kl.value)
    yield between(found.kl, number)


def _share(value: float) -> str:
    return f"{value:.2%}"


def _print_speculation(console: Console, found: Speculation) -> None:
    console.print()
    console.print(Text(f"{speculation_title(found)}:", style="bold"), soft_wrap=True)
    table = figures_table("", "source", "converted", "difference", "95% interval", "p")
    for row in speculation_rows(found):
        table.add_row(*row)
    console.print(table)


def speculation_title(found: Speculation) -> str:
    """What was drafted, and after what."""
    tokens = "1 token" if found.drafted == 1 else f"{found.drafted} tokens"
    by = "its own head" if found.draft == LAYER else found.draft
    return (
        f"speculative decoding, {tokens} drafted by {by} for each step, "
        f"greedy: up to {found.new} tokens after {found.prompt} of each of {found.windows} windows"
    )


def speculation_rows(found: Speculation) -> Iterator[list[str]]:
    """Label, source, converted, difference, its interval and p-value of what is accepted; then in
    what share of steps the first 1, 2, ... drafts are right."""
    apart, models = found.difference, (found.source, found.converted)
    values = [number(model.accepted.value) for model in models]
    tested = [signed(apart.value), between(apart, signed), p_value(apart.p_value)]
    yield [f"accepted, of {found.drafted} drafted", *values, *tested]

    def shares(model: Accepted) -> list[str]:
        return [f"{share:.1%}" for share in model.right]

    for place, pair in enumerate(zip(*map(shares, models), strict=True), 1):
        yield ["  the first right" if place == 1 else f"  the first {place}", *pair, "", "", ""]
    yield ["steps", *(f"{model.steps:,}" for model in models), "", "", ""]
