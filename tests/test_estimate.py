"""The estimator: formulas by hand, limits, properties, hardware files, published rows."""

from __future__ import annotations

import contextlib
import json
import math
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ptconvert.cli import main
from ptconvert.errors import HardwareError
from ptconvert.estimate.collective import all_reduce_seconds
from ptconvert.estimate.compare import ACCURACY, Candidate, Setting, compare, faster
from ptconvert.estimate.hardware import (
    Engine,
    Hardware,
    Link,
    Protocol,
    engine_names,
    hardware_names,
    numbers,
    read_engine,
    read_hardware,
    to_yaml,
)
from ptconvert.estimate.model import Workload, estimate, step, step_seconds
from ptconvert.estimate.report import lane_group, layer_group
from ptconvert.estimate.roofline import Pass
from ptconvert.estimate.timeline import run
from ptconvert.presets import PRESETS, dense_schedule, parameters
from ptconvert.schedule import Schedule
from ptconvert.shape import ModelShape, read_config

ROOT = Path(__file__).parents[1]
LAYERS = 80
SHAPE = ModelShape.from_config(read_config(ROOT / "specs" / "configs" / "llama-3.1-70b.json"))
H100, GPT_FAST, VLLM = read_hardware("h100-sxm"), read_engine("gpt-fast"), read_engine("vllm")
ARGUMENTS = {"depth": 4, "delay": 2, "every": 4}
SCHEDULES = {
    name: Schedule(
        preset(range(LAYERS), **{k: ARGUMENTS[k] for k in parameters(name) if k in ARGUMENTS})
    )
    for name, preset in PRESETS.items()
}
OVERLAPPED = Schedule(PRESETS["parallel_track"](range(LAYERS), depth=4, overlap=1))
ALL_SCHEDULES = st.sampled_from([*SCHEDULES.values(), OVERLAPPED])
PASSES = st.builds(
    Pass,
    sequences=st.integers(1, 64),
    tokens=st.sampled_from([1, 7, 512]),
    past=st.integers(0, 4096),
    allocated=st.just(8192),
)
RANKS = st.sampled_from([1, 2, 4, 8])
LINKS = st.builds(
    Link,
    name=st.just("link"),
    ranks=st.just(8),
    base_us=st.floats(0, 100),
    algorithm=st.sampled_from(["ring", "tree", "ring or tree"]),
    one_shot_us=st.floats(0, 100),
    switch_us=st.floats(0, 100),
    switch_gb_s=st.floats(0, 1000),
    protocols=st.lists(
        st.builds(Protocol, step_us=st.floats(0, 50), gb_s=st.floats(0.1, 1000)),
        min_size=1,
        max_size=2,
    ).map(tuple),
)


def with_link(link: Link, share: float = 0.0) -> Hardware:
    device = replace(H100.device, overlap_share=share)
    return replace(H100, links=(link,), device=device)


def test_a_decode_step_by_hand() -> None:
    """Llama-3.1-70B, batch 1, one decode step of gpt-fast on 8 H100, from numbers alone."""
    weights = {"a": (8192 * 8192 * 2 + 2 * 8192 * 1024) / 8, "m": 3 * 8192 * 28672 / 8}
    bandwidth = 3350e9 * 0.94
    moved = {"a": 4 * 8192 + 3 * 1024 + 2 * 128, "m": 4 * 8192 + 4 * 3584}
    matrices = sum(2 * (weights[k] + moved[k]) / bandwidth for k in "am")
    cache = 2 * (1536 * 2 * 128 * 8 + 2 * 128) / bandwidth  # each of 8 query heads reads it
    layer = matrices + cache + 13 * 2.57e-6
    head = 2 * (128256 * 8192 + 128256 + 4 * 8192) / bandwidth + 4 * 2.57e-6
    ring = 8.59e-6 + 14 * 0.998e-6 + 2 * 7 / 8 * 2 * 8192 / 141e9
    one = Pass(1, 1, past=1280, allocated=1536)
    found = step(dense_schedule(LAYERS), SHAPE, H100, GPT_FAST, 8, one)
    assert found.compute == pytest.approx(80 * layer + head, rel=1e-9)
    assert found.seconds == pytest.approx(80 * layer + head + 160 * ring, rel=1e-9)
    assert found.communication == pytest.approx(160 * ring / found.seconds)


