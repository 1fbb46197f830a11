"""The families that SGLang serves, each by which of its models' decoder layers, and what else it
needs; all were compared with transformers' (tests/serving_sglang)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ptconvert.models.families import MODEL_TYPE_PREFIX, SCORE_CAP


@dataclass(frozen=True)
class Served:
    """A family in SGLang.

    `layer` is the decoder layer there that it has the attention and the MLP of, by module and class
    of `sglang.srt.models`: its own where that computes the same as transformers', else another
    family's, `given` what its own config says in other words. `mlp` is another MLP where that
    layer's isn't the family's, and `experts` that of a layer that is a mixture; either is activated
    by one of `activations`. Where some layers have linear attention, that is the module `linear`,
    and full attention is what a method `attends` of the `layer`, which has the projections itself.
    Its norms are those that a checkpoint has, of SGLang's class `norm` or
    torch's LayerNorm, whose epsilon the config calls `eps`; `qk_norms` are those of queries and
    keys where the attention has none, before their rotary positions or, `normed_after`, behind
    them. Attention scores are multiplied by `scale`, where that isn't one by the root of a head's
    size, and then have the soft cap that the config calls `score_cap`; with `sinks` each head has a
    score beside them that nothing is attended to by, which only some of SGLang's attention backends
    know. `tensors` are the names in a checkpoint that have others there, `joined` those of linears
    that are parts of one there, of which some are `parted` before: those have keys, keys and values
    of linear attention in one. With `shared_weights` shared experts' linears must keep a `weight`
    of that name. Quantised weights may be kept by one of `methods`, as quantization_configs call
    them.

    SGLang knows by the names of its own architectures, of which it is told the one that the family
    is `known_as`, if what it keeps is no keys and values of as many tokens and heads in all layers:
    with `latent` attention (MLA) latents, else those of layers with a window in a cache of their
    own, of other heads, too, where these are `by_kind` of layer, which only its attention
    `backends` read, if they are given. With a config key of `refused` SGLang's layers would be
    others, as it says; those of `fixed` have a value built in, and any other is refused. If `ropes`
    are given, positions are of these types alone, with these keys beside base and type. What it
    computes beside, `engines.families` says.
    """

    layer: str = "llama.LlamaDecoderLayer"
    mlp: str | None = None
    experts: str | None = None
    linear: str | None = None
    attends: str | None = None
    activations: tuple[str, ...] = ("silu",)
    given: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # noqa: ARG005
    norm: str = "RMSNorm"
    eps: str = "rms_norm_eps"
    qk_norms: tuple[str, str] | None = None
    normed_after: bool = False
    scale: Callable[[Any], float] | None = None
    score_cap: str | None = None
    sinks: bool = False
    tensors: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    joined: Mapping[str, tuple[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    parted: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    shared_weights: bool = False
    methods: tuple[str, ...] = ("fp8", "compressed-tensors", "awq", "gptq", "modelopt")
    known_as: str | None = None
    latent: bool = False
    by_kind: bool = False
    backends: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ropes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))


# SGLang's Llama has no biases before its activation; this one computes the same, and has.
BIASED_MLP = "hunyuan.HunYuanMLP"
# From what a checkpoint calls a projection of an expert to what SGLang does; some say it as SGLang.
EXPERTS_PARTS = MappingProxyType({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
_QK_NORMS = ("q_norm", "k_norm")
_AS_STARCODER2 = MappingProxyType(
    {".mlp.up_proj.": ".mlp.c_fc.", ".mlp.down_proj.": ".mlp.c_proj."}
)


def _multiplied(config: Any) -> float:
    return float(config.attention_multiplier)


def _gemma(**more: Any) -> Served:
    return Served(
        mlp="gemma3_causal.Gemma3MLP",
        activations=("gelu_pytorch_tanh",),
        norm="GemmaRMSNorm",
        **more,
    )


def _gemma_with_windows(**more: Any) -> Served:
    return _gemma(
        scale=lambda config: float(config.query_pre_attn_scalar**-0.5),
        score_cap=SCORE_CAP,
        **more,
    )


def _ungated(norm: str, eps: str, bias: str) -> Served:
    """Llama's attention beside StarCoder2's MLP, which has no gate; `bias` is what its config calls
    the MLP's biases."""

    def given(config: Any) -> Mapping[str, Any]:
        biased = {"attention_bias": config.use_bias} if bias == "use_bias" else {}
        return {**biased, "use_bias": getattr(config, bias)}

    return Served(
        mlp="starcoder2.Starcoder2MLP",
        activations=("relu2", "gelu", "gelu_pytorch_tanh", "gelu_new"),
        given=given,
        norm=norm,
        eps=eps,
        tensors=_AS_STARCODER2,
    )


