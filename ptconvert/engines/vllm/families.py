"""The families that vLLM serves, each by which of its models' decoder layers, and what else it
needs; all were compared with transformers' (tests/serving)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Served:
    """A family in vLLM.

    `model` is the causal language model there whose decoder layers it has: its own, or where vLLM
    has only its Transformers backend, one whose layers compute the same, `given` what its own
    config hasn't. (Qwen2's take no size of heads, so that a track couldn't have fewer.) These call
    its MLP `mlp`. Rotary positions turn neighbouring channels where they are `interleaved`, else
    those of both halves of a head; `rotated` is what its config calls a list of which layers have
    them. Its `embeds` are multiplied by a number of its config, `rounded` to the model's dtype or
    not, and so are its `logits`, whose `soft_cap` has that name in it. With a config key of
    `refused` vLLM's layers would be others, as it says.
    """

    model: str
    mlp: str = "mlp"
    given: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    interleaved: bool = False
    rotated: str | None = None
    embeds: Callable[[Any], float] | None = None
    rounded: bool = False
    logits: Callable[[Any], float] | None = None
    soft_cap: str | None = None
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def _without(key: str, why: str) -> Mapping[str, str]:
    return MappingProxyType({key: why})


def _gemma(name: str, soft_cap: str | None = None) -> Served:
    return Served(
        f"{name}ForCausalLM",
        embeds=lambda config: config.hidden_size**0.5,
        rounded=True,
        soft_cap=soft_cap,
        refused=_without("attention_bias", "vLLM's layers for it have no biases"),
    )


SERVED: Mapping[str, Served] = MappingProxyType(
    {
        "llama": Served("LlamaForCausalLM"),
        "mistral": Served("MistralForCausalLM"),
        "ministral3": Served("MistralForCausalLM"),
        "qwen2": Served("LlamaForCausalLM", given=MappingProxyType({"qkv_bias": True})),
        "qwen3": Served("Qwen3ForCausalLM"),
        "phi3": Served("LlamaForCausalLM"),
        "cwm": Served("LlamaForCausalLM"),
        "seed_oss": Served("LlamaForCausalLM"),
        "smollm3": Served("LlamaForCausalLM", rotated="no_rope_layers"),
        "ernie4_5": Served(
            "LlamaForCausalLM",
            interleaved=True,
            refused=_without("use_bias", "vLLM's layers for it have no biases"),
        ),
        "glm": Served("LlamaForCausalLM", interleaved=True),
        "granite": Served(
            "GraniteForCausalLM",
            embeds=lambda config: config.embedding_multiplier,
            logits=lambda config: 1 / config.logits_scaling,
        ),
        "hyperclovax": Served(
            "HyperCLOVAXForCausalLM",
            embeds=lambda config: config.embedding_multiplier,
            logits=lambda config: config.logits_scaling,
        ),
        "gemma": _gemma("Gemma"),
        "gemma2": _gemma("Gemma2", soft_cap="final_logit_softcapping"),
        "gemma3_text": _gemma("Gemma3", soft_cap="final_logit_softcapping"),
        "glm4": Served("Glm4ForCausalLM"),
        "exaone4": Served("Exaone4ForCausalLM"),
        "qwen3_moe": Served(
            "Qwen3MoeForCausalLM",
            refused=_without(
                "shared_expert_intermediate_size", "vLLM would add experts that transformers hasn't"
            ),
        ),
        "mixtral": Served("MixtralForCausalLM", mlp="block_sparse_moe"),
    }
)
