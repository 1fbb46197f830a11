"""Attention to latents (MLA), which SGLang keeps in place of keys and values: what its decoder
layer and its loader do for it."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.adapters.attention import (
    AttentionInputs,
    get_attn_tp_context,
)
from sglang.srt.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods import AttnForwardMethod
from sglang.srt.models.deepseek_common.deepseek_weight_loader import DeepseekV2WeightLoaderMixin
from sglang.srt.utils import BumpAllocator

# Its backend of plain torch would attend to a prompt as Triton's, from keys that aren't cached. (In
# a process that runs a converted model.)
AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


class JoinedLinear(MergedColumnParallelLinear):  # type: ignore[misc]
    """Projections in one, whole on every rank, of which the last may end within a block of FP8, as
    published ones do. (compressed-tensors looks for Linear in a class's name.)"""

    def __init__(self, inputs: int, outputs: list[int], quant_config: Any, named: str) -> None:
        self.output_sizes = outputs  # which are loaded one by one
        ColumnParallelLinear.__init__(
            *(self, inputs, sum(outputs)),
            bias=False,
            quant_config=quant_config,
            prefix=named,
            skip_block_quant_check=True,
            parallel_group="replicated",
        )


def prepare(attention: Any, config: Any, quant_config: Any, named: str) -> None:
    """Makes a new attention one whose first projection loads each of its two parts by itself."""
    attention.fused_qkv_a_proj_with_mqa = JoinedLinear(
        config.hidden_size,
        [config.q_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim],
        quant_config,
        f"{named}.fused_qkv_a_proj_with_mqa",
    )


def attend(attention: Any, x_TD: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
    """The attention without its all-reduce; what it projects first it asks its context for."""
    context = get_attn_tp_context()
    context.set_attn_inputs(AttentionInputs(x_TD, batch, attention.prepare_qkv_latent))
    zeros = None
    if attention.w_kc.dtype == torch.float8_e4m3fn:  # scales of queries and of outputs begin so
        zeros = BumpAllocator(2, torch.float32, x_TD.device)
    try:
        out_TD: torch.Tensor = attention(
            positions=positions, hidden_states=x_TD, forward_batch=batch, zero_allocator=zeros
        )
    finally:
        context.clear_attn_inputs()
    return out_TD


def absorb(config: Any, layers: Iterable[Any]) -> None:
    """Makes of loaded decoder layers what queries and outputs are multiplied by in place of the
    latents, as SGLang's loader does."""
    layers = list(layers)
    model = SimpleNamespace(layers=layers, start_layer=0, end_layer=len(layers))
    quant_config = layers[0].self_attn.quant_config  # which has the size of blocks
    loader = SimpleNamespace(config=config, quant_config=quant_config, model=model)
    DeepseekV2WeightLoaderMixin.post_load_weights(loader)
