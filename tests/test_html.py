"""The look of reports: escaping, well-formed markup, charts that are to scale."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from ptconvert.report import charts, html

EVIL = "<script>alert('&')</script>"


class Strict(HTMLParser):
    """Collects tags and text; fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[tuple[str, str, str | None]] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {(tag, *attribute) for attribute in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# all that parts.html has, and text where a report puts any
ALL_PARTS = """{% extends "page.html" %}{% import "parts.html" as parts %}{% block content %}
<h2>{{ evil }}</h2><p>{{ evil }}<code>{{ evil }}</code></p><pre>{{ evil }}</pre>
{{ parts.notes([evil]) }}{{ parts.facts([(evil, evil)]) }}
{{ parts.table([evil, "n"], [[evil, 1], [evil, 2]], code=[0], highlight=[1], caption=evil) }}
{% for chart in charts %}{{ chart }}{% endfor %}{% endblock %}"""


def test_all_text_is_escaped_everywhere() -> None:
    series = [charts.Series(EVIL, [(1, 1), (2, 2)]), charts.Series("b", [(1, 2), (2, 3)])]
    bars = [charts.Bar(0, 9, EVIL, EVIL)]
    drawn = [
        charts.line_chart(series, EVIL, EVIL, caption=EVIL),
        charts.interval_plot([charts.Interval(EVIL, 0, 1, 2)], EVIL, caption=EVIL),
        charts.lanes([charts.LaneGroup(EVIL, [charts.Lane(EVIL, bars)])], EVIL, caption=EVIL),
    ]
    parser = Strict()
    template = html.environment().from_string(ALL_PARTS)
    parser.feed(template.render(title=EVIL, subtitle=EVIL, evil=EVIL, charts=drawn))
    assert not parser.open and "script" not in parser.seen
    assert parser.text.count(EVIL) >= 20


@pytest.mark.parametrize("name", ['" onload="alert(1)', "x' y", "<b>"])
def test_no_name_leaves_its_attribute(name: str) -> None:
    drawn = charts.line_chart([charts.Series("s", [(1, 1), (2, 2)])], "x", "y", caption=name)
    parser = Strict()
    parser.feed(drawn)
    assert parser.attributes >= {("svg", "aria-label", name)}
    assert not any(attribute == "onload" for _, attribute, _ in parser.attributes)


def test_a_template_lacks_nothing() -> None:
    with pytest.raises(UndefinedError, match="subtitle"):
        html.render("page.html", title="a")


def test_a_page_stands_alone() -> None:
    text = html.render("page.html", title="a", subtitle="b")
    assert "http" not in text and "src=" not in text and "@media print" in text


def test_lanes_are_to_scale() -> None:
    bars = [charts.Bar(0, 10, "x"), charts.Bar(20, 50, "x"), charts.Bar(50, 100, "y")]
    drawn = charts.lanes([charts.LaneGroup("g", [charts.Lane("l", bars)])], "us")
    found = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="22"', drawn)
    (x0, w0), (x1, w1), (x2, w2) = [(float(x), float(w)) for x, w in found]
    assert w1 == pytest.approx(3 * w0, abs=0.05) and w2 == pytest.approx(5 * w0, abs=0.05)
    assert x1 - x0 == pytest.approx(2 * w0, abs=0.05) and x2 == pytest.approx(x1 + w1, abs=0.05)


@pytest.mark.parametrize("log_x", [False, True])
def test_a_line_passes_through_its_points(log_x: bool) -> None:
    drawn = charts.line_chart(
        [charts.Series("s", [(1, 1), (10, 2), (100, 3)], [(0.5, 1.5), (1, 3), (2, 4)])],
        "x",
        "y",
        log_x=log_x,
        reference=1.0,
    )
    line = re.search(r'<polyline points="([^"]*)"', drawn)
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line[1].split()]
    steps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    ratio = 1 if log_x else 10
    assert steps[1] == pytest.approx(ratio * steps[0], rel=0.02)
    rises = [a[1] - b[1] for a, b in itertools.pairwise(points)]
    assert rises[0] == pytest.approx(rises[1], abs=0.2) and rises[0] > 0
    assert drawn.count('class="error"') == 3 and 'class="reference"' in drawn


@pytest.mark.parametrize("log_y", [False, True])
def test_a_logarithmic_y_spaces_decades_evenly_within_the_axes(log_y: bool) -> None:
    points = [(float(x), 0.001 * 10 ** (x / 6)) for x in range(1, 25)]
    drawn = charts.line_chart([charts.Series("s", points)], "x", "y", log_y=log_y)
    line = re.search(r'<polyline points="([^"]*)"', drawn)
    assert line is not None
    ys = [float(p.split(",")[1]) for p in line[1].split()]
    assert (ys[0] - ys[6] == pytest.approx(ys[12] - ys[18], abs=0.3)) == log_y
    ticks = [float(x) for x in re.findall(r'<text x="([0-9.]+)"[^>]*middle" class="tick"', drawn)]
    assert ticks and all(64 < x < charts.WIDTH - 16 for x in ticks)  # none beside the chart


def test_ticks_are_round_and_enclose() -> None:
    for low, high in ((0, 1), (0.97, 1.31), (-7, 2), (3, 3), (0, 48211)):
        ticks = charts._ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
