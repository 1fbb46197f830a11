"""What of quantised checkpoints vLLM has no method for, or one that computes something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.models.families import TensorRule
from ptconvert.models.quantised import BLOCKS, QUANTIZATION, scheme_of, unit_sizes
from ptconvert.models.shape import ModelShape


def unserved(
    quantization: Mapping[str, Any], shape: ModelShape, section: Section, ranks: int
) -> Iterator[str]:
    """What of a checkpoint's quantization_config vLLM, on so many ranks, has no method for, or one
    that computes something else, each in a line."""
    yield from (f"{QUANTIZATION}: {why}" for said, why in _SCHEMES if said(quantization))
    if any(map(_is_fp8_alone, _schemes_of_experts(quantization, shape))):
        why = "FP8 experts beside activations that aren't quantised: vLLM has no such"
        yield f"{QUANTIZATION}: {why}"
    if ranks > 1:
        yield from _parted(quantization, shape, section, ranks)


def _in_act_order(given: Mapping[str, Any]) -> bool:
    every_group = given.get("group_size") == -1
    orders = {weights.get("actorder") for weights, _ in _schemes(given)}
    return bool(given.get("desc_act") and not every_group) or not orders.isdisjoint(
        ("group", "dynamic", True)
    )


def _is_asymmetric_gptq(given: Mapping[str, Any]) -> bool:
    return given.get("quant_method") == "gptq" and not given.get("sym", True)


def _has_int8_zeros(given: Mapping[str, Any]) -> bool:
    """INT8 weights, one in each byte, with zero points of their own."""
    return any(not weights.get("symmetric", True) for weights, _ in _int8(given))


def _is_int8_alone(given: Mapping[str, Any]) -> bool:
    return any(not taken for _, taken in _int8(given))


def _schemes_of_experts(given: Mapping[str, Any], shape: ModelShape) -> Iterator[Mapping[str, Any]]:
    """compressed-tensors' schemes that a mixture's experts have."""
    for layer in range(shape.layers):
        for rule, module in _quantised(shape, layer):
            if rule.is_of_experts and (scheme := scheme_of(given, module)) is not None:
                yield scheme


def _quantised(shape: ModelShape, layer: int) -> Iterator[tuple[TensorRule, str]]:
    """A layer's weights that are, and what the quantization_config calls their modules."""
    for rule in shape.rules_of(layer):
        module = shape.module(layer, rule)
        if module is not None and shape.layer(layer) + rule.name in shape.widths:
            yield rule, module


def _is_fp8_alone(scheme: Mapping[str, Any]) -> bool:
    weights, form = scheme["weights"], str(scheme.get("format"))
    is_fp8 = weights.get("type") == "float" and weights.get("num_bits") == 8
    return is_fp8 and not form.startswith("mx") and not scheme.get("input_activations")


def _caches(given: Mapping[str, Any]) -> bool:
    return bool(given.get("kv_cache_scheme") or given.get("kv_cache_quant_algo"))


def _int8(given: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return (
        (weights, taken)
        for weights, taken in _schemes(given)
        if weights.get("type") == "int" and weights["format"] == "int-quantized"
    )


def _schemes(given: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """compressed-tensors' schemes of weights, each with its format and that of activations."""
    for group in (given.get("config_groups") or {}).values():
        kept = {"format": group.get("format") or given.get("format"), **(group["weights"] or {})}
        yield kept, group.get("input_activations")


_LEAST_BLOCK = 32  # of what vLLM makes of experts' blocks in FP8, both ways

_SCHEMES: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (_in_act_order, "groups in act-order (desc_act, actorder): vLLM would leave their order out"),
    (_is_asymmetric_gptq, "GPTQ with sym false: vLLM would leave its zero points out"),
    (_has_int8_zeros, "INT8 weights with zero points: vLLM has symmetric ones only"),
    (
        _caches,
        "a quantised KV cache (kv_cache_scheme, kv_cache_quant_algo): not served in vLLM",
    ),
    (_is_int8_alone, "INT8 weights beside activations that aren't quantised: vLLM has no such"),
)


def _refines(quantization: Mapping[str, Any], neurons: int, width: int) -> bool:
    """Whether vLLM gives a rank's experts finer blocks, each with the scale of the whole one."""
    blocks = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or not blocks:
        return False
    return math.gcd(*blocks, neurons, width) >= _LEAST_BLOCK


def _parted(
    quantization: Mapping[str, Any], shape: ModelShape, section: Section, ranks: int
) -> Iterator[str]:
    """Of a layer held dense the first weight whose groups ranks would part: vLLM gives each rank
    as many heads and neurons, where transformers' tracks have whole groups."""
    for layer in sorted(set(range(shape.layers)) - section.schedule.track_layers):
        for rule, module in _quantised(shape, layer):
            if not rule.is_cut:
                continue
            if rule.is_of_experts and quantization.get("quant_method") == "mxfp4":
                continue  # gpt-oss', of which vLLM gives each rank whole blocks
            of_inputs = rule.axis == len(rule.axes) - 1
            units = unit_sizes(quantization, module)
            if not of_inputs:
                units = unit_sizes(quantization, module, BLOCKS)
            for start, stop in shape.spans(rule, 0, ranks):
                parted = [unit for unit in units if (stop - start) % unit]
                if parted and not (
                    rule.is_of_experts and _refines(quantization, stop - start, shape.width)
                ):
                    yield (
                        f"tensor_parallel_size {ranks}: {module} keeps {parted[0]} of its "
                        f"{'inputs' if of_inputs else 'outputs'} together, and each rank would "
                        f"have {stop - start} of them; take fewer ranks"
                    )
                    return
