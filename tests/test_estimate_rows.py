"""Hardware and engine files: their sources, faults, and reading back."""

from __future__ import annotations

import contextlib
import csv
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from estimating import H100, ROOT, seconds
from hypothesis import given, settings
from hypothesis import strategies as st

from ptconvert.checkpoint.files import read_config
from ptconvert.errors import HardwareError
from ptconvert.estimate.hardware import (
    Hardware,
    engine_names,
    hardware_names,
    read_engine,
    read_hardware,
    to_yaml,
)
from ptconvert.estimate.model import Workload, estimate, step
from ptconvert.estimate.roofline import Pass
from ptconvert.estimate.sources import UNSAID, Sources, numbers, origins
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import dense_schedule


def test_engines_say_their_version_and_the_default_is_the_newest_vllm() -> None:
    engines = {name: read_engine(name) for name in engine_names()}
    for name, engine in engines.items():
        assert bool(engine.version) is (name != "ptconvert")  # whose version is the tool's own
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", engine.date)
    assert {read_hardware(name).engine for name in hardware_names()} == {"vllm"}
    vllms = {name: engine.date for name, engine in engines.items() if name.startswith("vllm")}
    assert max(vllms, key=vllms.__getitem__) == "vllm" and len(vllms) == 2
    assert "no published runs" in engines["vllm"].accuracy


def test_the_host_times_of_vllm_are_what_its_sources_leave() -> None:
    """After the roofline on one GPU; and other published runs are within a tenth."""
    engine, seen = read_engine("vllm"), []
    hostless = replace(engine, step_us=0.0, request_us=0.0)
    with (ROOT / "examples" / "calibration" / "vllm_one_gpu.csv").open() as stream:
        for row in csv.DictReader(stream):
            device = replace(
                H100.device,
                memory_gb_s=float(row["memory_gb_s"]),
                matmul_tflops=float(row["matmul_tflops"]),
            )
            shape = ModelShape.from_config(
                read_config(ROOT / "specs" / "configs" / f"{row['model']}.json")
            )
            schedule = dense_schedule(shape.layers)
            workload = Workload(1, int(row["prompt_tokens"]), int(row["new_tokens"]))
            ours, without = (
                estimate(schedule, shape, replace(H100, device=device), e, 1, workload)
                for e in (engine, hostless)
            )
            times = {"ttft": ours.ttft, "tpot": ours.tpot}
            times["request"] = workload.new / ours.tokens_per_second
            seen.append((row, float(row["milliseconds"]), times[row["metric"]] * 1e3, without))
    (_, tpot, _, step), (_, ttft, _, request) = seen[:2]
    assert engine.step_us == pytest.approx(1e3 * tpot - 1e6 * step.tpot, abs=5)
    left = 1e3 * ttft - 1e6 * request.ttft - engine.step_us
    assert engine.request_us == pytest.approx(left, abs=50)
    for row, published, estimated, _ in seen[2:]:
        assert estimated == pytest.approx(published, rel=0.1), row


