"""Charts of HTML reports: inline SVG, each a pure function.

Series are told apart by marker and dash as well as by colour, so that they survive grey printing;
the colours are Okabe and Ito's, made for all kinds of colour vision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ptconvert.report.html import render

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444", "#e69f00")
WIDTH = 760  # of every chart, in its own units; the page scales it to the column
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
_Scale = Callable[[float], float]


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
) -> Markup:
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
    left, right, top, bottom = 64.0, WIDTH - 16.0, 12.0, height - 44.0
    to_x = _scale(xs[0], xs[-1], left + 8, right - 8, log_x)
    to_y = _scale(low, high, bottom, top, log_y)
    parts = [_line(left, to_y(t), right, to_y(t), "grid") for t in y_ticks]
    parts += [_text(left - 8, to_y(t) + 4, _number(t), "end") for t in y_ticks]
    parts += [_line(to_x(t), bottom, to_x(t), bottom + 5, "axis") for t in x_ticks]
    parts += [_text(to_x(t), bottom + 18, _number(t), "middle") for t in x_ticks]
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_text((left + right) / 2, height - 6, x_label, "middle", "label"))
    middle = (top + bottom) / 2
    turn = f"rotate(-90 14 {middle:.1f})"
    parts.append(_text(14, middle, y_label, "middle", "label", transform=turn))
    if reference is not None:
        parts.append(_line(left, to_y(reference), right, to_y(reference), "reference"))
    for index, one in enumerate(series):
        for (x, _), (low, high) in zip(one.points, one.bounds, strict=False):
            bar = _line(to_x(x), to_y(low), to_x(x), to_y(high), "error")
            parts.append(element("g", bar, stroke=_colour(index)))
        parts += _stroke([(to_x(x), to_y(y)) for x, y in one.points], index)
    names = [(_swatch(i), s.name) for i, s in enumerate(series)]
    return figure(
        parts, height, names if len(series) > 1 else [], caption, label=caption or y_label
    )


def interval_plot(
    rows: Sequence[Interval],
    x_label: str,
    *,
    reference: float | None = None,
    caption: str = "",
    digits: int = 3,
) -> Markup:
    """Estimates with their intervals as horizontal bars, one below the other, values at the right.

    `reference` draws a vertical line, such as "no difference". `digits` are significant ones.
    """
    values = [v for r in rows for v in (r.low, r.high)]
    values += [reference] if reference is not None else []
    ticks = _ticks(min(values), max(values))
    left, right, height = 200.0, WIDTH - 190.0, 26 * len(rows) + 52
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
        dot = element("circle", cx=to_x(row.value), cy=y, r=4.5)
        parts.append(element("g", bar + dot, stroke=_colour(0), fill=_colour(0)))
        value, low, high = (f"{v:.{digits}g}" for v in (row.value, row.low, row.high))
        parts.append(_text(right + 16, y + 4, f"{value}  ({low} to {high})", "start", "name"))
    return figure(parts, height, [], caption, label=caption or x_label)


def lanes(groups: Sequence[LaneGroup], x_label: str, *, caption: str = "") -> Markup:
    """Timelines drawn to scale: all groups share one time axis that begins at 0.

    Kinds get their colours in the order in which they come first. A bar's label is drawn where it
    fits; its times are in its tooltip.
    """
    bars = [b for g in groups for lane in g.lanes for b in lane.bars]
    kinds = list(dict.fromkeys(b.kind for b in bars))
    ticks = _ticks(0.0, max(b.end for b in bars))
    left, right = 108.0, WIDTH - 16.0
    to_x = _scale(ticks[0], ticks[-1], left, right)
    parts: list[Markup] = []
    y = 0.0
    for group in groups:
        parts.append(_text(0, y + 16, group.title, "start", "group"))
        y += 24
        for lane in group.lanes:
            parts.append(_text(left - 10, y + 16, lane.label, "end"))
            parts.append(_line(left, y + 22, right, y + 22, "grid"))
            for bar in lane.bars:
                parts += _bar(bar, to_x, y, kinds.index(bar.kind))
            y += 27
        y += 10
    parts += [_line(to_x(t), y, to_x(t), y + 5, "axis") for t in ticks]
    parts += [_text(to_x(t), y + 18, _number(t), "middle") for t in ticks]
    parts.append(_line(left, y, right, y, "axis"))
    parts.append(_text((left + right) / 2, y + 38, x_label, "middle", "label"))
    square = {"width": 14, "height": 14}
    names = [
        (element("svg", element("rect", **square, rx=2, fill=_colour(i)), **square), kind)
        for i, kind in enumerate(kinds)
    ]
    return figure(parts, int(y + 46), names, caption, label=caption or x_label)


def figure(
    parts: Sequence[Markup],
    height: int,
    legend: Sequence[tuple[Markup, str]],
    caption: str,
    *,
    label: str,
    width: int = WIDTH,
    legend_below: bool = False,
) -> Markup:
    """SVG elements as a figure. A legend's entries are a swatch, itself SVG, and what it means;
    `label` is what the figure shows, for who can't see it."""
    return render(
        "figure.html",
        parts=parts,
        width=width,
        height=height,
        legend=legend,
        legend_below=legend_below,
        caption=caption,
        label=label,
    )


def element(tag: str, content: str = "", /, **attributes: str | float) -> Markup:
    """One SVG element. `class_` and `text_anchor` are the attributes class and text-anchor."""
    shown = {
        name.rstrip("_").replace("_", "-"): f"{v:.2f}" if isinstance(v, float) else v
        for name, v in attributes.items()
    }
    written = Markup().join(Markup(' {}="{}"').format(*item) for item in shown.items())
    return Markup("<{}{}>{}</{}>").format(tag, written, content, tag)


def _bar(bar: Bar, to_x: _Scale, y: float, kind: int) -> Iterator[Markup]:
    x, width = to_x(bar.start), to_x(bar.end) - to_x(bar.start)
    tip = f"{bar.label} {bar.kind}: {_number(bar.start)} to {_number(bar.end)}".strip()
    shape = {"x": x, "y": y, "width": max(width, 0.4), "height": 22}
    yield element("rect", element("title", tip), **shape, fill=_colour(kind))
    if bar.label and width > 7.5 * len(bar.label) + 4:
        yield _text(x + width / 2, y + 15, bar.label, "middle", "in-bar")


def _stroke(points: Sequence[tuple[float, float]], index: int) -> Iterator[Markup]:
    """A series' line and markers, in the style of its index."""
    yield element("polyline", points=_path(points), **_style(index))
    yield from (_marker(x, y, index) for x, y in points)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _style(index: int) -> dict[str, str]:
    dash = _DASHES[index % len(_DASHES)]
    return {"class_": "series", "stroke": _colour(index), "stroke_dasharray": dash}


def _marker(x: float, y: float, index: int) -> Markup:
    shape, fill = index % 4, _colour(index)
    if shape == 0:
        return element("circle", cx=x, cy=y, r=3.6, fill=fill)
    if shape == 1:
        return element("rect", x=x - 3.3, y=y - 3.3, width=6.6, height=6.6, fill=fill)
    tip = -4.6 if shape == 2 else 4.6
    corners = [(x, y + tip), (x - 4.2, y - tip * 0.7), (x + 4.2, y - tip * 0.7)]
    return element("polygon", points=_path(corners), fill=fill)


def _swatch(index: int) -> Markup:
    line = element("polyline", points="1,7 29,7", **_style(index))
    return element("svg", line + _marker(15, 7, index), width=30, height=14)


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


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)


def _text(x: float, y: float, content: str, anchor: str, css: str = "tick", **more: str) -> Markup:
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=css, **more)
