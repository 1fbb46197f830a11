"""Where a dense checkpoint's tensors lie in a converted one: the map that both directions read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptconvert.checkpoint.writer import Indices, Target
from ptconvert.families import Cut, TensorRule
from ptconvert.schedule import Kind, Schedule, Sublayer
from ptconvert.shape import DTYPE_BYTES, EMBEDDING, ModelShape
from ptconvert.spec import Spec

SHARED = "shared"


@dataclass(frozen=True)
class Part:
    """A tensor of the converted checkpoint: what lies at `indices` of the dense tensor's `axis`.

    `track` owns it; None where it is shared by all.
    """

    name: str
    track: int | None
    axis: int
    indices: Indices


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the dense checkpoint, and the parts that hold it in the converted one.

    Parts that cover the same indices are copies of each other; the others share the axis out.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of one part."""
        size = len(part.indices)
        return tuple(size if axis == part.axis else s for axis, s in enumerate(self.shape))


@dataclass(frozen=True)
class Assignment:
    """The order in which a layer's units go to tracks: the first 1/n to track 0, and so on.

    `kv_heads` come with the query heads that read them. With fewer KV heads than tracks, heads
    are assigned contiguously whatever it says.
    """

    kv_heads: NDArray[np.int32]
    neurons: NDArray[np.int32]


def contiguous(shape: ModelShape) -> Assignment:
    """The dense model's own order."""
    return Assignment(
        np.arange(shape.kv_heads, dtype=np.int32), np.arange(shape.neurons, dtype=np.int32)
    )


@dataclass(frozen=True)
class Calibration:
    """What was computed from a text for a conversion.

    The assignments by layer, the ranks of the guesses by sublayer, and the guesses' tensors: the
    bytes of each, in the model's dtype.
    """

    assignments: Mapping[int, Assignment] = field(default_factory=dict)
    guesses: Mapping[Sublayer, int] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


def dense_tensors(
    shape: ModelShape,
    schedule: Schedule,
    tracks: int,
    assignments: Mapping[int, Assignment] = MappingProxyType({}),
) -> Iterator[DenseTensor]:
    """Every tensor of the dense model with its parts.

    Layers in which tracks never differ keep their tensors as they are. The others become
    `model.layers.{i}.tracks.{t}.self_attn.…` and, for output biases,
    `model.layers.{i}.common.o_proj_bias` and `….down_proj_bias`. Layers without an assignment are
    assigned contiguously.
    """
    tracked = schedule.track_layers(tracks)
    rules = {f"model.layers.{i}.{r.name}": (i, r) for i in tracked for r in shape.rules}
    for name, size in shape.tensors():
        if name not in rules:
            yield DenseTensor(name, size, (Part(name, None, 0, range(size[0])),))
            continue
        layer, rule = rules[name]
        if rule.cut is Cut.COMMON:
            common = f"model.layers.{layer}.common.{'_'.join(rule.name.split('.')[1:])}"
            yield DenseTensor(name, size, (Part(common, None, 0, range(size[0])),))
            continue
        parts = tuple(
            Part(
                f"model.layers.{layer}.tracks.{track}.{rule.name}",
                track,
                rule.axis,
                _owned(shape, rule, track, tracks, assignments.get(layer)),
            )
            for track in range(tracks)
        )
        yield DenseTensor(name, size, parts)