def test_an_engine_file_says_for_which_endings_a_way_is_open(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (ROOT / "ptconvert" / "estimate" / "rows" / "engines" / "vllm.yaml").read_text()
    file.write_text(text.replace("one_shot: blocking", 'one_shot: "yes"'))
    with pytest.raises(HardwareError, match="one_shot is 'yes'; it must be none or blocking or ov"):
        read_engine(str(file))


@pytest.mark.parametrize("name", [*hardware_names(), *engine_names()])
def test_every_number_of_a_packaged_row_has_its_source(name: str) -> None:
    """And none has one that isn't there, but for an engine's words."""
    read: Callable[[str], Any] = read_hardware if name in hardware_names() else read_engine
    row = read(name)
    held = [path for texts in row.sources.by_kind().values() for path in texts]
    found = {number.path: number for number in numbers(row)}
    words = {f.name for f in fields(row)} if name in engine_names() else set()
    assert len(held) == len(set(held)) and set(held) <= found.keys() | words
    for path, number in found.items():
        assert path in held or number.is_default, f"{name}: {path} has no source"
    if isinstance(row, Hardware):
        assert row.links and to_yaml(row) and row.engine in engine_names()
        assert UNSAID not in origins(row, row.sources)


@pytest.mark.parametrize("name", [*hardware_names(), *engine_names()])
def test_every_published_number_has_the_year_of_its_source(name: str) -> None:
    """Of measurements and of data sheets; what is assumed may be a model's constant."""
    read: Callable[[str], Any] = read_hardware if name in hardware_names() else read_engine
    sources = read(name).sources
    for path, source in {**sources.measured, **sources.data_sheet}.items():
        assert re.search(r"\b20[0-3]\d\b", source), f"{name}: {path}: {source}"


def test_the_hardware_that_the_issues_name_is_there() -> None:
    names = set(hardware_names())
    assert {"h100-sxm", "h200-sxm", "h100-pcie", "h100-sxm-p2p-off", "a100-sxm"} <= names
    assert {"l40s-pcie", "rtx-a6000-pcie", "mi300x", "b200", "b300", "2x8-h100-sxm-ib400"} <= names
    cards = ("rtx-3090", "rtx-4090", "rtx-5090", "rtx-5070-ti", "rtx-pro-6000")
    both = {f"{card}-{way}" for card in cards for way in ("pcie", "p2p-off")}
    assert both <= names and {read_hardware(name).ranks for name in both} == {8}
    assert read_hardware("rtx-pro-6000-pcie-one-shot").ranks == 8
    assert {read_hardware(f"4-workstations-{n}gbe").ranks for n in (10, 25, 100)} == {4}
    assert {read_hardware(f"2-dgx-spark{how}").ranks for how in ("", "-one-shot")} == {2}
    assert read_hardware("2x8-h100-sxm-ib400").ranks == 16


@pytest.mark.parametrize(
    ("name", "ranks", "nbytes", "microseconds"),
    [
        ("rtx-pro-6000-pcie", 8, 8192, 24.2),
        ("rtx-pro-6000-pcie", 4, 256, 14.1),
        ("rtx-4090-p2p-off", 8, 8, 42.1),
        ("rtx-3090-p2p-off", 8, 8, 54.2),
        ("rtx-4090-pcie", 4, 2**25, 2037.7),
        ("mi300x", 8, 2**23, 91.1),
        ("rtx-5070-ti-p2p-off", 2, 10240, 39),
        ("rtx-5070-ti-p2p-off", 2, 2048 * 10240, 733e3 / 128),
        ("2-dgx-spark", 2, 8192, 31),
        ("2-dgx-spark", 2, 16384, 31),
        ("2-dgx-spark", 2, 32768, 38),
        ("2-dgx-spark", 2, 65536, 66),
    ],
)
def test_a_row_gives_what_its_sources_measured(
    name: str, ranks: int, nbytes: int, microseconds: float
) -> None:
    """Within a tenth; the Sparks, whose four sizes follow no line, within a fifth."""
    found = 1e6 * seconds(nbytes, ranks, read_hardware(name).links)
    assert found == pytest.approx(microseconds, rel=0.2 if "spark" in name else 0.1)


def test_two_cards_without_peer_to_peer_wait_for_most_of_a_prefill() -> None:
    """Two RTX 5070 Ti, 2048 tokens of a model of 64 layers and width 5120: its 128 all-reduces were
    733 of 802 ms. As many take 738 here, 128 x (36.2 us and 21 MB over 3.66 GB/s), and three
    quarters of the pass with all products in FP4, at the share of its rate that is assumed."""
    row = read_hardware("rtx-5070-ti-p2p-off")
    shape = ModelShape.from_config(read_config(ROOT / "specs" / "configs" / "qwen3.6-27b.json"))
    device = replace(row.device, matmul_tflops=row.device.fp4_tflops)
    engine, one = read_engine("vllm", "replicated"), Pass(1, 2048)
    found = step(shape.dense, shape, replace(row, device=device), engine, 2, one)
    waited = sum(span.waited for span in found.spans)
    assert waited == pytest.approx(128 * (36.18e-6 + 2048 * 10240 / 3.66e9), rel=1e-3)
    assert waited == pytest.approx(0.733, rel=0.01)
    assert 0.7 < waited / found.seconds < 733 / 802


@pytest.mark.parametrize("name", [name for name in hardware_names() if name.endswith("-pcie")])
def test_cards_with_peer_to_peer_have_one_latency(name: str) -> None:
    """That of RTX PRO 6000 behind switches: 24.2 us for 8 KB on 8, less what the bytes take."""
    (link,) = read_hardware(name).links
    (protocol,) = link.protocols
    moved = 14 / 8 * 8192 / protocol.gb_s / 1e3
    assert 1e6 * seconds(8192, 8, [link]) == pytest.approx(24.2 + moved, abs=0.1)


@pytest.mark.parametrize(
    ("nbytes", "microseconds"),
    [(256, 7.5), (1024, 7.5), (8192, 9.2), (2**15, 16.5), (2**16, 24.1)],
)
def test_one_shot_kernels_over_pcie_take_what_was_measured(
    nbytes: int, microseconds: float
) -> None:
    """On 8 RTX PRO 6000: from 64 KB on NCCL's ring is as fast, which has 24.1 us there."""
    (link,) = read_hardware("rtx-pro-6000-pcie-one-shot").links
    found = 1e6 * seconds(nbytes, 8, [link], one_shot=True)
    assert found == pytest.approx(microseconds, rel=0.05)


def test_one_shot_kernels_over_roce_take_what_was_measured_on_four() -> None:
    """23 us for 48 KB: 16 us and 3 x 48 KB over 21 GB/s."""
    (link,) = read_hardware("2-dgx-spark-one-shot").links
    four = replace(link, ranks=4)
    assert 1e6 * seconds(48 * 1024, 4, [four], one_shot=True) == pytest.approx(23, abs=0.1)


def test_what_is_measured_assumed_or_from_a_data_sheet_is_a_line() -> None:
    assert origins(H100, H100.sources) == (
        "measured: bandwidth that kernels reach, time of a kernel, cost of overlap, link latency "
        "in part, link bandwidth in part; data sheet: FLOP/s, memory; assumed: link latency in "
        "part, link bandwidth in part"
    )
    bare = replace(H100, sources=Sources(data_sheet={"device.memory_gb": "a sheet"}))
    assert origins(bare, bare.sources) == (
        "data sheet: memory in part; without a source: FLOP/s, memory in part, bandwidth that "
        "kernels reach, time of a kernel, cost of overlap, link latency, link bandwidth"
    )


@pytest.mark.parametrize("name", hardware_names())
def test_an_assumed_latency_of_a_link_is_said(name: str) -> None:
    row = read_hardware(name)
    assumed = row.sources.assumed
    said = origins(row, row.sources).partition("assumed: ")[2]
    latencies = {n.path for n in numbers(row) if n.about == "link latency" and not n.is_default}
    assert ("link latency" in said) is bool(latencies & assumed.keys())
    assert ("link latency in part" in said) is (
        0 < len(latencies & assumed.keys()) < len(latencies)
    )


@pytest.mark.parametrize(
    ("sources", "what"),
    [
        ("{device.memory_gb: a sheet}", "unknown key 'device.memory_gb'; sources takes measured"),
        ("{guessed: {device.memory_gb: 80}}", "unknown key 'guessed'"),
        ("{measured: a text}", "measured is a text; it must be a mapping of texts"),
        ("{measured: {a: x}, assumed: {a: y}}", "a is assumed and measured; it must be one"),
    ],
)
def test_sources_are_held_by_kind(tmp_path: Path, sources: str, what: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        to_yaml(replace(H100, sources=Sources())).replace("sources: {}", f"sources: {sources}")
    )
    with pytest.raises(HardwareError, match=re.escape(what)):
        read_hardware(str(file))


def test_a_row_reads_back_from_what_is_written(tmp_path: Path) -> None:
    for name in hardware_names():
        row, file = read_hardware(name), tmp_path / "row.yaml"
        file.write_text(to_yaml(row))
        assert read_hardware(str(file)) == row


def test_faults_of_a_hardware_file_come_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = to_yaml(H100)
    text = text.replace("format: 1", "format: 2").replace("matmul_tflops: 989.4", "matmul_tflop: 9")
    text = text.replace(f"memory_reach: {H100.device.memory_reach}", "memory_reach: 1.5")
    text = text.replace("algorithm: ring", "algorithm: star").replace("ranks: 8", "ranks: 7.5")
    file.write_text(text)
    with pytest.raises(HardwareError) as caught:
        read_hardware(str(file))
    faults = caught.value.faults
    assert len(faults) == 6 and all(fault.startswith(f"{file}:") for fault in faults)
    for what in ("unknown key 'matmul_tflop'", "matmul_tflops is missing", "0.001 to 1"):
        assert any(what in fault for fault in faults), faults
    for what in ("ring or tree", "a whole number", "format must be 1"):
        assert any(what in fault for fault in faults), faults
    file.write_text("links: [")
    with pytest.raises(HardwareError, match=r"mine\.yaml:\d+: not valid YAML"):
        read_hardware(str(file))
    with pytest.raises(HardwareError, match="h100-sxm"):
        read_hardware("nowhere")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("links:", "links: 3\nmore:", "must be a list"),
        ("engine: vllm", "engine: abacus", "must be one of"),
        ("gb_s: 141.0", "gb_s: .inf", "must be a number"),
        ("gb_s: 141.0", 'gb_s: "141"', "must be a number"),
        ("name: 8x", "name: [8x]\n#", "must be text"),
    ],
)
def test_a_fault_of_a_hardware_file_is_refused(
    tmp_path: Path, old: str, new: str, what: str
) -> None:
    file = tmp_path / "mine.yaml"
    text = to_yaml(H100)
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(HardwareError, match=what):
        read_hardware(str(file))


@given(st.data())
@settings(max_examples=150)
def test_no_hardware_file_ends_in_a_traceback(data: st.DataObject) -> None:
    lines = to_yaml(H100).splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(lines) - 1))
        word = st.sampled_from(["", "[]", "{}", "-1", "1e999", "~", "- x", "a: b", "!!int 3", "no"])
        kept = data.draw(st.sampled_from(["", lines[index].partition(":")[0] + ": ", lines[index]]))
        lines[index] = kept + data.draw(word)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "mine.yaml"
        file.write_text("\n".join(lines))
        with contextlib.suppress(HardwareError):
            seconds(1e6, 2, read_hardware(str(file)).links)
