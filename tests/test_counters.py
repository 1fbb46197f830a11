"""Overlap from a trace made by hand, so that the arithmetic can be checked by eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptconvert.runtime.communicator import Event, stages_of
from ptconvert.runtime.counters import Profile


def event(name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op") -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat, "args": {}}


def launch(ts: float, asynchronous: bool) -> dict[str, Any]:
    made = event("c10d::allreduce_", ts, 1)
    made["args"] = {
        "Input Dims": [[[1, 4, 8]], [], [], [], [], []],
        "Concrete Inputs": ["", "", "", "", str(asynchronous), "-1"],
    }
    return made


def transfer(ts: float, dur: float, tid: int = 2) -> dict[str, Any]:
    made = event("gloo:all_reduce", ts, dur, tid, "user_annotation")
    made["args"] = {"Input type": ["c10::BFloat16"]}
    return made


def test_overlap_and_collectives(tmp_path: Path) -> None:
    events = [
        event("step prefill", 0, 100, cat="user_annotation"),
        event("stage 1 a0~1", 0, 20, cat="user_annotation"),
        launch(10, asynchronous=True),
        transfer(12, 20),  # 12 to 32; computing from 15 to 25 and, nested and apart, to 30
        event("aten::linear", 15, 10),
        event("aten::mm", 16, 5),
        event("aten::add", 27, 3),
        event("aten::mul", 28, 100, tid=7),  # another thread's
        event("stage 2 m0!", 20, 60, cat="user_annotation"),
        launch(40, asynchronous=False),
        transfer(41, 10),
        event("c10d::barrier", 60, 1),
        event("c10d::_allgather_base_", 62, 1),
        event("_C::shm_all_gather", 64, 1),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events[::-1]}))
    profile = Profile(path)
    (found,) = profile.transfers()
    assert (found.stage, found.hidden) == ("1 a0~1", 13)
    assert found.share == pytest.approx(13 / 20)
    seen = profile.collectives()["prefill"]
    assert [(c.op, c.shape, c.dtype, c.asynchronous) for c in seen] == [
        ("all_reduce", (1, 4, 8), "bfloat16", True),
        ("all_reduce", (1, 4, 8), "bfloat16", False),
        ("barrier", (), "", None),
        ("all_gather", (), "", None),
        ("all_gather", (), "", None),
    ]
    assert seen[0].nbytes == 64


def test_what_a_gpus_trace_has_beside(tmp_path: Path) -> None:
    """Marks are there once more where the GPU ran what they launched, which is later; one rank's
    NCCL has no kernels, only the host's event."""
    made = transfer(31, 1, 1)
    events = [
        event("step prefill", 0, 100, cat="user_annotation"),
        event("stage 1 a0~1", 0, 20, cat="user_annotation"),
        event("stage 2 m0!", 20, 60, cat="user_annotation"),
        event("stage 1 a0~1", 25, 20, 7, cat="gpu_user_annotation"),
        event("sgemm", 25, 20, 7, cat="kernel"),
        *(launch(30, asynchronous=True), made | {"name": "nccl:all_reduce"}),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    profile = Profile(path)
    (seen,) = profile.collectives()["prefill"]
    assert (seen.stage, seen.dtype) == ("2 m0!", "bfloat16")
    assert [(t.stage, t.share) for t in profile.transfers()] == [("2 m0!", 1.0)]


@pytest.mark.parametrize("name", ["all_reduce", "flashinfer_trtllm_fused_allreduce_norm"])
def test_what_lies_in_vllms_own_operation_is_no_collective_of_its_own(
    name: str, tmp_path: Path
) -> None:
    outer = event(f"vllm::{name}", 10, 8) | {
        "args": {"Input Dims": [[4, 8]], "Input type": ["float"]}
    }
    events = [
        event("step 1", 0, 100, cat="user_annotation"),
        *(outer, launch(11, asynchronous=False), transfer(11, 5)),
        *(event("ptconvert::all_reduce_boundary", 29, 5), launch(30, asynchronous=True)),
        launch(40, asynchronous=True),  # a compiled one, which is waited for
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    seen = Profile(path).collectives()["1"]
    assert [(c.op, c.asynchronous) for c in seen] == [
        ("all_reduce", False),
        ("all_reduce", True),
        ("all_reduce", False),
    ]


def test_stages_of_a_journal() -> None:
    lines = ["pass a", "stage 0", "reduce x", "stage 1", "pass b", "stage 0", "reduce y"]
    events = [Event(*line.split(" ")) for line in lines]
    expected = [("a", "0", ["x"]), ("a", "1", []), ("b", "0", ["y"])]
    assert list(stages_of(events)) == expected
