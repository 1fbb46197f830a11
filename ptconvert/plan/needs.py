"""What a plan will hold and how long it will take, from the sizes and one layer's first step."""

from __future__ import annotations

from dataclasses import replace

from ptconvert.calibrate.needs import stand_in_phases
from ptconvert.checkpoint.inventory import weights_dtype
from ptconvert.measure.divergence import LOGITS_AT_ONCE
from ptconvert.measure.needs import Held, Needs, Phase, Place
from ptconvert.measure.one_layer import (
    PROCESS,
    forward_seconds,
    head_seconds,
    in_a_layer,
    one_layer,
)
from ptconvert.models.shape import DTYPE_BYTES, DTYPES, TORCH_NAMES
from ptconvert.plan.case import Case
from ptconvert.plan.planner import (
    FINALISTS,
    MIXTURES,
    NEAR,
    POINTS,
    REFINEMENTS,
    ROUNDS,
    Objective,
    is_basic,
    screening_windows,
    search_windows,
)
from ptconvert.plan.segments import alone, menu
from ptconvert.plan.sensitivity import all_as_tracks, kept_layers, last_kept
from ptconvert.runtime.load import opened
from ptconvert.shorten import counted

_LOGITS = 5  # copies in fp32 of LOGITS_AT_ONCE numbers, while two predictions are compared


def plan_needs(
    case: Case, objective: Objective, rounds: int | None, minutes: float | None
) -> Needs:
    """A plan's phases: the source's pass, what is fitted to weigh with, the weighing of segments,
    and mixtures measured whole.

    Times are for all rounds and points, or for `minutes` where these are less, and for as many
    parts of mixtures as the model has sublayers; a search weighs more, or fewer, on its way.
    """
    source, shape, tracks = case.source, case.shape, case.tracks
    dtype, device = case.dtype, case.device
    count, length = len(case.windows.ids), case.windows.length
    stored = weights_dtype(source, shape)
    if dtype == "auto":
        dtype = TORCH_NAMES[stored]
    number = DTYPE_BYTES[DTYPES[dtype]]
    scale = number / DTYPE_BYTES[stored]
    weights, copy = opened(source).nbytes, all_as_tracks(source, tracks).nbytes
    all_tracks = copy * weights // source.nbytes
    stream = count * length * shape.width * number
    kept = kept_layers(shape.layers, count * length * shape.width * 4)
    at_once = min(case.batch.size, count)
    layer = forward_seconds(one_layer(source.config, tracks, device, dtype), dtype, length)
    layers_seconds = count * shape.layers * layer
    heads_seconds = count * head_seconds(shape.vocabulary, shape.width, dtype, device, length)
    every_one = menu(shape.layers, objective.singles, objective.runs, 2, shape.family.parallel)
    # of several segments the same, and each from the kept layer before it to the end
    begins = {alone(s, shape.layers): s.layers[0] for s in every_one if is_basic(s)}.values()
    share = {b: 1 - last_kept(kept, b) / shape.layers for b in range(shape.layers)}
    screened, searched = (len(of(count)) / count for of in (screening_windows, search_windows))
    parts = [begin for begin in share for _ in range(len(shape.dense.stages) // shape.layers)]
    runs = [*((screened, b) for b in begins), *((searched - screened, b) for b in parts)]
    weighing = sum(on * share[begin] for on, begin in runs)
    heads = sum(on for on, _ in runs)  # which every run has, wherever it begins
    weighing_seconds = weighing * layers_seconds + heads * heads_seconds
    mixtures = (rounds or ROUNDS) * (MIXTURES + REFINEMENTS * NEAR)
    measuring = searched * mixtures + (1 - searched) * (POINTS + FINALISTS)
    whole_seconds = layers_seconds + heads_seconds
    if minutes is not None:
        measuring = max(0.0, min(measuring, (60 * minutes - weighing_seconds) / whole_seconds))
    guesses, fitting = 0, tuple[Phase, ...]()
    if (in_place := case.in_place) is not None:
        guesses = in_place.most(shape, tracks)
        sizes = (len(in_place.ids), in_place.ids.shape[1] - 1)
        fitting = tuple(stand_in_phases(source, in_place.wanted, tracks, *sizes, dtype, device))
    sequence = length * shape.width * number
    # before these layers, and the last of all
    streams = Held(
        f"streams, {counted(count, 'window')}, {counted(len(kept), 'layer')}",
        (len(kept) + 1) * stream,
        Place.MEMORY,
    )
    head = Held("the source's head", shape.vocabulary * shape.width * number, Place.DEVICE)
    fitting = tuple(replace(phase, held=(*phase.held, head, streams)) for phase in fitting)
    throughout = (
        Held("weights, as tracks", int(scale * all_tracks), Place.DEVICE),
        *[Held("guesses", guesses * number, Place.DEVICE)] * bool(guesses),
        head,
        Held(
            f"a layer's streams, {counted(at_once, 'window')}",
            at_once * in_a_layer(shape, tracks, length, number),
            Place.DEVICE,
        ),
        Held("logits, a piece", _LOGITS * 4 * LOGITS_AT_ONCE, Place.DEVICE),
        streams,
        Held("some windows of two of them", 2 * stream, Place.MEMORY),
        PROCESS,
    )
    return Needs(
        device,
        (
            Phase(
                "the source's predictions",
                (
                    Held("weights", int(scale * weights), Place.DEVICE),
                    Held(
                        f"streams, {counted(at_once, 'window')}, all layers",
                        (shape.layers + 1) * at_once * sequence,
                        Place.DEVICE,
                    ),
                    streams,
                    Held("one of them, as it is joined", stream, Place.MEMORY),
                    PROCESS,
                ),
                layers_seconds,
            ),
            *fitting,
            Phase(
                "weighing segments",
                (*throughout, Held("a copy, for a moment", copy, Place.DISK)),
                weighing_seconds,
            ),
            Phase("measuring mixtures", throughout, measuring * whole_seconds),
        ),
        (
            f"{1 + weighing + measuring:.0f} forward passes over the text"
            f"{', beside those of the fits' if fitting else ''}; a search may end "
            "before its last round, and weighs more parts of mixtures, or fewer, on its way.",
        ),
    )
