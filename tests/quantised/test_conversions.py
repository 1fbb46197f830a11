"""What real tools quantised, converted: undone byte for byte, opened by its own quantiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from making import FORMATS, Format, make, open_made, save_source, source_config
from safetensors.torch import load_file
from test_making import correlation, logits

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.measure.opening import open_model
from ptconvert.spec.document import parse_spec

# With blocks of 128 by 128 two tracks take KV heads of 128 channels each.
WIDER = {"num_key_value_heads": 4, "head_dim": 64}


def source_of(form: Format, folder: Path) -> Path:
    return save_source(source_config(form.family, **WIDER), folder)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in path.glob("*.safetensors") for n, t in load_file(f).items()}


def convert(source: Path, destination: Path, tracks: int) -> Path:
    item = "  - {layers: 0-1, use: parallel_track, depth: 2}\n"
    spec = f"format: 1\ntracks: {tracks}\nschedule:\n{item}"
    plan = plan_conversion(open_checkpoint(source), parse_spec(spec, "spec.yaml"), source_name="s")
    execute(plan, destination)
    return destination


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_is_converted_opened_and_undone(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    if missing := form.missing():
        pytest.skip(f"{name} takes {', '.join(missing)}")
    source = make(name, source_of(form, tmp_path / "dense"), tmp_path / "source")
    converted = convert(source, tmp_path / "converted", 2)
    before = tensors(source)
    execute(plan_to_dense(open_checkpoint(converted)), tmp_path / "back")
    after = tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(raw(before[n]), raw(after[n])) for n in before)
    configs = [json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "back")]
    assert configs[0] == configs[1]

    def opened(path: Path) -> Any:
        return logits(open_made(name, path))

    ours = open_model(open_checkpoint(converted), "float32", "cpu")
    if not form.opens:  # transformers doesn't open what it comes from
        return
    if form.family != "gpt_oss":  # whose output biases tracks see once they are merged
        whole = convert(source, tmp_path / "whole", 1)  # one track: the source's function
        assert correlation(opened(whole), opened(source)) > 0.9999
    if name == "gptq-act-order":
        return  # tracks have all groups' scales, for which its kernels have no place
    assert correlation(opened(converted), logits(ours)) > 0.999
