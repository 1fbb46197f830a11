"""estimate --measure: the row that measurements make, and a real run on two gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from estimating import seconds

from ptconvert.cli import main
from ptconvert.errors import HardwareError
from ptconvert.estimate import measure
from ptconvert.estimate.hardware import read_engine, read_hardware
from ptconvert.estimate.sources import numbers
from ptconvert.runtime.launch import Rank

ENGINE = read_engine("ptconvert")
STEP = 465 * 4e-6  # 8 layers of 41 + 14 operators and 25 more, 4 us each


def found(ranks: int, base: float, step: float, per_byte: float, overlapped: float) -> Any:
    """What ranks would find whose all-reduces follow the ring's formula exactly."""
    sizes = [n for n in (2, 4, 8) if n < ranks] + [ranks]
    reduces = [
        (n, m, base + 2 * (n - 1) * step + 2 * (n - 1) / n * m * per_byte)
        for n in sizes
        for m in (4096, 65536, 4194304)
    ]
    token = base + 2 * (ranks - 1) * step
    steps = {"one": STEP + token, "blocking": STEP + 16 * token, "overlapped": overlapped}
    one = {
        "name": "a CPU",
        "memory": 8e9,
        "matmul_flops": 5e10,
        "copy_bytes": 2e10,
        "read_bytes": [1e10, 5e9],
        "steps": {name: [[seconds] * 3] * 2 for name, seconds in steps.items()},
        "reduces": reduces,
    }
    slower = {**one, "matmul_flops": 4e10}
    return [slower, *[one] * (ranks - 1)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_row_gives_back_what_was_measured(ranks: int) -> None:
    results = found(ranks, base=4e-4, step=2e-5, per_byte=1e-9, overlapped=5e-3)
    row = measure.to_hardware(results, "gloo", ENGINE)
    assert row.ranks == ranks and row.engine == "ptconvert"
    assert row.device.matmul_tflops == 0.04 and row.device.memory_gb_s == 20
    assert (row.device.memory_reach, row.device.batched_reach) == (0.5, 0.5)
    assert row.device.kernel_us == pytest.approx(4, rel=1e-3)
    for size, nbytes, measured in results[0]["reduces"]:
        if size == ranks or ranks > 2:
            assert seconds(nbytes, size, row.links) == pytest.approx(measured, rel=0.02)
    assert row.sources.measured.keys() == {number.path for number in numbers(row)}
    assert row.sources.by_kind().keys() == {"measured"}


def test_the_overlap_share_explains_the_overlapped_step() -> None:
    shares = [
        measure.to_hardware(
            found(2, base=4e-5, step=0.0, per_byte=1e-9, overlapped=seconds), "nccl", ENGINE
        ).device.overlap_share
        for seconds in (STEP + 4e-5, STEP + 4e-5 + 15 * 0.3 * 4e-5, 1.0)
    ]
    assert shares[0] <= 0.01 and shares[1] == pytest.approx(0.3, abs=0.02) and shares[2] == 0.99


def test_one_rank_has_no_link() -> None:
    row = measure.to_hardware(found(1, 0.0, 0.0, 0.0, STEP), "gloo", ENGINE)
    assert row.links == () and row.ranks == 1 and row.device.overlap_share == 0


def check_measured(ranks: int, backend: str, file: Path) -> None:
    """What is at hand is measured, and written as a row that estimates read."""
    result = CliRunner().invoke(main, ["estimate", "--measure", str(file), "--ranks", str(ranks)])
    assert result.exit_code == 0, result.output
    row = read_hardware(str(file))
    assert row.ranks == ranks and backend in row.name
    assert 1e-3 < row.device.matmul_tflops < 1e4 and 0.1 < row.device.memory_gb_s < 1e5
    assert 0.1 < row.device.kernel_us < 1000
    if ranks > 1:
        assert 1e-6 < seconds(4096, ranks, row.links) < 1
        assert seconds(1e8, ranks, row.links) > seconds(4096, ranks, row.links)


def test_two_ranks_are_measured(tmp_path: Path) -> None:
    check_measured(2, "gloo", tmp_path / "here.yaml")


def fail(_: None, rank: Rank) -> dict[str, Any]:
    raise OSError(f"rank {rank.rank} has no memory to measure")


def test_a_rank_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_rank", fail)
    with pytest.raises(HardwareError, match=r"measuring failed: .*no memory to measure"):
        measure.measure(2)
