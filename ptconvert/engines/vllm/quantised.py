"""Quantised weights in vLLM: each linear by vLLM's own method, found by the checkpoint's names of
modules."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from ptconvert.errors import CheckpointError
from ptconvert.models.quantised import QUANTIZATION

_CONFIG_BUILT = "input_scale_ub"  # which vLLM makes of the quantization_config


def name_fused(quant_config: Any, stacked: Mapping[str, Any], weights: Collection[str]) -> None:
    """Tells a quantisation config of vLLM's which of a layer's weights vLLM fuses into one linear.

    `stacked` is where vLLM loads modules to, by their names, and `weights` are the checkpoint's:
    what lies fused there has its own name.
    """
    fused: dict[str, list[str]] = {}
    for part, (whole, _) in stacked.items():
        if any(name.endswith(f"{part}.weight") for name in weights):
            fused.setdefault(whole.removeprefix("."), []).append(part.removeprefix("."))
    quant_config.packed_modules_mapping = fused


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
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            whole = f"{name}.{own}"
            if parameter.numel() and own != _CONFIG_BUILT and whole not in loaded:
                raise CheckpointError(
                    f"the checkpoint has nothing for vLLM's {whole}: its {QUANTIZATION} says that "
                    "this is kept otherwise than it is"
                )
