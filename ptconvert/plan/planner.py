"""The plan: segments are weighed, mixtures searched for, and the best measured whole.

Every cost is the whole model's with a schedule, from the layer at which it departs from the dense
one to the end. What keeps that cheap is on how few windows: segments are screened on a few, and
those that good mixtures are made of weighed on more, as these mixtures are; all windows are for the
frontier. A window is measured once, so that more windows cost only those that are new.

Mixtures that should cost the same differ by some hundredths, by what their segments do to each
other. So about what is asked for several are measured, such as would be cheapest were segments'
costs a little other ones.
"""

from __future__ import annotations

import bisect
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ptconvert.plan.search import Choices, Floats, Mixture, Mixtures, Prices
from ptconvert.plan.segments import HIDDEN, OWN_SEEN, OWN_SEEN_LATER, Segment, menu, run, together
from ptconvert.plan.sensitivity import Cost, Meter
from ptconvert.schedule.endings import BLOCKING, Ending
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer

T = TypeVar("T")

# Of the windows given, what the search is on: eight at most, and of fewer than 32 a quarter, but
# four at least. Of these, what segments are screened on: a sixteenth of all, but one at least. The
# frontier is measured on all.
SEARCH_WINDOWS = 8
SEARCH_EACH = 4
SCREEN_EACH = 16
ROUNDS = 2
MIXTURES = 16  # that a round measures whole, at most, of all weights;
REFINEMENTS, NEAR = 10, 2  # and then so many times so many about what is asked for
POINTS = 7  # of the frontier that are measured, where it has more,
FINALISTS = 3  # and of what is asked for, as few windows tell too little of those nearly alike


@dataclass(frozen=True)
class Objective:
    """What is saved. `whole` gives it for a schedule in its `unit`, `segment` what a segment adds
    to the sum over a mixture, in whole numbers of any unit."""

    name: str
    unit: str
    whole: Callable[[Schedule], float]
    segment: Callable[[Segment], int]
    singles: tuple[Ending, ...]  # endings worth trying after one sublayer,
    runs: tuple[Ending, ...]  # and after several of which only the last all-reduces


def waited_for(overlap: bool) -> Objective:
    """All-reduces waited for. Without `overlap` no all-reduce runs beside computation, so that
    those waited for are all there are. With it, no overlapped all-reduce is saved: none is waited
    for, and each brings the tracks nearer together."""
    singles = (BLOCKING, OWN_SEEN, HIDDEN) if overlap else (BLOCKING,)
    return Objective(
        "syncs",
        "waited for",
        lambda s: s.counts.waited_for,
        lambda s: s.waits,
        singles,
        (BLOCKING,),
    )


def latency(
    seconds: Callable[[Schedule], float],
    layers: int,
    overlap: bool = True,
    grain: float | None = None,
    parallel: bool = False,
) -> Objective:
    """Estimated seconds of schedules, of which those of two stages more and less in a long run
    differ alike; sums of segments are rounded to `grain` of the dense model's time, by
    default a quarter of what one blocking all-reduce takes of it. Without `overlap` no all-reduce
    runs beside computation. `parallel` says what layers the model has."""
    stages = dense_schedule(layers, parallel).stages
    dense, last = seconds(Schedule(stages)), len(stages)
    if grain is None:
        # Side by side two stages have one all-reduce less and no tracks: that alone changes.
        pair = Segment(0, 2, BLOCKING, True, parallel)
        one = 1 - seconds(Schedule((*pair.stages, *stages[2:]))) / dense
        grain = one / 4 if one > 1e-6 else 1e-3  # less than that is what floats leave of nothing
    known: dict[object, float] = {}

    def added(segment: Segment) -> float:
        # Layers are alike: where a segment stands matters only to what is in flight at the end.
        start, stop, ending, beside, _ = segment
        key = start % 2, stop - start, ending, beside, min(last - stop, OWN_SEEN_LATER.lag)
        if key not in known:
            more = 0 if beside else max(0, stop - start - 5) // 2
            if more:  # in a run, every two stages add what the two before them do
                shorter = (run(start + 2 * more + n, stop, ending, parallel) for n in (0, 2))
                one, two = map(added, shorter)
                known[key] = one + more * (one - two)
            else:
                # With its own last all-reduce, which only a blocking one just after it would save:
                # that pair is a longer segment of the menu.
                whole = Schedule((*stages[:start], *segment.stages, *stages[stop:]))
                known[key] = seconds(whole) - dense
        return known[key]

    runs = (BLOCKING, OWN_SEEN, OWN_SEEN_LATER) if overlap else (BLOCKING,)
    singles = (*runs, HIDDEN) if overlap else runs
    return Objective(
        "latency",
        "ms",
        lambda s: 1e3 * seconds(s),
        lambda s: round(added(s) / (grain * dense)),
        singles,
        runs,
    )


