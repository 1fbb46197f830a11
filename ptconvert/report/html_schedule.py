"""A schedule drawn for HTML pages: layers as columns, what follows each sublayer as a cell."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from ptconvert.report.charts import WIDTH, element, figure
from ptconvert.report.terminal import endings
from ptconvert.schedule.endings import MARKS
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

_PER_ROW = 32
_CELL, _LEFT, _ROW = 21, 84, 74


def schedule_diagram(schedule: Schedule, tracks: int, before: int) -> Markup:
    """The schedule as an inline SVG with a legend and its counts in the caption; the dense model
    does `before` all-reduces."""
    cells = endings(schedule)
    columns = min(schedule.layers, _PER_ROW)
    rows = [range(i, min(i + columns, schedule.layers)) for i in range(0, schedule.layers, columns)]
    tracked = schedule.track_layers if tracks > 1 else frozenset()
    parts = [part for n, row in enumerate(rows) for part in _row(row, n * _ROW, cells, tracked)]
    width, height = max(_LEFT + columns * _CELL, WIDTH), len(rows) * _ROW
    used = {cell[0] for cell in cells.values()}
    keys = [
        (element("svg", _cell(0, 0, symbol, 15), width=16, height=16), mark.words)
        for symbol, mark in MARKS.items()
        if symbol in used
    ]
    counts = schedule.counts
    caption = (
        f"{counts.all_reduces} all-reduces per forward pass, {counts.waited_for} of them waited "
        f"for; the dense model does {before} and waits for each."
    )
    if tracked:
        caption += f" The line below marks the layers in which the {tracks} tracks differ."
    return figure(parts, height, keys, caption, label=str(schedule), width=width, legend_below=True)


def _row(
    layers: range, top: int, cells: dict[Sublayer, str], tracked: frozenset[int]
) -> Iterator[Markup]:
    for label, y in (("layer", 12), ("attention", 30), ("MLP", 51)):
        yield element("text", label, x=0, y=top + y, class_="label")
    for place, layer in enumerate(layers):
        x = _LEFT + place * _CELL
        yield element("text", str(layer), x=x + _CELL / 2 - 0.5, y=top + 12, text_anchor="middle")
        yield _cell(x, top + 16, cells[Sublayer(layer, Kind.ATTENTION)])
        yield _cell(x, top + 37, cells[Sublayer(layer, Kind.MLP)])
        if layer in tracked:
            yield element("rect", x=x, y=top + 60, width=_CELL, height=3, fill="#009e73")


def _cell(x: float, y: float, text: str, size: int = _CELL - 2) -> Markup:
    mark = MARKS[text[0]]
    style = f"fill:{mark.ink};font-size:11px"
    x_middle, base = x + size / 2, y + size / 2 + 4
    square = element("rect", x=x, y=y, width=size, height=size, rx=2, fill=mark.fill)
    return square + element("text", text, x=x_middle, y=base, text_anchor="middle", style=style)
