"""The whole way on families that differ: planned, converted, proved, healed, scored, undone."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import seeing
from click.testing import CliRunner
from conftest import MakeDense, byte_level
from quantising import quantise
from test_transform import back, same, tensors

from ptconvert.checkpoint.files import read_config
from ptconvert.cli import main
from ptconvert.models.shape import ModelShape

pytestmark = pytest.mark.slow
TEXT = "the quick brown fox jumps over the lazy dog, and {} of them count to {}.\n"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def figures(*arguments: object) -> dict[str, Any]:
    out = run(*arguments, "--json")
    found: dict[str, Any] = json.loads(out[out.index("{") :])
    return found


# fused projections; multipliers and output biases; linear attention; LayerNorm and other names;
# experts, without output biases and with them; sums that are normed, with a stream that is
# multiplied, and with no norm before; attention and MLP side by side
@pytest.mark.parametrize(
    "variant",
    [
        *("phi3", "granite", "qwen3_5_text", "starcoder2", "qwen3_moe", "gpt_oss"),
        *("gemma4_text", "exaone4", "cohere"),
    ],
)
def test_the_whole_way(variant: str, make_dense: MakeDense, tmp_path: Path) -> None:
    source = byte_level(functools.partial(make_dense, variant), tmp_path / "source")
    # longer, as guesses are better on the very windows that they were fitted on than on others
    tokens, top = (8192, "") if variant == "qwen3_moe" else (2048, "")
    if variant in ("gemma4_text", "exaone4"):
        top = "scale: fitted\n"
    go(source, tmp_path, tokens, top)


# linear attention; names of an older layout
@pytest.mark.parametrize("name", ["qwen3_5", "llava"])
def test_the_whole_way_with_a_model_that_sees(name: str, tmp_path: Path) -> None:
    go(seeing.save(name, tmp_path / "source"), tmp_path)


@pytest.mark.parametrize("name", ["GPTQ with zero points"])
def test_the_whole_way_of_quantised_weights(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = byte_level(functools.partial(make_dense, intermediate_size=64), tmp_path / "dense")
    go(quantise(dense, tmp_path / "source", name), tmp_path, 8192)


def go(source: Path, tmp_path: Path, tokens: int = 2048, top: str = "") -> None:
    text, spec = tmp_path / "text.txt", tmp_path / "spec.yaml"
    text.write_text("".join(TEXT.format(i, i * i) for i in range(400)))
    size = ("--text", text, "--windows", 32, "--window", 32, "--device", "cpu")
    cache = ("--cache", tmp_path / "cache")
    half = ModelShape.from_config(read_config(source)).dense.counts.all_reduces // 2
    asked = ("--tracks", 2, "--max-syncs", half, "--no-overlap")
    run("plan", source, *asked, "-o", spec, *size, *cache)
    spec.write_text(spec.read_text() + f"assignment: affinity\n{top}guess: {{rank: 8}}\n")
    converted = tmp_path / "converted"
    made = figures("transform", source, converted, "--spec", spec, *size)
    assert made["all_reduces"]["before"] == 2 * half
    assert made["all_reduces"]["after"] <= half and made["calibration"]["guesses"]
    proved = run("verify", converted, "--ranks", 2, "--repeats", 1, "--prompt", 4, "--new", 3)
    assert "all checks hold" in proved
    undone = tensors(back(converted, tmp_path / "back"))
    assert same(undone, seeing.under_todays_names(tensors(source)))
    healed = tmp_path / "healed"
    rates = ("--learning-rate", 3e-4, "--block-learning-rate", 1e-3)
    steps = ("--tokens", tokens, "--window", 32, "--device", "cpu", "--blockwise", *rates)
    run("heal", converted, healed, "--teacher", source, "--text", text, *steps)
    # another one, as guesses are better on the very windows that they were fitted on
    other = tmp_path / "other.txt"
    other.write_text("".join(TEXT.format(i, i * i) for i in range(400, 800)))
    size = ("--text", other, *size[2:])
    scored = [
        figures("eval", path, "--baseline", source, *size, *cache)["divergence"]["whole"]
        for path in (converted, healed)
    ]
    assert 0 < scored[1]["kl"]["value"] < scored[0]["kl"]["value"]
    assert figures("estimate", converted, "--hardware", "h100-sxm", "--ranks", 2)["verdict"]
