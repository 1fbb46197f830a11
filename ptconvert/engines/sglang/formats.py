"""What of quantised checkpoints SGLang has no method for, or one that computes something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.engines import formats
from ptconvert.engines.sglang.families import SERVED
from ptconvert.models.families import TensorRule
from ptconvert.models.quantised import BLOCKS, QUANTIZATION, scheme_of, unit_sizes
from ptconvert.models.shape import ModelShape

# Which it has for experts alone, and gives each rank whole blocks of them, with zeros behind.
MXFP4, MXFP4_BLOCK = "mxfp4", 32
# Of quant_methods that it serves, what SGLang calls what it makes of them.
METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp8": ("fp8",),
        "compressed-tensors": ("compressed_tensors",),
        "awq": ("awq", "awq_marlin"),
        "gptq": ("gptq", "gptq_marlin"),
        "modelopt": ("modelopt_fp4",),
        MXFP4: (MXFP4,),
    }
)
_REFUSED: tuple[tuple[formats.Question, str], ...] = (
    (formats.in_act_order, "groups in act-order (desc_act, actorder)"),
    (formats.is_asymmetric_gptq, "GPTQ with sym false"),
    (formats.has_int8_zeros, "INT8 weights with zero points"),
    (formats.quantises_cache, "a quantised KV cache (kv_cache_scheme, kv_cache_quant_algo)"),
    (formats.quantises_head, "a quantised lm_head (lm_head)"),
    (formats.is_int8_alone, "INT8 weights beside activations that aren't quantised"),
)
# Of compressed-tensors' weights those that were tried: type and bits, and those of activations.
_TRIED = {
    *(("float", 8, "float", 8), ("int", 8, "int", 8)),
    *(("int", 4, None, None), ("int", 8, None, None), ("float", 4, "float", 4)),
}
_FP4, _NVFP4_GROUP = ("float", 4), 16  # in other groups it is another format
_SHARED, _FIRST, _LATENT = ".shared_experts.", ".q_a_proj.", ".kv_b_proj."
# What its kernels for four bits (Marlin) take of experts; for others it has ones that cut again
# what tracks have cut.
_MARLIN_GROUPS, _MARLIN_WIDTH, _MARLIN_NEURONS = (-1, 32, 64, 128), 128, 64


def unserved_weights(
    quantization: Mapping[str, Any], shape: ModelShape, section: Section, on_cpu: bool
) -> Iterator[str]:
    """What of a checkpoint's quantization_config SGLang, with a rank for each track, has no method
    for, or one that computes something else, each in a line."""
    if on_cpu:
        yield f"{QUANTIZATION}: SGLang's kernels for CPUs (sgl_kernel) were never tried with it"
    method, kind = quantization.get("quant_method"), quantization.get("quant_algo")
    if method not in (served := SERVED[shape.model_type].methods):
        known = "serves only " + ", ".join(served) if served else "was tried with none"
        yield f"quant_method {method}: of a {shape.model_type} SGLang {known}"
    elif method == "modelopt" and kind != "NVFP4":
        yield f"quant_algo {kind} of ModelOpt: in SGLang only NVFP4 was tried"
    for asks, what in _REFUSED:
        if asks(quantization):
            yield f"{QUANTIZATION}: {what}: not served in SGLang"
    for weights, taken in formats.schemes(quantization):
        if not _is_tried(weights, taken):
            yield f"{QUANTIZATION}: {_named(weights, taken)}: not tried in SGLang"
    tracks = section.tracks
    yield from (f"{QUANTIZATION}: {what}" for what in _of_experts(quantization, shape, tracks))
    yield from (f"{QUANTIZATION}: {what}" for what in _of_latents(quantization, shape))
    for why in formats.parted(quantization, shape, section, tracks, lambda _: method == MXFP4):
        yield f"{tracks} tracks, a rank for each: {why}; convert to fewer"


def _is_tried(weights: Mapping[str, Any], taken: Any) -> bool:
    of_taken = _numbers(taken) if taken else (None, None)
    in_groups_of_16 = weights.get("group_size") == _NVFP4_GROUP
    return (*_numbers(weights), *of_taken) in _TRIED and (
        _numbers(weights) != _FP4 or in_groups_of_16
    )


def _numbers(scheme: Mapping[str, Any]) -> tuple[str, int]:
    """Of a scheme the type and the bits, or what compressed-tensors takes where it doesn't say."""
    return scheme.get("type", "int"), scheme.get("num_bits", 8)


