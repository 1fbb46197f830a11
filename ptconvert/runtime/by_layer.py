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


@contextmanager
def opened_by_layer(path: Path, dtype: torch.dtype, device: torch.device | str) -> Iterator[Any]:
    """A converted checkpoint's model with all its tracks, in eval mode, on one device.

    Its layers are read from their files each time they are called and let go again (accelerate's
    offloading to disk), so that it takes the memory of `by_layer_bytes`.
    """
    ptconvert.register()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    places: dict[str, Any] = {f"model.layers.{i}": "disk" for i in range(config.num_hidden_layers)}
    outside = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places |= dict.fromkeys(outside, str(device))
    with tempfile.TemporaryDirectory(prefix="ptconvert-offload-") as folder:
        yield AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=places, offload_folder=folder
        ).eval()


def by_layer_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that `opened_by_layer` holds at once, as stored: all that is outside of
    layers, and the largest layer."""
    layers: dict[str, int] = {}
    outside = 0
    for name, entry in checkpoint.tensors.items():
        if name.startswith("model.layers."):
            index = name.split(".")[2]
            layers[index] = layers.get(index, 0) + entry.nbytes
        else:
            outside += entry.nbytes
    return outside + max(layers.values(), default=0)


class _Reordered(ModelHook):  # type: ignore[misc]
    """Puts a Linear's outputs (axis 0) or inputs (axis 1) into another order, once it was read."""

    def __init__(self, axis: int, orders: dict[str, torch.Tensor]) -> None:
        self.axis, self.orders = axis, orders

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        order = self.orders["order"].to(module.weight.device)
        module.weight = nn.Parameter(module.weight.index_select(self.axis, order), False)
        if module.bias is not None and self.axis == 0:
            module.bias = nn.Parameter(module.bias.index_select(0, order), False)
        return args, kwargs


def reorderings(model: Any, count: int) -> Iterator[None]:
    """Makes a model of `opened_by_layer` the same function with sums that round differently: its
    FFN neurons in another order each time. Never the first order again."""
    generator = torch.Generator().manual_seed(0)
    orders: list[tuple[int, dict[str, torch.Tensor]]] = []
    for layer in model.model.layers:
        for own in layer.tracks.values() if hasattr(layer, "tracks") else [layer]:
            mlp, of_layer = own.mlp, dict[str, torch.Tensor]()
            orders.append((mlp.down_proj.in_features, of_layer))
            for projection, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
                add_hook_to_module(projection, _Reordered(axis, of_layer), append=True)
    for _ in range(count):
        for neurons, of_layer in orders:
            of_layer["order"] = torch.randperm(neurons, generator=generator)
        yield
