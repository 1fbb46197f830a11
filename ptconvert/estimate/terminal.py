"""What the terminal shows of estimates."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptconvert.estimate.compare import Row, Setting, accuracy
from ptconvert.estimate.report import HEADER, cells, notes, served_by


def print_estimates(console: Console, rows: Sequence[Row], setting: Setting) -> None:
    """Estimates of schedules against tensor parallelism's."""
    workload = setting.workload
    title = (
        f"{setting.hardware.name}, {served_by(setting)}, {setting.ranks} ranks, batch "
        f"{workload.batch}, {workload.prompt} + {workload.new} tokens"
    )
    table = Table(
        box=None,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
    )
    for name in HEADER:
        left = name == HEADER[0]
        heading = name.replace("-", "-\n").replace(" ", "\n").replace("muni", "muni-\n")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table)
    for note in notes(rows, setting):
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(Text(f"estimated; {accuracy(setting)}", style="dim"))
