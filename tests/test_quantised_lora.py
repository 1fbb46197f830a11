"""LoRA beside quantised weights: healed, opened everywhere, and never left out silently."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, byte_level, load, spec_text
from quantising import mxfp4_experts, quantise
from safetensors.torch import load_file, save_file
from served import random_calibration
from test_heal import SIZE, TEXT, differing, heal, kls
from test_modeling import left_padded
from test_quantised import SIZES, TOLERANCE, furthest, quantised_modules
from test_random_schedules import logits_on_a_rank
from test_transform import tensors
from transformers import AutoModel, FineGrainedFP8Config

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import CheckpointError
from ptconvert.measure.cache import content_digest
from ptconvert.measure.opening import open_model
from ptconvert.runtime.by_layer import opened_by_layer
from ptconvert.runtime.launch import launch
from ptconvert.spec.document import parse_spec

pytest.importorskip("peft", reason="peft is not installed")
FORMATS = ["W4A16", "block FP8", "GPTQ"]
# Tracks, and layers held dense that are changed, too, and so cut among ranks.
SCHEDULE = """  - {layers: 0-1, use: tensor_parallel}
  - {layers: 2-3, use: parallel_track, depth: 2}
  - {layers: 4-5, use: ladder}
"""
LORA = (*SIZE, "--lora", 4, "--learning-rate")
RATES = {"block FP8": 1e-3}  # of which the weights are larger; 1e-2 of the others


@pytest.fixture(scope="module")
def made(
    make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path, Path, dict[str, Any]]]:
    """Of each format the source, its conversion, that healed with a LoRA, and what heal printed."""
    found = {}
    for name in FORMATS:
        folder = tmp_path_factory.mktemp("lora")
        dense = byte_level(functools.partial(make_dense, **SIZES), folder / "dense")
        source = quantise(dense, folder / "source", name)
        converted, spec = folder / "converted", parse_spec(spec_text(2, SCHEDULE), "spec.yaml")
        execute(plan_conversion(open_checkpoint(source), spec, source_name="s"), converted)
        rate = RATES.get(name, 1e-2)
        figures = heal(converted, folder / "out", source, "--text", TEXT, *LORA, rate)
        found[name] = source, converted, folder / "out", figures
    return found


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest, made: Any) -> Any:
    return request.param, *made[request.param]


def logits(path: Path) -> torch.Tensor:
    model = open_model(open_checkpoint(path), "float32", "cpu")
    with torch.no_grad():
        found: torch.Tensor = model(left_padded()[0]).logits
    return found


@pytest.mark.slow
def test_it_heals_and_leaves_the_quantised_tensors(case: Any, tmp_path: Path) -> None:
    name, source, converted, out, figures = case
    assert figures["kept"] == "KL" and kls(figures)["KL"] < kls(figures)["before"]
    # with what adapters add, and not only by what isn't quantised
    rate = RATES.get(name, 1e-2)
    alone = (*SIZE, "--learning-rate", rate)
    small = heal(converted, tmp_path / "small", source, "--text", TEXT, *alone)
    assert kls(figures)["KL"] < kls(small)["KL"]
    moved = differing(converted, out)
    quantised = quantised_modules(tensors(converted))
    assert moved and not any(name.rsplit(".", 1)[0] in quantised for name in moved)
    adapter = load_file(out / "ptconvert_adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * (2 * 2 + 2)  # of two layers of two tracks, and of two layers
    assert all(t.startswith("base_model.model.model.layers.") for t in adapter)
    config = json.loads((out / "config.json").read_text())["ptconvert"]
    assert config["adapter"] and config["trained"]
    assert "a LoRA of rank 4 beside the quantised weights" in (out / "README.md").read_text()


@pytest.mark.slow
def test_it_is_opened_with_the_adapter_wherever_it_lies(case: Any, tmp_path: Path) -> None:
    _, _, _, out, _ = case
    moved = shutil.copytree(out, tmp_path / "moved")
    expected = logits(out)
    assert torch.equal(logits(moved), expected)
    by_layer = opened_by_layer(moved, torch.float32, "cpu")
    with torch.inference_mode():
        assert furthest(by_layer(left_padded()[0]).logits, expected) < TOLERANCE
    for rank in launch(logits_on_a_rank, [moved], 2, "gloo", "cpu", 300):
        assert furthest(torch.tensor(rank["logits"][0]), expected) < TOLERANCE
    before = content_digest(open_checkpoint(moved), lambda *_: None)
    shutil.rmtree(moved / "ptconvert_adapter")
    with pytest.raises(CheckpointError, match="ptconvert_adapter is missing"):
        logits(moved)
    config = json.loads((moved / "config.json").read_text())
    del config["ptconvert"]["adapter"]
    (moved / "config.json").write_text(json.dumps(config))
    assert furthest(logits(moved), expected) > 100 * TOLERANCE
    assert content_digest(open_checkpoint(moved), lambda *_: None) != before


def test_transformers_opens_it_with_the_adapter(made: Any) -> None:
    """By peft, beside the quantiser's own modules: here those of FP8, dequantised."""
    out = made["block FP8"][2]
    given = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = load(out, **given)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert furthest(model(left_padded()[0]).logits, logits(out)) < TOLERANCE


