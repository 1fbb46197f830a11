"""The estimator against published rows, and its fit to them."""

from __future__ import annotations

import math
import re
import runpy
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from estimating import ROOT

from ptconvert.estimate.compare import LIMITS
from ptconvert.estimate.hardware import hardware_names, read_hardware


def calibration() -> Any:
    """examples/calibrate.py as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import calibrate
    finally:
        sys.path.pop(0)
    return calibrate


def mean(values: Iterable[float | None]) -> float:
    found = [abs(v) for v in values if v is not None]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    found: list[Any] = calibration().errors(calibration().packaged())
    return found


def test_published_rows_that_were_left_out_of_the_fit(rows: list[Any]) -> None:
    assert len(rows) == 232 and sum(r.one.fitted for r in rows) == 71
    left = [r for r in rows if not r.one.fitted]
    folder = [r for r in left if r.one.source in ("ladder 70B", "PT 30B")]
    unseen = [r for r in left if r.one.source == "ladder 8B"]
    for chosen in (left, folder, unseen):
        assert mean(r.ratio_error for r in chosen) < 0.05
        assert mean(r.error for r in chosen if r.one.metric == "throughput") < 0.15
    assert mean(r.ratio_error for r in unseen if r.one.metric == "ttft") < 0.03


def test_the_accuracy_of_a_row_is_what_its_left_out_runs_show(rows: list[Any]) -> None:
    for name in hardware_names():
        text = read_hardware(name).accuracy
        left = [r for r in rows if not r.one.fitted and r.one.hardware == name]
        assert bool(text) == bool(left)
        if left:
            said = [mean(r.ratio_error for r in left)]
            speeds = [r.error for r in left if r.one.metric == "throughput"]
            said += [mean(speeds)] if speeds else []
            assert [f"{x:.0%}" for x in said] == re.findall(r"\d+%", text)
            assert ("too low" not in text) or all(r.ratio_error < 0 for r in left)


def test_the_limits_say_what_the_rows_show(rows: list[Any]) -> None:
    served = [r for r in rows if r.one.source == "PT 30B" and r.one.metric == "throughput"]
    loaded = [abs(r.error) for r in served if not r.one.fitted]
    gains = [
        ours.estimate / base.estimate - 1
        for base, ours in zip(served[::2], served[1::2], strict=True)
        if ours.one.workload.new == 4096 and ours.one.workload.prompt <= 2048
    ]
    long = [
        r.one.value / r.estimate
        for r in rows
        if r.one.metric == "ttft"
        and r.one.workload.prompt == 63488
        and r.one.engine == "tensorrt-llm"
    ]
    nodes = [r.ratio_error for r in rows if r.one.hardware == "2x8-h100-sxm-ib400"]
    overlap = []
    for batch in (64, 16):
        standard, ladder = (
            next(
                r
                for r in rows
                if r.one.what == f"batch {batch}, 8 ranks, p2p off" and r.one.architecture == name
            )
            for name in ("standard", "ladder")
        )
        published = ladder.one.value / standard.one.value - 1
        overlap.append((published, ladder.estimate / standard.estimate - 1))
    said = (
        (f"{mean(loaded):.0%} off on average, up to {max(loaded):.0%}", 0),
        (f"{min(gains) * 100:.0f} to {max(gains):.0%} are estimated", 0),
        (f"take {mean(long):.0%} of what is estimated", 1),
        (f"gains {overlap[0][0] * 100:.0f} to {overlap[1][0]:.0%} where", 2),
        (f"where {overlap[0][1] * 100:.0f} to {overlap[1][1]:.0%} are", 2),
        (f"by {mean(nodes):.0%} on average and up to {-min(nodes):.0%}", 3),
    )
    for text, index in said:
        assert text in LIMITS[index], text


def test_the_packaged_constants_are_the_fits() -> None:
    """Moving any constant by 5% either way makes the fit's rows worse (or none better)."""
    c = calibration()
    rows, best = c.packaged(), c.constants(c.packaged())

    def loss(values: list[float]) -> float:
        return math.fsum(r * r for r in c.residuals(values, rows))

    least = loss(best)
    for index in range(len(best)):
        for factor in (0.95, 1.05):
            moved = [v * (factor if i == index else 1) for i, v in enumerate(best)]
            assert loss(moved) > least * 0.9995, c.FITTED[index]


def test_the_calibration_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = sys.argv
    try:
        sys.argv = ["calibrate.py", "--rows"]
        runpy.run_path(str(ROOT / "examples" / "calibrate.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("mean absolute errors"))
    assert "\n".join(lines[first - 1 :]) in (ROOT / "docs" / "estimate.md").read_text()
