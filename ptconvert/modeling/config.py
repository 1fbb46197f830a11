"""Config classes: a family's own config with one more field, the `ptconvert` section."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ptconvert.format import MODEL_TYPE_PREFIX


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
