"""The ready specs: each read, fitted to its model's public config, and counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptconvert.shape import ModelShape, read_config
from ptconvert.spec import read_spec

SPECS = Path(__file__).parents[1] / "specs"
MODELS = sorted(p.stem for p in (SPECS / "configs").glob("*.json"))
HEAD = re.compile(r"All-reduces per forward pass: (\d+) before, (\d+) after; waited for: \d+ before, (\d+) after")  # fmt: skip # noqa: E501


def test_all_models_are_there() -> None:
    assert MODELS == [
        "llama-3.1-70b",
        "llama-3.1-8b",
        "llama-3.2-1b",
        "mistral-7b",
        "qwen2.5-7b",
        "qwen3-0.6b",
        "qwen3-8b",
    ]
    assert len(list(SPECS.glob("*.yaml"))) == 3 * len(MODELS)


@pytest.mark.parametrize("strength", ["gentle", "balanced", "aggressive"])
@pytest.mark.parametrize("model", MODELS)
def test_spec_fits_and_says_its_counts(model: str, strength: str) -> None:
    spec = read_spec(SPECS / f"{model}-{strength}.yaml")
    shape = ModelShape.from_config(read_config(SPECS / "configs" / f"{model}.json"))
    spec.check(shape)
    schedule = spec.schedule()
    assert schedule.layers == shape.layers
    said = HEAD.search(spec.text)
    assert said is not None
    counts = schedule.counts
    assert tuple(map(int, said.groups())) == (
        2 * shape.layers,
        counts.all_reduces,
        counts.waited_for,
    )


@pytest.mark.parametrize("model", MODELS)
def test_each_step_waits_for_fewer(model: str) -> None:
    waits = [
        read_spec(SPECS / f"{model}-{strength}.yaml").schedule().counts.waited_for
        for strength in ("gentle", "balanced", "aggressive")
    ]
    assert waits == sorted(waits, reverse=True)


def parameters(shape: ModelShape) -> int:
    total = 0
    for _, size in shape.tensors():
        count = 1
        for n in size:
            count *= n
        total += count
    return total


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        # the published parameter counts
        ("llama-3.2-1b", 1236),
        ("llama-3.1-8b", 8030),
        ("llama-3.1-70b", 70554),
        ("qwen2.5-7b", 7616),
        ("qwen3-0.6b", 596),
        ("qwen3-8b", 8191),
        ("mistral-7b", 7248),
    ],
)
def test_configs_describe_the_public_models(model: str, millions: int) -> None:
    shape = ModelShape.from_config(read_config(SPECS / "configs" / f"{model}.json"))
    assert round(parameters(shape) / 1e6) == millions
