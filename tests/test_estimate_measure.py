"""estimate --measure: the row that measurements make, and a real run on two gloo ranks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from estimating import seconds
from hypothesis import given
from hypothesis import strategies as st

from ptconvert.cli import main
from ptconvert.errors import HardwareError
from ptconvert.estimate import measure
from ptconvert.estimate.fit import Point, fit_links
from ptconvert.estimate.hardware import read_engine, read_hardware
from ptconvert.estimate.roofline import Part
from ptconvert.estimate.sources import numbers
from ptconvert.estimate.sweep import CLOSER, SIZES, Own, islands_of, pairs_of, sizes_of, sums_right
from ptconvert.runtime.launch import Rank, launch

ENGINE = read_engine("ptconvert")
STEP = 465 * 4e-6  # 8 layers of 41 + 14 operators and 25 more, 4 us each


def found(
    ranks: int, base: float, step: float, per_byte: float, overlapped: float, **other: Any
) -> Any:
    """What ranks would find whose all-reduces follow the ring's formula exactly."""
    sizes = [n for n in (2, 4, 8) if n < ranks] + [ranks] if ranks > 1 else []
    samples = [
        ("gloo", n, m, base + 2 * (n - 1) * step + 2 * (n - 1) / n * m * per_byte)
        for n in sizes
        for m in SIZES
    ]
    token = base + 2 * (ranks - 1) * step
    steps = {"one": STEP + token, "blocking": STEP + 16 * token, "overlapped": overlapped}
    sweep = {
        "order": list(range(ranks)),
        "levels": [(ranks, "a machine")] if ranks > 1 else [],
        "machines": 1,
        "samples": samples,
        "wrong": {},
        "beside": {"reduce": 4e-3, "products": 6e-3, "both": 7e-3},
        **other,
    }
    one = {
        "name": "a CPU",
        "memory": 8e9,
        "matmul_flops": 5e10,
        "copy_bytes": 2e10,
        "read_bytes": [1e10, 5e9],
        "steps": {name: [[seconds] * 3] * 2 for name, seconds in steps.items()},
        "in_graph": None,
        "sweep": sweep,
    }
    slower = {**one, "matmul_flops": 4e10}
    return [slower, *[one] * (ranks - 1)]


