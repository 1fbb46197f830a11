"""SGLang on 2 ranks against the single-process model: tokens, log-probabilities, all-reduces; and
its server. `make test-sglang`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, random_model, spec_text
from quantising import quantise
from safetensors.torch import load_file, save_file
from served import (
    COMPILED,
    MIXED,
    SIZES,
    UNTIED,
    apart,
    asked_for,
    check_chat,
    greedy,
    make_model,
    prompts,
    quick,
    shape_of,
    with_rope,
    with_words,
)

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.engines.sglang.families import SERVED
from ptconvert.engines.verify import TOLERANCE, Answers, count_checks
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec

NEW_TOKENS = 8
LIMIT_SECONDS = 400
LIMIT_OF_ALL = 1800.0
NEURONS: dict[str, Any] = {
    "intermediate_size": 128
}  # SGLang's CPU engine takes 32 of each rank's at a time
CORES = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """A conversion with 2 tracks."""

    variant: str
    schedule: str
    top: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    layers: int = LAYERS


# Every other family that is served, all in as few layers as have endings of every kind; what
# SGLang has no layers for is changed.
AS_THEY_ARE = (
    *("ministral3", "phi3", "phi3-two-kv", "cwm", "seed_oss", "ernie4_5", "glm", "glm4", "granite"),
    *("hyperclovax", "exaone4", "hunyuan_v1_dense", "apertus", "arcee", "nemotron", "jais2"),
    *("mistral-window", "qwen2-window"),
)
SHARED = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
OTHERS: dict[str, Mapping[str, Any]] = {
    **{name: {} for name in AS_THEY_ARE},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
    "gemma": UNTIED,
    # whose embeddings' scale would be another in bf16
    "gemma2": {
        **{**UNTIED, "dtype": torch.bfloat16, "hidden_size": 160},
        "attn_logit_softcapping": None,
    },
    "gemma3_text": UNTIED,
    "gemma4_text": {
        **{**UNTIED, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "global_head_dim": 64,
    },
    "gemma4_unified_text": {
        **{**UNTIED, "layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"global_head_dim": 64, "attention_k_eq_v": False},
    },
    "starcoder2": UNTIED,
    "cohere": {**UNTIED, "attention_bias": False},
    "cohere2": {**UNTIED, "attention_bias": True},
    "mixtral": {},
    # one layer of which has a dense MLP
    "qwen3_moe": {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 64},
    "glm4_moe": {"moe_intermediate_size": 64, "n_routed_experts": 8, "n_group": 2}
    | {"routed_scaling_factor": 2.5},
    "gpt_oss": {"intermediate_size": 128, "num_key_value_heads": 2},
    "deepseek_v3": {
        **{"moe_intermediate_size": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        **{"attention_bias": False, "num_key_value_heads": 4},
        **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "head_dim": 16},
    },
    "qwen3_5_text": UNTIED,
    # full attention in a layer held dense, too
    "qwen3_5_moe_text": {
        **SHARED,
        "layer_types": ["full_attention", *["linear_attention"] * 2, "full_attention"],
    },
    "qwen3_next": {
        **SHARED,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            **{"factor": 4.0, "original_max_position_embeddings": 64},
        },
    },
}
CASES = {
    "mixed, biases, affinity, guesses": Case(
        *("llama-biases", MIXED, "assignment: {method: affinity}\nguess: {rank: 8}\n"),
        more={"final_logit_softcapping": 5.0},  # a key that a Llama doesn't read, and SGLang does
    ),
    "delayed, mistral": Case("mistral", "use: delayed, delay: 2"),
    "depth 2, mean, qwen2, tied": Case(
        "qwen2-two-kv-tied", "use: parallel_track, depth: 2", "deferred: mean\n"
    ),
    "ladder, qwen3, biases": Case("qwen3-biases", "use: ladder"),
    **{
        name: Case(name, COMPILED, more={**more, **with_rope(name)}, layers=4)
        for name, more in OTHERS.items()
    },
}
# Schedules, norms, positions, experts and caches that differ; other families are slow.
FIRST = "mixed, biases, affinity, guesses"
QUICK = {
    *(FIRST, "ladder, qwen3, biases", "gemma4_text", "cohere2", "qwen3_moe", "deepseek_v3"),
    *("gpt_oss", "qwen3_5_text"),
}


def _without_gates(w_QD: torch.Tensor) -> torch.Tensor:
    """Queries with gates that are all the same."""
    w_H2CD = w_QD.clone().view(-1, 2, SIZES["head_dim"], w_QD.shape[1])
    w_H2CD[:, 1] = 0
    return w_H2CD.flatten(0, 2)


# Of some cases tensors that are left out, or lie otherwise.
Fault = tuple[str, Callable[[torch.Tensor], torch.Tensor]]
OF_GPT_OSS: dict[str, Fault] = {
    "no sinks": ("sinks", lambda sinks_H: sinks_H - 1e4),
    "another head's sinks": ("sinks", lambda sinks_H: sinks_H.flip(0)),
    "gate and up exchanged": (
        "gate_up_proj",
        lambda w_EDN: w_EDN.view(*w_EDN.shape[:-1], -1, 2).flip(-1).flatten(-2),
    ),
    "gate's and up's biases left out": ("gate_up_proj_bias", torch.zeros_like),
    "experts' output biases left out": ("down_proj_bias", torch.zeros_like),
    "the router's bias left out": ("router.bias", torch.zeros_like),
    "another expert": ("down_proj", lambda w_END: w_END.roll(1, 0)),
}
OF_LINEAR: dict[str, Fault] = {
    "states dropped": ("linear_attn.A_log", lambda a_H: a_H + 10),
    "earlier inputs of the convolution dropped": (
        "conv1d.weight",
        lambda w_C1K: w_C1K * torch.arange(w_C1K.shape[-1]).eq(w_C1K.shape[-1] - 1),
    ),
    "another head's decay": ("linear_attn.A_log", lambda a_H: a_H.flip(0)),
    "another head's bias of it": ("linear_attn.dt_bias", lambda bias_H: bias_H + bias_H.roll(1)),
    "no gates of full attention": ("self_attn.q_proj.weight", _without_gates),
}
FAULTS: dict[str, dict[str, Fault]] = {
    "gpt_oss": OF_GPT_OSS,
    "qwen3_5_text": {
        **OF_LINEAR,
        "another value head's gate": ("in_proj_z.weight", lambda w_VD: w_VD.roll(4, 0)),
        "another head": ("in_proj_qkv.weight", lambda w_CD: w_CD.roll(4, 0)),
    },
    "qwen3_next": {
        **OF_LINEAR,
        "another head": ("in_proj_qkvz.weight", lambda w_CD: w_CD.roll(len(w_CD) // 4, 0)),
        "gates of the rule exchanged": ("in_proj_ba.weight", lambda w_GD: w_GD.flip(0)),
        "the shared expert's gate left out": ("shared_expert_gate.weight", torch.zeros_like),
    },
}


def environment() -> dict[str, str]:
    bound = "|".join(str(CORES[rank % len(CORES)]) for rank in range(2))
    given = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # SGLang's own
    own = {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": bound}
    # Cohere's norms of queries and keys there are compiled, anew in each worker
    return given | own | {"TORCH_COMPILE_DISABLE": "1"}


def run(*command: object, seconds: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(),
        check=False,
    )


@pytest.fixture(scope="session")
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return {
        name: make_model(
            tmp_path_factory.mktemp("model"),
            *(c.variant, 2, c.schedule, c.top, c.layers),
            **{**NEURONS, **c.more},
        )
        for name, c in asked_for(request, __file__, CASES, [FIRST]).items()
    }


@pytest.fixture(scope="session")
def found(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each engine answers, and its passes; one process starts them all."""
    directory = tmp_path_factory.mktemp("found")
    asked = {"prompts": prompts(), "later": later(), "new_tokens": NEW_TOKENS}
    cases = [{"name": name, "path": str(path), **asked} for name, path in paths.items()]
    given = directory / "cases.json"
    given.write_text(json.dumps(cases))
    done = run(Path(__file__).with_name("engine.py"), given, directory, seconds=LIMIT_OF_ALL)
    assert (directory / f"{cases[-1]['name']}.json").exists(), done.stderr[-3000:]
    return {name: json.loads((directory / f"{name}.json").read_text()) for name in paths}


