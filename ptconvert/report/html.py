"""The look that all HTML reports share: pages, tables and charts, each a pure function.

A report is one file without scripts or external resources; it reads the same on screen, on paper
and by mail. Plain `str` is text and is escaped wherever it is put; `Html` is markup and is not.

    page(title, subtitle, [section(heading, paragraph(...), table(...), line_chart(...)), ...])

Charts are inline SVG. Series are told apart by marker and dash as well as by colour, so that they
survive grey printing; the colours are Okabe and Ito's, made for all kinds of colour vision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444", "#e69f00")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
_Scale = Callable[[float], float]
_WIDTH = 760  # of every chart, in its own units; the page scales it to the column


class Html(str):
    """Markup, as opposed to text, which is escaped."""

    __slots__ = ()


def markup(content: object) -> str:
    """`Html` as it is, anything else as escaped text."""
    return content if isinstance(content, Html) else escape(str(content))


# Pages


def page(title: str, subtitle: str, sections: Iterable[Html]) -> str:
    """A whole document: what it is about, one line about how it came to be, and its sections."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{markup(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{markup(title)}</h1>\n<p class="subtitle">{markup(subtitle)}</p></header>\n'
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *blocks: Html) -> Html:
    """A heading and the blocks under it."""
    return Html(f"<section>\n<h2>{markup(heading)}</h2>\n" + "\n".join(blocks) + "\n</section>")


def paragraph(*content: str) -> Html:
    """A paragraph of text and inline markup."""
    return Html(f"<p>{''.join(map(markup, content))}</p>")


def note(*content: str) -> Html:
    """A remark that should not be overlooked, such as a limit of validity."""
    return Html(f'<p class="note">{"".join(map(markup, content))}</p>')


def code(content: str) -> Html:
    """Inline code: a schedule, a command, a file name."""
    return Html(f"<code>{markup(content)}</code>")


def block(content: str) -> Html:
    """Preformatted text on lines of its own; long lines wrap."""
    return Html(f"<pre>{markup(content)}</pre>")


