"""examples/bench/curve.py: a power law through healed models, followed further."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import curve
import numpy as np
import pytest
from scipy import stats

TOKENS = [8192, 16384, 32768, 65536]


def test_a_law_is_followed_with_its_error() -> None:
    law = [3.0 * tokens**-0.3 for tokens in TOKENS]
    assert curve.followed(TOKENS, law, 2e6) == pytest.approx([3.0 * 2e6**-0.3] * 3)
    beside = [v * f for v, f in zip(law, (1.02, 0.97, 1.01, 0.99), strict=True)]
    line, covariance = np.polyfit(np.log(TOKENS), np.log(beside), 1, cov=True)
    at = np.array([math.log(2e6), 1])
    half = stats.t.ppf(0.975, 2) * math.sqrt(at @ covariance @ at)
    expected = np.exp(at @ line + np.array([0, -half, half]))
    assert curve.followed(TOKENS, beside, 2e6) == pytest.approx(expected)


def test_it_reads_what_the_benchmark_of_healing_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in TOKENS:
        work = tmp_path / str(tokens)
        work.mkdir()
        cell = {"kl": 3.0 * tokens**-0.3, "loss": 2.0 * tokens**-0.5, "loss_half": 0.01}
        told = {"tokens": tokens, "report": [["prose.txt"]]}
        kept = json.dumps({"of": told, "cells": [cell]})
        (work / "n3-w20-planned+guess+blockwise+KL.json").write_text(kept)
        (work / "n3-w6-planned+guess+blockwise+KL.json").write_text("of another number of waits")
    given = [*map(str, tmp_path.iterdir()), "--waits", "20", "--at", "2e6"]
    monkeypatch.setattr(sys, "argv", ["curve.py", *given])
    curve.main()
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "prose.txt: 20 waited for"
    assert said[5] == "| 8,192 | 0.2010 | +0.0221 ± 0.0100 |"
    assert said[-1] == "| 2,000,000, by the law | 0.039 (0.039 … 0.039) | 0.001 (0.001 … 0.001) |"
