"""Config classes: a family's own config with one more field, the `ptconvert` section."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import tokenization_auto

from ptconvert.checkpoint.section import MODEL_TYPE_PREFIX


class PTConvertLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """LlamaConfig with a schedule."""

    model_type = MODEL_TYPE_PREFIX + "llama"
    ptconvert: dict[str, Any] | None = None


class PTConvertMistralConfig(MistralConfig):  # type: ignore[misc]
    """MistralConfig with a schedule."""

    model_type = MODEL_TYPE_PREFIX + "mistral"
    ptconvert: dict[str, Any] | None = None


class PTConvertQwen2Config(Qwen2Config):  # type: ignore[misc]
    """Qwen2Config with a schedule."""

    model_type = MODEL_TYPE_PREFIX + "qwen2"
    ptconvert: dict[str, Any] | None = None


class PTConvertQwen3Config(Qwen3Config):  # type: ignore[misc]
    """Qwen3Config with a schedule."""

    model_type = MODEL_TYPE_PREFIX + "qwen3"
    ptconvert: dict[str, Any] | None = None


CONFIGS = (
    PTConvertLlamaConfig,
    PTConvertMistralConfig,
    PTConvertQwen2Config,
    PTConvertQwen3Config,
)


def register_tokenizers() -> None:
    """Makes AutoTokenizer choose the class for a converted checkpoint that it chooses for the
    source: it goes by the config's class and model_type, of which ours are given the same rows."""
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    # whose tokenizer_config.json transformers overrules
    overruled: set[str] = getattr(
        tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set()
    )
    mapping = tokenization_auto.TOKENIZER_MAPPING
    for config_class in CONFIGS:
        source = config_class.__base__
        if source.model_type in names:
            names[config_class.model_type] = names[source.model_type]
        if source.model_type in overruled:
            overruled.add(config_class.model_type)
        if (tokenizer_class := mapping.get(source, None)) is not None:
            mapping.register(config_class, tokenizer_class, exist_ok=True)
