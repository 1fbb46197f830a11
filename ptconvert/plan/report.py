"""A plan for people and machines: the spec's comments, the table, CSV, JSON, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from ptconvert import __version__
from ptconvert.measure.statistics import RESAMPLES, Estimate, estimate, mean_over
from ptconvert.models.shape import ModelShape
from ptconvert.plan.frontier import to_csv
from ptconvert.plan.planner import Frontier, Objective, Point, Sensitivity
from ptconvert.plan.spec_text import spec_text
from ptconvert.report.charts import Series, line_chart
from ptconvert.report.html import render
from ptconvert.report.html_schedule import schedule_diagram
from ptconvert.report.numbers import between, number, signed
from ptconvert.report.terminal import diagram, figures_table
from ptconvert.schedule.endings import BESIDE
from ptconvert.shorten import few
from ptconvert.spec.document import written

if TYPE_CHECKING:
    from ptconvert.calibrate.stand_ins import StandIns


@dataclass(frozen=True)
class Planned:
    """A search's result and how it came to be; `chosen` is the point that fits the budget."""

    model: str
    tracks: int
    texts: tuple[str, ...]
    windows: int
    length: int
    dtype: str
    budget: str
    objective: Objective
    frontier: Frontier
    chosen: Point
    shape: ModelShape  # of the source
    wanted: Mapping[str, Any] = field(default_factory=dict)  # to be computed, for the spec
    in_place: StandIns | None = None  # of these
    guess_rank: int = 0  # of those among them, 0 without

    @property
    def tokens(self) -> int:
        """Tokens that were predicted for each figure of the frontier."""
        return self.windows * self.length


def interval(point: Point) -> Estimate:
    """The measured KL with its 95% interval over windows."""
    windows = point.cost.kl_by_window
    return estimate(mean_over(windows), len(windows), RESAMPLES, 0)


def to_spec(planned: Planned) -> str:
    """The chosen schedule as a spec, with what it costs as comments."""
    p, counts = planned.chosen, planned.chosen.schedule.counts
    before = planned.shape.dense.counts.all_reduces
    head = [
        f"{planned.model}, planned by ptconvert {__version__} for {planned.budget}.",
        "",
        f"All-reduces per forward pass: {before} before, {counts.all_reduces} after;",
        f"waited for: {before} before, {counts.waited_for} after.",
        f"Measured on {few(planned.texts)} ({planned.windows} windows of {planned.length} "
        "tokens), before any",
        f"training: KL {number(p.cost.kl)}, loss {signed(p.cost.loss)} nats per token.",
        "The figure at each range is the sum of what the parts that begin there cost by",
        "themselves, in nats of KL.",
    ]
    parts = [(segment.layers, kl) for segment, kl in p.parts if not segment.dense]

    def remark(layers: range) -> str:
        begun = [kl for run, kl in parts if run[0] in layers]
        if begun:
            return number(sum(begun))
        into = any(run[0] < layers[0] <= run[-1] for run, _ in parts)
        return "in a figure above" if into else "as the dense model"

    parallel = planned.shape.family.parallel
    return spec_text(p.schedule, planned.tracks, head, remark, _computed(planned), parallel)


def _computed(planned: Planned) -> list[str]:
    """The lines of the spec about what transform computes from a text, where that has any use."""
    lines = written(planned.wanted)
    if not lines or not planned.chosen.schedule.own_kept(planned.tracks):
        return []
    if planned.in_place is None:
        told = ["# Computed from a text, not counted above: transform needs --text FILE."]
    else:
        told = [
            "# Computed from a text: transform needs --text FILE.",
            f"# {_measured_with(planned)}",
        ]
        if left := [key for key in planned.wanted if key not in planned.in_place.wanted]:
            told.append(f"# Not counted above: {', '.join(left)}.")
    return [*told, *lines]


