"""What computing an assignment and guesses will hold and how long it will take, from the sizes and
one layer's first step."""

from __future__ import annotations

import time

import torch

from ptconvert.calibrate.affinity import components, group_bytes
from ptconvert.calibrate.guess import BATCH_TOKENS, most_streams
from ptconvert.calibrate.on_disk import MEMORY_BYTES
from ptconvert.calibrate.regression import MATRICES, RIDGES, Moments, fits
from ptconvert.checkpoint.inventory import weights_dtype
from ptconvert.convert.transform import Plan
from ptconvert.measure.needs import Held, Needs, Phase, Place
from ptconvert.measure.one_layer import in_a_layer, one_layer, step_of
from ptconvert.models.guesses import most_guesses
from ptconvert.models.shape import DTYPE_BYTES, DTYPES, ModelShape
from ptconvert.runtime.memory import PROCESS_BYTES
from ptconvert.spec.document import Spec
from ptconvert.spec.terms import ASSIGNMENTS

_TIMED_FEATURES = 512  # of the regression that is timed; its time goes with the cube
_PASSES = 3  # of a layer while guesses are fitted: as it came, with guesses, and the dense model's
_AFFINITY_COPIES = 4  # of the largest pair's affinity while it is computed


def calibration_needs(
    plan: Plan, spec: Spec, windows: int, length: int, dtype: str, device: str
) -> Needs:
    """The phases of what a plan's spec wants from so many windows of a text. `dtype` is torch's
    name of one."""
    shape, tracks, schedule = plan.shape, spec.tracks, plan.schedule
    number = DTYPE_BYTES[DTYPES[dtype]]
    scale = number / DTYPE_BYTES[weights_dtype(plan.source, shape)]
    process = Held("the process", PROCESS_BYTES, Place.MEMORY)
    phases = []
    if spec.assignment != ASSIGNMENTS[0]:
        groups = [(group_bytes(shape, g, tracks), g) for g in components(schedule)]
        largest = max((nbytes for nbytes, _ in groups), default=0)
        step = step_of(one_layer(plan.source.config, 1, device), dtype, 1, length, keeps=False)
        flops = 2 * sum(a * b for a, b in _matrices(shape)) * length / step.forward
        products = sum(2 * shape.width * nbytes / 4 * 2 for nbytes, _ in groups)  # two readers
        phases.append(
            Phase(
                "affinity",
                (
                    Held("weights", int(scale * plan.source.nbytes), Place.DEVICE),
                    Held("one pair's affinity", _AFFINITY_COPIES * _pair(shape), Place.DEVICE),
                    Held(
                        "all pairs of a run",
                        largest,
                        Place.MEMORY if largest <= MEMORY_BYTES else Place.DISK,
                    ),
                    process,
                ),
                windows * shape.layers * step.forward + products / flops,
            )
        )
    if spec.guess is not None:
        guesses = most_guesses(schedule, tracks, spec.guess, shape)
        step = step_of(
            one_layer(plan.source.config, tracks, device), dtype, 1, length, False, False
        )
        streams = most_streams(schedule, tracks) * windows * length * shape.width * number
        at_once = max(1, BATCH_TOKENS // length)
        phases.append(
            Phase(
                "guesses",
                (
                    Held("weights, as converted", int(scale * plan.nbytes), Place.DEVICE),
                    Held(
                        "one track's regression",
                        MATRICES * (2 * shape.width) ** 2 * 8,
                        Place.DEVICE,
                    ),
                    Held(
                        "the tracks' factors",
                        len(RIDGES) * tracks * spec.guess * 3 * shape.width * 8,
                        Place.DEVICE,
                    ),
                    Held(
                        f"a layer's streams, {at_once} windows",
                        at_once * in_a_layer(shape, tracks, length, number),
                        Place.DEVICE,
                    ),
                    Held(
                        f"streams, {windows} windows",
                        streams,
                        Place.MEMORY if streams <= MEMORY_BYTES else Place.DISK,
                    ),
                    process,
                    Held("a conversion, for a moment", plan.nbytes, Place.DISK),
                ),
                _PASSES * windows * shape.layers * step.forward
                + len(guesses) * tracks * _fit_seconds(shape.width, windows * length, device),
            )
        )
    return Needs(device, tuple(phases))


def _matrices(shape: ModelShape) -> list[tuple[int, int]]:
    """The sizes of a layer's matrices."""
    sizes = [shape.size(rule) for rule in shape.rules]
    return [(size[0], size[1]) for size in sizes if len(size) == 2]


def _pair(shape: ModelShape) -> int:
    """Bytes of the affinity of two MLPs' neurons."""
    return 4 * shape.neurons**2


def _fit_seconds(width: int, tokens: int, device: str) -> float:
    """About how long one track's regression takes: sums over all tokens and the solution, each
    timed at fewer features."""
    features = min(_TIMED_FEATURES, 2 * width)
    scale = 2 * width / features
    pairs = 2 * features
    train, test = (Moments(features, features // 2, device) for _ in range(2))
    for moments in (train, test):
        moments.add(torch.randn(pairs, features), torch.randn(pairs, features // 2))
    started = time.perf_counter()
    train.add(torch.randn(pairs, features), torch.randn(pairs, features // 2))
    added = time.perf_counter()
    fits(train, test, 1)
    solved = time.perf_counter()
    return scale**2 * tokens / pairs * (added - started) + scale**3 * (solved - added)
