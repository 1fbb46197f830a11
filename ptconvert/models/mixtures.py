"""Which layers of a model are mixtures of experts, by its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptconvert.errors import ConfigError
from ptconvert.models.families import DENSE, EXPERTS, FAMILIES, MODEL_TYPE_PREFIX, Family
from ptconvert.schedule.schedule import Schedule


def mlps_of(
    family: Family, config: Mapping[str, object], layers: int, where: str
) -> Iterator[str | None]:
    """What each layer's MLP is. Raises ConfigError."""

    def given(key: str, otherwise: object) -> Any:
        value = config.get(key) if key in family.dense else otherwise
        return family.defaults.get(key, otherwise) if value is None else value

    first, step = given("first_k_dense_replace", 0), given("decoder_sparse_step", 1)
    dense = given("mlp_only_layers", [])
    if type(first) is not int or type(step) is not int or step < 1 or not isinstance(dense, list):
        raise ConfigError(
            f"{where}: which layers have experts isn't clear: {' and '.join(family.dense)} must be "
            "whole numbers, and mlp_only_layers a list of them"
        )
    for layer in range(layers):
        sparse = layer >= first and layer not in dense and (layer + 1) % step == 0
        yield (EXPERTS if sparse else DENSE) if family.experts else None


def divisible_layers(
    config: Mapping[str, object], layers: int, where: str = "config.json"
) -> frozenset[int]:
    """The layers of a language model, dense or converted, whose MLP is a mixture with shared
    experts, and so may run in two parts. Raises ConfigError."""
    family = FAMILIES.get(str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
    if family is None or family.shared is None:
        return frozenset()
    mlps = mlps_of(family, config, layers, where)
    return frozenset(layer for layer, mlp in enumerate(mlps) if mlp == EXPERTS)


def indivisible_mlp(
    schedule: Schedule, divisible: frozenset[int], model_type: object
) -> str | None:
    """Why a schedule can't divide the MLPs that it does in a model of which some are `divisible`;
    None if it can."""
    layer = min(schedule.divided - divisible, default=None)
    if layer is None:
        return None
    return (
        f"the schedule runs s{layer} and r{layer}, but layer {layer} of {model_type} has no shared "
        f"experts beside routed ones; run its MLP whole, as m{layer}"
    )
