"""The families that vLLM serves, each by which of its models' decoder layers, and what else it
needs; all were compared with transformers' (tests/serving)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ptconvert.models.families import MODEL_TYPE_PREFIX


@dataclass(frozen=True)
class Served:
    """A family in vLLM.

    `model` is the causal language model there whose decoder layers it has: its own, or where vLLM
    has only its Transformers backend, one whose layers compute the same, `given` what its own
    config says in other words. (Qwen2's take no size of heads, so that a track couldn't have
    fewer.) They are of the class `layer`, if that isn't called after the model, and call attention
    and MLP `attention` and `mlp`; `tensors` are the names in a checkpoint that have others there,
    `passed` what the attention is called with beside the rest. Norms between sublayers are made of
    vLLM's class `norm`, if its layer has others. `normed_after` are the norms of queries and keys
    that follow their rotary positions. With `latent` attention (MLA) these tensors are parts of
    others there, where vLLM keeps the latents in its cache. `methods` are quantisation methods of
    its own, by the names of those that it would get. With a config key of `refused` vLLM's layers
    would be others, as it says; those of `fixed` have a value built in, and any other is refused.
    Without `float16` vLLM refuses that. What it computes beside, `engines.families` says.
    """

    model: str
    layer: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    tensors: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    passed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    norm: str | None = None
    given: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # noqa: ARG005
    normed_after: tuple[str, str] | None = None
    latent: Mapping[str, tuple[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    methods: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    float16: bool = True


def _without(key: str, why: str) -> Mapping[str, str]:
    return MappingProxyType({key: why})


_GEMMA4 = Served(
    "Gemma4ForCausalLM",
    refused=_without("attn_logit_softcapping", "vLLM would cap scores, which transformers doesn't"),
)


def _llama_4_scaling(config: Any) -> Mapping[str, Any]:
    """What queries are multiplied by at late positions, as vLLM's Mistral reads it."""
    rope = config.rope_parameters
    scaling = {
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta": rope["llama_4_scaling_beta"],
    }
    return {"llama_4_scaling": scaling}


def _ungated(norm: str, eps: str, **more: Any) -> Served:
    """Nemotron's layers, whose MLP has no gate, with other norms; `eps` is theirs in its config."""

    def given(config: Any) -> Mapping[str, Any]:
        biased = getattr(config, "use_bias", None)
        biases = {} if biased is None else {"attention_bias": biased, "mlp_bias": biased}
        return {"norm_eps": getattr(config, eps), **biases}

    return Served("NemotronForCausalLM", norm=norm, given=given, **more)


def _cohere(**more: Any) -> Served:
    return Served(
        "CohereForCausalLM",
        norm="LayerNorm",
        refused=_without("attention_bias", "vLLM's layers for it have no biases"),
        **more,
    )


def _narrower(config: Any) -> Mapping[str, Any]:
    """vLLM lets Cohere's windows reach one token further than transformers."""
    window = config.sliding_window
    return {} if window is None else {"sliding_window": window - 1}