def test_gpus_are_measured_for_what_serves_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM, whose kernels are in a graph: not the time that the host takes to launch one."""
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 3))
    results = found(2, base=4e-4, step=2e-5, per_byte=1e-9, overlapped=5e-3)
    for result, kernel in zip(results, (1.9e-6, 2.1e-6), strict=True):
        result["in_graph"] = kernel
        result["sweep"] = json.loads(json.dumps(result["sweep"]).replace('"gloo"', '"nccl"'))
    row = measure.to_measured(results, "nccl", ENGINE).hardware
    assert row.engine == "vllm" and row.device.kernel_us == pytest.approx(2.1)
    # what large products reached is not once more taken as a data sheet's
    part, vllm = Part(4e10, 0.0), read_engine("vllm")
    assert part.seconds(row.device, vllm) == pytest.approx(1.0)
    listed = replace(row.device, matmul_rate="data sheet")
    assert part.seconds(listed, vllm) == pytest.approx(1 / vllm.matmul_reach)
    same = measure.to_measured(found(2, 4e-4, 2e-5, 1e-9, 5e-3), "gloo", ENGINE).hardware
    assert row.device.overlap_share == same.device.overlap_share


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_row_gives_back_what_was_measured(ranks: int) -> None:
    results = found(ranks, base=4e-4, step=2e-5, per_byte=1e-9, overlapped=5e-3)
    measured = measure.to_measured(results, "gloo", ENGINE)
    row = measured.hardware
    assert row.ranks == ranks and row.engine == "ptconvert"
    assert row.device.matmul_tflops == 0.04 and row.device.memory_gb_s == 20
    assert (row.device.memory_reach, row.device.batched_reach) == (0.5, 0.5)
    assert row.device.kernel_us == pytest.approx(4, rel=1e-3)
    assert len(measured.samples) == len(results[0]["sweep"]["samples"])
    for sample in measured.samples:
        assert sample.said == pytest.approx(sample.seconds, rel=1e-3)
        within = seconds(sample.nbytes, sample.ranks, row.links)
        assert within == pytest.approx(sample.seconds, rel=0.02)
    assert row.sources.measured.keys() == {number.path for number in numbers(row)}
    assert row.sources.by_kind().keys() == {"measured"}
    said = row.sources.measured["links.0.base_us"]
    assert f"{ranks} ranks" in said and "torch 2." in said and "1 machine" in said


@pytest.mark.parametrize(
    ("both", "share", "says"),
    [
        (7e-3, 0.25, "75% of an all-reduce of 4 MiB goes on beside computation"),
        (6e-3, 0.0, "100% of an all-reduce of 4 MiB goes on beside computation"),
        (10e-3, 0.99, "computation doesn't go on beside an all-reduce of 4 MiB"),
    ],
)
def test_what_goes_on_beside_computation(both: float, share: float, says: str) -> None:
    beside = {"reduce": 4e-3, "products": 6e-3, "both": both}
    measured = measure.to_measured(found(2, 4e-4, 0, 1e-9, 5e-3, beside=beside), "gloo", ENGINE)
    assert measured.hardware.device.bulk_overlap_share == pytest.approx(share)
    assert any(note.startswith(says) for note in measured.notes)


def test_wrong_sums_of_the_backend_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some machines' peer-to-peer gives."""
    results = found(2, 4e-4, 0.0, 1e-9, 5e-3, wrong={"nccl": [4096, 16384]})
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    cured = (
        "wrong sums of 4096, 16384 bytes on these ranks; with NCCL_P2P_DISABLE=1 it may be right"
    )
    with pytest.raises(HardwareError, match=f"^nccl gives {cured}$"):
        measure.to_measured(results, "nccl", ENGINE)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with pytest.raises(HardwareError, match=r"on these ranks$"):
        measure.to_measured(results, "nccl", ENGINE)


@pytest.mark.parametrize("wrong", [False, True])
def test_an_engines_own_kernel_is_the_one_shot_one(wrong: bool) -> None:
    own = [("custom", 2, m, 5e-6 + m / 1e9) for m in SIZES[:4]]
    results = found(2, 4e-4, 0.0, 1e-9, 5e-3)
    results[0]["sweep"]["samples"] += own
    results[0]["sweep"]["wrong"] = {"custom": [65536]} if wrong else {}
    measured = measure.to_measured(results, "gloo", ENGINE)
    (link,) = measured.hardware.links
    assert link.one_shot_us == (0 if wrong else pytest.approx(5, rel=1e-3))
    assert any("custom" in sample.way for sample in measured.samples) is not wrong
    said = "custom gives wrong sums of 65536 bytes, and is left out"
    assert (said in measured.notes) is wrong


def test_ranks_that_should_be_neighbours_are_named() -> None:
    results = found(4, 4e-4, 1e-5, 1e-9, 5e-3, order=[0, 2, 1, 3])
    notes = measure.to_measured(results, "gloo", ENGINE).notes
    assert any("CUDA_VISIBLE_DEVICES=0,2,1,3" in note for note in notes)


INNER, OUTER = (1e-5, 2e-6, 1e-11), (5e-5, 1e-5, 1e-10)  # base, step, seconds per byte


def ring(n: int, m: float, base: float, step: float, per_byte: float) -> float:
    return base + 2 * (n - 1) * step + 2 * (n - 1) / n * m * per_byte


