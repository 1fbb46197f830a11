"""Tracks' guesses of each other's partials, as data: which there are, their tensors, their cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ptconvert.models.families import guesses_of
from ptconvert.models.shape import DTYPE_BYTES, ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer


def guess_tensors(
    shape: ModelShape, guesses: Mapping[Sublayer, int], tracks: int
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Track, name and shape of each tensor of the guesses, given their ranks by sublayer."""
    for sublayer, rank in guesses.items():
        sizes = {
            "from_input.weight": (rank, shape.width),
            "from_partial.weight": (rank, shape.width),
            "to_stream.weight": (shape.width, rank),
            "to_stream.bias": (shape.width,),
        }
        for track in range(tracks):
            layer = shape.layer(sublayer.layer)
            owner = f"{layer}tracks.{track}.guess.{guesses_of(sublayer.kind)}"
            for name, size in sizes.items():
                yield track, f"{owner}.{name}", size


def most_guesses(
    schedule: Schedule, tracks: int, rank: int | None, shape: ModelShape
) -> dict[Sublayer, int]:
    """The guesses that a conversion can have at most: wherever one can be; none without a rank."""
    if rank is None:
        return {}
    return dict.fromkeys(schedule.own_kept(tracks), min(rank, shape.width))


def guess_cost(
    shape: ModelShape, guesses: Mapping[Sublayer, int], tracks: int
) -> dict[str, Any] | None:
    """What the guesses add over all tracks, with their share of the dense model's own.

    FLOPs are of the projections of one token, 2 for each weight of a matrix that it is multiplied
    with: embeddings are looked up, and of experts count those that it goes to.
    """
    if not guesses:
        return None
    added = [size for _, _, size in guess_tensors(shape, guesses, tracks)]
    dense = dict(shape.unquantised.tensors())
    rules = [rule for layer in range(shape.layers) for rule in shape.rules_of(layer)]
    matrices = [
        math.prod(shape.size(rule)) * shape.routed_share(rule)
        for rule in rules
        if len(rule.axes) == 2 or rule.apart
    ]
    matrices.append(shape.vocabulary * shape.width)  # the output head
    parameters = sum(map(math.prod, added))
    flops = 2 * sum(math.prod(s) for s in added if len(s) == 2)
    return {
        "ranks": {str(s): rank for s, rank in guesses.items()},
        "parameters": parameters,
        "parameters_share": parameters / sum(map(math.prod, dense.values())),
        "bytes": parameters * DTYPE_BYTES[shape.dtype or "BF16"],
        "flops_per_token": flops,
        "flops_share": flops / (2 * sum(matrices)),
    }
