"""Sliding windows: which layers have one, by each family's config, and what they save."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from estimating import GPT_FAST, H100, ROOT, VLLM
from hypothesis import given
from hypothesis import strategies as st
from test_estimate_command import run_command
from transformers import AutoConfig

from ptconvert.checkpoint.files import read_config
from ptconvert.errors import ConfigError
from ptconvert.estimate.model import Workload, estimate
from ptconvert.estimate.roofline import Pass, rank_bytes, sublayer_parts
from ptconvert.models.families import FAMILIES, SLIDING
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.stages import Kind, Sublayer

SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 34, "num_attention_heads": 4, "vocab_size": 100},
    **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "pad_token_id": 0},
}
ON: dict[str, dict[str, Any]] = {
    "smollm3": {"use_sliding_window": True, "sliding_window": 7},
    **{name: {"use_sliding_window": True} for name in ("qwen2", "qwen3", "qwen3_moe")},
    **{name: {"sliding_window": 7} for name in ("phi3", "ministral3", "starcoder2", "mixtral")},
}
WINDOWED = [f.model_type for f in FAMILIES.values() if SLIDING in f.kinds]
GPT_OSS = ModelShape.from_config(read_config(ROOT / "specs" / "configs" / "gpt-oss-120b.json"))


def windows(shape: ModelShape) -> list[int | None]:
    return [shape.window_of(layer) for layer in range(shape.layers)]


@pytest.mark.parametrize("model_type", WINDOWED)
@pytest.mark.parametrize("on", [False, True])
def test_the_layers_with_a_window_are_those_of_transformers(model_type: str, on: bool) -> None:
    """By the family's own class: with its defaults, and with a window where that has none."""
    config = {**SIZES, "model_type": model_type, "hidden_size_per_layer_input": 0}
    config |= ON.get(model_type, {}) if on else {}
    theirs: Any = AutoConfig.for_model(**config)
    types = getattr(theirs, "layer_types", [SLIDING] * 34)
    expected = [theirs.sliding_window if kind == SLIDING else None for kind in types]
    if not FAMILIES[model_type].causal_lm or model_type.startswith("gemma4_unified"):
        config = {"model_type": model_type.removesuffix("_text"), "text_config": config}
    assert windows(ModelShape.from_config(config)) == expected
    assert any(expected) is (on or model_type not in ON)


def test_the_windows_of_smollm3_are_where_no_rope_is() -> None:
    """By its class: every so many layers, which needn't be four, or as a list says."""
    config = {**SIZES, "model_type": "smollm3", **ON["smollm3"]}
    flags = [layer % 3 for layer in range(34)]
    for more in ({"no_rope_layer_interval": 3}, {"no_rope_layers": flags}):
        theirs = AutoConfig.for_model(**config, **more)
        expected = [7 if kind == SLIDING else None for kind in theirs.layer_types]
        assert windows(ModelShape.from_config({**config, **more})) == expected
        assert 11 <= sum(map(bool, expected)) <= 12
    with pytest.raises(ConfigError, match=r"no_rope_layers is \[1, 0\]; it must have a "):
        ModelShape.from_config({**config, "no_rope_layers": [1, 0]})


def test_layer_types_say_which_layers_have_the_window() -> None:
    types = ["full_attention", "sliding_attention"] * 17
    config = {**SIZES, "model_type": "gemma2", "sliding_window": 9, "layer_types": types}
    assert windows(ModelShape.from_config(config)) == [None, 9] * 17
    assert windows(ModelShape.from_config({**config, "sliding_window": None})) == [None] * 34
    exaone = {**config, "model_type": "exaone4", "sliding_window_pattern": "LLLG"}
    assert windows(ModelShape.from_config(exaone)) == [None, 9] * 17
    stray = {**SIZES, "model_type": "llama", "sliding_window": 9, "layer_types": types}
    assert windows(ModelShape.from_config(stray)) == [None] * 34
    qwen = {**SIZES, "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}
    assert windows(ModelShape.from_config(qwen)) == [4096] * 34


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sliding_window": "9"}, "sliding_window is '9'; it must be a whole number, 1 to"),
        ({"sliding_window": -1}, "sliding_window is -1; it must be a whole number, 1 to"),
        ({"layer_types": ["full_attention"]}, "of each of 34 layers that it is full_attention or"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
            "max_window_layers is None; it must be a whole number, 0 to",
        ),
    ],
)
def test_windows_that_are_wrong_are_a_line(changed: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        ModelShape.from_config({**SIZES, "model_type": "gemma2", **changed})
    assert "\n" not in str(error.value)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 50))