@dataclass(frozen=True)
class Point:
    """A schedule of the frontier: what it still waits for, its parts with the KL of each by itself,
    and what was measured of the whole."""

    schedule: Schedule
    weight: float
    parts: tuple[tuple[Segment, float], ...]
    cost: Cost

    @property
    def predicted(self) -> float:
        """The KL if the parts' added up."""
        return sum(kl for _, kl in self.parts)


@dataclass(frozen=True)
class Tried:
    """A mixture that was measured whole, on the windows of the search."""

    schedule: Schedule
    mixture: Mixture
    weight: float  # of the schedule, in the objective's unit
    cost: Cost


@dataclass(frozen=True)
class Sensitivity:
    """The KL of one stage's ending in an otherwise dense model; None where the objective has no use
    for it. `deferred` merges with the next stage."""

    sublayers: tuple[Sublayer, ...]
    deferred: float | None
    own_seen: float | None
    hidden: float | None


@dataclass(frozen=True)
class Frontier:
    """Points in rising weight and falling measured KL, and what was learnt on the way."""

    points: tuple[Point, ...]
    sensitivities: tuple[Sensitivity, ...]
    weighed_alone: int
    measured_whole: int
    search_windows: int
    passes: float = field(compare=False)  # what was computed, in forward passes over all windows


def search(
    meter: Meter,
    objective: Objective,
    rounds: int = ROUNDS,
    target: float | None = None,
    max_loss: float | None = None,
    seconds: float | None = None,
) -> Frontier:
    """Finds the frontier of an objective against KL.

    Each round searches the cheapest mixtures at the prices known, weighs each segment in them that
    was only guessed or screened, then measures the mixtures whole, and corrects the prices; until
    it proposes nothing new. `target` is a weight, and `max_loss` a rise of the loss, not to leave
    out: about them it does the same a few more times, at prices drawn at random about the known
    ones. All on a few windows; the best are then measured on all of them, and those that another
    one beats in both respects are dropped. Where `seconds` are given, without those that fitting
    what is in place takes, nothing more is searched when half of them are over, and of the frontier
    what was asked for and its ends are measured, and more while there is time.
    """
    return _Search(meter, objective, target, max_loss, seconds).run(rounds)


