"""What vLLM is told about a converted model before it starts: what can't be served, by name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

import ptconvert
from ptconvert.checkpoint.reader import Adapter, read_adapter
from ptconvert.checkpoint.section import SECTION, Section, source_config
from ptconvert.engines.formats import has_auto_round_experts
from ptconvert.engines.vllm.adapters import adapter_folder
from ptconvert.engines.vllm.checkpoints import unserved
from ptconvert.engines.vllm.families import LANGUAGE_MODELS, SERVED
from ptconvert.errors import ConfigError
from ptconvert.modeling.model import section_of
from ptconvert.models.families import MODEL_TYPE_PREFIX
from ptconvert.models.quantised import QUANTIZATION
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import wrapper_of
from ptconvert.spec.terms import VOCABULARIES, wrong_ranks

LINEAR_ON_CPUS = {torch.bfloat16}  # dtypes that vLLM's kernels for linear attention take there
_LOADS = "auto", "hf", "safetensors", "dummy"  # which give the model its tensors by their names
_NEVER = {
    "enable_expert_parallel": "each track has a share of every expert",
    "enable_eplb": "each track has a share of every expert",
    "enable_dbo": "the schedule says what runs beside its all-reduces",
}


class LatentConfig(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """What vLLM reads of a config where attention goes through latents (MLA), which it knows by the
    model's type."""

    def is_deepseek_mla(self) -> bool:
        return True


