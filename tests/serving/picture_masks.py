"""Attention in which a picture's tokens see each other, for vLLM on CPUs, which has none.

It stands for the one operation that is attention, of requests with such pictures; which tokens are
a picture's vLLM says, and keys and values are those of its cache. The mask is that of vLLM's
kernels for GPUs, the rest transformers' literal attention.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward


def install() -> None:
    """Puts it beside vLLM's; before vLLM makes a layer.

    Models with such pictures are refused for want of it, and no more."""
    from vllm.v1.attention.backends import cpu_attn

    builder, attention = cpu_attn.CPUAttentionMetadataBuilder, cpu_attn.CPUAttentionBackendImpl
    build, forward = builder.build, attention.forward

    def built(
        self: Any,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
    ) -> Any:
        requests = build(self, common_prefix_len, common_attn_metadata, fast_build)
        requests.mm_prefix_range = common_attn_metadata.mm_req_doc_ranges  # as in vLLM's for GPUs
        return requests

    def attended(self: Any, layer: Any, q_THC: torch.Tensor, *more: Any, **named: Any) -> Any:
        out_THC = forward(self, layer, q_THC, *more, **named)
        _, _, cache, requests, *_ = more
        for request, pictures in (getattr(requests, "mm_prefix_range", None) or {}).items():
            if pictures:
                attend(layer, requests, request, pictures, q_THC, cache, out_THC)
        return out_THC

    builder.build, attention.forward = built, attended
    cpu_attn.CPUAttentionBackend.supports_mm_prefix = classmethod(lambda _: True)


def attend(
    layer: Any,
    requests: Any,
    request: int,
    pictures: list[tuple[int, int]],
    q_THC: torch.Tensor,
    cache: torch.Tensor,
    out_THC: torch.Tensor,
) -> None:
    """Fills in `out_THC` what a request's tokens get; `pictures` are the first and the last place
    of each."""
    own = slice(*requests.query_start_loc[request : request + 2].tolist())
    length, attention = int(requests.seq_lens[request]), layer.impl
    # (blocks of tokens, heads, and of each head keys by channel, and values by token)
    blocks = cache[requests.block_table[request]]
    n, heads, size, _ = blocks.shape
    keys, values = blocks.reshape(n, heads, 2, -1).unbind(2)
    k_HSC = keys.view(n, heads, -1, size).permute(1, 0, 3, 2).reshape(heads, n * size, -1)
    v_HSC = values.view(n, heads, size, -1).permute(1, 0, 2, 3).reshape(heads, n * size, -1)

    at_S = torch.arange(length)
    at_T1 = at_S[own.start - own.stop :, None]
    near_TS = torch.ones(len(at_T1), length, dtype=torch.bool)
    if attention.sliding_window > 0:
        near_TS = at_T1 - at_S < attention.sliding_window
    seen_TS = (at_S <= at_T1) & near_TS
    for first, last in pictures:
        both_TS = ((at_T1 >= first) & (at_T1 <= last)) & ((at_S >= first) & (at_S <= last))
        seen_TS |= both_TS & near_TS if layer.mm_prefix_clamp_sliding_window else both_TS

    groups = q_THC.shape[1] // heads
    module: Any = SimpleNamespace(num_key_value_groups=groups, training=False)
    out_1THC, _ = eager_attention_forward(
        module,
        q_THC[own].transpose(0, 1)[None],
        k_HSC[None, :, :length],
        v_HSC[None, :, :length],
        torch.zeros(seen_TS.shape).masked_fill(~seen_TS, float("-inf")),
        scaling=attention.scale,
        softcap=attention.logits_soft_cap or None,
    )
    out_THC[own] = out_1THC[0]
