"""What SGLang can't serve of converted checkpoints, by name, before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.engines.formats import mixtures_in_parts, not_causal, unlike_keys
from ptconvert.engines.sglang.families import SERVED, Served
from ptconvert.engines.sglang.formats import METHODS, MXFP4, unserved_weights
from ptconvert.errors import ConfigError
from ptconvert.models.families import FULL
from ptconvert.models.quantised import QUANTIZATION, quantization_of
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import wrapper_of

# Its attention backends that know sinks, of those on GPUs and of that on CPUs which was tried.
SINKS = frozenset(("triton", "trtllm_mha", "fa3", "fa4", "aiter"))
ON_CPUS = "torch_native"
LINEAR_ON_CPUS = False  # whether its operations for linear attention there were tried
CPU_BLOCK = 32  # SGLang's CPU engine fills each rank's neurons up to a multiple of it
# What it calls the numbers of a config that it replaced so.
_PADDED = {
    "intermediate_size": "original_intermediate_size",
    "moe_intermediate_size": "original_moe_intermediate_size",
    "shared_expert_intermediate_size": "original_shared_expert_intermediate_size",
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
}
# And those of layers with a window, where others have other heads (Gemma 4).
_WINDOWS = {"head_dim": "swa_head_dim", "num_key_value_heads": "swa_num_key_value_heads"}
_MODELOPT = "modelopt"
_WHOLE = "all layers must be on every rank, each with all of a batch"
_SHARED = "each track has a share of every expert"
# Why ranks can't be in several groups, by the option that makes these.
_ONE_GROUP = {
    **dict.fromkeys(("--pp-size", "--enable-dp-attention", "--attn-cp-size", "--dcp-size"), _WHOLE),
    **dict.fromkeys(("--ep-size", "--moe-dp-size"), _SHARED),
}
_OLDER_ROPES = "rope_scaling"  # which transformers reads first
_PLAIN_ROPES = MappingProxyType({"rope_type": "default"})
_ALWAYS = "rope_type", "type", "rope_theta"  # keys of all positions
_MSCALES = {"mscale", "mscale_all_dim"}


def unpadded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the checkpoint's own numbers, and its own name of a quantisation method."""
    quantization = config.get(QUANTIZATION) or {}
    if str(quantization.get("quant_method")).startswith(_MODELOPT):  # and what of its kinds
        config = {**config, QUANTIZATION: {**quantization, "quant_method": _MODELOPT}}
    config = {**config, **{k: config[own] for k, own in _PADDED.items() if own in config}}
    if _WINDOWS["num_key_value_heads"] in config:
        full = {key: config[key] for key in _WINDOWS}
        layers = (str(i) for i, kind in enumerate(config["layer_types"]) if kind == FULL)
        config |= {key: config[own] for key, own in _WINDOWS.items()}
        config["per_layer_config"] = dict.fromkeys(layers, full)
    return config


def check(
    config: Mapping[str, Any],
    shape: ModelShape,
    section: Section,
    ranks: int,
    *,
    on_cpu: bool,
    quantization: str | None = None,
    groups: Mapping[str, int] = MappingProxyType({}),
    dense_ranks: int | None = None,
    backends: tuple[str, ...] = (),
    drafts: str | None = None,
) -> None:
    """Raises ConfigError for settings under which the model would not work: of so many
    tensor-parallel ranks, a quantisation method by SGLang's name, groups of ranks by SGLang's
    options, how many ranks share a dense MLP of a mixture, attention by these backends, drafts by
    this algorithm. `config` is as for `unserved`.
    """
    refused = list(unserved(config, shape, section, ranks, on_cpu=on_cpu))
    method = str((quantization_of(config) or {}).get("quant_method"))
    if quantization not in (None, *METHODS.get(method, ())):
        refused.append(
            f"--quantization {quantization}: converted models are served as their weights are "
            "kept; leave it out"
        )
    refused += [
        f"{option}: {_ONE_GROUP[option]}; leave it" for option, size in groups.items() if size > 1
    ]
    if dense_ranks is not None:
        refused.append("--moe-dense-tp-size: each rank has its share of a dense MLP; leave it")
    if drafts is not None:
        refused.append(
            f"--speculative-algorithm {drafts}: not tried in SGLang; leave it out, or serve it in "
            "vLLM"
        )
    if shape.model_type in SERVED:
        refused += _unread(SERVED[shape.model_type], backends)
    if refused:
        raise ConfigError("; ".join(refused))


def _unread(served: Served, backends: tuple[str, ...]) -> Iterator[str]:
    """Which of attention's backends don't do what a family needs of them."""
    needs = [("heads differ by kind of layer, which", served.backends)]
    if served.sinks:
        needs.append(("attention has sinks, which", tuple(sorted(SINKS))))
    for what, taken in needs:
        for backend in dict.fromkeys(backends):
            if taken and backend not in taken:
                known = ", ".join(taken)
                yield f"--attention-backend {backend}: {what} in SGLang only {known} read"
    if served.known_as and not served.latent and ON_CPUS in backends and len(set(backends)) > 1:
        yield f"--attention-backend: {ON_CPUS} beside another was not tried; take one"


