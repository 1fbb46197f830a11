"""What the terminal shows: schedules as diagrams, plans and counts as tables."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ptconvert.checkpoint.compensations import COMPENSATIONS
from ptconvert.measure.needs import Needs
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.endings import BESIDE, MARKS
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

_ONE, _DIFFER = "─", "≡"


def figures_table(*names: str, text: int = 1, no_wrap: bool = False, **options: Any) -> Table:
    """A table without lines: the first `text` columns are set left, as text is, the others right.

    `options` are rich's, of a table.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", **options)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < text else "right", no_wrap=no_wrap)
    return table


def diagram(schedule: Schedule, tracks: int, width: int) -> RenderableType:
    """The schedule with layers as columns, and under each sublayer what follows it.

    `width` is the terminal's, in characters; layers that don't fit go into further rows.
    """
    cells = endings(schedule)
    tracked = schedule.track_layers if tracks > 1 else frozenset()
    column = 1 + max(len(str(schedule.layers - 1)), *(len(cell) for cell in cells.values()))
    per_row = max(1, (width - 11) // column)
    rows: list[RenderableType] = []
    for first in range(0, schedule.layers, per_row):
        layers = range(first, min(first + per_row, schedule.layers))
        rows.append(_row("layer", [(str(i), "dim") for i in layers], column))
        for kind, label in rows_of(schedule).items():
            texts = [cells.get(Sublayer(i, kind), "") for i in layers]
            rows.append(_row(label, [(t, MARKS[t[0]].style if t else "") for t in texts], column))
        streams = [(_DIFFER * column if i in tracked else _ONE * column, "dim") for i in layers]
        rows.append(_row("stream", streams, column))
        rows.append(Text(""))
    rows.extend(_legend(cells.values(), bool(tracked), tracks))
    return Group(*rows)


def rows_of(schedule: Schedule) -> dict[Kind, str]:
    """The kinds of sublayers that a schedule has, in the order of a diagram's rows, with labels."""
    labels = {
        Kind.ATTENTION: "attention",
        Kind.MLP: "MLP",
        Kind.SHARED: "shared",
        Kind.ROUTED: "routed",
    }
    there = {sublayer.kind for stage in schedule.stages for sublayer in stage.sublayers}
    return {kind: label for kind, label in labels.items() if kind in there}


def endings(schedule: Schedule) -> dict[Sublayer, str]:
    """What the schedule's text form has after each sublayer: `|` or the stage's ending."""
    return {
        sublayer: BESIDE.symbol if sublayer is not stage.sublayers[-1] else str(stage.ending)
        for stage in schedule.stages
        for sublayer in stage.sublayers
    }


def _row(label: str, cells: Sequence[tuple[str, str]], column: int) -> Text:
    row = Text(f"{label:<10}", style="bold", no_wrap=True)
    for text, style in cells:
        row.append(f"{text:>{column}}", style=f"not bold {style}")
    return row


def _legend(cells: Sequence[str] | Any, differ: bool, tracks: int) -> Iterator[Text]:
    used = {cell[0] for cell in cells}
    for symbol, mark in MARKS.items():
        if symbol in used:
            yield Text.assemble((f"{symbol}  ", mark.style), (mark.words, "dim"))
    one = f"{_ONE}  the {tracks} tracks' streams agree (held dense)"
    yield Text(one + (f"   {_DIFFER}  they differ (held per track)" if differ else ""), "dim")


def counts_table(schedule: Schedule, dense: Schedule, shape: ModelShape | None) -> RenderableType:
    """All-reduces of the dense model under tensor parallelism and of the schedule."""
    before, after = dense.counts, schedule.counts
    rows: list[tuple[str, int, int]] = [
        ("all-reduces per forward pass", before.all_reduces, after.all_reduces),
        ("of them waited for", before.waited_for, after.waited_for),
    ]
    if shape is not None:
        if not shape.norms_sums:  # else they differ
            each = "bytes per token per all-reduce"
            rows.append((each, shape.bytes_per_token, shape.bytes_per_token))
        old, new = (shape.bytes_all_reduced(s) for s in (dense, schedule))
        rows.append(("bytes all-reduced per token", old, new))
    table = figures_table("", "tensor parallel", "this schedule", "times fewer")
    for label, old, new in rows:
        table.add_row(label, f"{old:,}", f"{new:,}", "" if old == new else f"{old / new:.1f}")
    return table


def print_mtp(console: Console, summary: Mapping[str, Any]) -> None:
    """What became of a head for further tokens, where the model has one."""
    if count := summary["mtp_tensors"]:
        console.print(
            f"{count} tensors of a head for further tokens (MTP) come along as they were; "
            "the model opens without it; `ptconvert eval --draft layer` runs it",
            style="dim",
        )


def plan_table(summary: Mapping[str, Any], free: int) -> RenderableType:
    """A plan's figures, as `--dry-run` shows them; `free` is the disk space found, in bytes."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    tracked = summary["layers_as_tracks"]
    dense = [i for i in range(summary["layers"]) if i not in tracked]
    held = "; ".join(
        f"{len(layers)} {kind} ({ranges(layers)})"
        for kind, layers in (("dense", dense), (f"as {summary['tracks']} tracks", tracked))
        if layers
    )
    table.add_row("layers", held)
    for label, key in (("all-reduces", "all_reduces"), ("waited for", "waited_for")):
        table.add_row(label, f"{summary[key]['before']} before, {summary[key]['after']} after")
    for way in ("in", "out"):
        tensors, size = summary[f"tensors_{way}"], decimal(summary[f"bytes_{way}"])
        table.add_row(way, f"{tensors} tensors, {size}")
    for file, size in summary["files"].items():
        table.add_row("", f"{file}  {decimal(size)}")
    for row in COMPENSATIONS:
        if told := row.told(summary[row.key]):
            table.add_row(row.label, told)
    fits = "enough" if free >= summary["bytes_needed"] else "NOT ENOUGH"
    needed = decimal(summary["bytes_needed"])
    table.add_row("disk space", f"{needed} needed, {decimal(free)} free: {fits}")
    return table


def needs_table(console: Console, needs: Needs, free: Mapping[str, int]) -> None:
    """What a command holds in each of its phases and about how long these take, and whether there
    is room."""
    peaks = needs.peaks()
    table = figures_table("phase", "holds", *peaks, "takes about", text=2)
    for phase in needs.phases:
        for held in phase.held:
            first = held is phase.held[0]
            sizes = [decimal(held.nbytes) if needs.place(held) == p else "" for p in peaks]
            took = _duration(phase.seconds) if first else ""
            table.add_row(phase.name if first else "", held.what, *sizes, took)
    table.add_row("at once, at most", "", *map(decimal, peaks.values()), _duration(needs.seconds))
    there = [decimal(free[place]) if place in free else "" for place in peaks]
    table.add_row("free", "", *there, "")
    console.print(table)
    for note in needs.notes:
        console.print(note, style="dim")
    lacking = needs.lacking(free)
    if lacking:
        console.print(f"NOT ENOUGH on {', '.join(lacking)}", style="bold red")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def print_calibration(
    console: Console, computed: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """What was computed from the text, what it gains, and what it costs."""
    shares = computed["affinity_between_tracks"]
    if shares is not None:
        console.print(
            f"affinity between units of different tracks: {shares['before']:.1%} before, "
            f"{shares['after']:.1%} as assigned"
        )
    if computed["guesses"]:
        table = figures_table("guessed after", "rank", "error left", text=0)
        for row in computed["guesses"]:
            kept = row["rank"] > 0
            table.add_row(
                row["sublayer"],
                str(row["rank"]) if kept else "-",
                f"{row['error']:.0%}" if kept else "gains nothing",
            )
        console.print(table)
    print_compensations(console, figures)


def print_compensations(console: Console, figures: Mapping[str, Any], decided: bool = True) -> None:
    """What a model's compensations are and add to it; `decided` once a text has."""
    for row in COMPENSATIONS:
        if told := row.told(figures[row.key]):
            at_most = f", {row.yet}" if row.undecided and not decided else ""
            console.print(f"{row.label}{at_most}: {told}", soft_wrap=True)


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-3, 7, 9-11."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)


def fewer_ranks(tracks: int, tracked: Collection[int]) -> str | None:
    """What becomes of `tracks` on fewer ranks; None where no layer is held as tracks."""
    if not tracked or tracks == 1:
        return None
    parts = [f"For {tracks} ranks, a track each."]
    if fewer := [str(n) for n in range(2, tracks) if tracks % n == 0]:
        *others, last = fewer
        listed = f"{', '.join(others)} or {last}" if others else last
        parts.append(
            f"On {listed} a rank runs several tracks one after another, each with its own kernels, "
            "and tensor parallelism can be faster: take a spec of as many tracks."
        )
    return " ".join([*parts, "On one rank use the dense checkpoint, which needs no tracks."])


def print_unserved(console: Console, reasons: Mapping[str, Sequence[str]], tracks: int) -> None:
    """Why engines wouldn't serve a conversion with a rank for each track, by their names."""
    for engine, found in reasons.items():
        told = f"{engine} doesn't serve it on {tracks} ranks: {'; '.join(found)}"
        console.print(told, style="yellow", soft_wrap=True)


def print_schedule(
    console: Console, schedule: Schedule, dense: Schedule, tracks: int, shape: ModelShape | None
) -> None:
    """Diagram, counts beside the dense model's, and text form."""
    console.print(diagram(schedule, tracks, console.width))
    console.print()
    console.print(counts_table(schedule, dense, shape))
    console.print()
    console.print(Text(str(schedule)), style="dim", soft_wrap=False)