class _Search:
    """What is known so far: the prices, and the mixtures that were measured on a few windows."""

    def __init__(
        self,
        meter: Meter,
        objective: Objective,
        target: float | None,
        max_loss: float | None,
        seconds: float | None,
    ) -> None:
        self.started = time.monotonic()
        self.meter, self.objective = meter, objective
        self.target, self.max_loss, self.seconds = target, max_loss, seconds
        count, longest = len(meter.windows.ids), len(meter.dense.stages)
        self.screening, self.searching = screening_windows(count), search_windows(count)
        parts = objective.singles, objective.runs, longest, meter.parallel
        self.segments = tuple(menu(meter.layers, *parts))
        meter.progress("weighing segments", 0, None)
        self.choices = Choices(self.segments, objective.segment)
        self.prices = Prices(self.segments)
        self.screened, self.weighed = dict[Segment, float](), dict[Segment, float]()
        # where both are the same windows, segments are only weighed
        self.known_on = {self.screening: self.screened, self.searching: self.weighed}
        self.tried: dict[Schedule, Tried] = {}

    def run(self, rounds: int) -> Frontier:
        self.learn(list(filter(is_basic, self.segments)), "sensitivities", self.screening)
        for number in range(1, rounds + 1):
            # other weights in each round, where there are more than it measures
            shift = (number - 1) / rounds
            if self.tried and self.is_late(0.5):
                break
            if not self.measure(functools.partial(self.of_all_weights, shift), f"round {number}"):
                break
            for again in range(REFINEMENTS):
                weight = self.aim()
                if weight is None or self.is_late(0.5):
                    break
                factors_NS = self.prices.factors(NEAR, seed=REFINEMENTS * number + again)
                find = functools.partial(self.near, weight, factors_NS)
                self.measure(find, f"round {number}.{again + 1}")
        points = [
            Point(
                t.schedule,
                t.weight,
                tuple((part, self.prices.alone(part)) for part in t.mixture.segments),
                cost,
            )
            for t, cost in self.measured_whole()
        ]
        return Frontier(
            tuple(undominated(points, lambda p: (p.weight, p.cost.kl))),
            tuple(_sensitivities(self.meter.dense, self.meter.parallel, self.prices)),
            len(self.prices.measured),
            len(self.tried),
            len(self.searching),
            self.meter.passes,
        )

    def learn(self, some: Sequence[Segment], step: str, windows: range) -> None:
        """Measures segments by themselves."""
        costs = self.meter.alone(some, step, windows)
        self.known_on[windows].update(zip(some, costs, strict=True))
        self.prices.learn(as_weighed(self.screened, self.weighed))

    def learn_more(self, mixtures: Iterable[Mixture], step: str) -> bool:
        """Learns more of the mixtures' segments, screening before weighing; whether there was more
        to learn."""
        used = dict.fromkeys(s for mixture in mixtures for s in mixture.segments if not s.dense)
        for windows, known in self.known_on.items():
            if unknown := [segment for segment in used if segment not in known]:
                self.learn(unknown, step, windows)
                return True
        return False

    def measure(self, find: Callable[[], list[Mixture]], step: str) -> bool:
        """Measures mixtures, found again as long as there is more to learn of their segments;
        whether one was new."""
        self.meter.progress(f"{step}: searching", 0, None)
        found = find()
        while self.learn_more(found, f"{step}: parts"):
            found = find()
        new = {s: m for m in found if (s := together(m.segments)) not in self.tried}
        costs = self.meter.costs(new, f"{step}: mixtures", self.searching)
        for (schedule, mixture), cost in zip(new.items(), costs, strict=True):
            weight = self.objective.whole(schedule)
            self.tried[schedule] = Tried(schedule, mixture, weight, cost)
        self.prices.correct([(t.mixture.segments, t.cost.kl) for t in self.tried.values()])
        return bool(new)

    def of_all_weights(self, shift: float) -> list[Mixture]:
        """The cheapest mixtures, not all where they are many."""
        found = self.choices.cheapest(self.prices.costs)
        asked = [] if self.target is None else [_heaviest(found, self.objective, self.target)]
        return [*_thinned(found, MIXTURES, shift), *asked]

    def near(self, weight: float, factors_NS: Floats) -> list[Mixture]:
        """One of this weight for each time that costs are others by such factors."""
        drawn = (self.choices.cheapest(self.prices.costs * factor_S) for factor_S in factors_NS)
        return [_heaviest(found, self.objective, weight) for found in drawn]

    def best(self) -> list[Tried]:
        """Those that none tried beats, by rising weight."""
        return undominated(self.tried.values(), lambda t: (t.weight, t.cost.kl))

    def aim(self) -> float | None:
        """Which weight is worth trying more of: the target, or the next that is lighter than the
        lightest whose loss fits."""
        if self.max_loss is None:
            return self.target
        best = self.best()
        at = _fits_at(best, self.max_loss)
        return best[at - 1].weight if at else None

    def asked(self, best: Sequence[Tried]) -> tuple[Sequence[Tried], Sequence[Tried]]:
        """What was asked for, and what may turn out to be it on more windows."""
        tried = self.tried.values()
        if self.max_loss is not None:
            at = _fits_at(best, self.max_loss)
            fitting = sorted(
                (t for t in tried if t.weight <= best[at].weight), key=lambda t: t.cost.loss
            )
            return best[max(0, at - 1) : at + 2], fitting[:FINALISTS]
        most = -math.inf if self.target is None else self.target
        fitting = sorted((t for t in tried if t.weight <= most), key=lambda t: t.cost.kl)
        return fitting[:1], fitting[:FINALISTS]

    def measured_whole(self) -> Iterator[tuple[Tried, Cost]]:
        """The best on all windows: what was asked for, the ends, and more while there is time."""
        best = self.best()
        asked, finalists = self.asked(best)
        first = {t.schedule: t for t in (*asked, best[0], best[-1])}
        order = first | {t.schedule: t for t in (*finalists, *_thinned(best, POINTS))}
        costs = self.meter.each(order, "frontier, whole")
        for done, (tried, cost) in enumerate(zip(order.values(), costs, strict=True), 1):
            yield tried, cost
            if self.is_late() and done >= len(first):
                break

    def is_late(self, part: float = 1.0) -> bool:
        """Whether that part of the time is over."""
        limit = math.inf if self.seconds is None else part * self.seconds
        return time.monotonic() - self.started - self.meter.fitting_seconds > limit


