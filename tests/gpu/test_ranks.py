"""Ptconvert's own ranks on GPUs: what `verify` checks, and what `estimate --measure` finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Convert, MakeDense
from places import on
from test_estimate_measure import check_measured
from test_modeling import SCHEDULES
from test_verify import SETTINGS

from ptconvert.verify.run import verify

OFF = {"NCCL_P2P_DISABLE": "1"}


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "dtype", "environment"),
    [
        ("cpu", 2, "gloo", "float32", {}),
        on(1, "cuda", 1, "nccl", "float32", {}),
        on(1, "cuda", 1, "nccl", "bfloat16", {}),
        on(1, "cuda", 2, "gloo", "float32", {}),
        on(1, "cuda", 4, "gloo", "float32", {}),
        on(2, "cuda", 2, "nccl", "float32", {}),
        on(2, "cuda", 2, "nccl", "bfloat16", {}),
        on(2, "cuda", 2, "nccl", "float32", OFF),
        on(4, "cuda", 4, "nccl", "float32", {}),
        on(4, "cuda", 4, "nccl", "float32", OFF),
    ],
)
def test_verify(
    device: str,
    ranks: int,
    backend: str,
    dtype: str,
    environment: dict[str, str],
    make_dense: MakeDense,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts by both means, answers, and all-reduces in flight, of several stages' lags."""
    for name, value in environment.items():  # which the ranks inherit
        monkeypatch.setenv(name, value)
    path = convert(make_dense("llama-biases"), 4, SCHEDULES["mixed"])
    settings = replace(SETTINGS, ranks=ranks, device=device, backend=backend, dtype=dtype)
    report = verify(path, settings)
    assert report is not None and report.ok, (report and report.checks, report and report.failures)
    assert all(where.split(":")[0] == device for where in report.figures["devices"])
    assert report.figures["overlap"]["asynchronous"] > 0
    says = any("times mean nothing" in note for note in report.notes)
    assert says == (device == "cuda" and backend == "gloo")


@pytest.mark.parametrize("ranks", [on(1, 1), on(2, 2), on(4, 4)])
def test_the_gpus_are_measured(ranks: int, tmp_path: Path) -> None:
    """(Its body runs on the CPU in test_estimate_measure.py.)"""
    check_measured(ranks, "nccl", tmp_path / "here.yaml")
