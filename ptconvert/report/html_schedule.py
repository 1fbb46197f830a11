"""A schedule drawn for HTML pages: layers as columns, what follows each sublayer as a cell."""

from __future__ import annotations

from collections.abc import Iterator

from ptconvert.report.html import Html, markup
from ptconvert.report.terminal import endings
from ptconvert.schedule.endings import MARKS
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

_PER_ROW = 32
_CELL, _LEFT, _ROW = 21, 84, 74


def schedule_diagram(schedule: Schedule, tracks: int) -> Html:
    """The schedule as an inline SVG with a legend and its counts in the caption."""
    cells = endings(schedule)
    columns = min(schedule.layers, _PER_ROW)
    rows = [range(i, min(i + columns, schedule.layers)) for i in range(0, schedule.layers, columns)]
    tracked = schedule.track_layers if tracks > 1 else frozenset()
    parts = [part for n, row in enumerate(rows) for part in _row(row, n * _ROW, cells, tracked)]
    width, height = max(_LEFT + columns * _CELL, 760), len(rows) * _ROW
    used = {cell[0] for cell in cells.values()}
    keys = [
        f'<span class="key"><svg width="16" height="16">{_cell(0, 0, symbol, 15)}</svg>'
        f"<span>{markup(mark.words)}</span></span>"
        for symbol, mark in MARKS.items()
        if symbol in used
    ]
    counts = schedule.counts
    caption = (
        f"{counts.all_reduces} all-reduces per forward pass, {counts.waited_for} of them waited "
        f"for; the dense model does {2 * schedule.layers} and waits for each."
    )
    if tracked:
        caption += f" The line below marks the layers in which the {tracks} tracks differ."
    return Html(
        f'<figure><svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{markup(str(schedule))}">{"".join(parts)}</svg>'
        f'<div class="legend">{"".join(keys)}</div><figcaption>{markup(caption)}</figcaption>'
        "</figure>"
    )


def _row(
    layers: range, top: int, cells: dict[Sublayer, str], tracked: frozenset[int]
) -> Iterator[str]:
    for label, y in (("layer", 12), ("attention", 30), ("MLP", 51)):
        yield f'<text x="0" y="{top + y}" class="label">{label}</text>'
    for place, layer in enumerate(layers):
        x = _LEFT + place * _CELL
        yield f'<text x="{x + _CELL / 2 - 0.5}" y="{top + 12}" text-anchor="middle">{layer}</text>'
        yield _cell(x, top + 16, cells[Sublayer(layer, Kind.ATTENTION)])
        yield _cell(x, top + 37, cells[Sublayer(layer, Kind.MLP)])
        if layer in tracked:
            yield f'<rect x="{x}" y="{top + 60}" width="{_CELL}" height="3" fill="#009e73"/>'


def _cell(x: float, y: float, text: str, size: int = _CELL - 2) -> str:
    mark = MARKS[text[0]]
    return (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="2" fill="{mark.fill}"/>'
        f'<text x="{x + size / 2}" y="{y + size / 2 + 4}" text-anchor="middle" '
        f'style="fill:{mark.ink};font-size:11px">{markup(text)}</text>'
    )
