"""The estimator against published rows, and its fit to them."""

from __future__ import annotations

import math
import runpy
import sys
from typing import Any

import pytest
from estimating import ROOT

from ptconvert.estimate.compare import ACCURACY


def calibration() -> Any:
    """examples/calibrate.py as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import calibrate
    finally:
        sys.path.pop(0)
    return calibrate


def test_published_rows_that_were_left_out_of_the_fit() -> None:
    rows = calibration().errors(calibration().packaged())
    assert len(rows) == 232 and sum(r.one.fitted for r in rows) == 71
    left = [r for r in rows if not r.one.fitted]
    folder = [r for r in left if r.one.source != "ladder 405B" and r.one.workload.batch != 4]
    for chosen in (left, folder):
        ratios = [abs(r.ratio_error) for r in chosen if r.ratio_error is not None]
        speeds = [abs(r.error) for r in chosen if r.one.metric == "throughput"]
        assert sum(ratios) / len(ratios) < 0.05
        assert sum(speeds) / len(speeds) < 0.15
    said = {"4%": ratios_of(left), "6%": speeds_of(left)}
    for text, value in said.items():
        assert text in ACCURACY and f"{value:.0%}" == text


def ratios_of(rows: list[Any]) -> float:
    values = [abs(r.ratio_error) for r in rows if r.ratio_error is not None]
    return float(sum(values) / len(values))


def speeds_of(rows: list[Any]) -> float:
    values = [abs(r.error) for r in rows if r.one.metric == "throughput"]
    return float(sum(values) / len(values))


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
    assert "all left out: ratios" in capsys.readouterr().out