def _named(weights: Mapping[str, Any], taken: Any) -> str:
    """A scheme, as weights and activations."""
    named = ("{} {}".format(*_numbers(one)) if one else "none" for one in (weights, taken))
    return "weights in {}, activations in {}".format(*named)


def _of_experts(quantization: Mapping[str, Any], shape: ModelShape, tracks: int) -> Iterator[str]:
    method = quantization.get("quant_method")
    if shape.experts and method == "gptq":
        yield "experts in GPTQ: SGLang has a rank's scales in the size of all ranks'"
    if shape.experts and method == "awq":
        group = quantization.get("group_size", quantization.get("q_group_size"))
        neurons = (shape.expert_neurons or shape.neurons) // tracks
        fits = group in _MARLIN_GROUPS and not shape.width % _MARLIN_WIDTH
        if not fits or neurons % max(_MARLIN_NEURONS, group):
            yield (
                f"experts in AWQ, {neurons} neurons for a rank in groups of {group}: SGLang's "
                f"kernel takes groups of 32, 64 or 128, multiples of {_MARLIN_NEURONS} neurons and "
                f"of {_MARLIN_WIDTH} channels"
            )
    of_experts = formats.schemes_of(quantization, shape, lambda rule: rule.is_of_experts)
    if any(_numbers(s["weights"])[0] == "int" and s.get("input_activations") for s in of_experts):
        yield "experts in integers beside quantised activations: not served in SGLang"
    by_weight = SERVED[shape.model_type].shared_weights
    if by_weight and any(map(_is_packed, _schemes_of(quantization, shape, _SHARED))):
        yield "shared experts in packed numbers: SGLang asks for their weights as they are"


def _of_latents(quantization: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    if any(map(_is_packed, _schemes_of(quantization, shape, _LATENT))):
        yield (
            "kv_b_proj in packed numbers: SGLang multiplies queries and outputs by it, and unpacks "
            "AWQ's only"
        )
    nvfp4 = quantization.get("quant_method") == "modelopt"
    firsts = _schemes_of(quantization, shape, _FIRST)
    if any(nvfp4 if one is None else _numbers(one["weights"]) == _FP4 for one in firsts):
        yield "q_a_proj in NVFP4: SGLang has one scale for it and kv_a_proj_with_mqa"
    for rule, module in _weights_of(shape, _FIRST):
        outputs, units = shape.size(rule)[0], unit_sizes(quantization, module, BLOCKS)
        if cut := [unit for unit in units if outputs % unit]:
            yield (
                f"{module} has {outputs} outputs in blocks of {cut[0]}: SGLang has "
                "kv_a_proj_with_mqa after them in one"
            )
            return


def _schemes_of(
    quantization: Mapping[str, Any], shape: ModelShape, part: str
) -> Iterator[Mapping[str, Any] | None]:
    """How weights with such a part in their names are quantised, but by `fp8` and AWQ, which SGLang
    has methods for there: compressed-tensors' schemes, None of others."""
    if quantization.get("quant_method") not in ("fp8", "awq"):
        for _, module in _weights_of(shape, part):
            yield scheme_of(quantization, module)


def _weights_of(shape: ModelShape, part: str) -> Iterator[tuple[TensorRule, str]]:
    """All layers' quantised weights with such a part in their names, and their modules."""
    for layer in range(shape.layers):
        for rule, module in formats.quantised_weights(shape, layer):
            if part in rule.name:
                yield rule, module


def _is_packed(scheme: Mapping[str, Any] | None) -> bool:
    return (
        scheme is None or _numbers(scheme["weights"])[1] < 8 or not scheme.get("input_activations")
    )