def test_a_prefill_is_bound_by_flops() -> None:
    one = Pass(4, 1024, allocated=1024)
    flops = 2 * 4 * 1024 * (LAYERS * 3 * 8192 * 28672 / 8)
    silent = replace(H100, links=(replace(H100.links[0], ranks=8),))
    found = step(dense_schedule(LAYERS), SHAPE, silent, VLLM, 8, one).compute
    assert found > flops / (989.4e12 * VLLM.matmul_reach)
    faster_chip = replace(H100.device, matmul_tflops=2 * 989.4)
    half = step(
        dense_schedule(LAYERS), SHAPE, replace(H100, device=faster_chip), VLLM, 8, one
    ).compute
    assert 0.5 < half / found < 0.55


def test_all_reduce_formulas() -> None:
    link = Link(
        name="x",
        ranks=8,
        base_us=5,
        algorithm="ring",
        protocols=(Protocol(step_us=2, gb_s=10),),
    )
    ring = all_reduce_seconds(8e6, 4, [link])
    assert ring == pytest.approx(5e-6 + 6 * 2e-6 + 2 * 3 / 4 * 8e6 / 10e9)
    tree = all_reduce_seconds(8e6, 6, [replace(link, algorithm="tree")])
    assert tree == pytest.approx(5e-6 + 2 * 3 * 2e-6 + 2 * 8e6 / 10e9)
    both = replace(link, algorithm="ring or tree")
    assert all_reduce_seconds(8, 8, [both]) < all_reduce_seconds(8, 8, [link])
    assert all_reduce_seconds(8e9, 8, [both]) == all_reduce_seconds(8e9, 8, [link])
    direct = replace(link, one_shot_us=3)
    assert all_reduce_seconds(100, 4, [direct], one_shot=True) == pytest.approx(3e-6 + 300 / 10e9)
    assert all_reduce_seconds(8e6, 4, [direct], one_shot=True) == ring  # (n-1) m is more to read
    switched = replace(link, switch_us=7, switch_gb_s=40)
    assert all_reduce_seconds(8e6, 8, [switched]) == pytest.approx(12e-6 + 8e6 / 40e9)
    outer = replace(link, ranks=16, base_us=20)
    two_levels = all_reduce_seconds(8e6, 16, [link, outer])
    within, between = all_reduce_seconds(8e6, 8, [link]), all_reduce_seconds(1e6, 2, [outer])
    assert two_levels == pytest.approx(within + between)
    assert all_reduce_seconds(8e6, 1, []) == 0


def test_an_overlapped_all_reduce_hides_under_the_stages_before_its_merge() -> None:
    device = replace(H100.device, overlap_share=0.0)
    schedule = Schedule.parse("a0~1 m0~1 a1~1 m1!")
    hidden = run(schedule, [10.0] * 4, 0.0, 6.0, device)
    assert hidden.seconds == 46  # only the last is waited for
    assert [s.waited for s in hidden.spans] == [0, 0, 0, 6]
    exposed = run(schedule, [10.0] * 4, 0.0, 14.0, device)
    # stages begin at 0, 10, 24 (a0's merge), 38 (m0's); the last waits for a1's, then its own
    assert [s.compute[0] for s in exposed.spans] == [0, 10, 24, 38]
    assert exposed.seconds == 66 and exposed.spans[3].waited == 18
    two = run(schedule, [10.0] * 4, 0.0, 14.0, replace(device, reduces_at_once=2))
    assert [s.compute[0] for s in two.spans] == [0, 10, 24, 34] and two.seconds == 58
    shared = run(schedule, [10.0] * 4, 0.0, 6.0, replace(device, overlap_share=0.5))
    assert shared.seconds == 46 + 3 * 3
    blocking = run(Schedule.parse("a0! m0! a1. m1!"), [10.0] * 4, 1.0, 6.0, device)
    assert blocking.seconds == 40 + 3 * 6 + 1 and blocking.compute == 41