def test_what_a_pass_attends_to_through_a_window(tokens: int, past: int, window: int) -> None:
    """Token by token: each sees itself and those before it, as far as the window reaches."""
    one = Pass(1, tokens, past)
    seen = [range(max(0, at + 1 - window), at + 1) for at in range(past, past + tokens)]
    assert one.attended(window) == pytest.approx(sum(map(len, seen)) / tokens)
    assert one.cached(window) == len({token for each in seen for token in each})
    assert one.attended() == one.attended(past + tokens)
    assert one.cached() == one.cached(past + tokens)


def test_a_layer_with_a_window_by_hand() -> None:
    """gpt-oss-120b, 64 heads and 8 KV heads of 64, every other layer with a window of 128; 3
    sequences after 5000 tokens on 4 ranks: 16 heads each and 2 KV heads."""
    one = Pass(3, 1, past=4999, allocated=8192)
    assert windows(GPT_OSS) == [128, None] * 18
    for layer, tokens in ((0, 128), (1, 5000)):
        core = sublayer_parts(Sublayer(layer, Kind.ATTENTION), GPT_OSS, VLLM, 4, one)[1]
        keys = 2 * 2 * 64  # and values, of a token
        read = 3 * tokens * keys / VLLM.kv_reach + 3 * keys
        assert core.flops == 4 * 3 * tokens * 16 * 64
        assert core.nbytes == pytest.approx(2 * read)
    short = Pass(3, 1, past=99, allocated=8192)
    first, second = (
        sublayer_parts(Sublayer(layer, Kind.ATTENTION), GPT_OSS, VLLM, 4, short)[1]
        for layer in (0, 1)
    )
    assert first == second  # which the window holds whole
    whole = sublayer_parts(Sublayer(0, Kind.ATTENTION), GPT_OSS, GPT_FAST, 4, one)[1]
    assert whole.flops == 4 * 3 * 128 * 16 * 64  # of an engine that attends to all it allocated


def test_a_window_bounds_the_cache() -> None:
    held = [rank_bytes(GPT_OSS, VLLM, 4, Pass(n, 1, 0, 8192)) for n in (3, 0)]
    token = 2 * 2 * 64 * 2  # keys and values of 2 KV heads of 64, in bf16
    assert held[0] - held[1] == 3 * 18 * (128 + 8192) * token


def test_long_prompts_decode_faster_with_a_window() -> None:
    gemma = ModelShape.from_config(read_config(ROOT / "specs" / "configs" / "gemma-4-31b.json"))
    assert windows(gemma) == [*[1024] * 5, None] * 10
    for prompt, faster in ((256, False), (65536, True)):
        ours, theirs = (
            estimate(shape.dense, shape, H100, VLLM, 8, Workload(16, prompt, 256))
            for shape in (gemma, replace(gemma, window=0))
        )
        assert (ours.tpot < 0.7 * theirs.tpot) is faster
        assert (ours.tpot == theirs.tpot) is not faster
        assert (ours.ttft < 0.8 * theirs.ttft) is faster


def test_the_report_has_a_row_for_a_layer_with_a_window(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    run_command("--model", "gpt-oss-120b", "--hardware", "h100-sxm", "--html", file)
    rows = [f">{name}<" for name in ("attention, window 128", "attention", "experts")]
    assert all(file.read_text().count(row) >= 2 for row in rows)  # a prefill's and a decode step's
