"""The search over mixed schedules: exact for costs that add up, corrected where they don't.

Each segment has a weight (all-reduces waited for, or time) and a cost (KL by itself, in an
otherwise dense model). If costs added up, dynamic programming over the sublayers would give the
cheapest mixture for every weight at once. They don't quite: what two segments do to each other
shows when whole mixtures are measured, and is shared out among their segments by ridge regression.
Nothing here needs torch or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ptconvert.plan.segments import Segment
from ptconvert.schedule.endings import BLOCKING

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_GUESSED = 1e6  # nats: a guess is a multiple of shorter ones, which are multiples of others
COMMON = 1.0  # the variance of the factor common to all segments
OWN = 0.5  # the variance of a segment's own correction, as a share of its cost squared
DRAWN = 0.2  # the standard deviation of the logarithms of costs that are drawn about the known ones


@dataclass(frozen=True)
class Mixture:
    """Segments in a row that cover all sublayers; `weight` and `cost` are sums over them."""

    weight: int
    cost: float
    segments: tuple[Segment, ...]


class Labels(NamedTuple):
    """Ways to reach positions (L each): weight and cost so far, the segment that ends there (its
    index), and the label before."""

    weight: Ints
    cost: Floats
    by: Ints
    before: Ints


class Mixtures(Sequence[Mixture]):
    """What a search found, by rising weight. A mixture's segments are put together when it is asked
    for: of hundreds found a few are."""

    def __init__(self, segments: Sequence[Segment], labels: Labels, ends: range) -> None:
        self._segments, self._labels, self._ends = segments, labels, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Mixture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mixture]: ...
    def __getitem__(self, index: int | slice) -> Mixture | Sequence[Mixture]:
        if isinstance(index, slice):
            return Mixtures(self._segments, self._labels, self._ends[index])
        label = self._ends[index]
        weight, cost = self._labels.weight[label].item(), self._labels.cost[label].item()
        segments: list[Segment] = []
        while (by := self._labels.by[label]) >= 0:
            segments.append(self._segments[by])
            label = self._labels.before[label]
        return Mixture(weight, cost, tuple(reversed(segments)))


class Choices:
    """The segments that mixtures are made of and their weights, for search after search."""

    def __init__(self, segments: Sequence[Segment], weight: Callable[[Segment], int]) -> None:
        weights = np.array([weight(s) for s in segments])
        starts, stops = (np.array([s[end] for s in segments]) for end in (0, 1))
        self._order_S = np.argsort(starts, kind="stable")
        self._segments = [segments[i] for i in self._order_S]
        self._start_S, self._weight_S = starts[self._order_S], weights[self._order_S]
        stop_S = stops[self._order_S]
        self._here_P = [np.flatnonzero(stop_S == p) for p in range(stop_S.max() + 1)]

    def cheapest(self, costs: Floats) -> Mixtures:
        """For each weight, in rising order, the cheapest mixture, at the costs of the segments in
        the order in which they were given; those that cost no less than a lighter one are left out.

        Multi-objective dynamic programming: per position the labels that no lighter one beats,
        those of all positions one after the other. Of equals, the one whose last segment is longest
        wins. Costs must be finite, and some segments must lead from 0 to the last position. Shapes:
        S segments, P positions, L labels so far, E extensions of them that end at one position.
        """
        cost_S = costs[self._order_S]
        first, none = np.zeros(1, np.int64), np.full(1, -1)
        labels, position_L = Labels(first, np.zeros(1), none, none), first
        for position, here_H in enumerate(self._here_P[1:], 1):
            before_E, by_E = _extensions(position_L, here_H, self._start_S[here_H])
            weight_E = labels.weight[before_E] + self._weight_S[by_E]
            cost_E = labels.cost[before_E] + cost_S[by_E]
            kept_K = _undominated(weight_E, cost_E)
            new = (of_E[kept_K] for of_E in (weight_E, cost_E, by_E, before_E))
            labels = Labels(*map(np.concatenate, zip(labels, new, strict=True)))
            position_L = np.append(position_L, np.full(len(kept_K), position))
        ends = range(len(position_L) - len(kept_K), len(position_L))
        return Mixtures(self._segments, labels, ends)


def _extensions(position_L: Ints, here_H: Ints, start_H: Ints) -> tuple[Ints, Ints]:
    """Each label, once per segment of `here` (in the order of their starts) that starts where it
    is; and these segments."""
    count_P = np.bincount(start_H, minlength=position_L[-1] + 1)
    count_L = count_P[position_L]
    before_E = np.repeat(np.arange(len(position_L)), count_L)
    # Of a label's extensions the first has the first segment that starts there, and so on.
    shift_L = (count_P.cumsum() - count_P)[position_L] - (count_L.cumsum() - count_L)
    return before_E, here_H[np.arange(len(before_E)) + shift_L[before_E]]


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


class Prices:
    """What segments cost: measured by themselves, guessed until then, and corrected by wholes.

    The guess for a run that wasn't measured is what it would cost if the costs of the run without
    its first and without its last sublayer added up, times what runs cost more than that when they
    were first measured (the lowest tenth, so that a guess is too low rather than too high), and
    MOST_GUESSED at most. A search that trusts a guess proposes the run, and it gets measured; runs
    that no search proposes never cost a measurement. A measurement may come again, on more windows.
    Those of all S segments are kept as arrays, and made again when more is known.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.measured: dict[Segment, float] = {}
        self._index = {segment: i for i, segment in enumerate(segments)}
        self._runs = list(_parts_by_length(segments))
        size = len(segments)
        self._measured_S = np.full(size, np.nan)
        self._alone_S, self._sum_S, self._corrections_S = np.zeros((3, size))
        self._common = 1.0
        self._ratios: dict[Segment, float] = {}

    def learn(self, measured: Mapping[Segment, float]) -> None:
        """Takes in what segments cost by themselves, in place of what was known of them."""
        indices = np.array([self._index[segment] for segment in measured], dtype=np.int64)
        values, sums = np.array(list(measured.values())), self._sum_S[indices]
        runs = zip(measured, values.tolist(), sums.tolist(), strict=True)
        new = {segment: value / total for segment, value, total in runs if total > 0}
        self._ratios = new | self._ratios  # of what was only guessed until now
        more = float(np.quantile(list(self._ratios.values()), 0.1)) if self._ratios else 1.0
        self.measured.update(measured)
        self._measured_S[indices] = values
        known_S = ~np.isnan(self._measured_S)
        self._alone_S = np.where(known_S, self._measured_S, 0.0)
        for here, *parts in self._runs:  # the shorter ones first, of which the longer are made
            head, tail, middle = (self._alone_S[part] for part in parts)
            self._sum_S[here] = np.maximum(np.maximum(head, tail), head + tail - middle)
            guess = np.minimum(more * self._sum_S[here], MOST_GUESSED)
            self._alone_S[here] = np.where(known_S[here], self._alone_S[here], guess)

    @property
    def costs(self) -> Floats:
        """What each segment adds to a mixture's cost, as far as is known, in the order given."""
        return np.maximum(0.0, self._common * self._alone_S + self._corrections_S)

    def factors(self, draws: int, seed: int) -> Floats:
        """By what costs may be off, drawn at random: (draws, segments)."""
        size = draws, len(self._index)
        return np.exp(np.random.default_rng(seed).normal(0.0, DRAWN, size))

    def alone(self, segment: Segment) -> float:
        """What the segment costs by itself, measured or guessed."""
        return float(self._alone_S[self._index[segment]])

    def correct(
        self, wholes: Sequence[tuple[Sequence[Segment], float]], noise: float = 0.05
    ) -> None:
        """Fits corrections to whole mixtures and their measured costs.

        Bayesian linear regression. A factor common to all segments, also to those in no whole yet,
        is normal around 1 with a variance of COMMON: wholes cost more than their parts, and were
        that laid on the parts that were tried, the next search would flee to those that were not.
        A segment's own correction is normal around 0 with a variance of OWN times its cost squared,
        and a whole is measured with a relative error of `noise`.
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
        sum_W = x_WS @ alone_S
        spread_SW = (OWN * alone_S**2)[:, None] * x_WS.T
        variance_W = (noise * measured_W) ** 2 + 1e-12
        explained_WW = x_WS @ spread_SW + COMMON * np.outer(sum_W, sum_W)
        solved_W = np.linalg.solve(explained_WW + np.diag(variance_W), measured_W - sum_W)
        # above 0, however the wholes scatter: else what no whole had would be free
        self._common = max(0.1, 1 + COMMON * float(sum_W @ solved_W))
        self._corrections_S = np.zeros(len(self._index))
        self._corrections_S[[self._index[s] for s in columns]] = spread_SW @ solved_W


def _parts_by_length(segments: Sequence[Segment]) -> Iterator[tuple[Ints, Ints, Ints, Ints]]:
    """Runs of three sublayers or more with one ending, by rising length: their indices, and those
    of the runs without their last sublayer, without their first, and without both, which the
    segments have, too, as a menu's do."""
    last = max(segment.stop for segment in segments)
    endings = dict.fromkeys([BLOCKING, *(s.ending for s in segments if not s.beside)])
    at_EPP = np.full((len(endings), last + 1, last + 1), -1)
    for number, ending in enumerate(endings):
        mine = [(i, s) for i, s in enumerate(segments) if not s.beside and s.ending == ending]
        places = np.array([(s.start, s.stop, i) for i, s in mine])
        at_EPP[number, places[:, 0], places[:, 1]] = places[:, 2]
    for length in range(3, last + 1):
        for at_PP in at_EPP:
            start = np.arange(last - length + 1)
            start = start[at_PP[start, start + length] >= 0]
            stop = start + length
            if len(start):
                head, middle = at_EPP[0, start, stop - 1], at_EPP[0, start + 1, stop - 1]
                yield at_PP[start, stop], head, at_PP[start + 1, stop], middle
