"""Where a dense checkpoint's tensors lie in a converted one: the map that both directions read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ptconvert.checkpoint.writer import Target
from ptconvert.families import Cut
from ptconvert.schedule import Schedule
from ptconvert.shape import ModelShape

SHARED = "shared"


@dataclass(frozen=True)
class Part:
    """A tensor of the converted checkpoint: [start, stop) of the dense tensor's `axis`.

    `track` owns it; None where it is shared by all.
    """

    name: str
    track: int | None
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the dense checkpoint, and the parts that hold it in the converted one.

    Parts that cover the same span are copies of each other; the spans tile the axis.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of one part."""
        size = part.stop - part.start
        return tuple(size if axis == part.axis else s for axis, s in enumerate(self.shape))


def dense_tensors(shape: ModelShape, schedule: Schedule, tracks: int) -> Iterator[DenseTensor]:
    """Every tensor of the dense model with its parts.

    Layers in which tracks never differ keep their tensors as they are. The others become
    `model.layers.{i}.tracks.{t}.self_attn.…` and, for output biases,
    `model.layers.{i}.common.o_proj_bias` and `….down_proj_bias`.
    """
    tracked = schedule.track_layers(tracks)
    rules = {f"model.layers.{i}.{r.name}": (i, r) for i in tracked for r in shape.rules}
    for name, size in shape.tensors():
        if name not in rules:
            yield DenseTensor(name, size, (Part(name, None, 0, 0, size[0]),))
            continue
        layer, rule = rules[name]
        if rule.cut is Cut.COMMON:
            common = f"model.layers.{layer}.common.{'_'.join(rule.name.split('.')[1:])}"
            yield DenseTensor(name, size, (Part(common, None, 0, 0, size[0]),))
            continue
        parts = tuple(
            Part(
                f"model.layers.{layer}.tracks.{track}.{rule.name}",
                track,
                rule.axis,
                *shape.span(rule, track, tracks),
            )
            for track in range(tracks)
        )
        yield DenseTensor(name, size, parts)


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
