"""Hardware and engine files: their sources, faults, and reading back."""

from __future__ import annotations

import contextlib
import csv
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
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
    numbers,
    read_engine,
    read_hardware,
    to_yaml,
)
from ptconvert.estimate.model import Workload, estimate
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
    with pytest.raises(HardwareError, match="one_shot is yes; it must be none or blocking or ov"):
        read_engine(str(file))


@pytest.mark.parametrize("name", [*hardware_names(), *engine_names()])
def test_every_number_of_a_packaged_row_has_its_source(name: str) -> None:
    read: Callable[[str], Any] = read_hardware if name in hardware_names() else read_engine
    row = read(name)
    if isinstance(row, Hardware):
        sources = row.sources
        assert row.links and to_yaml(row) and row.engine in engine_names()
    else:
        text = (ROOT / "ptconvert" / "estimate" / "rows" / "engines" / f"{name}.yaml").read_text()
        sources = {line.split(":")[0].strip(): "" for line in text.split("sources:")[1].split("\n")}
    defaults = (
        *("one_shot_us", "switch_us", "switch_gb_s", "batched_reach", "reduces_at_once"),
        *("fp8_tflops", "int8_tflops", "fp4_tflops"),
    )
    for path, value in numbers(row):
        default = path.rsplit(".", 1)[-1] in defaults and value in (0, 1)
        assert path in sources or default, f"{name}: {path} has no source"


def test_the_hardware_that_the_issue_names_is_there() -> None:
    names = set(hardware_names())
    assert {"h100-sxm", "h200-sxm", "h100-pcie", "h100-sxm-p2p-off", "a100-sxm"} <= names
    assert {"l40s-pcie", "rtx-pro-6000-pcie", "2x8-h100-sxm-ib400"} <= names
    assert {f"2-workstations-{n}gbe" for n in (10, 25, 100)} <= names
    assert read_hardware("2x8-h100-sxm-ib400").ranks == 16


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
