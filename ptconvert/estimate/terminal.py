"""What the terminal shows of estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptconvert.estimate.advice import Advice, verdict
from ptconvert.estimate.compare import Row, Setting, accuracy
from ptconvert.estimate.report import drafted, left_out, notes, served_by, ways_table
from ptconvert.estimate.server import Served
from ptconvert.estimate.sources import origins
from ptconvert.report.terminal import figures_table

if TYPE_CHECKING:  # with torch, which an estimate does without
    from ptconvert.estimate.measure import Measured, Sample

_LINES = {
    "all-reduces": "all-\nre-\nduces",
    "communication": "com-\nmuni-\ncation",
    "speed-up": "speed-\nup",
    "/s": "\n/s",
    **{f" {word}": f"\n{word}" for word in ("for", "ms", "at once")},
}


def print_estimates(
    console: Console,
    rows: Sequence[Row],
    advice: Advice,
    setting: Setting,
    served: Served | None = None,
) -> None:
    """Estimates of schedules against tensor parallelism's and the alternatives', and a verdict."""
    workload, ranks = setting.workload, setting.ranks
    drafts = drafted(workload)
    title = (
        f"{setting.hardware.name}, {served_by(setting)}, {ranks} "
        f"{'rank' if ranks == 1 else 'ranks'}, batch {workload.batch}, {workload.prompt} + "
        f"{workload.new} tokens"
        f"{f', drafted {drafts}' if drafts else ''}"
    )
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(_table(*ways_table(rows, advice)))
    if served and served.fits:
        console.print(Text(served.title, style="italic"), soft_wrap=True)
        console.print(_table(served.header, served.body))
    saturated = served.notes if served else []
    for note in (*notes(rows, setting), *left_out(advice, setting), *saturated):
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(Text(f"estimated; {accuracy(setting)}", style="dim"))
    console.print(Text(origins(setting.hardware, setting.hardware.sources), style="dim"))
    console.print(Text(verdict(advice), style="bold"))
    if served and served.verdict:
        console.print(Text(served.verdict, style="bold"))


def print_measured(console: Console, found: Measured) -> None:
    """All-reduces by size, in us: each way's, and what the fit of the process group's own is off
    by."""
    if found.samples:
        columns = list(dict.fromkeys((s.way, s.ranks) for s in found.samples))
        cells = {(s.way, s.ranks, s.nbytes): _sample(s) for s in found.samples}
        sizes = sorted({sample.nbytes for sample in found.samples})
        names = [f"{way},\n{ranks} ranks" for way, ranks in columns]
        table = figures_table("all-reduce\nof", *names, title="us (fitted)")
        for nbytes in sizes:
            line = [cells.get((*column, nbytes), "-") for column in columns]
            table.add_row(f"{nbytes / 2**10:,.0f} KiB", *line)
        console.print(table)
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _sample(sample: Sample) -> str:
    said = "" if sample.said is None else f" ({sample.said / sample.seconds - 1:+.0%})"
    return f"{sample.seconds * 1e6:,.0f}{said}"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for name in header:
        left = name == header[0]
        table.add_column(_broken(name), justify="left" if left else "right", overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def _broken(heading: str) -> str:
    """A column's heading on lines as short as its numbers."""
    for word, lines in _LINES.items():
        heading = heading.replace(word, lines)
    return heading