def _measured_with(planned: Planned) -> str:
    """What was in place, as a sentence; nothing where nothing was."""
    if planned.in_place is None:
        return ""
    names = " and ".join(planned.in_place.wanted)
    found = planned.in_place
    where = "others" if found.apart else "the same"
    tokens = found.ids[:, 1:].numel()
    return (
        f"Measured with {names} in place, fitted on {tokens:,} tokens, {where}, for no schedule in "
        "particular."
    )


def _in_place(planned: Planned) -> dict[str, Any] | None:
    if (found := planned.in_place) is None:
        return None
    return {**found.wanted, "tokens": found.ids[:, 1:].numel(), "apart": found.apart}


def to_json(planned: Planned) -> dict[str, Any]:
    """Everything but the windows' own figures, as plain data."""
    f = planned.frontier
    return {
        "model": planned.model,
        "tracks": planned.tracks,
        "texts": list(planned.texts),
        "windows": planned.windows,
        "window_tokens": planned.length,
        "dtype": planned.dtype,
        "objective": planned.objective.name,
        "budget": planned.budget,
        "chosen": _row(planned, planned.chosen),
        "frontier": [_row(planned, point) for point in f.points],
        "sensitivities": [
            {
                "sublayer": _name(s),
                "deferred": s.deferred,
                "own_seen": s.own_seen,
                "hidden": s.hidden,
            }
            for s in f.sensitivities
        ],
        "weighed_alone": f.weighed_alone,
        "measured_whole": f.measured_whole,
        "search_windows": f.search_windows,
        "in_place": _in_place(planned),
        "forward_passes": f.passes,
    }


def _row(planned: Planned, point: Point) -> dict[str, Any]:
    kl, counts = interval(point), point.schedule.counts
    low, high = kl.interval or (None, None)
    row = {
        "waited_for": counts.waited_for,
        "all_reduces": counts.all_reduces,
        "predicted_kl": point.predicted,
        "kl": kl.value,
        "kl_low": low,
        "kl_high": high,
        "loss_increase": point.cost.loss,
        "same_first_choice": point.cost.agreement,
        "schedule": str(point.schedule),
    }
    if planned.objective.name == "latency":
        row["milliseconds"] = point.weight
    return row


def table(planned: Planned) -> str:
    """The frontier as CSV."""
    rows = (_row(planned, point) for point in planned.frontier.points)
    head = {"tracks": planned.tracks, "guess_rank": planned.guess_rank}
    return to_csv([{**head, **row} for row in rows])


_SHOWN = (
    *("waited\nfor", "all-\nreduces", "predicted\nKL", "measured\nKL", "95%\ninterval"),
    *("loss", "same\nchoice"),
)


def _cells(planned: Planned, point: Point) -> list[str]:
    kl, counts = interval(point), point.schedule.counts
    cells = [f"{counts.waited_for}", f"{counts.all_reduces}", number(point.predicted)]
    cells += [number(kl.value), between(kl, number), signed(point.cost.loss)]
    cells.append(f"{point.cost.agreement:.1%}")
    return [f"{point.weight:.2f}", *cells] if planned.objective.name == "latency" else cells


def _header(planned: Planned) -> tuple[str, ...]:
    return ("ms", *_SHOWN) if planned.objective.name == "latency" else _SHOWN


def print_plan(console: Console, planned: Planned) -> None:
    """The frontier as a table with the chosen point marked, and its schedule."""
    console.print(Text(_title(planned), style="bold"), soft_wrap=True)
    shown = figures_table("", *_header(planned), no_wrap=True)
    for point in planned.frontier.points:
        here = point is planned.chosen
        mark = "→" if here else ""
        shown.add_row(mark, *_cells(planned, point), style="bold" if here else "")
    console.print(shown)
    console.print(Text(_explained(planned), style="dim"), soft_wrap=True)
    console.print()
    console.print(diagram(planned.chosen.schedule, planned.tracks, console.width))


def _title(planned: Planned) -> str:
    return (
        f"{planned.model} over {planned.tracks} tracks, {planned.budget}: {planned.windows} "
        f"windows of {planned.length} tokens of {few(planned.texts)} in {planned.dtype}; "
        "nats per token"
    )


