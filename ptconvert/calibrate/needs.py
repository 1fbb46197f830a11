"""What computing an assignment and guesses will hold and how long it will take, from the sizes and
one layer's first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ptconvert.calibrate import stand_ins
from ptconvert.calibrate.affinity import (
    components,
    group_bytes,
    group_flops,
    own_read,
    pair_numbers,
    product_numbers,
)
from ptconvert.calibrate.guess import alone as alone_program
from ptconvert.calibrate.on_disk import MEMORY_BYTES
from ptconvert.calibrate.regression import MATRICES, RIDGES, Moments, fits
from ptconvert.calibrate.streams import BATCH_TOKENS, most_streams
from ptconvert.checkpoint.inventory import weights_dtype
from ptconvert.checkpoint.quantised import as_dequantised
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.convert.transform import Plan
from ptconvert.measure.needs import Held, Needs, Phase, Place, spilling
from ptconvert.measure.one_layer import PROCESS, forward_seconds, in_a_layer, one_layer
from ptconvert.models.guesses import most_guesses
from ptconvert.models.shape import DTYPE_BYTES, DTYPES
from ptconvert.schedule.lower import Step
from ptconvert.schedule.schedule import Schedule
from ptconvert.shorten import counted
from ptconvert.spec.document import Spec

_TIMED_FEATURES = 512  # of the regression that is timed; its time goes with the cube
_PASSES = 2  # of a layer while scales or guesses are fitted: as it came, and with them
_COPIES = 5  # of a pair's affinity while it is computed


def calibration_needs(
    plan: Plan, spec: Spec, windows: int, length: int, dtype: str, device: str
) -> Needs:
    """The phases of what a plan's spec wants from so many windows of a text. `dtype` is torch's
    name of one."""
    given = (windows, length, dtype, device)
    phases = (PHASES[key](plan, wanted, *given) for key, wanted in spec.wanted.items())
    return Needs(device, tuple(phases))


def stand_in_phases(
    source: Checkpoint,
    wanted: Mapping[str, Any],
    tracks: int,
    windows: int,
    length: int,
    dtype: str,
    device: str,
) -> Iterator[Phase]:
    """The phases of an assignment and guesses for no schedule in particular (`stand_ins`)."""
    plan = stand_ins.conversion(source, tracks, wanted)
    given = (windows, length, dtype, device)
    if "assignment" in wanted:
        schedule = stand_ins.assigned_for(plan.shape)
        yield _affinity(plan, wanted["assignment"], *given, schedule=schedule)
    if "guess" in wanted:
        yield _guesses(plan, wanted["guess"], *given, alone=True)


def _affinity(
    plan: Plan,
    _wanted: str,
    windows: int,
    length: int,
    dtype: str,
    device: str,
    schedule: Schedule | None = None,
) -> Phase:
    """For the plan's schedule, or another one."""
    shape, config = plan.shape, plan.source.config
    pairs = own_read(shape, schedule or plan.schedule)
    groups = list(components(pairs))
    largest = max((group_bytes(shape, group, plan.tracks) for group in groups), default=0)
    product = max((product_numbers(shape, pair) for pair in pairs), default=0)
    pair = max((pair_numbers(shape, pair, plan.tracks) for pair in pairs), default=0)
    mixtures = sum(map(shape.is_mixture, range(shape.layers)))  # whose experts run twice
    seconds, exact = (
        forward_seconds(one_layer(config, 1, device, one), one, length)
        for one in (dtype, "float32")  # the affinities' products are in fp32
    )
    numbers = shape.largest_layer
    rate = 2 * numbers * length / exact
    return Phase(
        "affinity",
        (
            Held("weights", _scaled(plan, plan.source.nbytes, dtype), Place.DEVICE),
            Held("one pair's affinity", _COPIES * 4 * product, Place.DEVICE),
            spilling("all pairs of a run", largest, MEMORY_BYTES),
            Held("a pair in fp64", 8 * pair, Place.MEMORY),
            PROCESS,
        ),
        windows * (shape.layers + mixtures) * seconds
        + sum(group_flops(shape, group) for group in groups) / rate,
    )


