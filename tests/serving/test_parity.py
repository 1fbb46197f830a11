"""vLLM on 2 ranks against the single-process model: tokens, log-probabilities, all-reduces."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import engines  # noqa: F401  # settings
import lockstep
import pytest
import torch
import transformers
from calibrating import for_reference, permuted
from conftest import LAYERS, random_model
from drawing import drawn_schedule, spans_both
from ranks import start
from reference import reference_logits
from safetensors.torch import load_file, save_file
from served import (
    COMPILED,
    MIXED,
    SIZES,
    UNTIED,
    apart,
    asked_for,
    calibration,
    greedy,
    make_model,
    prompts,
    quick,
    shape_of,
    with_rope,
)

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.engines.verify import TOLERANCE, Answers, count_checks
from ptconvert.engines.vllm.families import SERVED
from ptconvert.evaluate.acceptance import accepted, choices_of_head, from_choices, from_text
from ptconvert.measure.batch import BatchSize
from ptconvert.models.families import FAMILIES
from ptconvert.runtime.counters import ALL_REDUCE
from ptconvert.runtime.mtp import open_head
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule

NEW_TOKENS = 8
LIMIT_SECONDS = 1800.0  # where ranks share no memory, gloo takes several times as long


@dataclass(frozen=True)
class Case:
    """A conversion, and how it is run; no tracks means the dense model in vLLM's own class."""

    variant: str
    tracks: int
    schedule: str = ""
    top: str = ""
    eager: bool = True
    layers: int = LAYERS
    sizes: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # vLLM's


ALTERNATING = ["sliding_attention", "full_attention"] * 2
# Every other family that is served; what vLLM has no layers for is changed.
OTHERS: dict[str, Mapping[str, Any]] = {
    **{"ministral3": {}, "phi3": {}, "phi3-two-kv": {}, "cwm": {}, "seed_oss": {}, "smollm3": {}},
    **{"ernie4_5": {"use_bias": False}, "glm": {"attention_bias": True}, "granite": {}},
    **{"hyperclovax-no-norms-after": {}, "mixtral": {}},
    **{"gemma": {**UNTIED, "attention_bias": False}, "gemma3_text": UNTIED},
    # whose embeddings' scale would be another in bf16
    "gemma2": {**UNTIED, "dtype": torch.bfloat16, "hidden_size": 160},
    **{"glm4": {"attention_bias": True}, "exaone4": {}, "hyperclovax": {}, "qwen2-window": {}},
    "qwen3_moe": {"shared_expert_intermediate_size": 0},
    "glm4_moe": {"n_routed_experts": 8, "n_group": 2, "routed_scaling_factor": 2.5},
    "gpt_oss": {"intermediate_size": 128},  # as many for a rank as vLLM's experts on CPUs take
    # the one size of latents that vLLM's attention to them takes on CPUs
    "deepseek_v3": {
        **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "num_key_value_heads": 4},
        "attention_bias": False,
    },
    "gemma4_text": {**UNTIED, "layer_types": ALTERNATING, "global_head_dim": 64},
    "gemma4_unified_text": {
        **{**UNTIED, "layer_types": ALTERNATING, "global_head_dim": 64},
        "attention_k_eq_v": False,
    },
    **{"apertus": {}, "nemotron": {}, "arcee": {}, "jais2": {}, "hunyuan_v1_dense": {}},
    **{"starcoder2": UNTIED, "cohere": {**UNTIED, "attention_bias": False}, "cohere2": UNTIED},
    **{"qwen3_5_text": {}, "qwen3_next": {}, "qwen3_5_moe_text": {}},
}