def _explained(planned: Planned) -> str:
    f = planned.frontier
    return (
        "→ chosen; predicted: the sum of what the parts cost by themselves; KL and loss: "
        f"the whole schedule, measured. {f.weighed_alone} parts and {f.measured_whole} "
        f"whole schedules were tried on {f.search_windows} windows or fewer; this time "
        f"{f.passes:.0f} forward passes over the text"
        f"{', beside what was fitted' if planned.in_place else ''}."
        f" {_measured_with(planned)}".rstrip()
    )


def plan_page(planned: Planned) -> str:
    """The frontier as one self-contained page."""
    chosen, points = planned.chosen, planned.frontier.points
    counts, before = chosen.schedule.counts, planned.shape.dense.counts.all_reduces
    return render(
        "plan.html",
        title=f"{planned.model} over {planned.tracks} tracks",
        subtitle=f"ptconvert plan {__version__}: all-reduces waited for against KL",
        facts={
            "budget": planned.budget,
            "waited for": f"{before} → {counts.waited_for}",
            "all-reduces": f"{before} → {counts.all_reduces}",
            "KL": f"{number(chosen.cost.kl)}  ({between(interval(chosen), number)})",
            "loss": signed(chosen.cost.loss),
            "same first choice": f"{chosen.cost.agreement:.1%}",
        },
        diagram=schedule_diagram(chosen.schedule, planned.tracks, before),
        spec=to_spec(planned),
        chart=_chart(planned),
        header=[name.replace("-\n", "-") for name in _header(planned)],
        rows=[_cells(planned, point) for point in points],
        chosen=[i for i, point in enumerate(points) if point is chosen],
        sensitivities=_sensitivities(planned),
        measured=f"{_title(planned)}. {_explained(planned)}",
        schedules=[(point.schedule.counts.waited_for, point.schedule) for point in points],
    )


def _chart(planned: Planned) -> Markup | None:
    """KL against weight, on a logarithmic scale, which has no place for the dense model's 0."""
    by_latency = planned.objective.name == "latency"
    ranges = {p: interval(p).interval or (p.cost.kl, p.cost.kl) for p in planned.frontier.points}
    drawn = [p for p in ranges if min(p.predicted, *ranges[p]) > 0]
    if not drawn:
        return None
    measured = [(p.weight, p.cost.kl) for p in drawn]
    return line_chart(
        [
            Series("measured whole", measured, [ranges[p] for p in drawn]),
            Series("predicted", [(p.weight, p.predicted) for p in drawn]),
        ],
        "milliseconds, estimated" if by_latency else "all-reduces waited for",
        "KL, nats per token",
        log_y=True,
        caption="With 95% intervals over windows. Predicted is the sum over the parts.",
    )


_ENDINGS = (
    ("deferred", "deferred to the next (.)"),
    ("own_seen", "overlapped, own part seen (^1)"),
    ("hidden", "overlapped, hidden (~1)"),
)


def _sensitivities(planned: Planned) -> dict[str, Any]:
    """The chart of each sublayer's endings, and the table."""
    found = planned.frontier.sensitivities
    names = [(key, label) for key, label in _ENDINGS if any(getattr(s, key) for s in found)]
    series = [
        Series(
            label,
            [
                (s.sublayers[0].position / 2, kl)
                for s in found
                if (kl := getattr(s, key) or 0.0) > 0
            ],
        )
        for key, label in names
    ]
    return {
        "chart": line_chart(
            series,
            "layer (attention at the whole number, MLP half a step on)",
            "KL, nats per token",
            log_y=True,
        ),
        "header": ["sublayer", *(label for _, label in names)],
        "rows": [[_name(s), *(_or_dash(getattr(s, key)) for key, _ in names)] for s in found],
    }


def _name(sensitivity: Sensitivity) -> str:
    return BESIDE.symbol.join(map(str, sensitivity.sublayers))


def _or_dash(value: float | None) -> str:
    return "-" if value is None else number(value)