def _scales(plan: Plan, _wanted: str, windows: int, length: int, dtype: str, device: str) -> Phase:
    seconds = forward_seconds(
        one_layer(plan.source.config, plan.tracks, device, dtype), dtype, length
    )
    held = _stagewise(plan, windows, length, dtype)
    return Phase("scales", held, _PASSES * windows * plan.shape.layers * seconds)


def _stagewise(
    plan: Plan,
    windows: int,
    length: int,
    dtype: str,
    program: Sequence[Step] | None = None,
) -> tuple[Held, ...]:
    """What windows that go through a converted model stage by stage hold, by its schedule or
    another `program`."""
    shape, tracks, number = plan.shape, plan.tracks, DTYPE_BYTES[DTYPES[dtype]]
    streams = most_streams(plan.schedule, tracks, shape.norms_sums, program)
    nbytes = streams * windows * length * shape.width * number
    at_once = max(1, BATCH_TOKENS // length)
    layer = at_once * in_a_layer(shape, tracks, length, number)
    return (
        Held("weights, as converted", _scaled(plan, plan.nbytes, dtype), Place.DEVICE),
        Held(f"a layer's streams, {counted(at_once, 'window')}", layer, Place.DEVICE),
        spilling(f"streams, {counted(windows, 'window')}", nbytes, MEMORY_BYTES),
        PROCESS,
        Held("a conversion, for a moment", plan.nbytes, Place.DISK),
    )


def _guesses(
    plan: Plan,
    rank: int,
    windows: int,
    length: int,
    dtype: str,
    device: str,
    alone: bool = False,
) -> Phase:
    """With `alone` as `guess_alone` fits them."""
    shape, tracks = plan.shape, plan.tracks
    seconds = forward_seconds(one_layer(plan.source.config, tracks, device, dtype), dtype, length)
    features = shape.width if alone else 2 * shape.width
    regression = MATRICES * (features + shape.width) ** 2 * 8
    factors = len(RIDGES) * tracks * rank * (features + shape.width) * 8
    fitted = tracks * len(most_guesses(plan.schedule, tracks, rank, shape))
    return Phase(
        "guesses",
        (
            Held("one track's regression", regression, Place.DEVICE),
            Held("the tracks' factors", factors, Place.DEVICE),
            *_stagewise(
                plan, windows, length, dtype, alone_program(shape.dense) if alone else None
            ),
        ),
        (1 if alone else _PASSES) * windows * shape.layers * seconds
        + fitted * _fit_seconds(features, shape.width, windows * length, device),
    )


# By the spec's key, what computing it takes.
PHASES: Mapping[str, Callable[[Plan, Any, int, int, str, str], Phase]] = {
    "assignment": _affinity,
    "scale": _scales,
    "guess": _guesses,
}


def _scaled(plan: Plan, nbytes: int, dtype: str) -> int:
    """Bytes of weights as stored, in a dtype; quantised ones, as they are opened."""
    stored = DTYPE_BYTES[weights_dtype(plan.source, plan.shape)]
    unpacked = as_dequantised(plan.shape, plan.source).nbytes / plan.source.nbytes
    return int(nbytes * unpacked) * DTYPE_BYTES[DTYPES[dtype]] // stored


def _fit_seconds(features: int, width: int, tokens: int, device: str) -> float:
    """About how long one track's regression takes: sums over all tokens and the solution, each
    timed at fewer features."""
    timed = min(_TIMED_FEATURES, features)
    scale = features / timed
    targets, pairs = max(1, round(width / scale)), 2 * timed
    train, test = (Moments(timed, targets, device) for _ in range(2))

    def add(moments: Moments) -> None:
        z_PF, y_PD = (torch.randn(pairs, count, device=device) for count in (timed, targets))
        moments.add(z_PF, y_PD, torch.ones(pairs, device=device))
        float(moments.sums[0, 0])  # waits for it, on a GPU too

    add(train)
    add(test)
    started = time.perf_counter()
    add(train)
    added = time.perf_counter()
    read = torch.randn(timed, targets, device=device)  # an identity is solved at once
    float(fits(train, test, 1, read.T @ read)[-1].errors[0])
    solved = time.perf_counter()
    return scale**2 * tokens / pairs * (added - started) + scale**3 * (solved - added)
