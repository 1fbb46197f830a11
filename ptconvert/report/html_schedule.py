"""A schedule drawn for HTML pages: layers as columns, what follows each sublayer as a cell."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from ptconvert.report.charts import WIDTH, element, figure
from ptconvert.report.terminal import endings, rows_of
from ptconvert.schedule.endings import MARKS
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

_PER_ROW = 32
_CELL, _LEFT, _TOP, _BELOW = 21, 84, 16, 16  # of a row of layers: above its cells, and below


def schedule_diagram(schedule: Schedule, tracks: int, before: int) -> Markup:
    """The schedule as an inline SVG with a legend and its counts in the caption; the dense model
    does `before` all-reduces."""
    cells = endings(schedule)
    columns = min(schedule.layers, _PER_ROW)
    rows = [range(i, min(i + columns, schedule.layers)) for i in range(0, schedule.layers, columns)]
    tracked = schedule.track_layers if tracks > 1 else frozenset()
    kinds = rows_of(schedule)
    each = _TOP + len(kinds) * _CELL + _BELOW
    parts = [
        part for n, row in enumerate(rows) for part in _row(row, n * each, kinds, cells, tracked)
    ]
    width, height = max(_LEFT + columns * _CELL, WIDTH), len(rows) * each
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
    layers: range,
    top: int,
    kinds: dict[Kind, str],
    cells: dict[Sublayer, str],
    tracked: frozenset[int],
) -> Iterator[Markup]:
    yield element("text", "layer", x=0, y=top + 12, class_="label")
    for number, label in enumerate(kinds.values()):
        y = top + _TOP + number * _CELL + 14
        yield element("text", label, x=0, y=y, class_="label")
    for place, layer in enumerate(layers):
        x = _LEFT + place * _CELL
        yield element("text", str(layer), x=x + _CELL / 2 - 0.5, y=top + 12, text_anchor="middle")
        for number, kind in enumerate(kinds):
            if (text := cells.get(Sublayer(layer, kind))) is not None:
                yield _cell(x, top + _TOP + number * _CELL, text)
        if layer in tracked:
            below = top + _TOP + len(kinds) * _CELL + 2
            yield element("rect", x=x, y=below, width=_CELL, height=3, fill="#009e73")


def _cell(x: float, y: float, text: str, size: int = _CELL - 2) -> Markup:
    mark = MARKS[text[0]]
    style = f"fill:{mark.ink};font-size:11px"
    x_middle, base = x + size / 2, y + size / 2 + 4
    square = element("rect", x=x, y=y, width=size, height=size, rx=2, fill=mark.fill)
    return square + element("text", text, x=x_middle, y=base, text_anchor="middle", style=style)