@given(ALL_SCHEDULES, PASSES, RANKS)
@settings(max_examples=40)
def test_free_links_make_every_schedule_as_fast_as_tensor_parallel(
    schedule: Schedule, one: Pass, ranks: int
) -> None:
    link = Link(
        name="free",
        ranks=8,
        base_us=0,
        algorithm="ring",
        protocols=(Protocol(step_us=0, gb_s=1e9),),
    )
    hardware = with_link(link, share=0.5)
    found, base = (
        step_seconds(s, SHAPE, hardware, GPT_FAST, ranks, one)
        for s in (schedule, dense_schedule(LAYERS))
    )
    assert found == pytest.approx(base, rel=1e-3)


@given(ALL_SCHEDULES, PASSES, LINKS, st.floats(0, 0.9))
@settings(max_examples=40)
def test_one_rank_has_no_communication(
    schedule: Schedule, one: Pass, link: Link, share: float
) -> None:
    found = step(schedule, SHAPE, with_link(link, share), VLLM, 1, one)
    assert found.seconds == pytest.approx(found.compute) and found.communication < 1e-9
    assert all(span.waited == 0 for span in found.spans)


@given(
    ALL_SCHEDULES,
    PASSES,
    st.sampled_from([2, 4, 8]),
    LINKS,
    st.floats(0, 0.9),
    st.floats(1, 100),
    st.sampled_from([1, 2]),
)
@settings(max_examples=120)
def test_time_never_falls_when_a_link_gets_slower(
    schedule: Schedule,
    one: Pass,
    ranks: int,
    link: Link,
    share: float,
    times: float,
    at_once: int,
) -> None:
    hardware = with_link(link, share)
    hardware = replace(hardware, device=replace(hardware.device, reduces_at_once=at_once))
    for engine in (GPT_FAST, VLLM):
        fast, slow = (
            step_seconds(schedule, SHAPE, h, engine, ranks, one)
            for h in (hardware, faster(hardware, 1 / times))
        )
        assert slow >= fast * (1 - 1e-9)
        compute = step(schedule, SHAPE, hardware, engine, ranks, one).compute
        assert fast >= compute * (1 - 1e-9)


@given(st.floats(1, 1e9), st.integers(2, 8), LINKS, st.sampled_from(["base_us", "step_us", "gb_s"]))
def test_each_number_of_a_link_matters_in_one_direction(
    nbytes: float, ranks: int, link: Link, which: str
) -> None:
    if which == "base_us":
        slower = replace(link, base_us=2 * link.base_us)
    elif which == "step_us":
        slow = tuple(replace(p, step_us=2 * p.step_us) for p in link.protocols)
        slower = replace(link, protocols=slow)
    else:
        slow = tuple(replace(p, gb_s=p.gb_s / 2) for p in link.protocols)
        slower = replace(link, protocols=slow)
    before, after = (all_reduce_seconds(nbytes, ranks, [x]) for x in (link, slower))
    assert after >= before
    assert all_reduce_seconds(2 * nbytes, ranks, [link]) >= before


def test_more_tracks_than_ranks_cost_kernels() -> None:
    schedule, one = SCHEDULES["parallel_track"], Pass(1, 1, past=100)
    same = step(schedule, SHAPE, H100, GPT_FAST, 4, one)
    twice = step(schedule, SHAPE, H100, GPT_FAST, 4, one, tracks=8)
    kernels = LAYERS * 13 * H100.device.kernel_us * 1e-6
    assert twice.compute - same.compute == pytest.approx(kernels, rel=0.15)
    assert step(dense_schedule(LAYERS), SHAPE, H100, GPT_FAST, 4, one, tracks=8) == step(
        dense_schedule(LAYERS), SHAPE, H100, GPT_FAST, 4, one
    )