def _llama_4_scaling(config: Any) -> Mapping[str, Any]:
    """From where on queries are multiplied, as SGLang's Ministral 3 reads it."""
    known = config.rope_parameters["original_max_position_embeddings"]
    return {"original_max_position_embeddings": known}


def _of_full_attention(config: Any) -> Mapping[str, Any]:
    """Sizes as SGLang's Gemma 4 reads them, those of windows under other names, and positions by
    kind of layer."""
    own = "head_dim", "num_key_value_heads", "rope_parameters"
    return {name: getattr(config, name) for name in own}


def _gated_delta_net(config: Any) -> Mapping[str, Any]:
    """What transformers' classes are, whatever a config says: their name decides on the MLP, and
    what comes out of either attention is gated. Positions are a text's, which has no pictures."""
    axes = "mrope_section", "mrope_interleaved"
    rope = {key: value for key, value in config.rope_parameters.items() if key not in axes}
    return {
        "model_type": config.model_type.removeprefix(MODEL_TYPE_PREFIX),
        "attn_output_gate": True,
        "output_gate_type": None,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "full_attention_interval": 1,  # by which only NPUs are told something
    }


def _hybrid(layers: str, linear: str, **more: Any) -> Served:
    return Served(
        layers,
        mlp="qwen2_moe.Qwen2MoeMLP",
        experts="qwen2_moe.Qwen2MoeSparseMoeBlock",
        linear=linear,
        attends="self_attention",
        norm="GemmaRMSNorm",
        methods=(),  # none was tried
        refused=MappingProxyType({"attention_bias": "SGLang's layers for it have no biases"}),
        **more,
    )