def bullets(items: Iterable[str]) -> Html:
    """A list of short statements."""
    return Html("<ul>" + "".join(f"<li>{markup(i)}</li>" for i in items) + "</ul>")


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Labels and values side by side: the settings of a run, or its headline figures."""
    cells = "".join(
        f"<div><dt>{markup(label)}</dt><dd>{markup(value)}</dd></div>" for label, value in pairs
    )
    return Html(f'<dl class="facts">{cells}</dl>')


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    text_columns: Sequence[int] = (0,),
    highlight: Sequence[int] = (),
    caption: str = "",
) -> Html:
    """A table; numbers are set right in figures of equal width, `text_columns` left.

    Cells are text or `Html`; the caller formats numbers. `highlight` are row indices to stress.
    """
    kinds = ["text" if i in text_columns else "number" for i in range(len(header))]

    def row(tag: str, cells: Sequence[object], css: str = "") -> str:
        written = (f'<{tag} class="{k}">{markup(c)}</{tag}>' for k, c in zip(kinds, cells))  # noqa: B905
        return f"<tr{css}>{''.join(written)}</tr>"

    body = [
        row("td", cells, ' class="highlight"' if i in highlight else "")
        for i, cells in enumerate(rows)
    ]
    title = f"<caption>{markup(caption)}</caption>" if caption else ""
    head = f"<thead>{row('th', header)}</thead>"
    return Html(
        f'<div class="scroll"><table>{title}{head}<tbody>{"".join(body)}</tbody></table></div>'
    )


# Charts


@dataclass(frozen=True)
class Series:
    """One line of a chart: points in order of x; `bounds` are (low, high) of each y, if known."""

    name: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Interval:
    """One row of an interval plot: an estimate with the interval that it lies in."""

    label: str
    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Bar:
    """What runs in a lane from `start` to `end`; `kind` chooses colour and legend entry."""

    start: float
    end: float
    kind: str
    label: str = ""


@dataclass(frozen=True)
class Lane:
    """A resource that does one thing at a time, such as compute or the link."""

    label: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class LaneGroup:
    """Lanes that belong together, under one title, on the time axis that all groups share."""

    title: str
    lanes: Sequence[Lane] = field(default=())


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    height: int = 300,
    caption: str = "",
    reference: float | None = None,
    from_zero: bool = False,
) -> Html:
    """Lines over a common x, with markers, error bars where bounds are given, and a legend.

    `log_x` needs x > 0, `log_y` y and bounds > 0. Where there are at most 9 different x, they are
    the ticks. `reference` draws a horizontal line, such as speed-up 1.
    """
    xs = sorted({x for s in series for x, _ in s.points})
    ys = [y for s in series for _, y in s.points] + [y for s in series for b in s.bounds for y in b]
    ys += [reference] if reference is not None else []
    low, high = min(0.0, *ys) if from_zero else min(ys), max(ys)
    y_ticks = _log_ticks(low, high) if log_y else _ticks(low, high)
    if not log_y:
        low, high = y_ticks[0], y_ticks[-1]
    x_ticks = xs if len(xs) <= 9 else _log_ticks(xs[0], xs[-1]) if log_x else _ticks(xs[0], xs[-1])
    x_ticks = [t for t in x_ticks if xs[0] <= t <= xs[-1]]
    left, right, top, bottom = 64.0, _WIDTH - 16.0, 12.0, height - 44.0
    to_x = _scale(xs[0], xs[-1], left + 8, right - 8, log_x)
    to_y = _scale(low, high, bottom, top, log_y)
    parts = [_line(left, to_y(t), right, to_y(t), "grid") for t in y_ticks]
    parts += [_text(left - 8, to_y(t) + 4, _number(t), "end") for t in y_ticks]
    parts += [_line(to_x(t), bottom, to_x(t), bottom + 5, "axis") for t in x_ticks]
    parts += [_text(to_x(t), bottom + 18, _number(t), "middle") for t in x_ticks]
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_text((left + right) / 2, height - 6, x_label, "middle", "label"))
    middle = (top + bottom) / 2
    turn = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(_text(14, middle, y_label, "middle", "label", turn))
    if reference is not None:
        parts.append(_line(left, to_y(reference), right, to_y(reference), "reference"))
    for index, one in enumerate(series):
        for (x, _), (low, high) in zip(one.points, one.bounds, strict=False):
            bar = _line(to_x(x), to_y(low), to_x(x), to_y(high), "error")
            parts.append(f'<g stroke="{COLOURS[index % len(COLOURS)]}">{bar}</g>')
        parts.append(_stroke([(to_x(x), to_y(y)) for x, y in one.points], index))
    names = [_swatch(i) + f"<span>{markup(s.name)}</span>" for i, s in enumerate(series)]
    return _figure(parts, height, names if len(series) > 1 else [], caption, y_label)


def interval_plot(
    rows: Sequence[Interval],
    x_label: str,
    *,
    reference: float | None = None,
    caption: str = "",
    digits: int = 3,
) -> Html:
    """Estimates with their intervals as horizontal bars, one below the other, values at the right.

    `reference` draws a vertical line, such as "no difference". `digits` are significant ones.
    """
    values = [v for r in rows for v in (r.low, r.high)]
    values += [reference] if reference is not None else []
    ticks = _ticks(min(values), max(values))
    left, right, height = 200.0, _WIDTH - 190.0, 26 * len(rows) + 52
    bottom = height - 40.0
    to_x = _scale(ticks[0], ticks[-1], left, right)
    parts = [_line(to_x(t), 4, to_x(t), bottom, "grid") for t in ticks]
    parts += [_text(to_x(t), bottom + 16, _number(t), "middle") for t in ticks]
    parts.append(_text((left + right) / 2, height - 4, x_label, "middle", "label"))
    if reference is not None:
        parts.append(_line(to_x(reference), 4, to_x(reference), bottom, "reference"))
    for index, row in enumerate(rows):
        y = 20 + 26 * index
        parts.append(_text(left - 12, y + 4, row.label, "end", "name"))
        bar = _line(to_x(row.low), y, to_x(row.high), y, "interval")
        dot = f'<circle cx="{to_x(row.value):.1f}" cy="{y}" r="4.5"/>'
        parts.append(f'<g stroke="{COLOURS[0]}" fill="{COLOURS[0]}">{bar}{dot}</g>')
        value, low, high = (f"{v:.{digits}g}" for v in (row.value, row.low, row.high))
        parts.append(_text(right + 16, y + 4, f"{value}  ({low} to {high})", "start", "name"))
    return _figure(parts, height, [], caption, x_label)


def lanes(groups: Sequence[LaneGroup], x_label: str, *, caption: str = "") -> Html:
    """Timelines drawn to scale: all groups share one time axis that begins at 0.

    Kinds get their colours in the order in which they come first. A bar's label is drawn where it
    fits; its times are in its tooltip.
    """
    bars = [b for g in groups for lane in g.lanes for b in lane.bars]
    kinds = list(dict.fromkeys(b.kind for b in bars))
    ticks = _ticks(0.0, max(b.end for b in bars))
    left, right = 108.0, _WIDTH - 16.0
    to_x = _scale(ticks[0], ticks[-1], left, right)
    parts: list[str] = []
    y = 0.0
    for group in groups:
        parts.append(_text(0, y + 16, group.title, "start", "group"))
        y += 24
        for lane in group.lanes:
            parts.append(_text(left - 10, y + 16, lane.label, "end"))
            parts.append(_line(left, y + 22, right, y + 22, "grid"))
            parts += [_bar(b, to_x, y, kinds.index(b.kind)) for b in lane.bars]
            y += 27
        y += 10
    parts += [_line(to_x(t), y, to_x(t), y + 5, "axis") for t in ticks]
    parts += [_text(to_x(t), y + 18, _number(t), "middle") for t in ticks]
    parts.append(_line(left, y, right, y, "axis"))
    parts.append(_text((left + right) / 2, y + 38, x_label, "middle", "label"))
    names = [
        '<svg width="14" height="14"><rect width="14" height="14" rx="2" '
        f'fill="{COLOURS[i % len(COLOURS)]}"/></svg><span>{markup(kind)}</span>'
        for i, kind in enumerate(kinds)
    ]
    return _figure(parts, int(y + 46), names, caption, x_label)


def _figure(parts: list[str], height: int, legend: list[str], caption: str, what: str) -> Html:
    keys = "".join(f'<span class="key">{entry}</span>' for entry in legend)
    keys = f'<div class="legend">{keys}</div>' if keys else ""
    text = f"<figcaption>{markup(caption)}</figcaption>" if caption else ""
    svg = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
    svg += f'aria-label="{escape(caption or what)}">{"".join(parts)}</svg>'
    return Html(f"<figure>{keys}{svg}{text}</figure>")


def _bar(bar: Bar, to_x: _Scale, y: float, kind: int) -> str:
    x, width = to_x(bar.start), to_x(bar.end) - to_x(bar.start)
    tip = f"{bar.label} {bar.kind}: {_number(bar.start)} to {_number(bar.end)}".strip()
    drawn = f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.4):.2f}" height="22" '
    drawn += f'fill="{COLOURS[kind % len(COLOURS)]}"><title>{markup(tip)}</title></rect>'
    if bar.label and width > 7.5 * len(bar.label) + 4:
        drawn += _text(x + width / 2, y + 15, bar.label, "middle", "in-bar")
    return drawn


def _stroke(points: Sequence[tuple[float, float]], index: int) -> str:
    """A series' line and markers, in the style of its index."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(_marker(x, y, index) for x, y in points)
    return f'<polyline points="{path}" {_style(index)}/>{marks}'


