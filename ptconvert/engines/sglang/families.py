"""The families whose layers in SGLang were compared with transformers' (tests/serving_sglang)."""

from collections.abc import Mapping
from types import MappingProxyType

# The module of `sglang.srt.models` and the class of each one's decoder layer.
SERVED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "llama": ("llama", "LlamaDecoderLayer"),
        "mistral": ("llama", "LlamaDecoderLayer"),
        "qwen2": ("qwen2", "Qwen2DecoderLayer"),
        "qwen3": ("qwen3", "Qwen3DecoderLayer"),
    }
)
