"""plan's search: segments, mixtures against brute force, prices, and specs, with no model."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from estimating import SHAPE, VLLM
from hypothesis import given
from hypothesis import strategies as st

from ptconvert.estimate.hardware import read_hardware
from ptconvert.estimate.model import Workload, estimate
from ptconvert.models.guesses import most_guesses
from ptconvert.plan.planner import latency, undominated, waited_for
from ptconvert.plan.search import Choices, Mixture, Prices
from ptconvert.plan.segments import (
    HIDDEN,
    OWN_SEEN,
    OWN_SEEN_LATER,
    Segment,
    alone,
    menu,
    run,
    together,
)
from ptconvert.plan.spec_text import spec_text
from ptconvert.schedule import presets
from ptconvert.schedule.endings import BLOCKING
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec

SINGLES, RUNS = (BLOCKING, OWN_SEEN, HIDDEN), (BLOCKING, OWN_SEEN)


def best_mixtures(
    segments: Sequence[Segment], weight: Callable[[Segment], int], cost: Callable[[Segment], float]
) -> list[Mixture]:
    """A first search, at costs by segment."""
    return list(Choices(segments, weight).cheapest(np.array([cost(s) for s in segments])))


def estimated(
    name: str, ranks: int, guess: int | None = None, prompt: int = 1024, new: int = 512
) -> Callable[[Schedule], float]:
    """Seconds of the 70B on this hardware with vLLM, cut into 8 tracks."""
    hardware, workload = read_hardware(name), Workload(1, prompt, new)

    def seconds(schedule: Schedule) -> float:
        guesses = most_guesses(schedule, 8, guess, SHAPE)
        setting = (schedule, SHAPE, hardware, VLLM.alike(), ranks, workload)
        found = estimate(*setting, tracks=8, guesses=guesses)
        return new / found.tokens_per_second

    return seconds


def all_mixtures(
    segments: Sequence[Segment], start: int, last: int
) -> Iterator[tuple[Segment, ...]]:
    """Every way to cover the positions from start to last, by trying each."""
    if start == last:
        yield ()
    for segment in segments:
        if segment.start == start:
            for rest in all_mixtures(segments, segment.stop, last):
                yield (segment, *rest)


def random_costs(segments: Sequence[Segment], seed: int) -> dict[Segment, float]:
    rng = random.Random(seed)
    return {s: 0.0 if s.dense else rng.choice([0.0, rng.random(), 3.0]) for s in segments}


@pytest.mark.parametrize(
    ("layers", "parallel", "among"),
    [
        (2, False, ["a0! m0^1 a1. m1!", "a0|m0! a1~1 m1!", "a0|a1! m0|m1!"]),
        (4, True, ["a0|m0! a1|m1^1 a2|m2. a3|m3!", "a0|m0! a1|m1|a2|m2! a3|m3!"]),
    ],
)
def test_every_mixture_of_segments_is_a_schedule_with_the_waits_of_its_parts(
    layers: int, parallel: bool, among: list[str]
) -> None:
    segments = tuple(menu(layers, SINGLES, (*RUNS, OWN_SEEN_LATER), 4, parallel))
    mixtures = list(all_mixtures(segments, 0, 4))
    assert len(mixtures) == len(set(mixtures)) > 50
    for mixture in mixtures:
        schedule = together(mixture)  # which checks itself
        assert schedule.layers == layers
        assert schedule.counts.waited_for == sum(s.waits for s in mixture)
    assert set(among) <= {str(together(m)) for m in mixtures}


@pytest.mark.parametrize("parallel", [False, True])
def test_the_layer_in_which_a_segment_begins(parallel: bool) -> None:
    """Before it all is as in the dense model."""
    for segment in menu(4, SINGLES, (*RUNS, OWN_SEEN_LATER), 8, parallel):
        schedule, dense = alone(segment, 4), dense_schedule(4, parallel)
        if segment.dense:
            continue
        first = next(stage for stage in schedule.stages if stage not in dense.stages)
        assert segment.layers[0] == min(sublayer.layer for sublayer in first.sublayers)


def test_all_reduces_that_change_nothing_are_left_out() -> None:
    assert str(alone(run(1, 2, OWN_SEEN), 2)) == "a0! m0. a1! m1!"
    chain = [run(0, 1, OWN_SEEN), run(1, 2, OWN_SEEN), run(2, 3, HIDDEN), run(3, 4, BLOCKING)]
    assert str(together(chain)) == "a0^1 m0^1 a1~1 m1!"
    parallel = run(1, 2, OWN_SEEN, parallel=True)
    assert str(alone(parallel, 4)) == "a0|m0! a1|m1. a2|m2! a3|m3!"


@pytest.mark.parametrize("seed", range(8))
def test_best_mixtures_are_those_of_brute_force(seed: int) -> None:
    segments = tuple(menu(3, SINGLES, RUNS, 3))
    costs = random_costs(segments, seed)
    found = best_mixtures(segments, lambda s: s.waits, costs.__getitem__)
    best: dict[int, float] = {}
    for mixture in all_mixtures(segments, 0, 6):
        waits = sum(s.waits for s in mixture)
        best[waits] = min(best.get(waits, 1e9), sum(costs[s] for s in mixture))
    expected = undominated(best.items(), lambda item: item)
    assert [m.weight for m in found] == [weight for weight, _ in expected]
    assert [m.cost for m in found] == pytest.approx([cost for _, cost in expected])
    for one in found:
        assert one.weight == sum(s.waits for s in one.segments)
        assert one.cost == pytest.approx(sum(costs[s] for s in one.segments))


def literal(
    segments: Sequence[Segment], weights: dict[Segment, int], costs: dict[Segment, float]
) -> list[tuple[int, float, tuple[Segment, ...]]]:
    """What best_mixtures is to find, to the bit and ties included: label by label, by its text."""
    last = max(s.stop for s in segments)
    labels: list[dict[int, tuple[float, tuple[Segment, ...]]]] = [{} for _ in range(last + 1)]
    labels[0][0] = (0.0, ())
    for position in range(last + 1):
        here, kept = labels[position], dict[int, tuple[float, tuple[Segment, ...]]]()
        for weight in sorted(here):
            if not kept or here[weight][0] < min(c for c, _ in kept.values()):
                kept[weight] = here[weight]
        labels[position] = kept
        for (weight, (cost, some)), segment in itertools.product(kept.items(), segments):
            if segment.start == position:
                total, new = weight + weights[segment], cost + costs[segment]
                reached = labels[segment.stop]
                if total not in reached or new < reached[total][0]:
                    reached[total] = (new, (*some, segment))
    return [(w, c, some) for w, (c, some) in labels[last].items()]


@given(st.integers(1, 5), st.integers(1, 10), st.randoms(use_true_random=False))
def test_best_mixtures_are_those_of_the_literal_search(
    layers: int, longest: int, rng: random.Random
) -> None:
    segments = list(menu(layers, SINGLES, RUNS, longest))
    weights = {s: rng.choice([s.waits, s.waits - s.length, rng.randint(-9, 9)]) for s in segments}
    costs = {s: rng.choice([0.0, 0.5, rng.random()]) for s in segments}
    rng.shuffle(segments)
    found = best_mixtures(segments, weights.__getitem__, costs.__getitem__)
    expected = literal(segments, weights, costs)
    assert [(m.weight, m.cost, m.segments) for m in found] == expected


def test_eighty_layers_take_seconds() -> None:
    """For both objectives the menu, its weights, what is measured first and six searches, with the
    schedules of what they find: of the processor's time, which other processes don't lengthen. It
    was minutes."""
    started, rng, seconds = time.process_time(), random.Random(0), estimated("h100-pcie", 8)
    for objective in (waited_for(overlap=True), latency(seconds, SHAPE.layers)):
        segments = tuple(menu(SHAPE.layers, objective.singles, objective.runs, 2 * SHAPE.layers))
        basic = [s for s in segments if not s.dense and (s.beside or s.length <= 2)]
        assert len([alone(s, SHAPE.layers) for s in basic]) > 600
        choices, prices = Choices(segments, objective.segment), Prices(segments)
        prices.learn({s: rng.random() * s.length for s in basic})
        for _ in range(6):
            found = choices.cheapest(prices.costs)
            assert len(found) > 150
            some = [found[i] for i in range(0, len(found), len(found) // 31)]
            assert len({together(m.segments) for m in some}) == len(some)
            used = dict.fromkeys(s for m in some for s in m.segments if s not in prices.measured)
            prices.learn({s: prices.alone(s) * (1 + rng.random()) for s in used if not s.dense})
    assert time.process_time() - started < 5


def test_a_weight_that_is_saved_may_be_negative() -> None:
    segments = tuple(menu(2, SINGLES, RUNS, 4))
    costs = random_costs(segments, 1)
    found = best_mixtures(segments, lambda s: s.waits - (s.stop - s.start), costs.__getitem__)
    same = best_mixtures(segments, lambda s: s.waits, costs.__getitem__)
    assert [(m.weight + 4, m.cost) for m in found] == [(m.weight, m.cost) for m in same]


def test_prices_guess_runs_from_their_halves_until_they_are_measured() -> None:
    prices = Prices(tuple(menu(3, (BLOCKING,), (BLOCKING,), 6)))
    first, second, third = (run(p, p + 2, BLOCKING) for p in range(3))
    prices.learn({first: 0.2, second: 0.1, third: 0.4})
    longer, whole = run(0, 3, BLOCKING), run(0, 4, BLOCKING)
    assert prices.alone(longer) == pytest.approx(0.3)
    assert prices.alone(whole) == pytest.approx(0.3 + 0.5 - 0.1)
    prices.learn({longer: 0.6})  # twice the guess, and so longer ones are guessed at twice, too
    assert prices.alone(longer) == 0.6
    assert prices.alone(run(1, 4, BLOCKING)) == pytest.approx(2 * 0.5)
    assert prices.alone(whole) == pytest.approx(2 * (0.6 + 2 * 0.5 - 0.1))
    assert prices.alone(run(0, 1, BLOCKING)) == 0.0


def test_guesses_stay_finite_however_they_multiply() -> None:
    """Each is a multiple of shorter ones, of which the longest has 158 here."""
    segments = list(menu(80, (BLOCKING, OWN_SEEN), (BLOCKING,), 160))
    prices = Prices(segments)
    prices.learn({s: 1e-7 for s in segments if s.length == 2 or s.ending == OWN_SEEN})
    prices.learn({run(start, start + 3, BLOCKING): 1e-4 for start in range(0, 150, 3)})
    assert np.isfinite(prices.costs).all() and prices.alone(run(0, 160, BLOCKING)) > 1
    lightest = Choices(segments, lambda s: s.waits).cheapest(prices.costs)[0]
    assert lightest.weight == 1 and together(lightest.segments).counts.waited_for == 1


def literal_guess(measured: dict[Segment, float], more: float, segment: Segment) -> float:
    """What `Prices.alone` is to say, by its text."""
    start, stop, ending, beside, _ = segment
    if segment in measured or stop - start < 3 or beside:
        return measured.get(segment, 0.0)
    parts = (run(start, stop - 1, BLOCKING), run(start + 1, stop, ending))
    head, tail = (literal_guess(measured, more, part) for part in parts)
    middle = literal_guess(measured, more, run(start + 1, stop - 1, BLOCKING))
    return more * max(head, tail, head + tail - middle)


@pytest.mark.parametrize("layers", [2, 3])
def test_prices_are_those_of_the_literal_guess(layers: int) -> None:
    rng = random.Random(layers)
    segments = list(menu(layers, SINGLES, (*RUNS, OWN_SEEN_LATER), 2 * layers))
    rng.shuffle(segments)
    basic = [s for s in segments if not s.dense and (s.beside or s.length <= 2)]
    longer = [s for s in segments if s.length > 2 and not s.beside]
    prices, ratios = Prices(segments), dict[Segment, float]()
    measured = {s: rng.random() for s in basic}
    prices.learn(measured)
    for _ in range(3):
        more = float(np.quantile([*ratios.values()], 0.1)) if ratios else 1.0
        guessed = {s: literal_guess(measured, more, s) for s in segments}
        assert {s: prices.alone(s) for s in segments} == pytest.approx(guessed)
        assert prices.costs.tolist() == pytest.approx([guessed[s] for s in segments])
        new = {s: rng.random() for s in rng.sample(longer, min(3, len(longer)))}
        fresh = {s: c for s, c in measured.items() if s not in new}
        guesses = {s: literal_guess(fresh, more, s) / more for s in new}
        ratios = {s: cost / guesses[s] for s, cost in new.items() if guesses[s] > 0} | ratios
        prices.learn(new)
        measured |= new


def test_corrections_find_what_segments_do_to_each_other() -> None:
    """Costs of pairs come on top of sums; corrected prices find the best that is really there."""
    segments = tuple(menu(3, (BLOCKING, OWN_SEEN), (BLOCKING,), 3))
    costs = random_costs(segments, 5)
    rng = random.Random(2)
    extra = {pair: rng.random() for pair in itertools.combinations(segments, 2)}

    def real(mixture: Sequence[Segment]) -> float:
        some = [s for s in mixture if not s.dense]
        pairs = itertools.combinations(some, 2)
        return sum(costs[s] for s in some) + sum(extra.get(p, 0.0) for p in pairs)

    everything = list(all_mixtures(segments, 0, 6))
    weights = sorted({sum(s.waits for s in m) for m in everything})

    def gap(rounds: int) -> float:
        """How far the best tried of each weight is from the best there is, added up."""
        prices, tried = Prices(segments), dict[tuple[Segment, ...], float]()
        choices = Choices(segments, lambda s: s.waits)
        prices.learn({s: c for s, c in costs.items() if not s.dense})
        for _ in range(rounds):
            for mixture in choices.cheapest(prices.costs):
                tried[mixture.segments] = real(mixture.segments)
            prices.correct(list(tried.items()))
        of = [min(_up_to(w, tried), default=9.0) for w in weights]
        best = [min(_up_to(w, {m: real(m) for m in everything})) for w in weights]
        return sum(a - b for a, b in zip(of, best, strict=True))

    assert gap(12) < 0.5 * gap(1)


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_what_all_parts_have_in_common_is_laid_on_all(factor: float) -> None:
    """Else the next search would flee to the parts that no whole had."""
    segments = tuple(menu(4, (BLOCKING, OWN_SEEN), (BLOCKING,), 4))
    costs = random_costs(segments, 3)
    prices, choices = Prices(segments), Choices(segments, lambda s: s.waits)
    prices.learn({s: c for s, c in costs.items() if not s.dense})
    before = prices.costs
    found = [m.segments for m in choices.cheapest(before)]
    assert len({s for some in found for s in some}) < len(segments) / 2
    prices.correct([(m, factor * sum(costs[s] for s in m if not s.dense)) for m in found])
    times = prices.costs[before > 0] / before[before > 0]
    assert times == pytest.approx(np.full(len(times), factor), rel=0.25)


def _up_to(weight: int, costs: dict[tuple[Segment, ...], float]) -> list[float]:
    return [c for m, c in costs.items() if sum(s.waits for s in m) <= weight]


def test_objectives() -> None:
    syncs = waited_for(overlap=False)
    assert all(not e.kind.lagged for e in (*syncs.singles, *syncs.runs))

    def seconds(schedule: Schedule) -> float:
        return 1.0 + schedule.counts.all_reduces

    objective = latency(seconds, 3, grain=0.1)
    dense = seconds(dense_schedule(3))
    assert objective.whole(dense_schedule(3)) == pytest.approx(1e3 * dense)
    assert objective.segment(run(0, 3, BLOCKING)) == round(-2 / (0.1 * dense))
    assert latency(seconds, 3).segment(run(0, 3, BLOCKING)) == -2 * 4


@pytest.mark.parametrize(("ranks", "rank"), [(8, None), (8, 64), (4, None), (2, None)])
@pytest.mark.parametrize("name", ["h100-sxm", "h100-pcie"])
def test_latency_rounds_no_gain_away(name: str, ranks: int, rank: int | None) -> None:
    """Of 160 all-reduces each is small, however much more is lost by guesses, or by ranks that run
    several tracks one after another. Over NVLink vLLM's overlapped ones cost more than its blocking
    ones, over PCIe they gain; dropping one gains where nothing else is lost by it."""
    objective = latency(estimated(name, ranks, rank), SHAPE.layers)
    assert objective.segment(Segment(60, 62, BLOCKING, beside=True)) == -4
    loses = name == "h100-sxm"
    assert (objective.segment(run(60, 61, HIDDEN)) > 0) is loses
    dropped = objective.segment(run(60, 62, BLOCKING))
    seen = [objective.segment(run(60, 61, ending)) for ending in (OWN_SEEN, OWN_SEEN_LATER)]
    if rank is None and ranks == 8:
        assert dropped == -4 and all((added > 0) is loses for added in seen)
    elif rank is None:
        assert dropped >= 0 and all(added > 0 for added in seen)


def test_sums_of_segments_are_the_latency_of_the_whole() -> None:
    """Up to rounding, wherever the segments stand; also where many overlap in a row."""
    seconds, layers = estimated("h100-pcie", 8, prompt=64, new=64), 12
    objective, dense = latency(seconds, layers, grain=1e-6), seconds(dense_schedule(layers))
    singles = [run(p, p + 1, OWN_SEEN) for p in range(23)]
    for parts in (
        [*singles, run(23, 24, BLOCKING)],
        [
            run(0, 5, BLOCKING),
            run(5, 8, OWN_SEEN_LATER),
            run(8, 16, OWN_SEEN),
            run(16, 24, BLOCKING),
        ],
        [run(0, 22, HIDDEN), run(22, 23, HIDDEN), run(23, 24, BLOCKING)],
    ):
        whole = seconds(Schedule(tuple(stage for part in parts for stage in part.stages)))
        added = 1e-6 * sum(map(objective.segment, parts))
        assert added == pytest.approx(whole / dense - 1, rel=0.05)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("ranks", "guess"), [(8, None), (8, 64), (2, None)])
def test_weights_of_segments_are_exact(ranks: int, guess: int | None, parallel: bool) -> None:
    """Not those of the whole schedule alone: though only short runs are estimated."""
    seconds, layers = estimated("h100-sxm", ranks, guess), 12 if parallel else 7
    stages = dense_schedule(layers, parallel).stages
    objective = latency(seconds, layers, grain=1e-9, parallel=parallel)
    dense = seconds(Schedule(stages))
    for segment in menu(layers, objective.singles, objective.runs, len(stages), parallel):
        whole = Schedule((*stages[: segment.start], *segment.stages, *stages[segment.stop :]))
        expected = (seconds(whole) / dense - 1) / 1e-9
        assert objective.segment(segment) == pytest.approx(expected, abs=1)


# Specs


@pytest.mark.parametrize(
    ("parts", "uses"),
    [
        ([("tensor_parallel", {}, 6)], ["tensor_parallel"]),
        ([("tensor_parallel", {}, 1), ("ladder", {}, 5)], ["tensor_parallel", "ladder"]),
        (
            [("parallel_track", {"depth": 3}, 6), ("ladder", {}, 2), ("tensor_parallel", {}, 4)],
            ["parallel_track", "ladder", "tensor_parallel"],
        ),
        ([("delayed", {"delay": 2}, 4), ("desync", {"every": 3}, 6)], ["delayed", "desync"]),
        (
            [("sync_point_drop", {}, 3), ("parallel_track", {"depth": 2, "overlap": 1}, 6)],
            ["sync_point_drop", "parallel_track"],
        ),
        ([("parallel_block", {}, 3), ("layer_parallel", {}, 5)], None),
    ],
)
def test_presets_are_found_again(
    parts: list[tuple[str, dict[str, int], int]], uses: list[str] | None
) -> None:
    ranges, first = [], 0
    for name, options, layers in parts:
        ranges.append((name, presets.PRESETS[name](range(first, first + layers), **options)))
        first += layers
    schedule = presets.join(ranges)
    spec = parse_spec(spec_text(schedule, 4, ["by a test"], lambda layers: f"{layers}"), "spec")
    assert spec.schedule() == schedule and spec.tracks == 4
    if uses is not None:
        assert [item.use for item in spec.items] == uses


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_can_be_written_as_a_spec(seed: int, parallel: bool) -> None:
    segments = tuple(menu(10 if parallel else 5, SINGLES, (*RUNS, OWN_SEEN_LATER), 5, parallel))
    rng, position, chosen = random.Random(seed), 0, list[Segment]()
    while position < 10:
        chosen.append(rng.choice([s for s in segments if s.start == position]))
        position = chosen[-1].stop
    schedule = together(chosen)
    text = spec_text(schedule, 2, [], lambda _: "", parallel=parallel)
    assert parse_spec(text, "spec").schedule(parallel) == schedule


def test_presets_of_parallel_layers_are_found_again() -> None:
    parts = [("tensor_parallel", {}), ("parallel_track", {"depth": 3}), ("delayed", {"delay": 2})]
    parts += [("layer_parallel", {}), ("ladder", {})]
    schedule = presets.join(
        (name, presets.PRESETS[name](range(6 * i, 6 * i + 6), True, **options))
        for i, (name, options) in enumerate(parts)
    )
    spec = parse_spec(spec_text(schedule, 4, [], lambda _: "", parallel=True), "spec")
    assert spec.schedule(parallel=True) == schedule
    assert [item.use for item in spec.items] == [name for name, _ in parts]


def test_what_presets_cannot_say_is_written_as_stages() -> None:
    schedule = Schedule.parse("a0! m0! a1~1 m1^1 a2. m2^1 a3! m3! a4! m4!")
    spec = parse_spec(spec_text(schedule, 2, [], lambda _: ""), "spec")
    assert [item.use for item in spec.items] == ["tensor_parallel", None, "tensor_parallel"]
