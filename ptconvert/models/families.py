"""The model families that can be converted, as data: each tensor's name, shape and cut.

Adding a family is adding a row: the tensors of one layer, which of them a config.json switches
on, and how each is divided among tracks. Nothing else in the package names a family.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


class Cut(enum.Enum):
    """How a layer's tensor is divided among tracks. Which of its indices a track owns says
    `ModelShape.span`, and in an assignment's order `checkpoint.layout`."""

    HEADS = "query heads"
    KV_HEADS = "KV heads"
    NEURONS = "FFN neurons"
    COPY = "a copy on every track"
    COMMON = "common to all tracks"


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a layer.

    `name` is relative to `model.layers.{i}.`; `shape` names attributes of ModelShape; `axis` is
    the axis that `cut` divides; `when` names the config.json flag that switches the tensor on.
    """

    name: str
    shape: tuple[str, ...]
    cut: Cut
    axis: int = 0
    when: str | None = None


@dataclass(frozen=True)
class Family:
    """A model family: its transformers classes, its tensors, and how its config.json is read.

    `defaults` are its config class's, where a key is missing; a null of the `nullable` keys means
    that the other sizes say it, and the class takes no other null.
    """

    model_type: str
    causal_lm: str
    layer: tuple[TensorRule, ...]
    defaults: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    nullable: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What the names of its classes in transformers begin with."""
        return self.causal_lm.removesuffix("ForCausalLM")

    def layer_rules(self, config: Mapping[str, object]) -> tuple[TensorRule, ...]:
        """The tensors that a layer of this config has."""
        return tuple(r for r in self.layer if r.when is None or config.get(r.when) is True)


_NORMS = (
    TensorRule("input_layernorm.weight", ("width",), Cut.COPY),
    TensorRule("post_attention_layernorm.weight", ("width",), Cut.COPY),
)
_ATTENTION = (
    TensorRule("self_attn.q_proj.weight", ("query_width", "width"), Cut.HEADS),
    TensorRule("self_attn.k_proj.weight", ("kv_width", "width"), Cut.KV_HEADS),
    TensorRule("self_attn.v_proj.weight", ("kv_width", "width"), Cut.KV_HEADS),
    TensorRule("self_attn.o_proj.weight", ("width", "query_width"), Cut.HEADS, axis=1),
)
_MLP = (
    TensorRule("mlp.gate_proj.weight", ("neurons", "width"), Cut.NEURONS),
    TensorRule("mlp.up_proj.weight", ("neurons", "width"), Cut.NEURONS),
    TensorRule("mlp.down_proj.weight", ("width", "neurons"), Cut.NEURONS, axis=1),
)
_QK_NORMS = (
    TensorRule("self_attn.q_norm.weight", ("head_size",), Cut.COPY),
    TensorRule("self_attn.k_norm.weight", ("head_size",), Cut.COPY),
)


def _qkv_biases(when: str | None) -> tuple[TensorRule, ...]:
    return (
        TensorRule("self_attn.q_proj.bias", ("query_width",), Cut.HEADS, when=when),
        TensorRule("self_attn.k_proj.bias", ("kv_width",), Cut.KV_HEADS, when=when),
        TensorRule("self_attn.v_proj.bias", ("kv_width",), Cut.KV_HEADS, when=when),
    )


_O_BIAS = (TensorRule("self_attn.o_proj.bias", ("width",), Cut.COMMON, when="attention_bias"),)
_MLP_BIASES = (
    TensorRule("mlp.gate_proj.bias", ("neurons",), Cut.NEURONS, when="mlp_bias"),
    TensorRule("mlp.up_proj.bias", ("neurons",), Cut.NEURONS, when="mlp_bias"),
    TensorRule("mlp.down_proj.bias", ("width",), Cut.COMMON, when="mlp_bias"),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        f.model_type: f
        for f in (
            Family(
                "llama",
                "LlamaForCausalLM",
                _NORMS + _ATTENTION + _MLP + _qkv_biases("attention_bias") + _O_BIAS + _MLP_BIASES,
                nullable=("num_key_value_heads", "head_dim"),
            ),
            Family(
                "mistral",
                "MistralForCausalLM",
                _NORMS + _ATTENTION + _MLP,
                MappingProxyType({"num_key_value_heads": 8}),
                nullable=("head_dim",),
            ),
            Family(
                "qwen2",
                "Qwen2ForCausalLM",
                _NORMS + _ATTENTION + _MLP + _qkv_biases(None),
                MappingProxyType({"num_key_value_heads": 32}),
                nullable=("num_key_value_heads",),
            ),
            Family(
                "qwen3",
                "Qwen3ForCausalLM",
                _NORMS + _ATTENTION + _MLP + _QK_NORMS + _qkv_biases("attention_bias") + _O_BIAS,
                MappingProxyType({"num_key_value_heads": 32, "head_dim": 128}),
                nullable=("num_key_value_heads",),
            ),
        )
    }
)

_MOE = "its layers are mixtures of experts, whose routing a track can't do on its own"
_POST_NORM = (
    "it norms each sublayer's output (post-norm), and a norm of a sum is not the sum of norms, "
    "so its sublayers can't be split into partials"
)
_HYBRID = "it has layers other than attention and MLP"

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "gemma2": _POST_NORM,
        "gemma3": _POST_NORM,
        "gemma3_text": _POST_NORM,
        "olmo2": _POST_NORM,
        "olmo3": _POST_NORM,
        "mixtral": _MOE,
        "qwen2_moe": _MOE,
        "qwen3_moe": _MOE,
        "deepseek_v2": _MOE,
        "deepseek_v3": _MOE,
        "llama4": _MOE,
        "llama4_text": _MOE,
        "gpt_oss": _MOE,
        "olmoe": _MOE,
        "jamba": _HYBRID,
        "mamba": _HYBRID,
        "mamba2": _HYBRID,
        "qwen3_next": _HYBRID,
    }
)

# Buffers that old checkpoints stored; they hold no weights and every loader ignores them.
CARRIED_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
