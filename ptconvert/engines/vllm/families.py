"""The families whose layers in vLLM were compared with transformers' (tests/serving)."""

SERVED = ("llama", "mistral", "qwen2", "qwen3")