def search_windows(windows: int) -> range:
    """Those of so many windows that the search is on."""
    each = max(math.ceil(windows / SEARCH_WINDOWS), min(SEARCH_EACH, windows // 4))
    return range(0, windows, each)


def screening_windows(windows: int) -> range:
    """Those of the search's windows that all segments are screened on; a single one is from the
    middle, as texts follow one another."""
    searching = search_windows(windows)
    each = math.ceil(SCREEN_EACH / searching.step)
    return searching[min(each, len(searching)) // 2 :: each]


def as_weighed(
    screened: Mapping[Segment, float], weighed: Mapping[Segment, float]
) -> dict[Segment, float]:
    """What segments cost on the windows on which some were weighed. Of those that were only
    screened it is what they cost there, times the median of what others cost more."""
    more = [weighed[s] / kl for s, kl in screened.items() if s in weighed and kl > 0]
    factor = statistics.median(more) if more else 1.0
    return {s: factor * kl for s, kl in screened.items()} | dict(weighed)


def is_basic(segment: Segment) -> bool:
    """What is screened before any search: all but the dense stages and the longer runs."""
    return not segment.dense and (segment.beside or segment.length <= 2)


def _heaviest(found: Mixtures, objective: Objective, weight: float) -> Mixture:
    """The heaviest that weighs no more, whole, or the lightest of all."""

    def whole(mixture: Mixture) -> float:
        return objective.whole(together(mixture.segments))

    at = bisect.bisect_right(found, weight, key=whole)
    # Their weights are sums over segments, by which wholes are nearly in order.
    return next((m for m in found[:at][::-1] if whole(m) <= weight), found[0])


def _fits_at(best: Sequence[Tried], max_loss: float) -> int:
    """The first whose loss rises by no more, or the last."""
    return next((i for i, t in enumerate(best) if t.cost.loss <= max_loss), len(best) - 1)


def undominated(items: Iterable[T], values: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that no other beats in both values, by the first value rising."""
    kept, best = list[T](), math.inf
    for (_, second), item in sorted(((values(i), i) for i in items), key=lambda pair: pair[0]):
        if not kept or second < best:
            kept.append(item)
            best = second
    return kept


def _thinned(items: Sequence[T], most: int, shift: float = 0.0) -> list[T]:
    """So many, evenly, from a part of a step on; and the first."""
    count = len(items)
    step = (count - 1) / max(1, most - 1)
    chosen = set(range(count))
    if count > most:
        chosen = {0, *(min(count - 1, round((i + shift) * step)) for i in range(most))}
    return [items[i] for i in sorted(chosen)]


def _sensitivities(dense: Schedule, parallel: bool, prices: Prices) -> Iterable[Sensitivity]:
    for p, stage in enumerate(dense.stages):
        single = {e: run(p, p + 1, e, parallel) for e in (OWN_SEEN, HIDDEN)}
        pair = run(p, p + 2, BLOCKING, parallel) if p + 2 <= len(dense.stages) else None
        yield Sensitivity(
            stage.sublayers,
            prices.measured.get(pair) if pair else None,
            *(prices.measured.get(single[e]) for e in (OWN_SEEN, HIDDEN)),
        )


def choose(frontier: Frontier, max_weight: float | None, max_loss: float | None) -> Point | None:
    """The cheapest point of at most `max_weight`, or the lightest whose loss rises by at most
    `max_loss`; None where there is none."""
    fitting = [
        p
        for p in frontier.points
        if (max_weight is None or p.weight <= max_weight)
        and (max_loss is None or p.cost.loss <= max_loss)
    ]
    if not fitting:
        return None
    return fitting[-1] if max_loss is None else fitting[0]