def test_levels_are_fitted_from_the_innermost_outwards() -> None:
    points = [Point(n, m, ring(n, m, *INNER)) for n in (2, 4) for m in SIZES] + [
        Point(4 * n, m, ring(4, m, *INNER) + ring(n, m / 4, *OUTER)) for n in (2, 4) for m in SIZES
    ]
    inner, outer = fit_links(points, [4, 16], ["an island", "a machine"])
    assert (inner.ranks, outer.ranks, outer.name) == (4, 16, "a machine")
    assert (inner.base_us, inner.protocols[0].step_us) == pytest.approx((10, 2), rel=1e-3)
    assert (outer.base_us, outer.protocols[0].step_us) == pytest.approx((50, 10), rel=1e-3)
    assert (inner.protocols[0].gb_s, outer.protocols[0].gb_s) == pytest.approx((100, 10), rel=1e-3)
    for point in points:
        said = seconds(point.nbytes, point.ranks, (inner, outer))
        assert said == pytest.approx(point.seconds, rel=1e-3)


def test_a_protocol_for_small_messages_is_told_from_one_for_large_ones() -> None:
    """NCCL's LL and Simple: the faster of both at each size."""
    points = [
        Point(n, m, min(ring(n, m, 5e-6, 1e-6, 1e-10), ring(n, m, 5e-6, 8e-6, 1e-11)))
        for n in (2, 4, 8)
        for m in SIZES
    ]
    (link,) = fit_links(points, [8], ["a machine"])
    assert len(link.protocols) == 2
    for point in points:
        said = seconds(point.nbytes, point.ranks, [link])
        assert said == pytest.approx(point.seconds, rel=0.05)


@given(st.lists(st.floats(1e-6, 1), min_size=len(SIZES), max_size=len(SIZES)))
def test_any_times_make_a_link(times: list[float]) -> None:
    points = [Point(2, m, t) for m, t in zip(SIZES, times, strict=True)]
    (link,) = fit_links(points, [2], ["a machine"])
    assert link.base_us >= 0
    assert all(p.step_us >= 0 and p.gb_s > 0 for p in link.protocols)


@pytest.mark.parametrize(
    ("far", "islands"),
    [
        ({}, [[0, 1, 2, 3]]),  # all alike
        ({(0, 2), (0, 3), (1, 2), (1, 3)}, [[0, 1], [2, 3]]),
        ({(0, 1), (0, 3), (1, 2), (2, 3)}, [[0, 2], [1, 3]]),  # bridges between other cards
        ({(0, 3), (1, 3), (2, 3)}, [[0, 1, 2, 3]]),  # one by itself is no division into islands
        ({(0, 3)}, [[0, 1, 2, 3]]),
    ],
)
@pytest.mark.parametrize("times", [1.2, 3.0])
def test_islands(far: set[tuple[int, int]], islands: list[list[int]], times: float) -> None:
    pairs = {p: 1e-4 * (times if p in far else 1.0) for p in combinations(range(4), 2)}
    assert islands_of(pairs) == (islands if times > CLOSER else [[0, 1, 2, 3]])


def between_pairs(_: None, rank: Rank) -> dict[str, Any]:
    return {"pairs": [(*pair, seconds) for pair, seconds in pairs_of(rank, [0, 1, 2]).items()]}