_PLAIN_YARN = "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"
_YARN = (*_PLAIN_YARN, "mscale", "mscale_all_dim")
_GEMMA4 = Served(
    "gemma4_causal.Gemma4DecoderLayer",
    mlp="gemma3_causal.Gemma3MLP",
    activations=("gelu_pytorch_tanh",),
    given=_of_full_attention,
    known_as="Gemma4ForCausalLM",
    by_kind=True,
    # those of SGLang's own Gemma 4 on GPUs, and what it has on CPUs
    backends=("triton", "trtllm_mha", "fa4", "aiter", "torch_native"),
    ropes=MappingProxyType({"default": (), "proportional": ("partial_rotary_factor",)}),
)
_QWEN3_5 = _hybrid(
    "qwen3_5.Qwen3_5AttentionDecoderLayer",
    "qwen3_5.Qwen3_5GatedDeltaNet",
    given=lambda config: {**_gated_delta_net(config), "norm_topk_prob": True},
    parted=MappingProxyType({".in_proj_qkv.": (".in_proj_q.", ".in_proj_k.", ".in_proj_v.")}),
    joined=MappingProxyType(
        {
            **{f".in_proj_{part}.": (".in_proj_qkvz.", n) for n, part in enumerate("qkvz")},
            **{f".in_proj_{part}.": (".in_proj_ba.", n) for n, part in enumerate("ba")},
        }
    ),
)
SERVED: Mapping[str, Served] = MappingProxyType(
    {
        "llama": Served(),
        "mistral": Served(),
        "ministral3": Served("ministral3.Ministral3DecoderLayer", given=_llama_4_scaling),
        "qwen2": Served("qwen2.Qwen2DecoderLayer"),
        "qwen3": Served("qwen3.Qwen3DecoderLayer"),
        "phi3": Served(),
        "cwm": Served(),
        "seed_oss": Served(),
        "smollm3": Served(),
        "ernie4_5": Served(given=lambda config: {"attention_bias": config.use_bias}),
        "glm": Served(),
        "glm4": Served(),
        "granite": Served(scale=_multiplied),
        "hyperclovax": Served(scale=_multiplied),
        "exaone4": Served(qk_norms=_QK_NORMS),
        "hunyuan_v1_dense": Served(
            qk_norms=("query_layernorm", "key_layernorm"), normed_after=True
        ),
        "gemma": _gemma(),
        "gemma2": _gemma_with_windows(),
        "gemma3_text": _gemma_with_windows(qk_norms=_QK_NORMS),
        "gemma4_text": _GEMMA4,
        "gemma4_unified_text": _GEMMA4,
        "apertus": Served("apertus.ApertusDecoderLayer", activations=("xielu",)),
        "arcee": _ungated("RMSNorm", "rms_norm_eps", "mlp_bias"),
        "nemotron": _ungated("LayerNorm1P", "norm_eps", "mlp_bias"),
        "jais2": _ungated("LayerNorm", "layer_norm_eps", "mlp_bias"),
        "starcoder2": _ungated("LayerNorm", "norm_epsilon", "use_bias"),
        "cohere": Served(
            "commandr.CohereDecoderLayer",
            norm="LayerNorm",
            eps="layer_norm_eps",
            refused=MappingProxyType({"attention_bias": "SGLang's layers for it have no biases"}),
        ),
        "cohere2": Served(norm="LayerNorm", eps="layer_norm_eps"),
        "mixtral": Served(
            experts="mixtral.MixtralMoE",
            tensors=MappingProxyType({".block_sparse_moe.": ".mlp."}),
        ),
        "qwen3_moe": Served(
            "qwen3.Qwen3DecoderLayer",
            experts="qwen3_moe.Qwen3MoeSparseMoeBlock",
        ),
        "glm4_moe": Served("glm4_moe.Glm4MoeDecoderLayer", shared_weights=True),
        "gpt_oss": Served(
            "gpt_oss.GptOssDecoderLayer",
            sinks=True,
            tensors=MappingProxyType(
                {
                    ".experts.gate_up_proj_blocks": ".experts.w13_weight",
                    ".experts.gate_up_proj_scales": ".experts.w13_weight_scale",
                    ".experts.down_proj_blocks": ".experts.w2_weight",
                    ".experts.down_proj_scales": ".experts.w2_weight_scale",
                    ".experts.gate_up_proj_bias": ".experts.w13_weight_bias",
                    ".experts.down_proj_bias": ".experts.w2_weight_bias",
                    ".experts.gate_up_proj": ".experts.w13_weight",
                    ".experts.down_proj": ".experts.w2_weight",
                }
            ),
            methods=("mxfp4",),  # its attention's linears there are never quantised
            known_as="GptOssForCausalLM",
            fixed=MappingProxyType({"swiglu_alpha": 1.702}),
            ropes=MappingProxyType({"default": (), "yarn": (*_PLAIN_YARN, "truncate")}),
        ),
        "deepseek_v3": Served(
            "deepseek_v2.DeepseekV2DecoderLayer",
            given=lambda _: {
                **{"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
            },
            joined=MappingProxyType(
                {
                    ".q_a_proj": (".fused_qkv_a_proj_with_mqa", 0),
                    ".kv_a_proj_with_mqa": (".fused_qkv_a_proj_with_mqa", 1),
                }
            ),
            known_as="DeepseekV3ForCausalLM",
            latent=True,
            refused=MappingProxyType({"attention_bias": "SGLang's layers for it have no biases"}),
            fixed=MappingProxyType({"rms_norm_eps": 1e-6, "rope_interleave": True}),
            ropes=MappingProxyType({"yarn": _YARN}),
        ),
        "qwen3_5_text": _QWEN3_5,
        "qwen3_5_moe_text": _QWEN3_5,
        "qwen3_next": _hybrid(
            "qwen3_next.Qwen3HybridAttentionDecoderLayer",
            "qwen3_next.Qwen3GatedDeltaNet",
            given=_gated_delta_net,
        ),
    }
)