def test_a_request_is_its_prefill_and_its_steps() -> None:
    workload = Workload(batch=4, prompt=1000, new=101)
    e = estimate(dense_schedule(LAYERS), SHAPE, H100, VLLM, 8, workload)
    assert e.ttft == pytest.approx(e.prefill.seconds + VLLM.request_us * 1e-6)
    assert e.tokens_per_second == pytest.approx(4 * 101 / (e.ttft + 100 * e.tpot))
    assert 141e9 / 8 < e.memory < 141e9 / 8 + 1.1e9  # weights, a little cache
    assert estimate(dense_schedule(LAYERS), SHAPE, H100, VLLM, 8, replace(workload, new=1)).tpot


@pytest.mark.parametrize("name", [*hardware_names(), *engine_names()])
def test_every_number_of_a_packaged_row_has_its_source(name: str) -> None:
    read: Callable[[str], Any] = read_hardware if name in hardware_names() else read_engine
    row = read(name)
    if isinstance(row, Hardware):
        sources = row.sources
        assert row.links and to_yaml(row) and row.engine in engine_names()
    else:
        text = (ROOT / "ptconvert" / "engines" / f"{name}.yaml").read_text()
        sources = {line.split(":")[0].strip(): "" for line in text.split("sources:")[1].split("\n")}
    defaults = ("one_shot_us", "switch_us", "switch_gb_s", "batched_reach", "reduces_at_once")
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
    text = text.replace("memory_reach: 0.94", "memory_reach: 1.5")
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
            all_reduce_seconds(1e6, 2, read_hardware(str(file)).links)


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
    assert len(rows) == 178 and sum(r.one.fitted for r in rows) == 60
    left = [r for r in rows if not r.one.fitted]
    folder = [r for r in left if r.one.source != "ladder 405B" and r.one.workload.batch != 4]
    for chosen in (left, folder):
        ratios = [abs(r.ratio_error) for r in chosen if r.ratio_error is not None]
        speeds = [abs(r.error) for r in chosen if r.one.metric == "throughput"]
        assert sum(ratios) / len(ratios) < 0.05
        assert sum(speeds) / len(speeds) < 0.15
    said = {"4%": ratios_of(left), "7%": speeds_of(left)}
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


