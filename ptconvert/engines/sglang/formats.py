"""What of quantised checkpoints SGLang has no method for, or one that computes something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.engines import formats
from ptconvert.models.quantised import QUANTIZATION
from ptconvert.models.shape import ModelShape

# The quant_methods of which SGLang's tensors were looked at.
METHODS = ("fp8", "compressed-tensors", "awq", "gptq", "modelopt")
_REFUSED: tuple[tuple[formats.Question, str], ...] = (
    (formats.in_act_order, "groups in act-order (desc_act, actorder)"),
    (formats.is_asymmetric_gptq, "GPTQ with sym false"),
    (formats.has_int8_zeros, "INT8 weights with zero points"),
    (formats.quantises_cache, "a quantised KV cache (kv_cache_scheme, kv_cache_quant_algo)"),
    (formats.is_int8_alone, "INT8 weights beside activations that aren't quantised"),
)
_SHARED = ".shared_experts."
_MXFP4 = "mxfp4-pack-quantized"  # of compressed-tensors


def unserved(
    quantization: Mapping[str, Any], shape: ModelShape, section: Section, on_cpu: bool
) -> Iterator[str]:
    """What of a checkpoint's quantization_config SGLang, with a rank for each track, has no method
    for, or one that computes something else, each in a line."""
    if on_cpu:
        yield f"{QUANTIZATION}: SGLang's kernels for CPUs (sgl_kernel) were never tried with it"
    if (method := quantization.get("quant_method")) not in METHODS:
        yield f"quant_method {method}: in SGLang only {', '.join(METHODS)} are served"
    for asks, what in _REFUSED:
        if asks(quantization):
            yield f"{QUANTIZATION}: {what}: not served in SGLang"
    if any(weights["format"] == _MXFP4 for weights, _ in formats.schemes(quantization)):
        yield f"{QUANTIZATION}: MXFP4 of compressed-tensors: SGLang has no linears in it"
    for what in _of_experts(quantization, shape):
        yield f"{QUANTIZATION}: {what}"
    tracks = section.tracks
    for why in formats.parted(quantization, shape, section, tracks, lambda _: False):
        yield f"--tp {tracks}: {why}"


def _of_experts(quantization: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    method = quantization.get("quant_method")
    if shape.experts and method == "gptq":
        yield "experts in GPTQ: SGLang has a rank's scales in the size of all ranks'"
    of_experts = formats.schemes_of(quantization, shape, lambda rule: rule.is_of_experts)
    if any(s["weights"]["type"] == "int" and s.get("input_activations") for s in of_experts):
        yield "experts in integers beside quantised activations: SGLang has them on NPUs only"
    if formats.has_fp8_experts_alone(quantization, shape):
        yield "FP8 experts beside activations that aren't quantised: not served in SGLang"
    shared = formats.schemes_of(quantization, shape, lambda rule: _SHARED in rule.name)
    packed = any(s["weights"]["num_bits"] < 8 or not s.get("input_activations") for s in shared)
    if packed or (shape.shared_experts and method == "modelopt"):
        yield "shared experts in packed numbers: SGLang asks for their weights as they are"