def later() -> list[list[int]]:
    """Prompts that begin with none of those before."""
    return [prompt[::-1] for prompt in prompts()[5:]]


def answers_of(path: Path) -> Answers:
    return greedy(path, prompts(), NEW_TOKENS)


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_answers_of_the_single_process_model(
    name: str, found: dict[str, Any], paths: dict[str, Path]
) -> None:
    """All prompts at once, the longest in chunks; again out of the radix cache; and others in its
    place."""
    expected = answers_of(paths[name])
    assert apart(found[name]["answers"], expected) <= TOLERANCE
    assert apart(found[name]["again"], expected) <= TOLERANCE
    assert found[name]["cached"] > 0
    expected_later = greedy(paths[name], later(), NEW_TOKENS)
    assert apart(found[name]["later"], expected_later) <= TOLERANCE
    # and not the source's
    assert apart(found[name]["answers"], answers_of(paths[name].parent / "dense")) > TOLERANCE


@pytest.mark.parametrize("name", quick(FAULTS, QUICK))
def test_other_sinks_windows_experts_states_and_gates_would_be_seen(
    name: str, found: dict[str, Any], paths: dict[str, Path], tmp_path: Path
) -> None:
    answers = found[name]["answers"]
    for fault, (ends, change) in FAULTS[name].items():
        path = shutil.copytree(paths[name], tmp_path / fault)
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            changed = {n: change(t).contiguous() for n, t in tensors.items() if n.endswith(ends)}
            save_file(tensors | changed, file, {"format": "pt"})
        assert apart(answers, answers_of(path)) > TOLERANCE, fault
    config: dict[str, Any] = read_config(paths[name])
    if "sliding_attention" not in config["layer_types"]:
        return
    path = shutil.copytree(paths[name], tmp_path / "no windows")
    config["sliding_window"] = 512
    (path / "config.json").write_text(json.dumps(config))
    assert apart(answers, answers_of(path)) > TOLERANCE


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_all_reduces_are_the_schedules(
    name: str, found: dict[str, Any], paths: dict[str, Path]
) -> None:
    passes, shape = found[name]["passes"], shape_of(paths[name])
    schedule = read_section(read_config(paths[name])).schedule
    checks = count_checks(passes, schedule, shape, new_tokens=3)
    assert all(check.ok for check in checks), checks
    for wrong in (dense_schedule(LAYERS), Schedule.parse("a0. m0!")):
        assert not all(c.ok for c in count_checks(passes, wrong, shape, new_tokens=3))
    wider = replace(shape, width=shape.width + 1)
    assert not all(c.ok for c in count_checks(passes, schedule, wider, new_tokens=3))