def test_each_pair_is_timed_and_all_ranks_know_it() -> None:
    found = launch(between_pairs, None, 3, "gloo", "cpu", 120)
    assert found[0] == found[1] == found[2]
    assert [tuple(pair[:2]) for pair in found[0]["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert all(1e-5 < pair[2] < 10 for pair in found[0]["pairs"])


def test_wrong_sums_are_seen() -> None:
    """By a way that doubles what one rank alone gives, and one that forgets a number."""

    def forgetful(x: torch.Tensor) -> torch.Tensor:
        x[1000] = 0
        return x

    ways = {True: lambda x: x, False: lambda x: x * 2}
    for right, reduce in ways.items():
        own = Own("own", reduce, SIZES[-1])
        assert sums_right(own, 1024, 0, 1, torch.device("cpu")) is right
    assert not sums_right(Own("own", forgetful, 1), 1024, 0, 1, torch.device("cpu"))


def test_sizes_measured_together() -> None:
    assert sizes_of([2]) == [2] and sizes_of([6]) == [2, 4, 6] and sizes_of([]) == []
    assert sizes_of([2, 8, 32]) == [2, 4, 8, 16, 32]


def test_the_overlap_share_explains_the_overlapped_step() -> None:
    shares = [
        measure.to_measured(
            found(2, base=4e-5, step=0.0, per_byte=1e-9, overlapped=seconds), "gloo", ENGINE
        ).hardware.device.overlap_share
        for seconds in (STEP + 4e-5, STEP + 4e-5 + 15 * 0.3 * 4e-5, 1.0)
    ]
    assert shares[0] <= 0.01 and shares[1] == pytest.approx(0.3, abs=0.02) and shares[2] == 0.99


def test_one_rank_has_no_link() -> None:
    row = measure.to_measured(found(1, 0.0, 0.0, 0.0, STEP), "gloo", ENGINE).hardware
    assert row.links == () and row.ranks == 1 and row.device.overlap_share == 0


def check_measured(ranks: int, backend: str, file: Path) -> None:
    """What is at hand is measured, and written as a row that estimates read."""
    result = CliRunner().invoke(main, ["estimate", "--measure", str(file), "--ranks", str(ranks)])
    assert result.exit_code == 0, result.output
    row = read_hardware(str(file))
    assert row.ranks == ranks and backend in row.name
    assert (
        "goes on beside" in result.output or "doesn't go on beside" in result.output or ranks == 1
    )
    assert 1e-3 < row.device.matmul_tflops < 1e4 and 0.1 < row.device.memory_gb_s < 1e5
    assert 0.1 < row.device.kernel_us < 1000
    if ranks > 1:
        assert 1e-6 < seconds(4096, ranks, row.links) < 1
        assert seconds(1e8, ranks, row.links) > seconds(4096, ranks, row.links)


def test_the_ranks_at_hand_may_be_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure.to_measured(found(2, 4e-4, 2e-5, 1e-9, 5e-3), "gloo", ENGINE)
    asked: list[int] = []

    def at_hand(ranks: int, _: object) -> measure.Measured:
        asked.append(ranks)
        return measured

    monkeypatch.setattr(measure, "measure", at_hand)
    given = ["estimate", "llama-3.2-1b", "--hardware", "measured", "--ranks", "2", "--json"]
    result = CliRunner().invoke(main, [*given, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert asked == [2] and figures["hardware"] == measured.hardware.name
    assert (figures["engine"], figures["ranks"]) == ("ptconvert", 2)
    lacking = CliRunner().invoke(main, given[:4])
    assert lacking.exit_code == 2 and "--ranks R" in lacking.output


@pytest.mark.slow
def test_two_ranks_are_measured(tmp_path: Path) -> None:
    check_measured(2, "gloo", tmp_path / "here.yaml")


@pytest.mark.slow
def test_two_machines_under_torchrun(tmp_path: Path) -> None:
    """Two agents of two ranks each, as on two machines: a level within, and one between."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ("-m", "ptconvert", "estimate", "--measure", str(tmp_path / "here.yaml"), "--json")
    agents = []
    for machine in range(2):
        where = ("--nnodes", "2", "--node-rank", str(machine), "--nproc-per-node", "2")
        how = ("--master-addr", "127.0.0.1", "--master-port", str(port))
        command = [sys.executable, "-m", "torch.distributed.run", *where, *how, *script]
        pipe = subprocess.PIPE
        agents.append(subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe))
    done = [agent.communicate(timeout=400) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], done
    (row,) = json.loads(done[0][0])["rows"]
    assert {(s["way"], s["ranks"]) for s in row["samples"]} == {("gloo", 2), ("gloo", 4)}
    assert {s["nbytes"] for s in row["samples"]} == {*SIZES} and SIZES[-1] == 64 * 2**20
    links = read_hardware(str(tmp_path / "here.yaml")).links
    assert [(link.name, link.ranks) for link in links] == [
        ("a machine", 2),
        ("between machines", 4),
    ]


def fail(_: None, rank: Rank) -> dict[str, Any]:
    raise OSError(f"rank {rank.rank} has no memory to measure")


def test_a_rank_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_rank", fail)
    with pytest.raises(HardwareError, match=r"measuring failed: .*no memory to measure"):
        measure.measure(2, [])
