"""Every format's checkpoint is made by its tool, and opens to what its source computes, nearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from making import BOTH, FORMATS, make, open_made, save_source, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    families = {form.family for form in FORMATS.values()}
    return {family: save_source(family, folder / family) for family in families}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(token_ids(4, 32, seed=3)).logits.float()
    return found


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("name", FORMATS)
def test_is_made_and_opens_close_to_its_source(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    form = FORMATS[name]
    if missing := form.missing():
        pytest.skip(f"{name} takes {', '.join(missing)}")
    source = sources[form.family]
    made = make(name, source, tmp_path / name)
    assert json.loads((made / "config.json").read_text())["quantization_config"]
    dense, tensors = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    assert any(n not in tensors or tensors[n].dtype != dense[n].dtype for n in dense)
    exact = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    for way in form.opens:
        found = logits(open_made(name, made, way))
        assert form.correlation < correlation(found, exact) < 1 - 1e-7, way


def test_control_a_model_that_lost_its_scales_is_not_close(sources: dict[str, Path]) -> None:
    exact = AutoModelForCausalLM.from_pretrained(sources["llama"], dtype=torch.float32)
    lost = AutoModelForCausalLM.from_pretrained(sources["llama"], dtype=torch.float32)
    with torch.no_grad():
        for layer in lost.model.layers:
            weight = layer.mlp.down_proj.weight
            weight.div_(weight.abs().amax(1, keepdim=True))
    assert correlation(logits(lost), logits(exact)) < min(f.correlation for f in FORMATS.values())


def test_every_way_to_open_has_a_meaning() -> None:
    assert {way for form in FORMATS.values() for way in form.opens} == set(BOTH)