DRAFTED = 3
NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": DRAFTED}
NGRAM |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
# Whose texts repeat themselves, some at once and some later, so that some drafts are accepted.
LOUD = {"tie_word_embeddings": True, "embedding_multiplier": 12.0}
DRAFTS = {
    "drafts": Case("granite", 4, MIXED, sizes=LOUD, arguments={"speculative_config": NGRAM}),
}
# By the head for further tokens that the source came with (served.add_head), read out of the
# converted checkpoint; tied, so that some drafts are accepted.
OWN_HEAD: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}
HEADS = {
    "drafts of its own head": Case(
        *("glm4_moe", 2, COMPILED),
        layers=4,
        sizes={**OTHERS["glm4_moe"], "tie_word_embeddings": True},
        arguments={"speculative_config": OWN_HEAD},
    ),
}
HEADS |= {f"compiled, {name}": replace(case, eager=False) for name, case in HEADS.items()}
TWO_EACH = "mixtral", "glm4", "qwen3_5_text", "qwen3_next"  # compiled, with two tracks on each rank
GUESSES = "assignment: {method: affinity}\nguess: {rank: 8}\n"
CASES = {
    "parallel_track, depth 1": Case("llama", 2, "use: parallel_track, depth: 1"),
    "parallel_track, depth 2": Case("llama", 2, "use: parallel_track, depth: 2"),
    "parallel_track, depth 4": Case("llama", 2, "use: parallel_track, depth: 4"),
    "ladder": Case("llama", 2, "use: ladder"),
    "delayed": Case("llama", 2, "use: delayed, delay: 2"),
    "parallel_block": Case("llama", 2, "use: parallel_block"),
    "mean": Case("llama", 2, "use: parallel_track, depth: 2", "deferred: mean\n"),
    "mixed, biases, 2 tracks per rank": Case("llama-biases", 4, MIXED),
    "mixed, KV heads repeated": Case("llama-mqa", 4, MIXED),
    "mixed, mistral with a window": Case("mistral-window", 2, MIXED),
    "mixed, qwen2, tied": Case("qwen2-two-kv-tied", 4, MIXED),
    "mixed, qwen3, biases": Case("qwen3-biases", 4, MIXED),
    "parallel_track, depth 3, guesses": Case("llama", 2, "use: parallel_track, depth: 3", GUESSES),
    "guesses, mixed, 2 tracks per rank": Case("llama-biases", 4, MIXED, GUESSES),
    "guesses, in flight": Case("llama", 2, "use: delayed, delay: 2", GUESSES),
    "compiled": Case("llama-biases", 4, COMPILED, eager=False, layers=4),
    "compiled, guesses": Case("llama", 2, COMPILED, GUESSES, False, 4),
    **{
        name: Case(name, 2, COMPILED, layers=4, sizes={**sizes, **with_rope(name)})
        for name, sizes in OTHERS.items()
    },
    **{
        f"compiled, {name}": Case(
            *(name, 4 if name in TWO_EACH else 2, COMPILED),
            eager=False,
            layers=4,
            sizes={**OTHERS.get(name, {}), **with_rope(name)},
        )
        for name in (*OTHERS, "mistral-window", "qwen2-two-kv-tied", "qwen3-biases")
    },
    **DRAFTS,
    **HEADS,
    "dense": Case("llama", 0),
}
WITH_FAULTS = (
    "parallel_track, depth 4",
    "ladder",
    "delayed",
    "mixed, biases, 2 tracks per rank",
    "parallel_track, depth 3, guesses",
)
# Its norms double what they give, and nothing norms its sums: transformers' own logits in float32
# are up to 0.001 from those in float64.
ROUGHER = {"compiled, gemma": 4e-3}
WHOLE_HEAD = "mixed, qwen2, tied"  # also with all of lm_head on each rank
RUINED = "mixed, biases, 2 tracks per rank"
ALONE = ("guesses, mixed, 2 tracks per rank", "compiled")  # also with all tracks on one rank
# Each way through the walk, the layers and vLLM once; families that differ by less are slow.
QUICK = {
    *("ladder", "mixed, qwen2, tied", "parallel_track, depth 3, guesses", "dense"),
    *("mixed, biases, 2 tracks per rank", "guesses, mixed, 2 tracks per rank", "compiled"),
    *("gemma2", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_text", "cohere2", *DRAFTS),
    "drafts of its own head",
}
# Its model, in which layers 1 and 2 are held as tracks, runs other schedules too: see `drawn`.
DRAWN = "guesses, mixed, 2 tracks per rank"


def drawn() -> list[tuple[str, str]]:
    """A rule for deferred partials and a schedule each: random ones in which tracks differ in
    layers 1 and 2 at most; half of them have stages that run sublayers of these beside such of
    layers held dense."""
    random, spanning, others = Random(0), set[Schedule](), set[Schedule]()
    while len(spanning) < 6 or len(others) < 6:
        schedule = drawn_schedule(random, LAYERS)
        if schedule.track_layers and schedule.track_layers <= {1, 2}:
            some = spanning if spans_both(schedule) else others
            some |= {schedule} if len(some) < 6 else set()
    texts = sorted(map(str, spanning)) + sorted(map(str, others))
    return [("sum" if i % 2 else "mean", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    others = {DRAWN, "dense", *ALONE, WHOLE_HEAD, RUINED}
    return {
        name: make_model(
            tmp_path_factory.mktemp("model"),
            *(c.variant, c.tracks, c.schedule, c.top, c.layers),
            **c.sizes,
        )
        for name, c in asked_for(request, __file__, CASES, others).items()
    }


def case_of(
    name: str, path: Path | str, alone: int | None = None, device: str = "cpu", **arguments: Any
) -> dict[str, Any]:
    """A case as ranks.py reads it; `alone` is the process that runs it by itself, if one does, and
    `arguments` are vLLM's, beside those of all cases."""
    return {
        "device": device,
        "arguments": {**CASES[name].arguments, **arguments},
        "name": name if alone is None else f"{name}, alone",
        "path": str(path),
        "eager": CASES[name].eager,
        "faults": name in WITH_FAULTS and alone is None,
        "drawn": drawn() if name == DRAWN else [],
        "alone": alone,
    }


def ruined(converted: Path, directory: Path) -> str:
    """Copies of a conversion with 4 tracks for 2 ranks, in which what the other rank reads is
    ruined; their path, with the rank's place in it."""
    for rank, others in enumerate(((2, 3), (0, 1))):
        own = shutil.copytree(converted, directory / str(rank))
        for track in others:
            file = own / f"track-{track:02}-of-04.safetensors"
            nothing = {n: torch.full_like(t, torch.nan) for n, t in load_file(file).items()}
            save_file(nothing, file, metadata={"format": "pt"})
    return str(directory / "{rank}")


def run_cases(directory: Path, cases: list[dict[str, Any]], count: int) -> Any:
    """Findings of ranks.py on each of `count` ranks, for all cases in the same processes."""
    for case in cases:
        case.update(prompts=prompts(), new_tokens=NEW_TOKENS)
    (directory / "cases.json").write_text(json.dumps(cases))
    with lockstep.meeting(directory) as meeting:
        running = [start(rank, count, directory, meeting) for rank in range(count)]
        deadline = time.monotonic() + LIMIT_SECONDS
        while any(p.is_alive() for p in running) and not any(p.exitcode for p in running):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        codes = [process.exitcode for process in running]
        for process in running:
            process.kill()
            process.join()
    said = [(directory / f"output.{rank}").read_text()[-2000:] for rank in range(count)]
    assert codes == [0] * count, "\n".join(said)
    return [json.loads((directory / f"found.{r}.json").read_text()) for r in range(count)]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Any:
    """All engines run in the same two processes: starting these takes longer than most of them."""
    cases = [case_of(name, path) for name, path in paths.items()]
    if RUINED in paths:
        own = ruined(paths[RUINED], tmp_path_factory.mktemp("own"))
        cases.append({**case_of(RUINED, own), "name": "own", "faults": False})
    if WHOLE_HEAD in paths:
        replicated = {"ptconvert": {"lm_head": "replicated"}}
        whole = case_of(WHOLE_HEAD, paths[WHOLE_HEAD], additional_config=replicated)
        cases.append({**whole, "name": "whole head"})
    cases += [case_of(n, paths[n], rank) for rank, n in enumerate(ALONE) if n in paths]
    # vLLM 0.32 starts no further engine in a process in which one drafted: its registration of
    # kernels stumbles over what drafting imports.
    cases.sort(key=lambda case: "speculative_config" in case["arguments"])
    return run_cases(tmp_path_factory.mktemp("ranks"), cases, 2)


@pytest.fixture(scope="session")
def references(paths: dict[str, Path]) -> dict[str, Answers]:
    """What the single-process model answers, prompt by prompt."""
    return {name: greedy(path, prompts(), NEW_TOKENS) for name, path in paths.items()}


def of_case(found: Any, name: str) -> list[dict[str, Any]]:
    for rank in found:
        assert "error" not in rank.get(name, {"error": "it did not run"}), rank[name]["error"]
    return [rank[name] for rank in found]


def schedule_of(path: Path) -> Schedule:
    return read_section(read_config(path)).schedule


def test_every_family_that_is_served_is_here() -> None:
    alone = {name for name in SERVED if FAMILIES[name].causal_lm}  # the others are test_pictures'
    assert alone == {c.variant.split("-")[0] for c in CASES.values()}
    assert set(CASES) >= QUICK


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_answers_of_the_single_process_model(
    name: str, found: Any, references: dict[str, Answers]
) -> None:
    within = ROUGHER.get(name, TOLERANCE)
    for rank in of_case(found, name):
        assert apart(rank["answers"], references[name]) <= within
        assert apart(rank["again"], references[name]) <= within
        # "again" came out of the prefix cache, which vLLM on CPUs hasn't for latents
        latent = bool(SERVED[CASES[name].variant.split("-")[0]].latent)
        assert (rank["cached"] > 0) != latent


@pytest.mark.parametrize(
    "name", quick((n for n in CASES if CASES[n].tracks and n not in {*DRAFTS, *HEADS}), QUICK)
)
def test_all_reduces_are_the_schedules(name: str, found: Any, paths: dict[str, Path]) -> None:
    passes = [rank["passes"] for rank in of_case(found, name)]
    shape = shape_of(paths[name])
    checks = count_checks(passes, schedule_of(paths[name]), shape, new_tokens=3)
    assert all(check.ok for check in checks), checks
    for wrong in (dense_schedule(LAYERS), Schedule.parse("a0. m0!")):
        assert not all(c.ok for c in count_checks(passes, wrong, shape, new_tokens=3))
    wider = replace(shape, width=shape.width + 1)
    assert not all(
        c.ok for c in count_checks(passes, schedule_of(paths[name]), wider, new_tokens=3)
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_steps_that_verify_drafts(
    name: str, found: Any, references: dict[str, Answers], paths: dict[str, Path]
) -> None:
    """As many all-reduces as any step, of all its tokens; vLLM says that it accepted some and not
    all, and no fewer than `ptconvert eval` counts in the answers, which leaves out their ends."""
    schedule, shape = schedule_of(paths[name]), shape_of(paths[name])
    for rank in of_case(found, name):
        passes = rank["passes"]
        checks = count_checks([passes] * 2, schedule, shape, len(passes))
        assert all(check.ok for check in checks), checks
    counts = 0
    for prompt, (tokens, _) in zip(prompts(), references[name], strict=True):
        text = prompt + tokens
        counts += sum(accepted(text, len(prompt), DRAFTED, from_text(text, DRAFTED, 1, 2)))
    rank = of_case(found, name)[0]
    assert 0 < counts <= rank["drafts"]["accepted"] < rank["drafts"]["drafted"]
    sizes = {one["tokens"] for one in rank["passes"][1:]}
    assert max(sizes) > 1  # drafts were verified in a pass


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_its_own_drafts(
    name: str, found: Any, references: dict[str, Answers], paths: dict[str, Path]
) -> None:
    """As many of its drafts are accepted as `ptconvert eval` counts, which leaves out a text's last
    step; and a step's all-reduces are the schedule's and the two of the head's one layer, which is
    tensor parallel."""
    scheduled, counts = schedule_of(paths[name]).counts.all_reduces, 0
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[name]).eval()
    opened, blind = open_checkpoint(paths[name]), 0
    given = BatchSize(1, "cpu"), lambda *_: None

    def without_states(*arguments: Any) -> Any:
        head = open_head(*arguments)
        head.hnorm.weight.zero_()
        return head

    for prompt, (tokens, _) in zip(prompts(), references[name], strict=True):
        text, begin = prompt + tokens, len(prompt)
        (ids,) = choices_of_head(model, opened, [text], begin, *given)
        counts += sum(accepted(text, begin, 1, from_choices(ids, begin, 1)))
        with mock.patch("ptconvert.evaluate.acceptance.open_head", without_states):
            (ids,) = choices_of_head(model, opened, [text], begin, *given)
        blind += sum(accepted(text, begin, 1, from_choices(ids, begin, 1)))
    assert blind < counts  # so it is seen which states the engine gives it
    for rank in of_case(found, name):
        assert 0 < counts <= rank["drafts"]["accepted"] < rank["drafts"]["drafted"]
        assert rank["drafts"]["accepted"] <= counts + len(prompts())
        passes = rank["passes"]
        reduces = [sum(c["op"] == ALL_REDUCE for c in one["collectives"]) for one in passes]
        assert set(reduces) == {scheduled + 2}
        assert max(one["tokens"] for one in passes[1:]) > 2  # of two prompts: drafts among them


def literal(
    model: Any, schedule: str, tracks: int, prompt: list[int], new: int, **settings: Any
) -> Any:
    """Greedy tokens and their log-probabilities by the literal reference."""
    ids, logs = torch.tensor([prompt]), []
    for _ in range(new):
        log_V = reference_logits(model, schedule, tracks, ids, **settings)[0, -1].log_softmax(-1)
        logs.append(float(log_V.max()))
        ids = torch.cat([ids, log_V.argmax().view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist(), logs


@pytest.fixture(scope="session")
def literals(paths: dict[str, Path]) -> dict[str, Answers]:
    """What the literal reference answers to some prompts, by rule and drawn schedule."""
    case = CASES[DRAWN]
    known = calibration(paths[DRAWN].parent / "dense", case.tracks, case.schedule, case.top)
    assert known is not None
    guesses = for_reference(known, case.tracks)
    dense = random_model(case.variant, **SIZES)
    dense.set_attn_implementation("eager")
    permuted(known, dense)
    return {
        f"{rule} {text}": [
            literal(dense, text, case.tracks, p, 4, deferred=rule, guesses=guesses)
            for p in prompts()[:4]
        ]
        for rule, text in drawn()
    }


def check_drawn(ranks: list[dict[str, Any]], literals: dict[str, Answers]) -> None:
    for schedule, expected in literals.items():
        for rank in ranks:
            assert apart(rank["drawn"][schedule], expected) <= TOLERANCE, schedule


def test_drawn_schedules_against_the_literal_reference(
    found: Any, literals: dict[str, Answers]
) -> None:
    check_drawn(of_case(found, DRAWN), literals)


def test_vllms_own_dense_model_does_one_more_for_its_embedding(found: Any) -> None:
    for rank in of_case(found, "dense"):
        counts = [
            sum(c["op"] == "all_reduce" for c in one["collectives"]) for one in rank["passes"]
        ]
        assert counts == [2 * LAYERS + 1] * 3


@pytest.mark.parametrize("name", quick(WITH_FAULTS, QUICK))
def test_faults_are_seen(name: str, found: Any, references: dict[str, Answers]) -> None:
    seen = set()
    for rank in of_case(found, name):
        for fault, answers in rank["faults"].items():
            assert apart(answers, references[name]) > TOLERANCE, fault
            seen.add(fault)
    assert "a merge is dropped" in seen
    assert ("a lag is changed" in seen) == ("parallel_track" not in name)
    assert ("a bias is counted twice" in seen) == ("biases" in name)
    assert ("a guess is left out" in seen) == ("guesses" in name)


def test_one_rank_holds_all_tracks(
    found: Any, references: dict[str, Answers], literals: dict[str, Answers]
) -> None:
    for rank, name in enumerate(ALONE):
        (alone,) = of_case(found[rank : rank + 1], f"{name}, alone")
        assert apart(alone["answers"], references[name]) <= TOLERANCE
        assert not any(
            c["op"] == "all_reduce" for one in alone["passes"] for c in one["collectives"]
        )
        if name == DRAWN:
            check_drawn([alone], literals)


def test_a_whole_lm_head_gathers_no_logits(found: Any, references: dict[str, Answers]) -> None:
    for cut, whole in zip(of_case(found, WHOLE_HEAD), of_case(found, "whole head"), strict=True):
        assert apart(whole["answers"], references[WHOLE_HEAD]) <= TOLERANCE
        for with_gather, without in zip(cut["passes"], whole["passes"], strict=True):
            counted = Counter(c["op"] for c in with_gather["collectives"])
            assert counted.pop("all_gather") == 1
            assert counted == Counter(c["op"] for c in without["collectives"])


def test_a_rank_reads_its_own_tracks_only(found: Any, references: dict[str, Answers]) -> None:
    tracks = ("00", "01"), ("02", "03")
    for rank, own in zip(of_case(found, "own"), tracks, strict=True):
        assert apart(rank["answers"], references[RUINED]) <= TOLERANCE
        wanted = {f"track-{track}-of-04.safetensors" for track in own}
        assert set(rank["files"]) == {"shared.safetensors", *wanted}
