"""Quantised weights in vLLM: what it has methods of its own for, and whether all were loaded."""

from __future__ import annotations

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


def check_loaded(model: nn.Module, loaded: Collection[str]) -> None:
    """Raises CheckpointError where a parameter got no tensor, which vLLM lets pass without a word;
    scales of the KV cache may be left at 1."""
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
                    f"the checkpoint has nothing for vLLM's {name}.{own}: a tensor is missing, or "
                    f"its {QUANTIZATION} says that this is kept otherwise than it is"
                )
