"""The plan: segments are weighed, mixtures searched for, and the best measured whole.

Every cost is the whole model's with a schedule, from the layer at which it departs from the dense
one to the end. What keeps that cheap is on how few windows: segments are screened on a few, and
those that good mixtures are made of weighed on more, as these mixtures are; all windows are for the
frontier. A window is measured once, so that more windows cost only those that are new.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ptconvert.plan.search import Choices, Mixture, Prices
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
ROUNDS = 3
MIXTURES = 20  # that a round measures whole, at most
POINTS = 12  # of the frontier that are measured, where it has more


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
    it proposes nothing new. All on a few windows; the best are then measured on all of them, and
    those that another one beats in both respects are dropped. `target` is a weight, and `max_loss`
    a rise of the loss, not to leave out. Where `seconds` are given, no further round begins when
    half of them are over, and of the frontier what was asked for and its ends are measured, and
    more while there is time.
    """

    def within(schedule: Schedule) -> bool:
        return objective.whole(schedule) <= (target or 0)

    def fits(mixture: Mixture) -> bool:
        return within(together(mixture.segments))

    wanted, started = None if target is None else fits, time.monotonic()
    count = len(meter.windows.ids)
    screening, searching = screening_windows(count), search_windows(count)
    longest = len(meter.dense.stages)
    segments = tuple(menu(meter.layers, objective.singles, objective.runs, longest, meter.parallel))
    meter.progress("weighing segments", 0, None)
    choices, prices = Choices(segments, objective.segment), Prices(segments)
    screened, weighed = dict[Segment, float](), dict[Segment, float]()
    known_on = {screening: screened, searching: weighed}  # where both are the same, only weighed

    def learn(some: Sequence[Segment], step: str, windows: range) -> None:
        known_on[windows].update(zip(some, meter.alone(some, step, windows), strict=True))
        prices.learn(as_weighed(screened, weighed))

    def weigh(used: Sequence[Segment], step: str) -> bool:
        """Learns more of the segments that are used, screening before weighing; whether there was
        more to learn."""
        for windows, known in known_on.items():
            if unknown := [segment for segment in used if segment not in known]:
                learn(unknown, step, windows)
                return True
        return False

    learn([s for s in segments if is_basic(s)], "sensitivities", screening)
    tried: dict[Schedule, tuple[Mixture, Cost]] = {}
    for number in range(1, rounds + 1):
        if tried and seconds is not None and time.monotonic() - started > seconds / 2:
            break
        step = f"round {number}"
        meter.progress(f"{step}: searching", 0, None)
        # other weights in each round, where there are more than it measures
        shift = (number - 1) / rounds
        weigh_parts = functools.partial(weigh, step=f"{step}: parts")
        found = _priced(choices, prices, weigh_parts, wanted, shift)
        new = {together(m.segments): m for m in found}
        new = {s: m for s, m in new.items() if s not in tried}
        if not new:
            break
        costs = meter.costs(new, f"{step}: mixtures", searching)
        for (schedule, mixture), cost in zip(new.items(), costs, strict=True):
            tried[schedule] = mixture, cost
        prices.correct([(mixture.segments, cost.kl) for mixture, cost in tried.values()])
    best = undominated(tried.items(), lambda t: (objective.whole(t[0]), t[1][1].kl))
    asked = [t for t in best if target is not None and within(t[0])][-1:]
    if max_loss is not None:  # the lightest that fits, and the next, should others' windows differ
        fits_at = next(i for i, t in enumerate(best) if t[1][1].loss <= max_loss or t is best[-1])
        asked += best[fits_at : fits_at + 2]
    asked = list(dict.fromkeys([*asked, best[0], best[-1]]))
    order = list(dict.fromkeys([*asked, *_thinned(best, None, POINTS)]))
    chosen = []
    for item, cost in zip(order, meter.each([s for s, _ in order], "frontier, whole"), strict=True):
        chosen.append((item, cost))
        late = seconds is not None and time.monotonic() - started > seconds
        if late and len(chosen) >= len(asked):
            break
    points = [
        Point(s, objective.whole(s), tuple((p, prices.alone(p)) for p in m.segments), cost)
        for (s, (m, _)), cost in chosen
    ]
    return Frontier(
        tuple(undominated(points, lambda p: (p.weight, p.cost.kl))),
        tuple(_sensitivities(meter.dense, meter.parallel, prices)),
        len(prices.measured),
        len(tried),
        len(searching),
        meter.passes,
    )


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


def _priced(
    choices: Choices,
    prices: Prices,
    weigh: Callable[[Sequence[Segment]], bool],
    wanted: Callable[[Mixture], bool] | None,
    shift: float,
) -> list[Mixture]:
    """The cheapest mixtures, of segments of which nothing is left to learn; not all where they are
    many."""
    while True:
        found = _thinned(choices.cheapest(prices.costs), wanted, MIXTURES, shift)
        if not weigh(list(dict.fromkeys(s for m in found for s in m.segments if not s.dense))):
            return found


def undominated(items: Iterable[T], values: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that no other beats in both values, by the first value rising."""
    kept, best = list[T](), math.inf
    for (_, second), item in sorted(((values(i), i) for i in items), key=lambda pair: pair[0]):
        if not kept or second < best:
            kept.append(item)
            best = second
    return kept


def _thinned(
    items: Sequence[T], wanted: Callable[[T], bool] | None, most: int, shift: float = 0.0
) -> list[T]:
    """So many, evenly, from a part of a step on; the first; and the last that is wanted."""
    count = len(items)
    step = (count - 1) / max(1, most - 1)
    chosen = set(range(count))
    if count > most:
        chosen = {0, *(min(count - 1, round((i + shift) * step)) for i in range(most))}
    if wanted is not None:
        chosen.update(itertools.islice((i for i in reversed(range(count)) if wanted(items[i])), 1))
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
