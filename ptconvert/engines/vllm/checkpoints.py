"""Which converted checkpoints vLLM doesn't serve, by what they say of themselves; without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.engines.formats import mixtures_in_parts, not_causal, unlike_keys
from ptconvert.engines.vllm.families import LANGUAGE_MODELS, SERVED, Served
from ptconvert.engines.vllm.formats import unserved_weights
from ptconvert.models.quantised import QUANTIZATION
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import TEXT, Wrapper, language_config, wrapper_of
from ptconvert.spec.terms import wrong_ranks

_LORA = "a LoRA beside quantised weights (heal --lora)"


def unserved(
    config: Mapping[str, Any], shape: ModelShape, section: Section, ranks: int
) -> Iterator[str]:
    """Why vLLM wouldn't serve it on so many ranks, each reason in a line, whatever vLLM is told.

    `config` is its config.json, or its source's; what that doesn't say is as transformers has it,
    which is served. `shape` is the source's.
    """
    wrapper = wrapper_of(config["model_type"])
    if wrapper is not None and wrapper.model_type not in LANGUAGE_MODELS:
        yield (
            f"a converted {wrapper.model_type} isn't served in vLLM, of converted models with "
            f"pictures only {', '.join(LANGUAGE_MODELS)}; transformers runs it"
        )
    if shape.family.model_type not in SERVED:
        yield (
            f"a converted {shape.family.model_type} isn't served in vLLM, of converted models only "
            f"{', '.join(SERVED)}; transformers runs it"
        )
    else:
        reasons = _unlike(SERVED[shape.family.model_type], language_config(config), shape)
        yield from (f"{reason}; transformers runs it" for reason in reasons)
    yield from mixtures_in_parts("vLLM", section)
    if section.adapter:
        for where in _without_lora(wrapper, shape, language_config(config)):
            yield f"{_LORA}: not tried {where}; transformers runs it"
    if reason := wrong_ranks("the checkpoint", section.tracks, ranks):
        yield f"tensor_parallel_size {ranks}: {reason}"
    quantization = config.get(QUANTIZATION)
    if quantization is not None:
        yield from unserved_weights(quantization, shape, section, ranks)
    elif wrapper is not None and (config.get(TEXT) or {}).get(QUANTIZATION) is not None:
        yield f"{QUANTIZATION} in text_config: vLLM would take it for the tower's too"


def _without_lora(
    wrapper: Wrapper | None, shape: ModelShape, config: Mapping[str, Any]
) -> Iterator[str]:
    """Where a LoRA wasn't tried."""
    served = SERVED.get(shape.family.model_type)
    if wrapper is not None:
        yield "in models with pictures"
    if served is not None and served.latent:
        yield "with attention to latents (MLA)"
    if any(map(shape.is_linear, range(shape.layers))):
        yield "beside linear attention"
    if shape.experts:
        yield "in mixtures of experts"
    if config.get("attention_k_eq_v"):
        yield "where keys are values"


def _unlike(served: Served, config: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    """Why vLLM's layers would compute something else than transformers', or nothing that is good
    for anything; what they lack in tensors is seen when they are built."""
    yield from unlike_keys("vLLM", served.refused, served.fixed, config)
    yield from not_causal("vLLM", config)
    activation = config.get("hidden_act", "silu")
    if shape.experts and activation != "silu":
        yield f"hidden_act {activation}: vLLM's experts would be activated by silu"
    if any(map(shape.is_linear, range(shape.layers))) and activation != "silu":
        yield f"hidden_act {activation}: vLLM's linear attention knows silu only"
