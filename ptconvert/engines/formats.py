"""What engines may not serve of checkpoints, by keys of a config.json; and what its
quantization_config says, told by one question each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ptconvert.checkpoint.section import Section
from ptconvert.models.families import TensorRule, sees_later
from ptconvert.models.quantised import BLOCKS, scheme_of, unit_sizes
from ptconvert.models.shape import ModelShape

Question = Callable[[Mapping[str, Any]], bool]


def unlike_keys(
    engine: str, refused: Mapping[str, str], fixed: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[str]:
    """What a config.json says by which an engine's layers would be others: keys that are `refused`,
    and values that aren't those `fixed` there."""
    for key, why in refused.items():
        if value := config.get(key):
            yield f"{key} {value}: {why}"
    for key, built_in in fixed.items():
        if (value := config.get(key, built_in)) != built_in:
            yield f"{key} {value}: {engine}'s layers for it have {built_in}"


def not_causal(engine: str, config: Mapping[str, Any]) -> Iterator[str]:
    """That tokens of a text attend to later ones: engines would let them see earlier ones only, or
    take the model for an encoder."""
    for said in sees_later(config):
        yield (
            f"{said}: tokens see later ones, too, and {engine} serves converted models with causal "
            "attention only"
        )


def mixtures_in_parts(engine: str, section: Section) -> Iterator[str]:
    """That a schedule runs the two parts of a layer's mixture apart from each other, if any does:
    engines have one module for both."""
    if divided := section.schedule.divided:
        layer = min(divided)
        yield (
            f"s{layer} and r{layer}, a mixture in two parts (farskip): {engine} runs it whole; "
            "transformers runs it"
        )


def in_act_order(given: Mapping[str, Any]) -> bool:
    """Groups whose inputs don't lie side by side."""
    every_group = given.get("group_size") == -1
    orders = {weights.get("actorder") for weights, _ in schemes(given)}
    return bool(given.get("desc_act") and not every_group) or not orders.isdisjoint(
        ("group", "dynamic", True)
    )


def is_asymmetric_gptq(given: Mapping[str, Any]) -> bool:
    """GPTQ with zero points."""
    return given.get("quant_method") == "gptq" and not given.get("sym", True)


def has_int8_zeros(given: Mapping[str, Any]) -> bool:
    """INT8 weights, one in each byte, with zero points of their own."""
    return any(not weights.get("symmetric", True) for weights, _ in _int8(given))


def is_int8_alone(given: Mapping[str, Any]) -> bool:
    """INT8 weights beside activations that aren't quantised."""
    return any(not taken for _, taken in _int8(given))


def quantises_cache(given: Mapping[str, Any]) -> bool:
    """Keys and values in fewer bits, too."""
    return bool(given.get("kv_cache_scheme") or given.get("kv_cache_quant_algo"))


def quantises_head(given: Mapping[str, Any]) -> bool:
    """lm_head, too, where the config says so (GPTQ, AutoRound)."""
    return bool(given.get("lm_head"))


def has_fp8_experts_alone(given: Mapping[str, Any], shape: ModelShape) -> bool:
    """FP8 experts beside activations that aren't quantised, of compressed-tensors."""
    experts = schemes_of(given, shape, lambda rule: rule.is_of_experts)
    return any(map(_is_fp8_alone, experts))


def has_auto_round_experts(given: Mapping[str, Any], shape: ModelShape) -> bool:
    """Experts quantised by AutoRound."""
    if given.get("quant_method") != "auto-round":
        return False
    layers = range(shape.layers)
    weights = (rule for layer in layers for rule, _ in quantised_weights(shape, layer))
    return any(rule.is_of_experts for rule in weights)


def schemes(given: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """compressed-tensors' schemes of weights, each with its format and that of activations."""
    for group in (given.get("config_groups") or {}).values():
        kept = {"format": group.get("format") or given.get("format"), **(group["weights"] or {})}
        yield kept, group.get("input_activations")


def parted(
    quantization: Mapping[str, Any],
    shape: ModelShape,
    section: Section,
    ranks: int,
    parts_experts: Callable[[int], bool],
) -> Iterator[str]:
    """Of a layer held dense the first weight whose groups so many ranks would part: engines give
    each rank as many heads and neurons, where transformers' tracks have whole groups.

    `parts_experts` says whether an engine parts those of experts rightly, of so many neurons each.
    """
    for layer in sorted(set(range(shape.layers)) - section.schedule.track_layers):
        for rule, module in quantised_weights(shape, layer):
            if not rule.is_cut:
                continue
            of_inputs = rule.axis == len(rule.axes) - 1
            units = unit_sizes(quantization, module)
            if not of_inputs:
                units = unit_sizes(quantization, module, BLOCKS)
            for start, stop in shape.spans(rule, 0, ranks):
                if rule.is_of_experts and parts_experts(stop - start):
                    continue
                if cut := [unit for unit in units if (stop - start) % unit]:
                    yield (
                        f"{module} keeps {cut[0]} of its {'inputs' if of_inputs else 'outputs'} "
                        f"together, and each rank would have {stop - start} of them"
                    )
                    return


def schemes_of(
    given: Mapping[str, Any], shape: ModelShape, asked: Callable[[TensorRule], bool]
) -> Iterator[Mapping[str, Any]]:
    """compressed-tensors' schemes that some of a model's weights have."""
    for layer in range(shape.layers):
        for rule, module in quantised_weights(shape, layer):
            if asked(rule) and (scheme := scheme_of(given, module)) is not None:
                yield scheme


def quantised_weights(shape: ModelShape, layer: int) -> Iterator[tuple[TensorRule, str]]:
    """A layer's weights that are, and what the quantization_config calls their modules."""
    for rule in shape.rules_of(layer):
        module = shape.module(layer, rule)
        if module is not None and shape.layer(layer) + rule.name in shape.widths:
            yield rule, module


def _is_fp8_alone(scheme: Mapping[str, Any]) -> bool:
    weights, form = scheme["weights"], str(scheme.get("format"))
    is_fp8 = weights.get("type") == "float" and weights.get("num_bits") == 8
    return is_fp8 and not form.startswith("mx") and not scheme.get("input_activations")


def _int8(given: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return (
        (weights, taken)
        for weights, taken in schemes(given)
        if weights.get("type") == "int" and weights["format"] == "int-quantized"
    )
