"""Speculative decoding in the estimate: what a verified step reads, what drafting takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from estimating import GPT_FAST, H100, SCHEDULES, SHAPE, VLLM
from test_estimate_command import GIVEN, run_command

from ptconvert.estimate.alternatives import pipeline
from ptconvert.estimate.compare import Setting
from ptconvert.estimate.hardware import Protocol
from ptconvert.estimate.model import (
    Speculation,
    Workload,
    draft_seconds,
    estimate,
    reduction,
    step,
    vocabulary_seconds,
)
from ptconvert.estimate.roofline import Part, Pass, logits_of, rank_bytes, sublayer_parts
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.stages import Kind, Sublayer

PLAIN = Workload(2, 1000, 101)
FOUR = replace(PLAIN, speculation=Speculation(4, 2.5))
LAYER = replace(PLAIN, speculation=Speculation(4, 2.5, layer=True))


def drafting_of(workload: Workload, ranks: int = 8) -> float:
    return draft_seconds(
        SHAPE, H100, VLLM.serving(False), ranks, workload.decode, workload.speculation
    )


def test_a_step_that_verifies_by_hand() -> None:
    """Llama-3.1-70B on 8 ranks: 2 sequences of 5 tokens, which read weights and cache once."""
    one = FOUR.decode
    assert one == Pass(2, 5, past=1050, allocated=1101, drafted=4) and not one.is_prefill
    (mlp,) = sublayer_parts(Sublayer(0, Kind.MLP), SHAPE, VLLM, 8, one)
    weights, neurons = 3 * 8192 * 28672 / 8, 28672 / 8
    assert mlp.flops == 2 * 10 * weights
    assert mlp.nbytes == 2 * (weights + 10 * 4 * (8192 + neurons))
    _, core = sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, VLLM, 8, one)
    keys = 2 * 128  # and values: one KV head of 128 on each rank
    assert core.flops == 4 * 10 * 1053 * 8 * 128  # the first sees 1051, the last 1055
    assert core.nbytes == pytest.approx(2 * (2 * 1055 * keys / VLLM.kv_reach + 10 * keys))
    assert logits_of(VLLM, one) == 10 and logits_of(GPT_FAST, one) == 10
    found = estimate(SHAPE.dense, SHAPE, H100, VLLM, 8, FOUR)
    assert found.decode == step(SHAPE.dense, SHAPE, H100, VLLM, 8, one)
    assert found.tpot == pytest.approx(found.decode.seconds / 3.5)
    assert found.tokens_per_second == pytest.approx(2 * 101 / (found.ttft + 100 * found.tpot))
    assert found.memory == estimate(SHAPE.dense, SHAPE, H100, VLLM, 8, PLAIN).memory


def test_tokens_share_the_all_reduces_of_their_step() -> None:
    """Where these take as long whatever they carry, each token waits for 1 / 3.5 of them."""
    endless = (Protocol(step_us=9, gb_s=1e12),)
    links = (replace(H100.links[0], protocols=endless, switch_gb_s=0, one_shot_us=0),)
    for schedule in (SHAPE.dense, SCHEDULES["parallel_track"]):
        ours, plain = (
            estimate(schedule, SHAPE, replace(H100, links=links), GPT_FAST, 8, workload)
            for workload in (FOUR, PLAIN)
        )
        waits = [e.decode.seconds - e.decode.compute for e in (ours, plain)]
        assert waits[0] == pytest.approx(waits[1], rel=1e-6)
        assert ours.tpot < plain.tpot / 3


def test_a_layer_that_drafts_by_hand() -> None:
    """Four times one after another: the last layer cut by rank, a product of 2 x 8192 to 8192 on
    each rank whole, lm_head, and 2 all-reduces, which have their norms in them; it has weights and
    a cache."""
    d, one = H100.device, Pass(2, 1, past=1050, allocated=1101)
    bandwidth = 3350e9 * d.memory_reach
    attention, mlp = (
        sum(p.seconds(d, VLLM) for p in sublayer_parts(Sublayer(79, kind), SHAPE, VLLM, 8, one))
        for kind in (Kind.ATTENTION, Kind.MLP)
    )
    joining = 2 * (2 * 8192**2 + 2 * 3 * 8192) / bandwidth
    head = 2 * (8192 * 128256 / 8 + 2 * 128256 / 8 + 2 * 4 * 8192) / bandwidth
    kernels = (6 + 4 + 4 - 2) * d.kernel_us * 1e-6
    waited = 2 * reduction(SHAPE, H100, VLLM, 8, one).blocking.seconds
    waited += vocabulary_seconds(SHAPE, H100, VLLM.serving(False), 8, one)
    each = attention + mlp + joining + head + kernels + waited
    drafting = drafting_of(LAYER)
    assert drafting == pytest.approx(4 * each)
    assert drafting_of(FOUR) == 0
    ours, free = (estimate(SHAPE.dense, SHAPE, H100, VLLM, 8, x) for x in (LAYER, FOUR))
    assert ours.tpot == pytest.approx(free.tpot + drafting / 3.5) and ours.ttft == free.ttft
    weights = (8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 8 + 2 * 8192**2
    cache = 2 * 1101 * 2 * 128
    assert ours.memory - free.memory == pytest.approx(2 * (weights + cache), rel=1e-3)  # norms


def test_a_pipeline_drafts_on_its_last_device() -> None:
    ours, free, plain = (
        pipeline(Setting(SHAPE, H100, VLLM, "vllm", 8, replace(x, batch=1)))
        for x in (LAYER, FOUR, PLAIN)
    )
    more = drafting_of(replace(LAYER, batch=1), 1) / 3.5
    assert ours.tpot == pytest.approx(free.tpot + more) and free.tpot < plain.tpot / 3
    assert ours.memory > free.memory


def test_linear_attention_keeps_a_state_after_each_drafted_token() -> None:
    config = {
        **{"model_type": "qwen3_5_text", "hidden_size": 4096, "num_hidden_layers": 32},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 12288},
        **{"vocab_size": 1000, "dtype": "bfloat16"},
    }
    shape, state = ModelShape.from_config(config), 32 * 128 * 128
    one = Pass(2, 5, past=100, allocated=200, drafted=4)
    recurrence = sublayer_parts(Sublayer(0, Kind.ATTENTION), shape, VLLM, 1, one)[1]
    assert recurrence == Part(6 * 10 * state, 4 * 2 * state * (1 + 5))  # read once, written 5 times
    held = [rank_bytes(shape, VLLM, 1, replace(one, drafted=n)) for n in (4, 0)]
    assert held[0] - held[1] == 24 * 2 * 4 * state * 4


def test_what_speculation_gives_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    given = (*GIVEN, "--speculate", 3, "--accepted", 1.5)
    out = run_command(*given, "--html", file)[0]
    said = "3 tokens a step from the text, 1.5 right"
    assert f"tokens, drafted {said}\n" in out and said in file.read_text()
    figures, plain = (json.loads(run_command(*x, "--json")[0]) for x in (given, GIVEN))
    assert figures["tokens_per_step"] == 2.5 and plain["tokens_per_step"] == 1
    for ours, theirs in zip(figures["rows"], plain["rows"], strict=True):
        assert ours["tpot_seconds"] < theirs["tpot_seconds"] / 2
        assert ours["ttft_seconds"] == theirs["ttft_seconds"]
    layer = json.loads(run_command(*given, "--draft", "layer", "--json")[0])
    assert layer["rows"][1]["tpot_seconds"] > figures["rows"][1]["tpot_seconds"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--speculate", 3), "--accepted is missing; it must say how many of 3 drafted tokens"),
        (("--speculate", 3, "--accepted", 3.5), "--accepted is 3.5; it must say how many of 3"),
        (("--speculate", 3, "--accepted", "nan"), "nan isn't a finite number"),
        (("--accepted", 1), "--accepted and --draft need --speculate K, the tokens drafted"),
        (("--draft", "layer"), "--accepted and --draft need --speculate K, the tokens drafted"),
        (("--speculate", 0, "--accepted", 0), "0 is not in the range 1<=x<=64"),
    ],
)
def test_wrong_speculation_is_a_line(arguments: tuple[object, ...], what: str) -> None:
    _, err = run_command(*GIVEN, *arguments, code=2)
    assert what in err.replace("\n", " ") and "Traceback" not in err
