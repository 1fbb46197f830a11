"""What of quantised checkpoints vLLM has no method for, or one that computes something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.engines import formats
from ptconvert.models.quantised import QUANTIZATION
from ptconvert.models.shape import ModelShape

_LEAST_BLOCK = 32  # of what vLLM makes of experts' blocks in FP8, both ways
_REFUSED: tuple[tuple[formats.Question, str], ...] = (
    (
        formats.in_act_order,
        "groups in act-order (desc_act, actorder): vLLM would leave their order out",
    ),
    (formats.is_asymmetric_gptq, "GPTQ with sym false: vLLM would leave its zero points out"),
    (formats.has_int8_zeros, "INT8 weights with zero points: vLLM has symmetric ones only"),
    (
        formats.quantises_cache,
        "a quantised KV cache (kv_cache_scheme, kv_cache_quant_algo): not served in vLLM",
    ),
    (
        formats.is_int8_alone,
        "INT8 weights beside activations that aren't quantised: vLLM has no such",
    ),
)


def unserved_weights(
    quantization: Mapping[str, Any], shape: ModelShape, section: Section, ranks: int
) -> Iterator[str]:
    """What of a checkpoint's quantization_config vLLM, on so many ranks, has no method for, or one
    that computes something else, each in a line."""
    yield from (f"{QUANTIZATION}: {why}" for asks, why in _REFUSED if asks(quantization))
    if formats.has_fp8_experts_alone(quantization, shape):
        why = "FP8 experts beside activations that aren't quantised: vLLM has no such"
        yield f"{QUANTIZATION}: {why}"

    if formats.has_auto_round_experts(quantization, shape) and not quantization.get("sym", True):
        why = "AutoRound's experts with zero points: vLLM would cut these once more in each track"
        yield f"{QUANTIZATION}: {why}"

    def parts_experts(neurons: int) -> bool:
        if quantization.get("quant_method") == "mxfp4":
            return True  # gpt-oss', of which vLLM gives each rank whole blocks
        return _refines(quantization, neurons, neurons * ranks, shape.width)

    if ranks > 1:
        cut = formats.parted(quantization, shape, section, ranks, parts_experts)
        yield from (f"tensor_parallel_size {ranks}: {why}; take fewer ranks" for why in cut)


def _refines(quantization: Mapping[str, Any], neurons: int, whole: int, width: int) -> bool:
    """Whether vLLM gives a rank's experts finer blocks, each with the scale of the one that it is
    in: scales are repeated as if all of the `whole` expert's blocks were whole ones."""
    blocks = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or not blocks:
        return False
    if any(size % block for size in (whole, width) for block in blocks):
        return False
    return math.gcd(*blocks, neurons, width) >= _LEAST_BLOCK
