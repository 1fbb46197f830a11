"""The single-process model, a layer at a time: what ranks are compared with, whatever its size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM

import ptconvert
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.models.families import NEURONS
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import layer_of


@contextmanager
def opened_by_layer(path: Path, dtype: torch.dtype, device: torch.device | str) -> Iterator[Any]:
    """A converted checkpoint's model with all its tracks, in eval mode, on one device.

    Its layers are read from their files each time they are called and let go again (accelerate's
    offloading to disk), so that it takes the memory of `by_layer_bytes`.
    """
    ptconvert.register()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = {id(layer) for layer in model.get_decoder().layers.children()}
    places = {
        name: "disk" if id(module) in layers else str(device)
        for name, module in _without(model, layers)
    }
    with tempfile.TemporaryDirectory(prefix="ptconvert-offload-") as folder:
        yield AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=places, offload_folder=folder
        ).eval()


def _without(module: nn.Module, layers: set[int], name: str = "") -> Iterator[tuple[str, Any]]:
    """The layers, by name, and the largest modules that have none of them."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".removeprefix(".")
        if id(child) in layers or not any(id(m) in layers for m in child.modules()):
            yield path, child
        else:
            yield from _without(child, layers, path)


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


class _Reordered(ModelHook):  # type: ignore[misc]
    """Puts an axis of a module's tensor into another order, `unit` by unit, once it was read."""

    def __init__(self, tensor: str, axis: int, unit: int, orders: dict[str, torch.Tensor]) -> None:
        self.tensor, self.axis, self.unit, self.orders = tensor, axis, unit, orders

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(module, self.tensor)
        order, length = self.orders["order"].to(own.device), own.shape[self.axis]
        order = (order[:, None] * self.unit + torch.arange(self.unit, device=own.device)).flatten()
        # of each of those that are fused into the tensor
        begins = torch.arange(0, length, len(order), device=own.device)
        indices = (begins[:, None] + order).flatten()
        setattr(module, self.tensor, nn.Parameter(own.index_select(self.axis, indices), False))
        return args, kwargs


def reorderings(model: Any, shape: ModelShape, count: int) -> Iterator[None]:
    """Makes a model of `opened_by_layer` the same function with sums that round differently: its
    FFN neurons in another order each time. Never the first order again."""
    generator = torch.Generator().manual_seed(0)
    orders: list[tuple[int, dict[str, torch.Tensor]]] = []
    for index, layer in enumerate(model.get_decoder().layers.children()):
        for own in layer.tracks.values() if hasattr(layer, "tracks") else [layer]:
            known = dict[str, dict[str, torch.Tensor]]()  # by what the neurons are counted by
            for rule in shape.rules_of(index):
                segment = rule.segments(rule.axis)[0]
                if segment.cut not in NEURONS:
                    continue
                name, tensor = rule.name.rsplit(".", 1)
                module, segments = own.get_submodule(name), len(rule.segments(rule.axis))
                unit = shape.length(segment) // getattr(shape, segment.count)
                neurons = getattr(module, tensor).shape[rule.axis] // (segments * unit)
                if segment.count not in known:
                    known[segment.count] = {}
                    orders.append((neurons, known[segment.count]))
                hook = _Reordered(tensor, rule.axis, unit, known[segment.count])
                add_hook_to_module(module, hook, append=True)
    for _ in range(count):
        for neurons, order in orders:
            order["order"] = torch.randperm(neurons, generator=generator)
        yield