def run_command(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["estimate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


SPEC = ROOT / "specs" / "llama-3.1-8b-balanced.yaml"
MODEL = ROOT / "specs" / "configs" / "llama-3.1-8b.json"
GIVEN = (SPEC, "--model", MODEL, "--hardware", "l40s-pcie", "--ranks", 8)


def test_the_table_and_the_figures() -> None:
    out, err = run_command(*GIVEN)
    assert "8x L40S over PCIe, vllm, 8 ranks, batch 1, 1024 + 512 tokens" in out and not err
    assert all(word in out for word in ("TTFT", "TPOT", "tokens/s", "waited", "64", "22", "1.00"))
    figures = json.loads(run_command(*GIVEN, "--json")[0])
    base, ours = figures["rows"]
    assert base["name"] == "tensor_parallel" and base["speed_up"]["tokens_per_second"] == 1
    assert (base["all_reduces"], ours["all_reduces"]) == (64, 22)
    assert ours["speed_up"]["tpot"] == pytest.approx(base["tpot_seconds"] / ours["tpot_seconds"])
    assert 1 < ours["speed_up"]["tokens_per_second"] < 2
    assert 0 < ours["communication_share"]["decode"] < base["communication_share"]["decode"] < 1
    slower = json.loads(run_command(*GIVEN, "--engine", "gpt-fast", "--batch", 4, "--json")[0])
    assert slower["engine"] == "gpt-fast" and slower["batch"] == 4
    wide = json.loads(run_command(*GIVEN, "--dtype", "float32", "--json")[0])
    assert wide["rows"][0]["bytes_per_rank"] == pytest.approx(2 * base["bytes_per_rank"])


def test_several_specs_and_what_does_not_fit() -> None:
    more = ROOT / "specs" / "llama-3.1-70b-aggressive.yaml"
    config = ROOT / "specs" / "configs" / "llama-3.1-70b.json"
    given = (more, more.with_name("llama-3.1-70b-gentle.yaml"), "--model", config)
    out, _ = run_command(*given, "--hardware", "l40s-pcie", "--ranks", 2)
    assert "can't run" in out.replace("\n", " ") and "gentle" in out.replace("\n", "")


def test_the_report_is_whole_and_draws_to_scale(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    run_command(*GIVEN, "--html", file)
    text = file.read_text()
    Balanced().feed(text)
    assert "<script" not in text and "http" not in text and "@media print" in text
    for heading in ("Result", "A layer group in a decode step", "link speed", "batch", "ranks"):
        assert heading in text
    schedule = Schedule(PRESETS["ladder"](range(LAYERS)))
    found = step(schedule, SHAPE, H100, GPT_FAST, 8, Pass(1, 1, past=100, allocated=200))
    layers = layer_group(SCHEDULES["parallel_track"])
    assert len(layers) == 4
    group = lane_group(Candidate("ladder", schedule, 8), found, layers)
    compute, reduces = (lane.bars for lane in group.lanes)
    spans = [found.spans[i] for i in range(2 * layers[0], 2 * layers[-1] + 2)]
    lengths = [(s.compute[1] - s.compute[0]) * 1e6 for s in spans]
    assert [b.end - b.start for b in compute] == pytest.approx(lengths)
    assert {b.kind for b in reduces} == {"all-reduce, hidden"}
    assert max(b.end for b in (*compute, *reduces)) <= compute[-1].end + 1e-6


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((*GIVEN[:5], "--ranks", 3), "--ranks 3: 3 ranks don't divide"),
        ((*GIVEN[:5], "--ranks", 16), "--ranks 16: llama-3.1-8b-balanced has 8 tracks"),
        ((*GIVEN[:3], "--hardware", "abacus", "--ranks", 8), "neither a file nor one of"),
        ((*GIVEN[:3], "--hardware", "2-workstations-10gbe", "--ranks", 8), "at most 2 ranks"),
        ((*GIVEN, "--engine", "steam"), "neither a file nor one of"),
        ((SPEC, "--hardware", "h100-sxm", "--ranks", 8), "needs --model"),
        ((SPEC, "--model", MODEL, "--ranks", 8), "--hardware NAME is missing"),
        (("--measure", "/nowhere/row.yaml", "--ranks", 2), "does not exist"),
    ],
)
def test_wrong_input_is_a_line(arguments: tuple[object, ...], what: str) -> None:
    _, err = run_command(*arguments, code=2)
    assert what in err.replace("\n", " ") and "Traceback" not in err


def test_listing_and_imports() -> None:
    out, _ = run_command("--list")
    assert all(name in out for name in (*hardware_names(), *engine_names()))
    script = (
        "import sys; from click.testing import CliRunner; from ptconvert.cli import main; "
        f"r = CliRunner().invoke(main, {['estimate', *map(str, GIVEN)]!r}); "
        "assert r.exit_code == 0, r.output; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'scipy', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_setting_needs_ranks_that_the_hardware_joins() -> None:
    engine: Engine = VLLM
    setting = Setting(SHAPE, H100, engine, "vllm", 16, Workload(1, 8, 8))
    with pytest.raises(HardwareError, match="at most 8 ranks"):
        compare([Candidate("ladder", SCHEDULES["ladder"], 16)], setting)


def test_the_calibration_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = sys.argv
    try:
        sys.argv = ["calibrate.py", "--rows"]
        runpy.run_path(str(ROOT / "examples" / "calibrate.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    assert "all left out: ratios" in capsys.readouterr().out