def test_every_family_is_one_of_the_cases() -> None:
    assert {case.variant.split("-")[0] for case in CASES.values()} == set(SERVED)
    assert set(CASES) >= QUICK


def verified(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "ptconvert", "verify", path, "--runtime", "sglang", "--ranks", 2]
    return run(*command, "--dtype", "float32", "--json", *options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_verify_counts_inside_the_workers(dtype: str, paths: dict[str, Path]) -> None:
    done = verified(paths[FIRST], "--batch", "3", "--dtype", dtype)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], report["checks"]
    assert [check["name"] for check in report["checks"]] == [
        "schedule as converted",
        "all-reduces in prefill",
        "all-reduces in decode",
        *(["greedy tokens"] if dtype == "float32" else []),
        "their log-probabilities",
    ]
    assert len(report["seen_by_rank"]) == 2 and len(report["seen_by_rank"][0]) == 8


@pytest.mark.slow
def test_linear_attention_is_refused_on_cpus_before_it_starts(tmp_path: Path) -> None:
    refused(
        make_model(tmp_path, "qwen3_next", 2, "use: ladder"),
        "linear attention: SGLang's operations for it on CPUs (sgl_kernel) were never tried; serve",
    )


@pytest.mark.slow
def test_sinks_are_refused_on_cpus_before_it_starts(tmp_path: Path) -> None:
    refused(
        make_model(tmp_path, "gpt_oss", 2, "use: ladder"),
        "attention sinks: SGLang's attention on CPUs (torch_native) has none; serve it on GPUs",
    )


def test_quantised_weights_are_refused_before_it_starts(tmp_path: Path) -> None:
    random_model("llama", **SIZES, **NEURONS).save_pretrained(tmp_path / "dense")
    source = quantise(tmp_path / "dense", tmp_path / "source", "W4A16")
    spec = parse_spec(spec_text(2, "use: parallel_track, depth: 2"), "spec.yaml")
    execute(plan_conversion(open_checkpoint(source), spec, source_name="s"), tmp_path / "out")
    refused(tmp_path / "out", "quantization_config: SGLang's kernels for CPUs (sgl_kernel) were")


def refused(path: Path, says: str) -> None:
    done = verified(path)
    # beside how long it takes, which a slow machine is told
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" so far")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0]


@pytest.fixture(scope="session")
def server(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = with_words(paths[FIRST])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(path)]
    command += ["--device", "cpu", "--attention-backend", "torch_native", "--tp-size", "2"]
    command += ["--dtype", "float32", "--max-total-tokens", "4096", "--disable-cuda-graph"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(), start_new_session=True
        )
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it didn't start
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_server_streams_a_chat_completion(server: str, paths: dict[str, Path]) -> None:
    check_chat(server, paths[FIRST])
