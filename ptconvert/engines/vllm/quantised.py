"""Quantised weights in vLLM: each linear by vLLM's own method, found by the checkpoint's names of
modules."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from ptconvert.errors import CheckpointError
from ptconvert.models.quantised import QUANTIZATION

# What vLLM makes of the quantization_config, and experts' output biases, which are beside tracks.
_LEFT = "input_scale_ub", "w2_bias"


def method_of_family(quant_config: Any, methods: Mapping[str, str]) -> Any:
    """A quantisation config of vLLM's, or that of a family's own method, which vLLM finds by the
    model's type: `methods` are their names by those of the others, which say nothing more."""
    own = None if quant_config is None else methods.get(quant_config.get_name())
    return quant_config if own is None else get_quantization_config(own).from_config({})


def name_fused(quant_config: Any, stacked: Mapping[str, Any], weights: Collection[str]) -> None:
    """Tells a quantisation config of vLLM's which of a layer's weights vLLM fuses into one linear.

    `stacked` is where vLLM loads modules to, by their names, and `weights` are those of a
    checkpoint's layers, each after a dot: what lies fused there has its own name.
    """
    fused: dict[str, dict[str, None]] = {}
    for part, (whole, _) in stacked.items():
        if any(name.endswith(f"{part.rstrip('.')}.weight") for name in weights):
            # by the last of their names, as vLLM asks; `stacked` may say inside of what they are
            whole, part = (name.strip(".").rpartition(".")[2] for name in (whole, part))
            fused.setdefault(whole, {})[part] = None
    quant_config.packed_modules_mapping = {whole: list(parts) for whole, parts in fused.items()}


def by_names(quant_config: Any, before: str, named: str) -> Any:
    """A quantisation config of vLLM's for a layer whose modules' names begin with `before` in vLLM,
    and with `named` in the checkpoint, as in its own lists and patterns."""
    if quant_config is None:
        return None

    def get_quant_method(layer: nn.Module, prefix: str) -> Any:
        return quant_config.get_quant_method(layer, named + prefix.removeprefix(before))

    own = copy.copy(quant_config)
    own.get_quant_method = get_quant_method
    return own


def check_loaded(model: nn.Module, loaded: Collection[str]) -> None:
    """Raises CheckpointError where a parameter of a quantised model got no tensor, which vLLM lets
    pass without a word; scales of the KV cache may be left at 1."""
    named = model.named_parameters(remove_duplicate=False)  # experts have their router's biases
    filled = {id(parameter) for name, parameter in named if name in loaded}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
            continue
        left = set(_LEFT)
        if hasattr(module, "moe_config") and not module.moe_config.has_bias:
            left.add("w13_bias")  # which vLLM takes away again
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.numel() and own not in left and id(parameter) not in filled:
                raise CheckpointError(
                    f"the checkpoint has nothing for vLLM's {name}.{own}: its {QUANTIZATION} says "
                    "that this is kept otherwise than it is"
                )
