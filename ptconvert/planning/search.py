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
from numpy.typing import NDArray

from ptconvert.planning.segments import Segment, run
from ptconvert.schedule import BLOCKING

Cost = Callable[[Segment], float]
Weight = Callable[[Segment], int]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """Segments in a row that cover all sublayers; `weight` and `cost` are sums over them."""

    weight: int
    cost: float
    segments: tuple[Segment, ...]


# A way to reach a position: the segment that ends there (its index), and the label before.
_LABEL = np.dtype(
    [("weight", np.int64), ("cost", np.float64), ("by", np.int64), ("before", np.int64)]
)


def best_mixtures(segments: Iterable[Segment], weight: Weight, cost: Cost) -> list[Mixture]:
    """For each weight, in rising order, the cheapest mixture; those that cost no less than a
    lighter one are left out.

    Multi-objective dynamic programming: per position the labels that no lighter one beats, those of
    all positions one after the other. Of equals, the one whose last segment is longest wins.
    Costs must be finite, and some segments must lead from 0 to the last position. Shapes: S
    segments, L labels so far, E extensions of them that end at one position.
    """
    chosen = sorted(segments, key=lambda s: s.start)
    start_S, stop_S = (np.array([s[end] for s in chosen]) for end in (0, 1))
    weight_S, cost_S = (np.array([of(s) for s in chosen]) for of in (weight, cost))
    labels_L, position_L = np.array([(0, 0.0, -1, -1)], dtype=_LABEL), np.zeros(1, dtype=np.int64)
    last = int(stop_S.max())
    for position in range(1, last + 1):
        here = np.flatnonzero(stop_S == position)
        before_E, by_E = _extensions(position_L, here, start_S[here])
        weight_E = labels_L["weight"][before_E] + weight_S[by_E]
        cost_E = labels_L["cost"][before_E] + cost_S[by_E]
        kept_K = _undominated(weight_E, cost_E)
        new_K = np.empty(len(kept_K), dtype=_LABEL)
        new_K["weight"], new_K["cost"] = weight_E[kept_K], cost_E[kept_K]
        new_K["by"], new_K["before"] = by_E[kept_K], before_E[kept_K]
        labels_L = np.concatenate([labels_L, new_K])
        position_L = np.append(position_L, np.full(len(new_K), position))
    ends = np.flatnonzero(position_L == last)
    return [_mixture(labels_L, int(index), chosen) for index in ends]


def _extensions(position_L: Ints, here_H: Ints, start_H: Ints) -> tuple[Ints, Ints]:
    """Each label, once per segment of `here` (in the order of their starts) that starts where it
    is; and these segments."""
    count_L = np.bincount(start_H, minlength=position_L[-1] + 1)[position_L]
    before_E = np.repeat(np.arange(len(position_L)), count_L)
    within_E = np.arange(len(before_E)) - (count_L.cumsum() - count_L)[before_E]
    return before_E, here_H[np.searchsorted(start_H, position_L)[before_E] + within_E]


def _undominated(weight_E: Ints, cost_E: Floats) -> Ints:
    """Those that none as light or lighter beats, by rising weight and falling cost; of equals the
    first. Memory goes with the range of the weights."""
    if not len(weight_E):
        return np.flatnonzero(weight_E)
    from_E = weight_E - weight_E.min()
    cheapest_W = np.full(from_E.max() + 1, np.inf)
    np.minimum.at(cheapest_W, from_E, cost_E)
    best_B = np.flatnonzero(cost_E == cheapest_W[from_E])
    weight_K, first_K = np.unique(from_E[best_B], return_index=True)
    lighter_W = np.minimum.accumulate(np.append(np.inf, cheapest_W[:-1]))
    kept_E: Ints = best_B[first_K[(cheapest_W < lighter_W)[weight_K]]]
    return kept_E


def _mixture(labels_L: NDArray[np.void], index: int, chosen: Sequence[Segment]) -> Mixture:
    weight, cost, by, before = labels_L[index].item()
    segments: list[Segment] = []
    while by >= 0:
        segments.append(chosen[by])
        _, _, by, before = labels_L[before].item()
    return Mixture(weight, cost, tuple(reversed(segments)))


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
        self._known: dict[Segment, float] = {}  # by themselves, measured or guessed
        self._ratios: list[float] = []
        self._more = 1.0  # what runs cost more than their parts

    def learn(self, measured: Mapping[Segment, float]) -> None:
        """Takes in what segments cost by themselves."""
        sums = {segment: self._sum(segment) for segment in measured}
        self._ratios += [measured[segment] / guess for segment, guess in sums.items() if guess > 0]
        if self._ratios:
            self._more = float(np.quantile(self._ratios, 0.1))
        self.measured.update(measured)
        self._known = dict(self.measured)

    def __call__(self, segment: Segment) -> float:
        """What the segment adds to a mixture's cost, as far as is known."""
        return max(0.0, self.alone(segment) + self._corrections.get(segment, 0.0))

    def alone(self, segment: Segment) -> float:
        """What the segment costs by itself, measured or guessed."""
        if segment not in self._known:
            self._known[segment] = 0.0 if segment.dense else self._more * self._sum(segment)
        return self._known[segment]

    def _sum(self, segment: Segment) -> float:
        """What a run of three sublayers or more would cost if its parts' costs added up, else 0."""
        start, stop, ending, beside = segment
        if stop - start < 3 or beside:
            return 0.0
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
