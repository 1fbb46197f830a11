"""Student and teacher: which weights move, and storage that both share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import HealError
from ptconvert.evaluate.models import is_dense
from ptconvert.format import SECTION, read_section, source_config
from ptconvert.layout import DenseTensor, dense_tensors
from ptconvert.presets import dense_schedule, with_only
from ptconvert.schedule import Schedule
from ptconvert.shape import ModelShape


def check_pair(student: Checkpoint, teacher: Checkpoint) -> ModelShape:
    """The shape that a converted checkpoint and its source have in common. Raises PTConvertError.

    Any model of the source's shape will do: the source itself, or a better trained one.
    """
    where = str(student.path / "config.json")
    if SECTION not in student.config:
        raise HealError(f"{student.path} isn't converted; heal starts from a converted checkpoint")
    if not is_dense(teacher):
        raise HealError(f"--teacher {teacher.path} is converted; it must be a dense checkpoint")
    section = read_section(student.config, where)
    shape = ModelShape.from_config(source_config(student.config, section), where)
    other = ModelShape.from_config(teacher.config, str(teacher.path / "config.json"))
    ours, theirs = dict(shape.tensors()), dict(other.tensors())
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            sizes = [list(s[name]) if name in s else "missing" for s in (theirs, ours)]
            raise HealError(
                f"--teacher {teacher.path}: its {name} is {sizes[0]}, the checkpoint's source has "
                f"{sizes[1]}; it must be of the source's shape"
            )
    return shape


def changed_layers(schedule: Schedule) -> frozenset[int]:
    """The layers inside blocks of the schedule that aren't the dense model's."""
    dense = dense_schedule(schedule.layers)
    return frozenset(
        sublayer.layer
        for block in schedule.blocks()
        if with_only(schedule, block) != dense
        for i in block
        for sublayer in schedule.stages[i].sublayers
    )


def in_layers(name: str, layers: Iterable[int]) -> bool:
    """Whether a parameter or module is one of these layers'."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and len(parts) > 2 and int(parts[2]) in layers


def trainable(model: nn.Module, which: str, schedule: Schedule) -> list[str]:
    """The parameters that are to move, `changed` or `all`. Raises HealError for none."""
    layers = changed_layers(schedule)
    names = [n for n, _ in model.named_parameters() if which == "all" or in_layers(n, layers)]
    if not names:
        raise HealError("the schedule changes no layer, so there is nothing to heal")
    return names


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies tensors over a model's parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
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
def share(student: nn.Module, teacher: nn.Module, tensors: Iterable[DenseTensor]) -> int:
    """Lets frozen parameters of the student be views of the teacher's where the values are the
    same: whole tensors of layers held dense, and tracks' parts of matrices. Returns the bytes
    saved.

    Vectors (norms) stay apart: they are small, and copies of one must not become one tensor.
    """
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    saved = 0
    for tensor in tensors:
        whole = theirs.get(tensor.name)
        for part in tensor.parts:
            own = ours.get(part.name)
            if own is None or whole is None or own.requires_grad or whole.ndim < 2:
                continue
            view = whole.data.narrow(part.axis, part.start, part.stop - part.start)
            if view.dtype == own.dtype and view.device == own.device and torch.equal(view, own):
                own.data = view
                saved += view.numel() * view.element_size()
    return saved


def parts_of(checkpoint: Checkpoint) -> list[DenseTensor]:
    """Where a converted checkpoint's parameters lie in its source's."""
    section = read_section(checkpoint.config)
    shape = ModelShape.from_config(source_config(checkpoint.config, section))
    return list(dense_tensors(shape, section.schedule, section.tracks))
