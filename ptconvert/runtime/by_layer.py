"""The single-process model, a layer at a time: what ranks are compared with, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook
from torch import nn

import ptconvert
from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import layer_of
from ptconvert.runtime.load import filled, kept_dtype, on_meta, read_for, shape_of


def opened_by_layer(path: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A converted checkpoint's model with all its tracks, in eval mode, on one device.

    The parameters of its layers are read from their files each time that they are called and let go
    again (accelerate's hooks), so that it takes the memory of `by_layer_bytes`. Quantised weights
    are dequantised.
    """
    ptconvert.register()
    checkpoint = open_checkpoint(path)
    shape = shape_of(checkpoint)
    model = on_meta(checkpoint, dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kept_dtype(model, parameter_name, dtype))
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names[id(layer)]: layer for layer in model.get_decoder().layers.children()}
    of_layers = {f"{name}.{n}" for name, m in layers.items() for n, _ in m.named_parameters()}
    filled(model, checkpoint, shape, dtype, without=of_layers)
    read = _Read(model, checkpoint, shape, dtype, of_layers)
    for name, layer in layers.items():
        attach_align_device_hook(layer, torch.device(device), True, read, module_name=name)
    for module in _without(model, set(map(id, layers.values()))):
        module.to(device)
    return model


@dataclass(frozen=True)
class _Read(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint's model by their names, each read whenever it is asked for."""

    model: Any
    checkpoint: Checkpoint
    shape: ModelShape
    dtype: torch.dtype
    names: Set[str]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return read_for(self.model, self.checkpoint, self.shape, name, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _without(module: nn.Module, layers: set[int]) -> Iterator[nn.Module]:
    """The largest modules that have none of some layers in them."""
    for child in module.children():
        if not any(id(m) in layers for m in child.modules()):
            yield child
        elif id(child) not in layers:
            yield from _without(child, layers)


def by_layer_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that `opened_by_layer` holds at once, as stored: all that is outside of
    layers, and the largest layer."""
    layers: dict[int, int] = {}
    outside = 0
    for name, entry in checkpoint.tensors.items():
        if (layer := layer_of(name)) is None:
            outside += entry.nbytes
        else:
            layers[layer] = layers.get(layer, 0) + entry.nbytes
    return outside + max(layers.values(), default=0)
