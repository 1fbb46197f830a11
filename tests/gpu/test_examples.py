"""The scripts of examples/gpu, to their ends: tiny on the CPU, the code that GPUs run."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import VLLM

from ptconvert.estimate.hardware import read_hardware
from ptconvert.estimate.measure import Measured

SCRIPTS = Path(__file__).parents[2] / "examples" / "gpu"
DEPTH_4 = "parallel_track, depth 4"
Run = Any  # runs a script with arguments; its exit code


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(name: str, *arguments: object) -> int:
        script = SCRIPTS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def check(rows: list[dict[str, Any]], over: dict[str, str]) -> None:
    """Each name once, with positive times and what they are over, which is 1 for itself."""
    assert {row["name"]: row["over"] for row in rows} == over and len(rows) == len(over)
    for row in rows:
        median, least, most = row["times_decode"]
        assert row["ttft_ms"] > 0 and row["tpot_ms"] > 0 and 0 < least <= median <= most
        assert row["decode_tokens_s"] == pytest.approx(1e3 * row["batch"] / row["tpot_ms"])
        assert (median == least == most == 1) or row["name"] != row["over"]


def test_throughput(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("throughput", "--device", "cpu", "--json", "--batches", 2) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = ["dense", DEPTH_4, f"{DEPTH_4}, overlap 1", "ladder"]
    check(rows, dict.fromkeys(names, "dense"))
    assert run("throughput", "--device", "cpu", "--batches", 1, "--repeats", 1) == 0
    table = capsys.readouterr().out
    assert "ladder" in table and "decode, tokens/s" in table


@pytest.mark.slow
def test_latency(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On two ranks; what they would be measured as is another test's."""
    row = read_hardware("h100-sxm")
    monkeypatch.setattr(
        "ptconvert.estimate.measure.measure", lambda ranks, _: {2: Measured(row, [], [])}[ranks]
    )
    only = ("--device", "cpu", "--ranks", 2, "--batches", 1, "--repeats", 1, "--presets", DEPTH_4)
    assert run("latency", *only, "--json", "--row", tmp_path / "here.yaml") == 0
    (line,) = capsys.readouterr().out.splitlines()
    other = f"{DEPTH_4}: tensor parallel"
    check(json.loads(line)["rows"], {DEPTH_4: other, other: other})
    assert read_hardware(str(tmp_path / "here.yaml")) == row


@pytest.mark.slow
@VLLM
def test_graphs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the dense model only, as compiling takes longest."""
    only = ("--device", "cpu", "--batches", 1, "--repeats", 1, "--presets")
    assert run("graphs", *only, "--json") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    check(rows, {f"dense, {mode}": "dense, eager" for mode in ("eager", "compiled")})


@pytest.mark.slow
@VLLM
def test_latency_in_vllm(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--device", "cpu", "--batches", 1, "--repeats", 1, "--presets", DEPTH_4)
    ways = ("--runtime", "vllm", "--all-reduces", "nccl", "--ranks", 2)
    assert run("latency", *only, *ways, "--json") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    check(rows, {"dense": "dense", DEPTH_4: "dense"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["throughput"], "needs 1 GPU(s), here are 0"),
        (["graphs"], "needs 1 GPU(s), here are 0"),
        (["latency", "--ranks", 4], "needs 4 GPU(s), here are 0"),
        (["latency", "--device", "cpu", "--all-reduces", "fused"], "so --runtime vllm"),
        (["latency", "--device", "cpu", "--row", "nowhere/a.yaml"], "there is no folder"),
        (["throughput", "--device", "cpu", "--tracks", 3], "3"),
    ],
)
def test_refusals_are_a_line(
    arguments: list[object], says: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    if "GPU" in says and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