def test_healed_again(made: Any, tmp_path: Path) -> None:
    """What isn't quantised moves on, the adapter stays; another one can't be put there."""
    source, _, out, figures = made["W4A16"]
    again = heal(out, tmp_path / "again", source, "--text", TEXT, *SIZE, "--learning-rate", 1e-3)
    assert kls(again)["before"] == pytest.approx(kls(figures)["KL"], rel=1e-3)
    weights = "ptconvert_adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    said = heal(out, tmp_path / "other", source, "--text", TEXT, *LORA, 1e-2, code=2)
    assert "has a LoRA beside its weights already" in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "is no LoRA as peft writes it"),
        ({"r": 0, "lora_alpha": 8}, "is no LoRA as peft writes it"),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "use_rslora is set; only plain LoRA"),
    ],
)
def test_a_broken_adapter(config: dict[str, Any], said: str, made: Any, tmp_path: Path) -> None:
    broken = shutil.copytree(made["W4A16"][2], tmp_path / "broken")
    file = broken / "ptconvert_adapter" / "adapter_config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(broken)


@pytest.mark.parametrize("change", ["factor", "module"])
def test_factors_of_another_model(change: str, made: Any, tmp_path: Path) -> None:
    broken = shutil.copytree(made["W4A16"][2], tmp_path / "broken")
    file = broken / "ptconvert_adapter" / "adapter_model.safetensors"
    found = load_file(file)
    name = next(iter(found))
    if change == "factor":
        found[name] = found[name][:2].contiguous()
    else:
        found = {n.replace("layers.4", "layers.40"): t for n, t in found.items()}
    save_file(found, file, {"format": "pt"})
    said = {"factor": "is no LoRA as peft writes it", "module": r"factors of model\.layers\.40"}
    with pytest.raises(CheckpointError, match=said[change]):
        open_checkpoint(broken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["biases", "guesses", "some left"])
def test_what_is_not_quantised_is_trained_itself(
    kind: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Biases of quantised layers, guesses, and modules that a recipe leaves; healed again, what was
    written is what was measured."""
    variant = "qwen2" if kind == "biases" else "llama"
    dense = byte_level(functools.partial(make_dense, variant, **SIZES), tmp_path / "dense")

    def chosen(module: str) -> bool:
        return ".layers." in module and (kind != "some left" or ".mlp." in module)

    source = quantise(dense, tmp_path / "source", "W4A16", chosen)
    checkpoint, top = open_checkpoint(source), "guess: {rank: 4}\n" if kind == "guesses" else ""
    spec = parse_spec(spec_text(2, SCHEDULE, top), "spec.yaml")
    plan = plan_conversion(checkpoint, spec, source_name="s")
    known = None if plan.complete else replace(random_calibration(plan), assignments={})
    plan = plan_conversion(checkpoint, spec, source_name="s", calibration=known)
    execute(plan, tmp_path / "converted")
    text = ("--text", TEXT)
    first = heal(tmp_path / "converted", tmp_path / "out", source, *text, *LORA, 3e-3)
    assert first["kept"] == "KL"
    moved = differing(tmp_path / "converted", tmp_path / "out")
    part = {"biases": "proj.bias", "guesses": ".guess.", "some left": "self_attn.q_proj.weight"}
    assert any(part[kind] in name for name in moved)
    adapters = load_file(tmp_path / "out" / "ptconvert_adapter" / "adapter_model.safetensors")
    assert not any(".guess." in name for name in adapters)
    assert any(".self_attn." in name for name in adapters) == (kind != "some left")
    again = heal(
        tmp_path / "out", tmp_path / "again", source, *text, *SIZE, "--learning-rate", 1e-3
    )
    assert kls(again)["before"] == pytest.approx(kls(first)["KL"], rel=1e-3)
    third = heal(tmp_path / "again", tmp_path / "x", source, *text, *SIZE, "--learning-rate", 1e-4)
    assert kls(third)["before"] == pytest.approx(kls(again)[again["kept"]], rel=1e-3)


def test_no_quantised_linear_layer(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    """gpt-oss: only its experts are quantised."""
    dense = byte_level(
        functools.partial(make_dense, "gpt_oss", hidden_size=64, intermediate_size=128),
        tmp_path / "dense",
    )
    source = mxfp4_experts(dense, tmp_path / "source")
    converted = convert(source, 2, "use: parallel_track, depth: 2")
    said = heal(converted, tmp_path / "out", source, "--text", TEXT, *LORA, 1e-3, code=2)
    assert "none of the layers that are trained has a quantised linear layer" in said


def test_what_transformers_would_lose(made: Any, tmp_path: Path) -> None:
    out = made["block FP8"][2]
    given = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    with pytest.raises(ValueError, match="would save the LoRA beside the quantised weights alone"):
        load(out, **given).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="is of the model with lm_head"):
        AutoModel.from_pretrained(pretrained_model_name_or_path=out, **given)
