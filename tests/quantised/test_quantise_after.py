"""Converted first and quantised after, by the recipes of docs/quantised.md as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from making import make, preset, save_source, source_config, token_ids
from test_conversions import WIDER, convert, raw, tensors
from test_making import correlation, logits
from transformers import AutoModelForCausalLM

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.measure.opening import open_model
from ptconvert.verify.run import Settings, verify

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
PAGE = Path(__file__).parents[2] / "docs" / "quantised.md"
RECIPES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
BY_ROW = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = source_config("llama", **WIDER)
    return save_source(config, tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture
def healed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the recipes begin with, where they look for it, and the text."""
    monkeypatch.chdir(tmp_path)
    rows = (" ".join(f"w{i}" for i in row) for row in token_ids(32).tolist())
    Path("mine.txt").write_text("\n".join(rows), encoding="utf-8")
    return convert(source, tmp_path / "qwen-pt-healed", 2)


def same_as_cut(quantised: Path, cut: Path, projections: tuple[str, ...]) -> None:
    ours, theirs = tensors(cut), tensors(quantised)
    names = [n for n in ours if ".tracks." in n and any(f".{p}.weight" in n for p in projections)]
    kept = len({name.rsplit(".", 1)[1] for name in names})
    assert len(names) == 2 * 2 * len(projections) * kept and kept > 1
    for name in names:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(raw(ours[name]), raw(theirs[name])), name


def opens_everywhere(quantised: Path, before: Path, close: float) -> None:
    """In transformers by its own quantiser, by us, and on ranks."""
    exact = logits(AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32))
    theirs = logits(AutoModelForCausalLM.from_pretrained(quantised))
    assert close < correlation(theirs, exact) < 1 - 1e-7
    ours = logits(open_model(open_checkpoint(quantised), "float32", "cpu"))
    assert correlation(ours, theirs) > 0.999
    report = verify(quantised, Settings(ranks=2, dtype="float32", repeats=1))
    assert report is not None and report.ok, report


def test_fp8_dynamic(source: Path, healed: Path, tmp_path: Path) -> None:
    exec(RECIPES[0], {})
    made = tmp_path / "qwen-pt-fp8"
    opens_everywhere(made, healed, 0.99)
    dense = make("fp8-channel", source, tmp_path / "dense-fp8")
    same_as_cut(made, convert(dense, tmp_path / "cut", 2), BY_ROW)
    config = json.loads((made / "config.json").read_text())
    assert config["ptconvert"]["tracks"] == 2 and config["quantization_config"]


def test_gptq_on_a_text(healed: Path, tmp_path: Path) -> None:
    exec(RECIPES[1], {})
    opens_everywhere(tmp_path / "qwen-pt-w4a16", healed, 0.9)


def test_rounded_in_groups(source: Path, healed: Path, tmp_path: Path) -> None:
    rounding = preset("W4A16")
    for whole, to in ((source, tmp_path / "dense-w4"), (healed, tmp_path / "quantised")):
        rounding(whole, to)
    cut = convert(tmp_path / "dense-w4", tmp_path / "cut", 2)
    same_as_cut(tmp_path / "quantised", cut, (*BY_ROW, "o_proj", "down_proj"))
