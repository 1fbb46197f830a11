"""A LoRA beside weights that real tools quantised, opened by their own quantisers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest
from loaded import with_lora
from making import FORMATS, make, open_made
from test_conversions import convert, source_of
from test_making import correlation, logits

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.measure.opening import open_model


@pytest.mark.parametrize("name", ["w4a16", "fp8-channel", "gptq", "fp8-block"])
def test_transformers_adds_what_we_add(name: str, tmp_path: Path) -> None:
    if missing := FORMATS[name].missing():
        pytest.skip(f"{name} takes {', '.join(missing)}")
    source = make(name, source_of(FORMATS[name], tmp_path / "dense"), tmp_path / "source")
    converted = convert(source, tmp_path / "converted", 2)
    model = open_model(open_checkpoint(converted), "float32", "cpu")
    without = logits(model)
    with_lora(converted)
    ours = logits(open_model(open_checkpoint(converted), "float32", "cpu"))
    theirs = logits(open_made(name, converted))
    assert correlation(ours, theirs) > 0.999 > correlation(without, theirs)
