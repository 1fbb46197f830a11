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
    config says in other words. (Qwen2's take no size of heads, so that a track couldn't have
    fewer.) These call its MLP `mlp`. Rotary positions turn neighbouring channels where they are
    `interleaved`, else those of both halves of a head; `rotated` is what its config calls a list of
    which layers have them. Its `embeds` are multiplied by a number of its config, `rounded` to the
    model's dtype or not, and so are its `logits`, whose `soft_cap` has that name in it. With a
    config key of `refused` vLLM's layers would be others, as it says, and without `float16` vLLM
    refuses that.
    """

    model: str
    mlp: str = "mlp"
    given: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # noqa: ARG005
    interleaved: bool = False
    rotated: str | None = None
    embeds: Callable[[Any], float] | None = None
    rounded: bool = False
    logits: Callable[[Any], float] | None = None
    soft_cap: str | None = None
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    float16: bool = True


def _without(key: str, why: str) -> Mapping[str, str]:
    return MappingProxyType({key: why})


def _gemma(name: str, soft_cap: str | None = None, **more: Any) -> Served:
    def width(config: Any) -> float:
        return float(config.hidden_size**0.5)

    return Served(f"{name}ForCausalLM", embeds=width, rounded=True, soft_cap=soft_cap, **more)


def _llama_4_scaling(config: Any) -> Mapping[str, Any]:
    """What queries are multiplied by at late positions, as vLLM's Mistral reads it."""
    rope = config.rope_parameters
    scaling = {
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta": rope["llama_4_scaling_beta"],
    }
    return {"llama_4_scaling": scaling}


_NO_CHUNKS = _without(
    "dual_chunk_attention_config", "vLLM would attend in chunks, which transformers doesn't"
)


SERVED: Mapping[str, Served] = MappingProxyType(
    {
        "llama": Served("LlamaForCausalLM"),
        "mistral": Served("MistralForCausalLM"),
        "ministral3": Served("MistralForCausalLM", given=_llama_4_scaling),
        "qwen2": Served("LlamaForCausalLM", given=lambda _: {"qkv_bias": True}),
        "qwen3": Served("Qwen3ForCausalLM", refused=_NO_CHUNKS),
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
            refused=_NO_CHUNKS,
        ),
        "gemma": _gemma(
            "Gemma", refused=_without("attention_bias", "vLLM's layers for it have no biases")
        ),
        "gemma2": _gemma("Gemma2", "final_logit_softcapping", float16=False),
        "gemma3_text": _gemma("Gemma3", "final_logit_softcapping", float16=False),
        "glm4": Served("Glm4ForCausalLM", float16=False),
        "exaone4": Served("Exaone4ForCausalLM"),
        "qwen3_moe": Served(
            "Qwen3MoeForCausalLM",
            refused=MappingProxyType(
                {
                    "shared_expert_intermediate_size": "vLLM would add experts that transformers "
                    "hasn't",
                    **_NO_CHUNKS,
                }
            ),
        ),
        "mixtral": Served("MixtralForCausalLM", mlp="block_sparse_moe"),
    }
)
