"""The search over mixed schedules: exact for costs that add up, corrected where they don't.

Each segment has a weight (all-reduces waited for, or time) and a cost (KL by itself, in an
otherwise dense model). If costs added up, dynamic programming over the sublayers would give the
cheapest mixture for every weight at once. They don't quite: what two segments do to each other
shows when whole mixtures are measured, and is shared out among their segments by ridge regression.
Nothing here needs torch or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ptconvert.planning.segments import Segment, run
from ptconvert.schedule import BLOCKING

Cost = Callable[[Segment], float]
Weight = Callable[[Segment], int]


@dataclass(frozen=True)
class Mixture:
    """Segments in a row that cover all sublayers; `weight` and `cost` are sums over them."""

    weight: int
    cost: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class _Label:
    """A way to reach a position: the cheapest of its weight."""

    weight: int
    cost: float
    last: Segment | None = None
    before: _Label | None = None


def best_mixtures(segments: Iterable[Segment], weight: Weight, cost: Cost) -> list[Mixture]:
    """For each weight, in rising order, the cheapest mixture; those that cost no less than a
    lighter one are left out.

    Multi-objective dynamic programming: per position one label for each weight that isn't
    dominated. Costs must be finite, and some segments must lead from 0 to the last position.
    """
    by_start: dict[int, list[tuple[Segment, int, float]]] = {}
    for segment in segments:
        by_start.setdefault(segment.start, []).append((segment, weight(segment), cost(segment)))
    last = max(segment.stop for some in by_start.values() for segment, _, _ in some)
    labels: list[dict[int, _Label]] = [{} for _ in range(last + 1)]
    labels[0] = {0: _Label(0, 0.0)}
    for position in range(last):
        for label in _undominated(labels[position]):
            for segment, added, price in by_start.get(position, ()):
                total, reached = label.weight + added, labels[segment.stop]
                if total not in reached or label.cost + price < reached[total].cost:
                    reached[total] = _Label(total, label.cost + price, segment, label)
    return [_mixture(label) for label in _undominated(labels[last])]


def _undominated(labels: Mapping[int, _Label]) -> list[_Label]:
    kept: list[_Label] = []
    for weight in sorted(labels):
        if not kept or labels[weight].cost < kept[-1].cost:
            kept.append(labels[weight])
    return kept


def _mixture(label: _Label) -> Mixture:
    segments: list[Segment] = []
    step: _Label | None = label
    while step is not None and step.last is not None:
        segments.append(step.last)
        step = step.before
    return Mixture(label.weight, label.cost, tuple(reversed(segments)))


class Prices:
    """What segments cost: measured by themselves, guessed until then, and corrected by wholes.

    The guess for a run that wasn't measured is what it would cost if the costs of the run without
    its first and without its last sublayer added up, times what runs measured so far cost more
    than that (the lowest tenth, so that a guess is too low rather than too high). A search that
    trusts a guess proposes the run, and it gets measured; runs that no search proposes never cost
    a measurement.
    """

    def __init__(self) -> None:
        self.measured: dict[Segment, float] = {}
        self._corrections: dict[Segment, float] = {}
        self._guesses: dict[Segment, float] = {}
        self._ratios: list[float] = []

    def learn(self, measured: Mapping[Segment, float]) -> None:
        """Takes in what segments cost by themselves."""
        sums = {segment: self._sum(segment) for segment in measured}
        self._ratios += [measured[segment] / guess for segment, guess in sums.items() if guess > 0]
        self.measured.update(measured)
        self._guesses.clear()

    def __call__(self, segment: Segment) -> float:
        """What the segment adds to a mixture's cost, as far as is known."""
        return max(0.0, self.alone(segment) + self._corrections.get(segment, 0.0))

    def alone(self, segment: Segment) -> float:
        """What the segment costs by itself, measured or guessed."""
        if segment.dense:
            return 0.0
        if segment in self.measured:
            return self.measured[segment]
        if segment not in self._guesses:
            more = float(np.quantile(self._ratios, 0.1)) if self._ratios else 1.0
            self._guesses[segment] = more * self._sum(segment)
        return self._guesses[segment]

    def _sum(self, segment: Segment) -> float:
        """What a run of three sublayers or more would cost if its parts' costs added up, else 0."""
        start, stop = segment.start, segment.stop
        if stop - start < 3 or len(segment.stages) != stop - start:
            return 0.0
        ending = segment.stages[-1].ending
        head, tail = run(start, stop - 1, BLOCKING), run(start + 1, stop, ending)
        middle = run(start + 1, stop - 1, BLOCKING)
        parts = [self.alone(part) for part in (head, tail)]
        return max(*parts, sum(parts) - self.alone(middle))

    def correct(
        self, wholes: Sequence[tuple[Sequence[Segment], float]], noise: float = 0.05
    ) -> None:
        """Fits corrections to whole mixtures and their measured costs.

        Bayesian linear regression: a segment's correction is normal around 0 with its own cost as
        standard deviation, a whole is measured with a relative error of `noise`.
        """
        used = [[s for s in segments if not s.dense] for segments, _ in wholes]
        columns = {s: i for i, s in enumerate(dict.fromkeys(s for some in used for s in some))}
        if not columns:
            return
        x_WS = np.zeros((len(wholes), len(columns)))
        for row, some in enumerate(used):
            x_WS[row, [columns[s] for s in some]] = 1.0
        alone_S = np.array([self.alone(s) for s in columns])
        measured_W = np.array([cost for _, cost in wholes])
        spread_SW = (alone_S**2)[:, None] * x_WS.T
        variance_W = (noise * measured_W) ** 2 + 1e-12
        errors_W = measured_W - x_WS @ alone_S
        found_S = spread_SW @ np.linalg.solve(x_WS @ spread_SW + np.diag(variance_W), errors_W)
        self._corrections = dict(zip(columns, map(float, found_S), strict=True))