class PictureConfig(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """The same where the tokens of every picture see each other."""

    def is_mm_prefix_lm(self, supports_multimodal: bool = True) -> bool:
        return supports_multimodal


class ServingConfig(VerifyAndUpdateConfig):  # type: ignore[misc]
    """vLLM's hook for an architecture, which it runs before it starts any worker."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ConfigError for settings under which the model would not work."""
        config = vllm_config.model_config.hf_config
        section = section_of(config, vllm_config.model_config.model)
        refused = list(_refused(vllm_config, section))
        if refused:
            raise ConfigError("; ".join(refused))
        wrapper = wrapper_of(config.model_type)
        theirs = SERVED[_family(config)].model if wrapper is None else wrapper.whole
        own = MODELS_CONFIG_MAP.get(theirs)
        if own is not None:  # what vLLM sees to for the family's own models
            own.verify_and_update_config(vllm_config)
        adapter = None
        if section.adapter:
            config.ptconvert_adapter = str(adapter_folder(vllm_config))
            adapter = read_adapter(Path(config.ptconvert_adapter))
        config.ptconvert_compiled = compiled_by(section, adapter)
        longest = vllm_config.model_config.max_model_len
        rope = getattr(vllm_config.model_config.hf_text_config, "rope_parameters", None) or {}
        known = rope.get("original_max_position_embeddings", longest)
        if rope.get("rope_type") == "longrope" and longest > known:
            logging.getLogger(__name__).warning(
                "longrope with max_model_len %d: vLLM takes the factors for long prompts for all, "
                "also for its dense model, and transformers only beyond %d tokens",
                longest,
                known,
            )


def compiled_by(section: Section, adapter: Adapter | None = None) -> str:
    """What a compiled graph is of, beside config.json: the program that it walks, which linears
    have a LoRA of which ranks beside them, and ptconvert.

    vLLM's key of its compile cache has all of the model's config, and so this; of ptconvert's code
    it knows by itself only the files that dynamo traces, which lowering is none of.
    """
    digest = hashlib.sha256(repr(section.schedule.program).encode())
    for module, factors in sorted(adapter.factors.items() if adapter else ()):
        digest.update(f"\0{module} {[factor.shape for factor in factors]}\0".encode())
    package = Path(ptconvert.__file__).parent
    for file in sorted(package.rglob("*.py")):  # as the version is the same between releases
        text = file.read_bytes()
        digest.update(f"\0{file.relative_to(package)} {len(text)}\0".encode())
        digest.update(text)
    return f"{ptconvert.__version__} {digest.hexdigest()}"


def replicates_head(vllm_config: Any) -> bool:
    """Whether each rank is to have all of lm_head, so that no logits are gathered: where vLLM's
    `additional_config` is {"ptconvert": {"lm_head": "replicated"}}."""
    return bool(_additional(vllm_config).get("lm_head") == "replicated")


def _additional(vllm_config: Any) -> Any:
    """What of vLLM's `additional_config` is ptconvert's: a mapping, once it isn't refused."""
    given = vllm_config.additional_config
    return given.get(SECTION, {}) if isinstance(given, dict) else {}


def _family(config: Any) -> str:
    """Of a model, or of the language model inside."""
    family: str = config.get_text_config(decoder=True).model_type.removeprefix(MODEL_TYPE_PREFIX)
    return family


def _linear(vllm_config: Any) -> Iterator[str]:
    """What vLLM's linear attention doesn't do."""
    model = vllm_config.model_config
    if current_platform.is_cpu() and model.dtype not in LINEAR_ON_CPUS:
        dtype = str(model.dtype).removeprefix("torch.")
        yield f"{dtype}: vLLM's linear attention on CPUs takes bfloat16 only"
    if vllm_config.speculative_config is not None:
        yield "speculative_config: not tried where layers have linear attention; leave it out"


def _seeing(vllm_config: Any) -> Iterator[str]:
    """What of a model with pictures isn't served."""
    model = vllm_config.model_config
    if vllm_config.speculative_config is not None:
        yield "speculative_config: not tried with models with pictures; leave it out"
    if model.multimodal_config.mm_encoder_only:
        yield "mm_encoder_only: the language model is what was converted; leave it out"
    elif model.is_mm_prefix_lm:  # which it isn't for texts alone
        yield from _seeing_each_other(model)


def _seeing_each_other(model: Any) -> Iterator[str]:
    """What of pictures whose tokens see each other isn't served."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # with all of its layers

    if current_platform.is_cpu() and not CPUAttentionBackend.supports_mm_prefix():
        yield (
            "a picture's tokens see each other there, which vLLM's attention on CPUs can't do; "
            "pass language_model_only for texts alone"
        )
    tokens = getattr(model.hf_config, "mm_tokens_per_image", 0)
    window = model.hf_text_config.sliding_window
    if window is not None and tokens > window:
        yield (
            f"mm_tokens_per_image {tokens}: of a picture that is longer than the window of "
            f"{window}, vLLM would let no token see a later one"
        )


def _refused(vllm_config: Any, section: Section) -> Iterator[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config, ranks = model.hf_config.to_dict(), parallel.tensor_parallel_size
    shape = ModelShape.from_config(source_config(config, section))
    yield from unserved(config, shape, section, ranks)
    wrapper = wrapper_of(model.hf_config.model_type)
    if wrapper is not None and wrapper.model_type in LANGUAGE_MODELS:
        yield from _seeing(vllm_config)
    served = SERVED.get(shape.family.model_type)
    if served is not None and not served.float16 and model.dtype == torch.float16:
        yield "float16: it overflows there, as vLLM says; use bfloat16 or float32"
    if any(map(shape.is_linear, range(shape.layers))):
        yield from _linear(vllm_config)
    divides = wrong_ranks("the checkpoint", section.tracks, ranks) is None
    if divides and section.tracks != ranks and model.use_mla:
        yield (
            f"tensor_parallel_size {ranks}: vLLM plans attention to latents (MLA) for one number "
            f"of heads, but a track has fewer than a rank; use {section.tracks}, or "
            "VLLM_MLA_DISABLE=1, which keeps whole keys and values"
        )
    if current_platform.is_cpu() and has_auto_round_experts(config.get(QUANTIZATION) or {}, shape):
        yield f"{QUANTIZATION}: AutoRound's experts: vLLM has no method for them on CPUs"
    kept = (getattr(one, QUANTIZATION, None) for one in (model.hf_config, model.hf_text_config))
    if model.quantization is not None and not any(kept):
        yield (
            f"quantization {model.quantization}: converted models are served as their weights are "
            "kept, and these aren't quantised; leave it out"
        )
    given = _additional(vllm_config)
    if not isinstance(given, dict):
        yield f"additional_config {SECTION} {given!r}: it must be a mapping, as of lm_head"
        given = {}
    for key, value in given.items():
        if key != "lm_head" or value not in VOCABULARIES:
            yield (
                f'additional_config {SECTION} {key} {value!r}: there is only "lm_head", which is '
                f"{' or '.join(VOCABULARIES)}"
            )
    load = vllm_config.load_config.load_format
    if section.adapter and load not in _LOADS:
        yield f"load_format {load}: the LoRA beside the weights would be left out; use auto"
    if vllm_config.lora_config is not None:
        yield "enable_lora: adapters name a dense model's layers; merge them before converting"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield (
                f"{name} {getattr(parallel, name)}: ranks would share keys and values, but each "
                "track has its own; leave it at 1"
            )
    for name, why in _NEVER.items():
        if getattr(parallel, name, False):
            yield f"{name}: {why}; leave it out"
    if parallel.data_parallel_size > 1 and shape.experts:
        yield (
            f"data_parallel_size {parallel.data_parallel_size}: vLLM would cut experts over all "
            "replicas' ranks, but tracks are cut already; start servers of their own"
        )
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline_parallel_size {parallel.pipeline_parallel_size}: a schedule's all-reduces "
            "may span layers, so all layers must be on every rank; use tensor_parallel_size"
        )
