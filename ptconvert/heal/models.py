"""Student and teacher: which weights move, and storage that both share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import SECTION, Section
from ptconvert.errors import HealError
from ptconvert.measure.divergence import converted_blocks
from ptconvert.measure.opening import is_dense, section_of
from ptconvert.models.families import E
from ptconvert.models.quantised import in_place_of, quantization_of
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import is_around, layer_of
from ptconvert.runtime.load import opened, shape_of

_TRACK = re.compile(r"\.tracks\.\d+\.")


def check_pair(student: Checkpoint, teacher: Checkpoint) -> ModelShape:
    """The shape that a converted checkpoint and its source have in common. Raises PTConvertError.

    Any model of the source's shape will do: the source itself, or a better trained one.
    """
    if SECTION not in student.config:
        raise HealError(f"{student.path} isn't converted; heal starts from a converted checkpoint")
    if not is_dense(teacher):
        raise HealError(f"--teacher {teacher.path} is converted; it must be a dense checkpoint")
    shape = shape_of(student)
    ours, theirs = (dict(s.unquantised.tensors()) for s in (shape, shape_of(teacher)))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            sizes = [list(s[name]) if name in s else "missing" for s in (theirs, ours)]
            raise HealError(
                f"--teacher {teacher.path}: its {name} is {sizes[0]}, the checkpoint's source has "
                f"{sizes[1]}; it must be of the source's shape"
            )
    return shape


def changed_layers(section: Section) -> frozenset[int]:
    """The layers inside blocks of the schedule that aren't the dense model's."""
    return frozenset(
        sublayer.layer
        for block in converted_blocks(section)
        for i in block
        for sublayer in section.schedule.stages[i].sublayers
    )


def in_layers(name: str, layers: Collection[int]) -> bool:
    """Whether a parameter or module is one of these layers'."""
    return layer_of(name) in layers


def trainable(names: Iterable[str], student: Checkpoint, which: str) -> list[str]:
    """The parameters that are to move of these: `changed`, or `all`, which are the language
    model's. Those that the checkpoint holds quantised stay as they are."""
    shape = shape_of(student)
    names = held_whole(names, student, shape)
    if which == "all":
        return [name for name in names if not is_around(name, shape.model_type)]
    layers = changed_layers(section_of(student))
    return [name for name in names if in_layers(name, layers)]


def adaptable(student: Checkpoint, which: str) -> list[str]:
    """The linear layers with quantised weights beside which adapters can be trained, of those that
    are to move, as for `trainable`; a mixture's experts are none."""
    shape, weights = shape_of(student), opened(student).tensors
    whole = set(held_whole(weights, student, shape))
    among = range(shape.layers) if which == "all" else changed_layers(section_of(student))
    return [
        name.removesuffix(".weight")
        for name, entry in weights.items()
        if name not in whole and len(entry.shape) == 2 and in_layers(name, among)
        if not is_of_experts(name, shape)
    ]


def is_of_experts(name: str, shape: ModelShape) -> bool:
    """Whether a checkpoint's tensor is of routed experts, or says which tokens they get."""
    layer = layer_of(name)
    rules = () if layer is None or layer >= shape.layers else shape.rules_of(layer)
    routed = [rule for rule in rules if E in rule.segments(0)]
    stored = [part.name for rule in routed for part in rule.stored(1)]
    begins = {one.partition(".experts.")[0] + ".experts." for one in stored if ".experts." in one}
    exact = {one for one in stored if ".experts." not in one}
    return any(begin in name for begin in begins) or any(name.endswith(f".{e}") for e in exact)


def held_whole(names: Iterable[str], checkpoint: Checkpoint, shape: ModelShape) -> list[str]:
    """Those of a model's parameters that a checkpoint of this shape doesn't hold quantised."""
    if quantization_of(checkpoint.config) is None:
        return list(names)
    return [
        name
        for name in names
        if not any(
            in_place_of(stored, checkpoint.tensors)
            for expert in shape.parts_of(name) or [[name]]
            for stored in expert
        )
    ]


@torch.no_grad()
def put(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies tensors over a model's parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


def freeze_but(model: nn.Module, names: Iterable[str]) -> None:
    """Lets only these parameters move, and holds them in fp32: the steps are smaller than what
    16 bits resolve."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            parameter.data = parameter.data.float()


@torch.no_grad()
def share(student: nn.Module, teacher: nn.Module, columns: bool) -> int:
    """Lets frozen matrices of the student be views of the teacher's where the values are the same:
    whole ones outside of tracks, and the rows of it that a track has; its `columns`, too, where
    transformers needn't save the student, which it can't with such views. Returns the bytes saved.
    The student may still be on the CPU: what is shared never comes to the teacher's device a second
    time.

    Vectors (norms) stay apart: they are small, and copies of one must not become one tensor.
    """
    theirs = dict(teacher.named_parameters())
    saved = 0
    for name, own in student.named_parameters():
        whole = theirs.get(_TRACK.sub(".", name))
        if own.requires_grad or own.ndim < 2 or whole is None or whole.dtype != own.dtype:
            continue
        mine = own.to(whole.device)
        views = (v for v in _slices(whole.data, own.shape) if columns or v.is_contiguous())
        same = next((v for v in views if torch.equal(v, mine)), None)
        if same is not None:
            own.data = same
            saved += same.nbytes
    return saved


def _slices(whole: torch.Tensor, size: torch.Size) -> Iterator[torch.Tensor]:
    """The pieces of this size that lie one after the other along the axis that is longer."""
    longer = [axis for axis in range(whole.ndim) if whole.shape[axis] != size[axis]]
    if not longer:
        yield whole
    elif len(longer) == 1:
        yield from (v for v in torch.split(whole, size[longer[0]], longer[0]) if v.shape == size)