def _owned(
    shape: ModelShape, rule: TensorRule, track: int, tracks: int, assignment: Assignment | None
) -> Indices:
    """The indices of `rule.axis` that a track owns."""
    start, stop = shape.span(rule, track, tracks)
    replicated = rule.cut in (Cut.HEADS, Cut.KV_HEADS) and shape.kv_heads % tracks > 0
    if assignment is None or rule.cut is Cut.COPY or replicated:
        return range(start, stop)
    order = assignment.neurons if rule.cut is Cut.NEURONS else assignment.kv_heads
    unit = shape.size(rule)[rule.axis] // len(order)
    units = order[start // unit : stop // unit, None]
    indices: NDArray[np.int32] = (units * unit + np.arange(unit)).ravel().astype(np.int32)
    return indices


def order_tensors(
    shape: ModelShape, schedule: Schedule, tracks: int
) -> Iterator[tuple[int, str, str, tuple[int, ...]]]:
    """Layer, field of Assignment, name and shape of each tensor that holds an assignment."""
    for layer in sorted(schedule.track_layers(tracks)):
        for of, size in (("kv_heads", shape.kv_heads), ("neurons", shape.neurons)):
            yield layer, of, f"model.layers.{layer}.assignment.{of}", (size,)


def guess_tensors(
    shape: ModelShape, guesses: Mapping[Sublayer, int], tracks: int
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Track, name and shape of each tensor of the guesses, given their ranks by sublayer."""
    blocks = {Kind.ATTENTION: "self_attn", Kind.MLP: "mlp"}
    for sublayer, rank in guesses.items():
        sizes = {
            "from_input.weight": (rank, shape.width),
            "from_partial.weight": (rank, shape.width),
            "to_stream.weight": (shape.width, rank),
            "to_stream.bias": (shape.width,),
        }
        for track in range(tracks):
            owner = f"model.layers.{sublayer.layer}.tracks.{track}.guess.{blocks[sublayer.kind]}"
            for name, size in sizes.items():
                yield track, f"{owner}.{name}", size


def most_guesses(spec: Spec, shape: ModelShape) -> dict[Sublayer, int]:
    """The guesses that a conversion by a spec can have at most: wherever one can be."""
    if spec.guess is None:
        return {}
    rank = min(spec.guess, shape.width)
    return dict.fromkeys(spec.schedule().own_kept(spec.tracks), rank)


def guess_cost(
    shape: ModelShape, guesses: Mapping[Sublayer, int], tracks: int
) -> dict[str, Any] | None:
    """What the guesses add over all tracks, with their share of the dense model's own.

    FLOPs are of the projections of one token, 2 for each weight of a matrix: embeddings are looked
    up, not multiplied.
    """
    if not guesses:
        return None
    added = [size for _, _, size in guess_tensors(shape, guesses, tracks)]
    dense = dict(shape.tensors())
    matrices = [s for n, s in dense.items() if len(s) == 2 and (shape.tied or n != EMBEDDING)]
    parameters = sum(map(math.prod, added))
    flops = 2 * sum(math.prod(s) for s in added if len(s) == 2)
    return {
        "ranks": {str(s): rank for s, rank in guesses.items()},
        "parameters": parameters,
        "parameters_share": parameters / sum(map(math.prod, dense.values())),
        "bytes": parameters * DTYPE_BYTES[shape.dtype or "BF16"],
        "flops_per_token": flops,
        "flops_share": flops / (2 * sum(map(math.prod, matrices))),
    }


def place(tensors: Iterable[Target], shard_bytes: int) -> tuple[Target, ...]:
    """Splits files that would exceed `shard_bytes`; each target comes with its file's stem.

    A stem with one file gives `stem.safetensors`, else `stem-00001-of-00003.safetensors` and so
    on. A tensor that is larger on its own gets a file to itself.
    """
    shards: dict[str, list[list[Target]]] = {}
    filled: dict[str, int] = {}
    for target in tensors:
        files = shards.setdefault(target.file, [[]])
        total = filled.get(target.file, 0) + target.nbytes
        if files[-1] and total > shard_bytes:
            files.append([])
            total = target.nbytes
        files[-1].append(target)
        filled[target.file] = total
    return tuple(
        replace(target, file=_file_name(stem, number, len(files)))
        for stem, files in shards.items()
        for number, members in enumerate(files, 1)
        for target in members
    )


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def track_stem(track: int, tracks: int) -> str:
    """The stem of the files that hold one track's tensors."""
    digits = max(2, len(str(tracks)))
    return f"track-{track:0{digits}d}-of-{tracks:0{digits}d}"
