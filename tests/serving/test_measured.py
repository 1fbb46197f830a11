"""vLLM's own all-reduce, as `ptconvert estimate --measure` times it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ptconvert.cli import main
from ptconvert.estimate.hardware import read_hardware
from ptconvert.estimate.sweep import SIZES

WAY = "vLLM shared memory"


@pytest.mark.slow
def test_it_is_timed_at_each_size_and_is_the_rows_one_shot_kernel(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    arguments = ["estimate", "--measure", str(file), "--ranks", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    own = {s["nbytes"]: s["seconds"] for s in row["samples"] if s["way"] == WAY}
    assert [*own] == SIZES and all(1e-7 < seconds < 10 for seconds in own.values())
    assert not any("wrong" in note for note in row["notes"])
    (link,) = read_hardware(str(file)).links
    assert 0 < link.one_shot_us < 1e6 * max(own.values())