def _style(index: int) -> str:
    colour, dash = COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]
    return f'class="series" stroke="{colour}" stroke-dasharray="{dash}"'


def _marker(x: float, y: float, index: int) -> str:
    shape, fill = index % 4, f'fill="{COLOURS[index % len(COLOURS)]}"'
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" {fill}/>'
    if shape == 1:
        return f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6" {fill}/>'
    tip = -4.6 if shape == 2 else 4.6
    corners = f"{x:.1f},{y + tip:.1f} {x - 4.2:.1f},{y - tip * 0.7:.1f}"
    return f'<polygon points="{corners} {x + 4.2:.1f},{y - tip * 0.7:.1f}" {fill}/>'


def _swatch(index: int) -> str:
    line = f'<polyline points="1,7 29,7" {_style(index)}/>'
    return f'<svg width="30" height="14">{line}{_marker(15, 7, index)}</svg>'


def _scale(low: float, high: float, a: float, b: float, log: bool = False) -> _Scale:
    """Maps values from [low, high] to positions from a to b, linearly or by logarithm."""
    of = math.log if log else float
    span = of(high) - of(low)
    return lambda value: a + (b - a) * (of(value) - of(low)) / (span or 1.0)


def _ticks(low: float, high: float) -> list[float]:
    """About six round values that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 5 >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers alone over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [f * 10.0**d for d, f in itertools.product(decades, factors)]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


def _number(value: float) -> str:
    return f"{round(value, 9):,.6g}"


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _text(x: float, y: float, content: str, anchor: str, css: str = "tick", more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}" {more}>'
        f"{markup(content)}</text>"
    )


_CSS = """
:root { color-scheme: light; --ink: #1c2126; --dim: #5b6570; --rule: #d9dee3; --tint: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 48px 28px 64px; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 14px; margin-bottom: 8px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 40px 0 10px; }
p, ul { max-width: 46em; margin: 8px 0 12px; }
.subtitle { color: var(--dim); margin: 0; }
.note { border-left: 3px solid #d55e00; background: var(--tint); padding: 8px 14px; }
code, pre { font: 0.875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--tint); padding: 10px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 16px 0; }
.facts dt { color: var(--dim); font-size: 0.8rem; }
.facts dd { margin: 0; font-size: 1.05rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 14px 0 18px; }
table { border-collapse: collapse; font-size: 0.9rem; width: 100%;
  font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; color: var(--dim); padding-bottom: 6px; }
th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom;
  line-height: 1.25; }
th, td { padding: 6px 10px; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td { border-bottom: 1px solid var(--rule); vertical-align: top; }
.text { text-align: left; }
.number { text-align: right; }
td.number { white-space: nowrap; }
.highlight td { background: var(--tint); font-weight: 600; }
figure { margin: 16px 0 22px; }
figcaption { color: var(--dim); font-size: 0.875rem; max-width: 52em; margin-top: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 0.85rem; margin-bottom: 6px; }
.key { display: inline-flex; align-items: center; gap: 7px; }
.chart { width: 100%; height: auto; display: block; overflow: visible; }
.chart text { font-size: 12px; fill: var(--dim); font-variant-numeric: tabular-nums; }
.chart .label, .chart .name { fill: var(--ink); font-size: 12.5px; }
.chart .group { fill: var(--ink); font-size: 13.5px; font-weight: 600; }
.chart .in-bar { fill: #fff; font-size: 11.5px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); }
.reference { stroke: var(--ink); stroke-dasharray: 3 3; }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.error { stroke-width: 1.5; } .interval { stroke-width: 3; stroke-linecap: round; }
@media print {
  @page { margin: 16mm; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } figure, tr, .facts, .note { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