def _gated_delta_net(config: Any) -> Mapping[str, Any]:
    """What transformers' classes are, whatever a config says: their name decides on the MLP, and
    what comes out of either attention is gated."""
    own = {"model_type": config.model_type.removeprefix(MODEL_TYPE_PREFIX)}
    return {**own, "attn_output_gate": True, "output_gate_type": "silu"}


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
        "smollm3": Served("LlamaForCausalLM"),
        "ernie4_5": Served(
            "LlamaForCausalLM",
            refused=_without("use_bias", "vLLM's layers for it have no biases"),
        ),
        "glm": Served("LlamaForCausalLM"),
        "granite": Served("GraniteForCausalLM"),
        "hyperclovax": Served("HyperCLOVAXForCausalLM", refused=_NO_CHUNKS),
        "gemma": Served(
            "GemmaForCausalLM",
            refused=_without("attention_bias", "vLLM's layers for it have no biases"),
        ),
        "gemma2": Served("Gemma2ForCausalLM", float16=False),
        "gemma3_text": Served("Gemma3ForCausalLM", float16=False),
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
        # vLLM divides what shared experts give in float16, and multiplies it again nowhere
        "glm4_moe": Served("Glm4MoeForCausalLM", float16=False),
        "gpt_oss": Served(
            "GptOssForCausalLM",
            layer="TransformerBlock",
            attention="attn",
            tensors=MappingProxyType(
                {
                    ".experts.gate_up_proj_blocks": ".experts.w13_weight",
                    ".experts.gate_up_proj_scales": ".experts.w13_weight_scale",
                    ".experts.down_proj_blocks": ".experts.w2_weight",
                    ".experts.down_proj_scales": ".experts.w2_weight_scale",
                    ".experts.gate_up_proj_bias": ".experts.w13_bias",
                    ".experts.down_proj_bias": ".experts.w2_bias",
                    ".experts.gate_up_proj": ".experts.w13_weight",
                    ".experts.down_proj": ".experts.w2_weight",
                }
            ),
            methods=MappingProxyType({"mxfp4": "gpt_oss_mxfp4"}),
            fixed=MappingProxyType(
                {"rms_norm_eps": 1e-5, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
            ),
        ),
        "deepseek_v3": Served(
            "DeepseekV2ForCausalLM",
            given=lambda _: {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            passed=MappingProxyType({"llama_4_scaling": None}),
            latent=MappingProxyType(
                {
                    ".q_a_proj.": (".fused_qkv_a_proj.", 0),
                    ".kv_a_proj_with_mqa.": (".fused_qkv_a_proj.", 1),
                }
            ),
            refused=_without("attention_bias", "vLLM's layers for it have no biases"),
            fixed=MappingProxyType({"rms_norm_eps": 1e-6, "rope_interleave": True}),
            float16=False,
        ),
        "gemma4_text": _GEMMA4,
        "gemma4_unified_text": _GEMMA4,
        "apertus": Served("ApertusForCausalLM"),
        "nemotron": Served("NemotronForCausalLM"),
        "arcee": _ungated("RMSNorm", "rms_norm_eps"),
        "jais2": _ungated("LayerNorm", "layer_norm_eps"),
        "starcoder2": _ungated(
            "LayerNorm",
            "norm_epsilon",
            tensors=MappingProxyType(
                {".mlp.c_fc.": ".mlp.up_proj.", ".mlp.c_proj.": ".mlp.down_proj."}
            ),
        ),
        "cohere": _cohere(),
        "cohere2": _cohere(given=_narrower),
        "hunyuan_v1_dense": Served(
            "LlamaForCausalLM", normed_after=("query_layernorm", "key_layernorm")
        ),
        "qwen3_vl_text": Served("Qwen3ForCausalLM", refused=_NO_CHUNKS),
        "qwen3_5_text": Served("Qwen3_5ForCausalLM", given=_gated_delta_net),
        "qwen3_5_moe_text": Served("Qwen3_5ForCausalLM", given=_gated_delta_net),
        "qwen3_next": Served("Qwen3NextForCausalLM", given=_gated_delta_net),
    }
)

# What vLLM's classes of models with pictures make their language model by, in their modules.
_REGISTERED = "init_vllm_registered_model"
LANGUAGE_MODELS: Mapping[str, str] = MappingProxyType(
    {
        "llava": _REGISTERED,
        "mistral3": _REGISTERED,
        "internvl": _REGISTERED,
        "qwen3_5": "Qwen3_5ForCausalLM",
        "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
        "gemma3": _REGISTERED,
        "gemma4": _REGISTERED,
        "gemma4_unified": _REGISTERED,
        "qwen3_vl": "Qwen3LLMForCausalLM",
    }
)
OLDER_NAMES = {"gemma4_unified"}  # whose tensors around it vLLM knows as they are published only
# Where a picture's tokens may see each other, which vLLM knows by a model's type.
SEE_EACH_OTHER = "gemma3", "gemma4", "gemma4_unified"
