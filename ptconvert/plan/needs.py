"""What a plan will hold and how long it will take, from the sizes and one layer's first step."""

from __future__ import annotations

import math

from ptconvert.checkpoint.inventory import weights_dtype
from ptconvert.measure.divergence import LOGITS_AT_ONCE
from ptconvert.measure.needs import Held, Needs, Phase, Place
from ptconvert.measure.one_layer import PROCESS, head_seconds, in_a_layer, one_layer, step_of
from ptconvert.models.shape import DTYPE_BYTES, DTYPES, TORCH_NAMES
from ptconvert.plan.case import Case
from ptconvert.plan.planner import MIXTURES, POINTS, ROUNDS, Objective, is_basic, searched_each
from ptconvert.plan.segments import Segment, menu
from ptconvert.plan.sensitivity import all_as_tracks, gradient_spacing, kept_layers
from ptconvert.runtime.load import opened

_LOGITS = 5  # copies in fp32 of LOGITS_AT_ONCE numbers, while two predictions are compared


def plan_needs(
    case: Case, objective: Objective, rounds: int | None, minutes: float | None
) -> Needs:
    """A plan's phases: the source's pass, the weighing of segments, and mixtures measured whole.

    Times are for all rounds and points, or for `minutes` where these are less; runs of more than
    two sublayers that a search weighs on its way are not in them.
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
    every = searched_each(count)
    searched = len(range(0, count, every))
    search_stream = searched * length * shape.width * number
    spacing = gradient_spacing(shape.layers, search_stream)
    at_once = min(case.batch.size, count)
    step = step_of(one_layer(source.config, tracks, device, dtype), dtype, length)
    seconds = count * (
        shape.layers * step.forward
        + head_seconds(shape.vocabulary, shape.width, dtype, device, length)
    )
    every_one = menu(shape.layers, objective.singles, objective.runs, 2, shape.family.parallel)
    basic = [s for s in every_one if is_basic(s)]
    weighed = sum(_layers_run(s, spacing) for s in basic)
    share = searched / count / shape.layers  # of a pass is a layer's run over what is searched on
    weighing = share * (3 * shape.layers + weighed)
    measuring = share * shape.layers * (rounds or ROUNDS) * MIXTURES + POINTS
    if minutes is not None:
        measuring = max(0.0, min(measuring, 60 * minutes / seconds - weighing))
    sequence = length * shape.width * number
    # before these layers, and the last of all; and gradients at those that are searched by
    streams = Held(
        f"streams, {count} windows, {len(kept)} layers", (len(kept) + 1) * stream, Place.MEMORY
    )
    searched_by = {*kept, *range(0, shape.layers, spacing), shape.layers}
    throughout = (
        Held("weights, as tracks", int(scale * all_tracks), Place.DEVICE),
        Held("the source's head", shape.vocabulary * shape.width * number, Place.DEVICE),
        Held(
            f"a layer's streams, {at_once} windows",
            at_once * in_a_layer(shape, tracks, length, number),
            Place.DEVICE,
        ),
        streams,
        Held(
            f"streams and gradients, {searched} windows",
            2 * search_stream * len(searched_by),
            Place.MEMORY,
        ),
        PROCESS,
    )
    logits = Held("logits, a piece", _LOGITS * 4 * LOGITS_AT_ONCE, Place.DEVICE)
    return Needs(
        device,
        (
            Phase(
                "the source's predictions",
                (
                    Held("weights", int(scale * weights), Place.DEVICE),
                    Held(
                        f"streams, {at_once} windows, all layers",
                        (shape.layers + 1) * at_once * sequence,
                        Place.DEVICE,
                    ),
                    streams,
                    Held("one of them, as it is joined", stream, Place.MEMORY),
                    PROCESS,
                ),
                seconds,
            ),
            Phase(
                "weighing segments",
                (
                    *throughout,
                    Held(
                        f"activations, {min(at_once, searched)} windows, {spacing} layers",
                        spacing * min(at_once, searched) * step.kept,
                        Place.DEVICE,
                    ),
                    Held("a copy, for a moment", copy, Place.DISK),
                ),
                weighing * seconds,
            ),
            Phase("measuring mixtures", (*throughout, logits), measuring * seconds),
        ),
        (
            f"{1 + weighing + measuring:.0f} forward passes over the text; a search may end "
            "before its last round, and weighs longer runs on its way.",
        ),
    )


def _layers_run(segment: Segment, spacing: int) -> int:
    """How many layers a segment runs for until all of it is merged where a stream is held."""
    return (math.ceil(segment.merged / spacing) - segment.layer // spacing) * spacing
