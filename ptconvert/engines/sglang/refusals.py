"""What SGLang can't serve of converted checkpoints, by name, before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.engines.sglang.families import SERVED
from ptconvert.errors import ConfigError
from ptconvert.models.shape import ModelShape

CPU_BLOCK = 32  # SGLang's CPU engine fills each rank's neurons up to a multiple of it
# What it calls the numbers of a config that it replaced so.
_PADDED = {
    "intermediate_size": "original_intermediate_size",
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
}


def unpadded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the checkpoint's own numbers."""
    return {**config, **{k: config[own] for k, own in _PADDED.items() if own in config}}


def check(
    shape: ModelShape,
    section: Section,
    ranks: int,
    *,
    on_cpu: bool,
    quantization: str | None = None,
    pipeline: int = 1,
    attention_groups: int = 1,
) -> None:
    """Raises ConfigError for settings under which the model would not work: of so many
    tensor-parallel ranks, pipeline stages, and groups of ranks with batches of their own."""
    refused = list(_refused(shape, section, ranks, on_cpu))
    if quantization is not None:
        refused.append(
            f"quantization {quantization}: converted models are served in bfloat16, float16 or "
            "float32 only"
        )
    for value, option in ((pipeline, "--pp-size"), (attention_groups, "--enable-dp-attention")):
        if value > 1:
            refused.append(
                f"{option}: all layers must be on every rank, each with all of a batch; leave it"
            )
    if refused:
        raise ConfigError("; ".join(refused))


def _refused(shape: ModelShape, section: Section, ranks: int, on_cpu: bool) -> Iterator[str]:
    if shape.model_type not in SERVED:
        yield (
            f"a converted {shape.model_type} isn't served in SGLang, of converted models only "
            f"{', '.join(SERVED)}; transformers runs it"
        )
    elif any(rule.name == "mlp.gate_proj.bias" for rule in shape.rules_of(0)):
        yield "mlp_bias: SGLang's MLPs have no biases before their activation; serve it in vLLM"
    elif ranks != section.tracks:
        yield (
            f"--tp {ranks}: SGLang's cache has as many heads in all layers, so each rank has one "
            f"of the checkpoint's {section.tracks} tracks; it takes --tp {section.tracks}"
        )
    elif on_cpu and (shape.neurons % (CPU_BLOCK * ranks) or shape.kv_heads % ranks):
        yield (
            f"{shape.neurons} FFN neurons and {shape.kv_heads} KV heads: SGLang's CPU engine fills "
            f"up what isn't a multiple of {CPU_BLOCK} neurons and one KV head on each rank, which "
            "tracks don't have; serve it on GPUs, or in vLLM"
        )
