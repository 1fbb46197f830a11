"""Gated DeltaNet and gates in float32 for SGLang on CPUs, whose operations for them there are
`sgl_kernel`'s, which has no build on the registry, or Triton's, which has no CPUs.

They stand for what lies between projections, in transformers' literal form, a token at a time, with
the states where SGLang keeps them; projections, positions, attention, caches, pools of states and
scheduling stay SGLang's. What they are called and given is as SGLang calls them.

Shape suffixes: T tokens of all requests, C channels of queries, keys and values; H heads, V and K
channels of a value and a key; S slots of the pool.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
    torch_recurrent_gated_delta_rule,
)

from ptconvert.engines.sglang import refusals


def install() -> None:
    """Puts them where SGLang looks for its own, before it imports what calls them.

    Models with linear attention are refused for want of them, and no more."""
    import sgl_kernel

    own: Any = ModuleType("sgl_kernel.mamba")
    sys.modules[own.__name__] = sgl_kernel.mamba = own
    operations: dict[Any, tuple[Any, ...]] = {
        own: (causal_conv1d_fn_cpu, causal_conv1d_update_cpu, chunk_gated_delta_rule_cpu),
        torch.ops.sgl_kernel: (
            *(fused_gdn_gating_cpu, fused_sigmoid_gating_delta_rule_update_cpu),
            *(fused_qkvzba_split_reshape_cat_contiguous_cpu, fused_sigmoid_mul_cpu),
            *(fused_qk_gemma_rmsnorm_cpu, fused_qk_gemma_rmsnorm_with_gate_cpu),
        ),
    }
    for module, its in operations.items():
        for operation in its:
            setattr(module, operation.__name__, operation)
    from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated
    from sglang.srt.models import qwen2_moe

    qwen2_moe.fused_gate_sigmoid_mul_add = fused_gate_sigmoid_mul_add
    fused_norm_gate.FusedRMSNormGated.forward = gated_norm
    layernorm_gated.RMSNorm.forward = gated_norm
    refusals.LINEAR_ON_CPUS = True


def gated_norm(norm: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    assert norm.activation in ("silu", "swish")
    literal = Qwen3NextRMSNormGated(x.shape[-1], eps=norm.eps)
    literal.weight = norm.weight
    out: torch.Tensor = literal(x, gate)
    return out


def fused_gate_sigmoid_mul_add(
    x_TD: torch.Tensor, weight_D: torch.Tensor, shared_TD: torch.Tensor, out_TD: torch.Tensor
) -> None:
    """Adds what the expert gives that all tokens go to, weighed, to what others give."""
    out_TD.add_((x_TD @ weight_D).sigmoid()[:, None] * shared_TD)


def causal_conv1d_fn_cpu(
    x_CT: torch.Tensor,
    weight: torch.Tensor,
    bias: None,
    *,
    activation: str,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: object,  # noqa: ARG001 - as the starts say
) -> torch.Tensor:
    """Of prompts, or chunks of them; brings the last inputs up to date, (S, C, taps - 1)."""
    assert bias is None and activation == "silu"
    out_CT = torch.empty_like(x_CT)
    starts = query_start_loc.tolist()
    for n, slot in enumerate(cache_indices.tolist()):
        own = slice(starts[n], starts[n + 1])
        before = conv_states[slot] if has_initial_state[n] else torch.zeros_like(conv_states[slot])
        out_CT[:, own], conv_states[slot] = _convolved(x_CT[:, own], before, weight)
    return out_CT


def causal_conv1d_update_cpu(
    x_TC: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: None,
    activation: str,
    *,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """Of a token of each request."""
    assert bias is None and activation == "silu"
    out_TC = torch.empty_like(x_TC)
    for n, slot in enumerate(conv_state_indices.tolist()):
        out_C1, conv_states[slot] = _convolved(x_TC[n, :, None], conv_states[slot], weight)
        out_TC[n] = out_C1[:, 0]
    return out_TC


def _convolved(
    x_CT: torch.Tensor, before: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    seen = torch.cat([before, x_CT], dim=1)
    mixed_CT = F.conv1d(seen, weight[:, None], groups=len(seen))
    return F.silu(mixed_CT), seen[:, -before.shape[1] :]


def fused_gdn_gating_cpu(
    A_log: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    dt_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays, as logarithms, and what new values are multiplied by, (1, T, H) each."""
    return -(A_log.exp() * F.softplus(a_TH + dt_bias))[None], b_TH.sigmoid()[None]


def chunk_gated_delta_rule_cpu(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[torch.Tensor, None, None]:
    """Of prompts, chunks of them, or a token of each request, (1, T, heads, channels); brings the
    matrices up to date, (S, H, V, K), which SGLang has emptied for a new request."""
    assert not head_first and use_qk_l2norm_in_kernel
    starts, heads = cu_seqlens.tolist(), v.shape[2] // k.shape[2]
    out_1THV = torch.empty_like(v)
    for n, slot in enumerate(initial_state_indices.tolist()):
        own = slice(starts[n], starts[n + 1])
        out_1THV[:, own], state_1HKV = torch_recurrent_gated_delta_rule(
            q[:, own].repeat_interleave(heads, dim=2),
            k[:, own].repeat_interleave(heads, dim=2),
            v[:, own],
            g=g[:, own],
            beta=beta[:, own],
            initial_state=initial_state[slot].mT[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        initial_state[slot] = state_1HKV[0].mT
    return out_1THV, None, None


def fused_sigmoid_gating_delta_rule_update_cpu(
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> torch.Tensor:
    """The same of a token of each request, with the gates."""
    assert (softplus_beta, softplus_threshold) == (1.0, 20.0)  # torch's
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    out_1THV, _, _ = chunk_gated_delta_rule_cpu(
        **{"q": q, "k": k, "v": v, "g": g, "beta": beta, "cu_seqlens": cu_seqlens},
        initial_state=initial_state_source,
        initial_state_indices=initial_state_indices,
        head_first=False,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return out_1THV


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    qkvz: torch.Tensor, ba: torch.Tensor, keys: int, values: int, key_size: int, value_size: int
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in one, what gates the output (T, H, V), and what gates of the rule
    are made of; of projections that lie one after the other."""
    rest = values * value_size
    qkv_TC, z_TC = torch.split(qkvz, [2 * keys * key_size + rest, rest], dim=-1)
    return qkv_TC, z_TC.reshape(len(z_TC), values, value_size), *ba.chunk(2, dim=-1)


def fused_sigmoid_mul_cpu(x: torch.Tensor, gate: torch.Tensor) -> None:
    x.mul_(gate.sigmoid())


def fused_qk_gemma_rmsnorm_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, normed head by head."""
    normed = [
        _norm(weight, eps)(x.reshape(-1, head_size)).view(x.shape)
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    return normed[0], normed[1]


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_size: int,
    heads: int,
) -> tuple[torch.Tensor, ...]:
    """The same, of queries that have their gate behind them head by head, and the gates."""
    both = q_gate.reshape(len(q_gate), heads, 2 * head_size).chunk(2, dim=-1)
    q, gate = (x.flatten(1) for x in both)
    return *fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_size), gate


def _norm(weight: torch.Tensor, eps: float) -> Any:
    norm = Qwen3NextRMSNorm(len(weight), eps=eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm
