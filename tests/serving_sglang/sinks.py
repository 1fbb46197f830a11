"""Attention with sinks for SGLang's `torch_native` on CPUs, which has none.

It stands for the one operation that is attention, where a layer has sinks; caches, places, windows
and scheduling stay SGLang's. It is transformers' literal one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention import torch_native_backend
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from ptconvert.engines.sglang import refusals

BACKEND = torch_native_backend.TorchNativeAttnBackend


def install() -> None:
    """Puts it in place of torch's where SGLang calls attention with sinks.

    Models with sinks are refused for want of it, and no more."""
    for name in ("forward_extend", "forward_decode"):
        setattr(BACKEND, name, _with_sinks(getattr(BACKEND, name)))
    refusals.SINKS |= {refusals.ON_CPUS}


def _with_sinks(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    theirs = torch_native_backend.scaled_dot_product_attention

    def called(*given: Any, sinks: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        if sinks is not None:
            torch_native_backend.scaled_dot_product_attention = _attention_by(sinks)
        try:
            return forward(*given, **more)
        finally:
            torch_native_backend.scaled_dot_product_attention = theirs

    return called


def _attention_by(sinks_H: torch.Tensor) -> Callable[..., torch.Tensor]:
    def attention(
        q_1HTC: torch.Tensor,
        k_1KSC: torch.Tensor,
        v_1KSC: torch.Tensor,
        attn_mask: torch.Tensor | None,
        enable_gqa: bool,  # noqa: ARG001
        scale: float,
        is_causal: bool,
    ) -> torch.Tensor:
        seen_TS = attn_mask
        if is_causal:
            seen_TS = torch.ones(q_1HTC.shape[2], k_1KSC.shape[2], dtype=torch.bool).tril()
        mask_TS = None
        if seen_TS is not None:
            mask_TS = torch.zeros(seen_TS.shape).masked_fill(~seen_TS, float("-inf"))
        groups = q_1HTC.shape[1] // k_1KSC.shape[1]
        module: Any = SimpleNamespace(num_key_value_groups=groups, sinks=sinks_H, training=False)
        out_1THC: torch.Tensor
        out_1THC, _ = eager_attention_forward(module, q_1HTC, k_1KSC, v_1KSC, mask_TS, scale)
        return out_1THC.transpose(1, 2)

    return attention
