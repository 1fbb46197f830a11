"""Quantised weights in an engine: each linear by the engine's own method, which it finds by the
checkpoint's names of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn


def fused_modules(stacked: Mapping[str, str], weights: Collection[str]) -> dict[str, list[str]]:
    """Which of a layer's linears an engine has in one, by the last of their names.

    `stacked` is where modules are loaded to, by their names, and `weights` are those of a
    checkpoint's layers, each after a dot: what lies fused there has its own name.
    """
    fused: dict[str, dict[str, None]] = {}
    for part, whole in stacked.items():
        if any(name.endswith(f"{part.rstrip('.')}.weight") for name in weights):
            # `stacked` may say inside of what they are
            whole, part = (name.strip(".").rpartition(".")[2] for name in (whole, part))
            fused.setdefault(whole, {})[part] = None
    return {whole: list(parts) for whole, parts in fused.items()}


def by_names(quant_config: Any, name_in_checkpoint: Callable[[str], str]) -> Any:
    """An engine's quantisation config that is asked by the engine's names of modules and answers by
    the checkpoint's, which its own lists and patterns have."""
    if quant_config is None:
        return None

    def get_quant_method(layer: nn.Module, prefix: str) -> Any:
        return quant_config.get_quant_method(layer, name_in_checkpoint(prefix))

    own = copy.copy(quant_config)
    own.get_quant_method = get_quant_method
    return own
