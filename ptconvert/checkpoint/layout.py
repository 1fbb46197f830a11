"""Where a dense checkpoint's tensors lie in a converted one: the map that both directions read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ptconvert.checkpoint.calibration import Assignment
from ptconvert.checkpoint.writer import Indices, Target, length
from ptconvert.models.families import ORDERS, Cut, TensorRule, common_name
from ptconvert.models.shape import ModelShape, rows
from ptconvert.schedule.schedule import Schedule

SHARED = "shared"


@dataclass(frozen=True)
class Part:
    """A tensor of the converted checkpoint: what lies at some indices of the dense tensor's `axis`.

    They are in `pieces`, one after the other, where several projections are fused into the tensor.
    In each expert's share of the tensor they are others where pieces have a row for each.
    `track` owns it; None where it is shared by all. With `values` it holds these, and nothing of
    the dense tensor's.
    """

    name: str
    track: int | None
    axis: int
    pieces: tuple[Indices, ...]
    values: tuple[int, ...] | None = None

    @property
    def indices(self) -> Indices:
        """The indices of all pieces."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        return np.concatenate([np.asarray(piece, np.int32) for piece in self.pieces], axis=-1)


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the dense checkpoint, and the parts that hold it in the converted one.

    Pieces that cover the same indices are copies of each other; the others share the axis out.
    One of what a `quantised` weight is kept as may be of any dtype; with `values` it holds these.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    quantised: bool = False
    values: tuple[int, ...] | None = None

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of one part."""
        size = sum(map(length, part.pieces))
        return tuple(size if axis == part.axis else s for axis, s in enumerate(self.shape))


def dense_tensors(
    shape: ModelShape,
    schedule: Schedule,
    tracks: int,
    assignments: Mapping[int, Assignment] = MappingProxyType({}),
) -> Iterator[DenseTensor]:
    """Every tensor of the dense model with its parts.

    Layers in which tracks never differ keep their tensors as they are. The others become
    `….layers.{i}.tracks.{t}.…` and, for output biases, `….layers.{i}.common.….`, such as
    `….common.o_proj_bias`; of what is added once there is only the first track's. Layers without an
    assignment are assigned contiguously.
    """
    tracked = schedule.track_layers
    rules = {shape.layer(i) + r.name: (i, r) for i in tracked for r in shape.stored_of(i)}
    quantised = {
        (shape.layer(layer) if layer is not None else "") + rule.name
        for layer, kept in shape.quantised.items()
        for rule in kept
        if rule.kept is not None
    }
    for name, size in shape.tensors():
        if name not in rules:
            kept = name in quantised
            yield DenseTensor(name, size, (Part(name, None, 0, (range(rows(size)),)),), kept)
            continue
        layer, rule = rules[name]
        if rule.common:
            common = f"{shape.layer(layer)}common.{common_name(rule.name)}"
            yield DenseTensor(name, size, (Part(common, None, 0, (range(rows(size)),)),))
            continue
        begins = [f"{shape.layer(layer)}tracks.{t}." for t in range(1 if rule.once else tracks)]
        if rule.told is not None:
            told = [tuple(shape.told(rule, t, tracks)) for t in range(tracks)]
            parts = tuple(
                Part(b + rule.name, t, 0, (range(len(told[t])),), told[t])
                for t, b in enumerate(begins)
            )
            yield DenseTensor(name, size, parts, True, tuple(shape.told(rule, 0, 1)))
            continue
        parts = tuple(
            Part(
                before + rule.name,
                track,
                rule.axis,
                tuple(_owned(shape, layer, rule, track, tracks, assignments.get(layer))),
            )
            for track, before in enumerate(begins)
        )
        yield DenseTensor(name, size, parts, rule.kept is not None)


def _owned(
    shape: ModelShape,
    layer: int,
    rule: TensorRule,
    track: int,
    tracks: int,
    assignment: Assignment | None,
) -> Iterator[Indices]:
    """The indices of `rule.axis` that a track owns, of each segment."""
    spans = shape.spans(rule, track, tracks)
    if assignment is None or not rule.is_cut:
        yield from (range(start, stop) for start, stop in spans)
        return
    for (segment, begin), span in zip(shape.segments(rule), spans, strict=True):
        heads = segment.cut in (Cut.HEADS, Cut.KV_HEADS)
        if heads and shape.attention_units(layer) % tracks > 0:
            yield range(*span)  # whole heads, as copies
            continue
        assert segment.cut is not None, f"{rule.name} has a segment that isn't cut beside others"
        order = getattr(assignment, ORDERS[segment.cut])
        if rule.expert is not None:
            order = order[rule.expert]
        unit = shape.length(segment) // order.shape[-1] // rule.per
        start, stop = (place - begin // rule.per for place in span)
        units = order[..., start // unit : stop // unit, None]
        indices = begin // rule.per + units * unit + np.arange(unit)
        yield indices.reshape(*order.shape[:-1], -1).astype(np.int32)


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
