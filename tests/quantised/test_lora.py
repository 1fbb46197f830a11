"""A LoRA beside weights that real tools quantised, opened by their own quantisers and peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from making import FORMATS, make, open_made
from test_conversions import convert, source_of
from test_making import correlation, logits
from torch import nn

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import ADAPTER_FOLDER, trained_config
from ptconvert.heal.adapters import write_adapter
from ptconvert.measure.opening import open_model


@pytest.mark.parametrize("name", ["w4a16", "fp8-channel", "gptq", "fp8-block"])
def test_transformers_adds_what_we_add(name: str, tmp_path: Path) -> None:
    if missing := FORMATS[name].missing():
        pytest.skip(f"{name} takes {', '.join(missing)}")
    source = make(name, source_of(FORMATS[name], tmp_path / "dense"), tmp_path / "source")
    converted = convert(source, tmp_path / "converted", 2)
    model = open_model(open_checkpoint(converted), "float32", "cpu")
    without, rng = logits(model), torch.Generator().manual_seed(0)
    adapters = {
        f"{module_name}.lora_{which}.weight": torch.randn(*size, generator=rng) / 20
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in module_name
        for which, size in (("A", (4, module.in_features)), ("B", (module.out_features, 4)))
    }
    write_adapter(converted / ADAPTER_FOLDER, adapters)
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(trained_config(config, adapter=True)))
    ours = logits(open_model(open_checkpoint(converted), "float32", "cpu"))
    theirs = logits(open_made(name, converted))
    assert correlation(ours, theirs) > 0.999 > correlation(without, theirs)
