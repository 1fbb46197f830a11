"""Gated DeltaNet in float32 for vLLM on CPUs, whose kernels there take bfloat16 only.

It stands for the one operation between a layer's projections, with the states where vLLM keeps
them; projections, gates, norms, cache and scheduling stay vLLM's. The rule is transformers' literal
one, a token at a time.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule


def install() -> None:
    """Puts it in place of vLLM's for what isn't bfloat16; before vLLM makes a layer.

    Models in float32 are refused for want of it, and no more."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.utils.torch_utils import _resolve_layer_name

    from ptconvert.engines.vllm import refusals

    theirs = gdn_attention.cpu_gdn_attention_core

    def core(
        mixed_qkv: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        core_attn_out: torch.Tensor,
        layer_name: Any,
    ) -> None:
        context = get_forward_context()
        if mixed_qkv.dtype == torch.bfloat16:
            theirs(mixed_qkv, b, a, core_attn_out, layer_name)
        elif context.attn_metadata is not None:  # else vLLM only looks how much memory it takes
            layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
            attend(layer, context.attn_metadata[layer.prefix], mixed_qkv, b, a, core_attn_out)

    # of which vLLM makes the operation's schema
    core.__annotations__ = {**get_type_hints(theirs), "return": None}
    gdn_attention.cpu_gdn_attention_core = core
    refusals.LINEAR_ON_CPUS |= {torch.float32}


def attend(
    layer: Any,
    requests: Any,
    qkv_TC: torch.Tensor,
    b_TH: torch.Tensor,
    a_TH: torch.Tensor,
    out_THV: torch.Tensor,
) -> None:
    """Fills `out_THV` and brings each request's states up to date; those that decode come first."""
    starts = requests.non_spec_query_start_loc.tolist()
    slots = requests.non_spec_state_indices_tensor.tolist()
    decodes, prefills = requests.num_decodes, requests.num_prefills
    known = [True] * decodes
    if prefills:
        known += requests.has_initial_state.tolist()[decodes : decodes + prefills]
    inputs, states = layer.kv_cache  # (slots, taps - 1, channels), (slots, heads, values, keys)
    heads = layer.num_v_heads // layer.num_k_heads
    sizes = layer.key_dim, layer.key_dim, layer.value_dim
    for n, continues in enumerate(known):
        own, slot = slice(starts[n], starts[n + 1]), slots[n]
        before = inputs[slot] if continues else torch.zeros_like(inputs[slot])
        x_TC = torch.cat([before, qkv_TC[own]])
        inputs[slot] = x_TC[-len(before) :]
        mixed_CT = F.conv1d(x_TC.T, layer.conv1d.weight, groups=x_TC.shape[1])
        own_sizes = [size // layer.tp_size for size in sizes]
        parts = torch.split(F.silu(mixed_CT).T, own_sizes, dim=-1)
        q, k = (part.reshape(1, len(part), -1, layer.head_k_dim) for part in parts[:2])
        out, state = torch_recurrent_gated_delta_rule(
            q.repeat_interleave(heads, dim=2),
            k.repeat_interleave(heads, dim=2),
            parts[2].reshape(1, len(parts[2]), -1, layer.head_v_dim),
            g=-layer.A_log.exp() * F.softplus(a_TH[own] + layer.dt_bias)[None],
            beta=b_TH[own].sigmoid()[None],
            initial_state=states[slot].mT[None] if continues else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        out_THV[own], states[slot] = out[0], state[0].mT