def unserved(
    config: Mapping[str, Any],
    shape: ModelShape,
    section: Section,
    ranks: int,
    *,
    on_cpu: bool = False,
) -> Iterator[str]:
    """Why SGLang wouldn't serve a converted checkpoint on so many ranks, each reason in a line,
    whatever SGLang is told.

    `config` is its config.json, or its source's, with its own numbers (`unpadded`); what that
    doesn't say is as transformers has it, which is served. `shape` is the source's.
    """
    if wrapper := wrapper_of(config["model_type"]):
        yield (
            f"a converted {wrapper.model_type} isn't served in SGLang, nor any other model with "
            "pictures; transformers runs it"
        )
        return
    if shape.model_type not in SERVED:
        yield (
            f"a converted {shape.model_type} isn't served in SGLang, of converted models only "
            f"{', '.join(SERVED)}; transformers runs it"
        )
        return
    yield from _unlike(SERVED[shape.model_type], config, on_cpu)
    yield from mixtures_in_parts("SGLang", section)
    if section.adapter:
        yield (
            "a LoRA beside quantised weights (heal --lora): SGLang would leave it out; "
            "transformers runs it"
        )
    if (quantization := quantization_of(config)) is not None:
        yield from unserved_weights(quantization, shape, section, on_cpu)
    by_blocks = (quantization or {}).get("quant_method") == MXFP4
    for key in () if by_blocks else section.together:
        yield (
            f"{key}: tracks have unequal shares, and SGLang gives each rank as much; convert to "
            "another number of tracks, or serve it in vLLM"
        )
    neurons = math.gcd(shape.neurons, shape.expert_neurons, shape.shared_neurons)
    heads = sorted({shape.kv_heads, shape.global_kv_heads or shape.kv_heads})
    if ranks != section.tracks:
        yield (
            f"--tp {ranks}: SGLang's cache has as many heads in all layers, so each rank has one "
            f"of the checkpoint's {section.tracks} tracks; it takes --tp {section.tracks}"
        )
    elif on_cpu and (neurons % (CPU_BLOCK * ranks) or any(n % ranks for n in heads)):
        yield (
            f"{neurons} FFN neurons and {' and '.join(map(str, heads))} KV heads: SGLang's CPU "
            f"engine fills up what isn't a multiple of {CPU_BLOCK} neurons and one KV head on each "
            "rank, which tracks don't have; serve it on GPUs, or in vLLM"
        )


def _unlike(served: Served, config: Mapping[str, Any], on_cpu: bool) -> Iterator[str]:
    """Why SGLang's layers would compute something else than transformers'; what they lack in
    tensors is seen when a checkpoint is loaded."""
    yield from unlike_keys("SGLang", served.refused, served.fixed, config)
    for key in ("hidden_act", "hidden_activation"):
        value = config.get(key)
        if value is not None and value not in served.activations:
            known = " or ".join(served.activations)
            yield f"{key} {value}: SGLang's MLP for it is activated by {known}"
    cap = served.score_cap and config.get(served.score_cap)
    if cap and on_cpu:
        yield f"{served.score_cap} {cap}: SGLang's attention on CPUs ({ON_CPUS}) leaves it out"
    if served.sinks and on_cpu and ON_CPUS not in SINKS:
        yield f"attention sinks: SGLang's attention on CPUs ({ON_CPUS}) has none; serve it on GPUs"
    if served.linear and on_cpu and not LINEAR_ON_CPUS:
        yield (
            "linear attention: SGLang's operations for it on CPUs (sgl_kernel) were never tried; "
            "serve it on GPUs, or in vLLM"
        )
    ropes = config.get(_OLDER_ROPES) or config.get("rope_parameters") or _PLAIN_ROPES
    for rope in (ropes, *ropes.values()):
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind == "dynamic" and "alpha" not in rope:
            yield (
                "rope_type dynamic: SGLang turns all positions as at the longest length, and "
                "transformers by a text's own"
            )
        elif kind is not None and served.ropes and kind not in served.ropes:
            known = " or ".join(served.ropes)
            yield f"rope_type {kind}: SGLang's attention for it turns positions by {known}"
        elif kind is not None and served.ropes:
            for key in (k for k in rope if k not in (*_ALWAYS, *served.ropes[kind])):
                yield (
                    f"{key} {rope[key]} of rope_type {kind}: SGLang's attention for it reads it "
                    "otherwise than transformers, or not"
                )
            if len(_MSCALES & rope.keys()) == 1:
                yield "mscale, mscale_all_dim: SGLang takes one without the other otherwise"
    yield from not_causal("SGLang", config)
