"""plan: sensitivities, the cache, the frontier and the command, on small models."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import FIXTURE, LAYERS, Convert, MakeDense, byte_level
from safetensors.torch import load_file, save_file
from test_cli import run

import ptconvert
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.errors import PlanError
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import content_digest
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import Windows, windows_for
from ptconvert.plan import planner, sensitivity
from ptconvert.plan.case import Case
from ptconvert.plan.frontier import read_frontier
from ptconvert.plan.planner import (
    FINALISTS,
    NEAR,
    REFINEMENTS,
    choose,
    screening_windows,
    search,
    search_windows,
    waited_for,
)
from ptconvert.plan.search import Mixture, Mixtures
from ptconvert.plan.segments import HIDDEN, alone, together
from ptconvert.plan.segments import run as run_of
from ptconvert.plan.sensitivity import Meter, Store, store_file
from ptconvert.schedule.endings import BLOCKING
from ptconvert.schedule.presets import dense_schedule, desync
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec, read_spec

TEXT = Path(ptconvert.__file__).parent / "spec" / "document.py"
# Of the README's table, 4 tracks: planned without and with overlap for 8, and with it for 3.
README_LOSSES = {
    "a0! m0! a1! m1. a2! m2. a3. m3. a4. m4! a5. m5. a6. m6. a7! m7. a8. m8. a9. m9. a10! m10. "
    "a11. m11!": 0.0655,
    "a0! m0! a1! m1! a2! m2^1 a3^1 m3^1 a4. m4! a5^1 m5^1 a6^1 m6^1 a7^1 m7^1 a8^1 m8^1 a9^1 m9^1 "
    "a10^1 m10. a11! m11!": 0.0180,
    "a0! m0! a1^1 m1^1 a2^1 m2^1 a3^1 m3^1 a4^1 m4^1 a5^1 m5^1 a6^1 m6^1 a7^1 m7^1 a8^1 m8^1 "
    "a9^1 m9^1 a10^1 m10^1 a11. m11!": 0.0652,
}
SIZE = ("--window", 24, "--windows", 4, "--dtype", "float32")


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("plan") / "source")


@pytest.fixture
def meter(source: Path, tmp_path: Path) -> Meter:
    return make_meter(source, 4, tmp_path / "costs.jsonl", (TEXT,), 24, 4)


def make_meter(
    source: Path, tracks: int, file: Path, texts: tuple[Path, ...], length: int, count: int
) -> Meter:
    checkpoint = open_checkpoint(source)
    windows = windows_for(checkpoint, texts, length, count)
    case = Case(checkpoint, tracks, windows, "float32", "cpu", BatchSize(2, "cpu"))
    return Meter(case, Store(file), quiet)


def tell_windows(monkeypatch: pytest.MonkeyPatch, tell: Callable[[list[int]], None]) -> None:
    """Tells on which windows a schedule is about to be measured, each time."""
    real = Meter._measure

    def measured(meter: Meter, schedule: Schedule, windows: list[int]) -> Any:
        tell(windows)
        return real(meter, schedule, windows)

    monkeypatch.setattr(Meter, "_measure", measured)


def test_what_runs_is_what_is_said(
    source: Path, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing a long text takes a minute, and weighing the segments seconds."""
    said: list[str] = []

    def stop(*_: object) -> None:
        raise PlanError("stopped")

    @contextmanager
    def recorded() -> Iterator[Callable[..., None]]:
        yield lambda step, *_: said.append(step)

    monkeypatch.setattr(sys.modules["ptconvert.cli.plan"], "step_progress", recorded)
    monkeypatch.setattr("ptconvert.plan.planner.search", stop)
    given = (str(source), "--tracks", "4", "--text", str(TEXT), "--max-syncs", "4", *SIZE)
    result = CliRunner().invoke(main, ["plan", *map(str, given)])
    assert result.exit_code == 2 and "stopped" in result.output
    assert said[:2] == [f"finding {source}", "tokenizing the text"] and len(set(said)) > 2
    said.clear()
    meter.progress = lambda step, *_: said.append(step)
    monkeypatch.setattr(meter, "alone", stop)
    with pytest.raises(PlanError):
        search(meter, waited_for(overlap=False))
    assert said == ["weighing segments"]


# What is measured


@pytest.mark.parametrize(
    "schedule",
    [
        "a0^1 m0! a1! m1! a2! m2! a3! m3! a4! m4! a5! m5!",
        "a0! m0! a1! m1! a2. m2. a3. m3! a4! m4! a5~1 m5!",
        "a0! m0! a1! m1! a2! m2! a3! m3^2 a4! m4! a5|m5!",
        "a0! m0! a1! m1! a2! m2! a3! m3! a4! m4! a5. m5!",
    ],
)
@pytest.mark.parametrize("kept", [1, 4])
def test_costs_are_evals_divergence_of_the_converted_checkpoint(
    schedule: str,
    kept: int,
    meter: Meter,
    source: Path,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the model runs from the layer at which the schedule departs from the dense one."""
    each = meter.windows.ids[:, 1:].numel() * 32 * 4
    monkeypatch.setattr(sensitivity, "STREAM_BYTES", LAYERS * each // kept)
    (cost,) = meter.costs([Schedule.parse(schedule)], "step")
    assert len(meter._opened[0].streams) == -(-LAYERS // kept)
    converted = convert(source, 4, f"  - {{layers: 0-5, stages: '{schedule}'}}\n")
    models = [open_model(open_checkpoint(p), "float32", "cpu") for p in (source, converted)]
    batch = BatchSize(4, "cpu")
    reference = divergence.reference(models[0], meter.windows, batch, quiet)
    tokens = divergence.measure(models[1], reference, meter.windows, batch, quiet)
    assert cost.kl == pytest.approx(tokens.kl.mean(), rel=1e-4)
    assert cost.kl > 0.005  # which a model that ran the dense schedule would not show
    assert cost.loss == pytest.approx((tokens.converted_loss - tokens.source_loss).mean(), rel=1e-3)
    assert cost.agreement == pytest.approx(tokens.agree.mean())


def test_a_candidate_runs_only_the_layers_from_which_it_differs(meter: Meter) -> None:
    """The dense layers before a block aren't run again."""
    ran: list[int] = []
    model = meter._opened[1]
    for index, layer in enumerate(model.model.layers):
        for track in layer.tracks.values():
            track.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    late = "a0! m0! a1! m1! a2! m2! a3! m3! a4. m4! a5! m5!"
    early = late.replace("a1!", "a1.")
    meter.costs([Schedule.parse(late)], "step")
    assert set(ran) == {4, 5}
    meter.costs([Schedule.parse(early)], "step")
    assert set(ran) == {1, 2, 3, 4, 5}


def test_a_window_is_measured_once(
    source: Path, meter: Meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On more windows only those are run that are new; and the cost is that of all at once."""
    schedule = Schedule.parse(str(dense_schedule(LAYERS)).replace("a1!", "a1."))
    (whole,) = make_meter(source, 4, tmp_path / "whole", (TEXT,), 24, 4).costs([schedule], "step")
    ran = list[list[int]]()
    tell_windows(monkeypatch, ran.append)
    for windows in ([2], range(0, 4, 2), None, [3, 1]):
        (cost,) = meter.costs([schedule], "step", windows)
        for name in ("kl_by_window", "loss_by_window", "agreement_by_window"):
            expected = [getattr(whole, name)[window] for window in windows or range(4)]
            assert getattr(cost, name) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert ran == [[2], [0], [1, 3]]


@pytest.mark.parametrize(
    ("count", "screening", "searching"),
    [(1, 1, 1), (4, 1, 4), (16, 1, 4), (24, 1, 6), (40, 2, 8), (65, 4, 8), (127, 8, 8)],
)
def test_on_how_many_windows(count: int, screening: int, searching: int) -> None:
    assert len(screening_windows(count)) == screening
    assert len(search_windows(count)) == searching
    assert set(screening_windows(count)) <= set(search_windows(count)) <= set(range(count))


def test_passes_are_what_ran_and_few(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hooks: rows that went through the layers of the model of tracks, and the source's."""
    meter = make_meter(source, 4, tmp_path / "costs.jsonl", (TEXT,), 24, 16)
    ran = [0]
    for layer in meter._opened[1].model.layers:
        layer.tracks["0"].mlp.register_forward_hook(
            lambda _, given, __: ran.__setitem__(0, ran[0] + len(given[0]))
        )
    windows, steps = dict[str, set[int]](), list[str]()
    meter.progress = lambda step, *_: steps.append(step)
    tell_windows(monkeypatch, lambda some: windows.setdefault(steps[-1], set()).update(some))
    frontier = search(meter, waited_for(overlap=True), target=6)
    whole = [Schedule.parse(s) for s, known in meter.store._costs.items() if len(known) == 16]
    assert sum(s.counts.waited_for == 6 for s in whole) == FINALISTS
    assert windows["sensitivities"] == {8} and windows["round 1: mixtures"] == {0, 4, 8, 12}
    assert windows["round 1: parts"] == {0, 4, 8, 12}
    assert windows["frontier, whole"] == set(range(16)) - {0, 4, 8, 12}
    assert all(len(point.cost.kl_by_window) == 16 for point in frontier.points)
    hidden = [alone(run_of(p, p + 1, HIDDEN), LAYERS) for p in range(2 * LAYERS - 1)]
    assert {8} in [set(meter.store.get(schedule)) for schedule in hidden]  # no mixture had it
    dense = LAYERS * len(meter.windows.ids)
    assert frontier.passes == pytest.approx((dense + ran[0]) / dense)
    assert frontier.passes < 40


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "most"), [(30, 40), (80, 60)])
def test_passes_at_the_depth_of_real_models(
    layers: int, most: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Sublayers write more and less there, so that mixtures differ in what they are made of."""
    path = shutil.copytree(make_dense("llama", num_hidden_layers=layers), tmp_path / "deep")
    tensors, rng = load_file(path / "model.safetensors"), random.Random(0)
    for name in sorted(tensors):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.5 + rng.random()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    ids = torch.randint(0, 64, (16, 25), generator=torch.Generator().manual_seed(0))
    windows, batch = Windows(ids, 24, 16 * 24), BatchSize(16, "cpu")
    case = Case(open_checkpoint(path), 4, windows, "float32", "cpu", batch)
    meter = Meter(case, Store(tmp_path / "costs.jsonl"), quiet)
    frontier = search(meter, waited_for(True), target=layers)
    assert len(frontier.points) > 6 and most / 2 < frontier.passes <= most


# The frontier


def test_the_frontier_is_measured_whole_and_nothing_on_it_is_beaten(meter: Meter) -> None:
    frontier = search(meter, waited_for(overlap=True), rounds=3)
    points = frontier.points
    assert points[-1].schedule == dense_schedule(LAYERS)
    assert points[0].weight == 1  # the last one, of a chain that overlaps all others
    for one, next_one in itertools.pairwise(points):
        assert one.weight < next_one.weight and one.cost.kl > next_one.cost.kl
    for point in points:
        assert point.weight == point.schedule.counts.waited_for
        assert point.predicted == pytest.approx(sum(kl for _, kl in point.parts))
        parts = [part for part, _ in point.parts if not part.dense]
        weighed = meter.alone(parts, "step", search_windows(4))
        assert point.predicted == pytest.approx(sum(weighed))
        assert meter.costs([point.schedule], "step") == [point.cost]
    apart = [abs(p.predicted - p.cost.kl) for p in points[:-1]]
    assert max(apart) > 1e-3  # both numbers are shown because they differ
    blocking = search(meter, waited_for(overlap=False), rounds=3)
    for point in blocking.points:
        counts = point.schedule.counts
        assert counts.all_reduces == counts.waited_for == point.weight


def test_planned_is_better_than_uniform(meter: Meter) -> None:
    frontier = search(meter, waited_for(overlap=False), rounds=4)
    for every in (2, 3, 4):
        uniform = desync(range(LAYERS), every=every)
        (cost,) = meter.costs([Schedule(uniform)], "uniform")
        planned = choose(frontier, 2 * LAYERS // every, None)
        assert planned is not None and planned.cost.kl <= cost.kl


@pytest.mark.parametrize("overlap", [True, False])
def test_it_searches_about_what_is_asked_for(
    overlap: bool, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtures of that weight, or of the next that is lighter than the lightest within the loss."""
    objective, heaviest = waited_for(overlap), planner._heaviest
    aims, found = list[float](), list[Schedule]()

    def recorded(mixtures: Mixtures, objective: planner.Objective, weight: float) -> Mixture:
        mixture = heaviest(mixtures, objective, weight)
        aims.append(weight)
        found.append(together(mixture.segments))
        return mixture

    monkeypatch.setattr(planner, "_heaviest", recorded)
    frontier = search(meter, objective, target=6)
    assert len(aims) > REFINEMENTS * NEAR and set(aims) == {6}
    assert len(set(found)) > 2 and {s.counts.waited_for for s in found} <= {5, 6}
    known = [meter.costs([schedule], "known")[0].kl for schedule in found]
    chosen = choose(frontier, 6, None)
    assert chosen is not None and chosen.cost.kl == min(known) < max(known)

    aims.clear()
    lightest = frontier.points[0]
    search(meter, objective, max_loss=lightest.cost.loss - 1e-6)
    assert len(aims) >= REFINEMENTS * NEAR and lightest.weight <= aims[0] < 2 * LAYERS

    for most in (None, 99.0):  # within which the lightest is
        aims.clear()
        search(meter, objective, max_loss=most)
        assert not aims


def test_a_time_limit_leaves_a_smaller_frontier(meter: Meter, tmp_path: Path, source: Path) -> None:
    """With what was asked for; one round is searched whatever the limit."""
    whole = search(meter, waited_for(overlap=True), rounds=3, target=5)
    again = make_meter(source, 4, tmp_path / "again.jsonl", (TEXT,), 24, 4)
    short = search(again, waited_for(overlap=True), rounds=3, target=5, seconds=1e-3)
    loose = search(again, waited_for(overlap=True), rounds=3, max_loss=1.0, seconds=1e-3)
    assert short.measured_whole < whole.measured_whole
    assert 1 < len(short.points) <= 4 < len(whole.points)
    chosen = choose(short, 5, None), choose(loose, None, 1.0)
    assert all(point is not None and point.weight < 2 * LAYERS for point in chosen)


def test_choose(meter: Meter) -> None:
    frontier = search(meter, waited_for(overlap=True), rounds=1)
    points = frontier.points
    assert choose(frontier, points[2].weight, None) == points[2]
    assert choose(frontier, 100, None) == points[-1]
    assert choose(frontier, 0, None) is None
    loss = sorted(p.cost.loss for p in points)[3]
    chosen = choose(frontier, None, loss)
    assert chosen is not None and chosen.cost.loss <= loss
    assert all(p.cost.loss > loss for p in points if p.weight < chosen.weight)
    assert choose(frontier, None, -9.0) is None


# The cache


def test_measurements_outlive_an_interruption(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "costs.jsonl"
    screened = 33  # before any mixture
    left = [screened + 5]

    def count_down(_: list[int]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    tell_windows(monkeypatch, count_down)
    with pytest.raises(KeyboardInterrupt):
        search(make_meter(source, 4, file, (TEXT,), 24, 4), waited_for(True), rounds=2)
    assert len(file.read_text().split("\n")) == 1 + screened + 5
    with file.open("ab") as damaged:  # the last by a write that was cut short
        damaged.write(
            b'\n\xff\n["a0! m0!", [[1, "x", 0, 0], [1, NaN, 0, 0]]]\n["a0! m0!", [[1, 0.1'
        )
    left[0] = 10_000
    resumed = search(make_meter(source, 4, file, (TEXT,), 24, 4), waited_for(True), rounds=2)
    lines = [line for line in file.read_bytes().splitlines() if line]
    assert 10_000 - left[0] == len(lines) - 3 - (screened + 5)
    left[0] = 0  # nothing is measured again, and no model opened
    monkeypatch.setattr(sensitivity, "open_model", None)
    again = search(make_meter(source, 4, file, (TEXT,), 24, 4), waited_for(True), rounds=2)
    assert again == resumed


def test_the_cache_is_by_model_text_and_tracks(source: Path, meter: Meter, tmp_path: Path) -> None:
    digest = content_digest(meter.source, quiet)
    other_text = make_meter(source, 4, tmp_path / "x", (Path(__file__),), 24, 4).windows

    def name(digest: str, windows: Windows, tracks: int, dtype: str, device: str) -> str:
        case = Case(meter.source, tracks, windows, dtype, device, meter.batch)
        return store_file(tmp_path, digest, case).name

    names = {
        name(d, w, tracks, dtype, "cpu")
        for d in (digest, "other")
        for w in (meter.windows, other_text)
        for tracks in (2, 4)
        for dtype in ("float32", "bfloat16")
    }
    assert len(names) == 16
    again = make_meter(source, 4, tmp_path / "x", (TEXT,), 24, 4).windows
    assert name(digest, again, 2, "float32", "cpu:0") in names


# The command


def plan(source: Path, tmp_path: Path, *arguments: object, code: int = 0) -> tuple[str, str]:
    cache = ("--cache", tmp_path / "cache", "--rounds", 2)
    return run("plan", source, "--text", TEXT, *SIZE, *cache, *arguments, code=code)


def test_the_spec_goes_through_transform_and_show(source: Path, tmp_path: Path) -> None:
    spec, page, table = (tmp_path / n for n in ("spec.yaml", "frontier.html", "frontier.csv"))
    asked = ("--tracks", 4, "--max-syncs", 5)
    out, _ = plan(source, tmp_path, *asked, "-o", spec, "--frontier", page)
    assert re.search(r"^→ +\d+ ", out, re.MULTILINE)
    assert f"wrote {spec}" in out and f"wrote {page}" in out
    assert list((tmp_path / "cache" / "plan").glob("tracks-*")) == []  # the copy is gone
    figures = json.loads(plan(source, tmp_path, *asked, "--frontier", table, "--json")[0])
    chosen = figures["chosen"]
    assert chosen["waited_for"] <= 5 and chosen in figures["frontier"]
    assert figures["spec"] == spec.read_text()
    assert f"waited for: 12 before, {chosen['waited_for']} after" in figures["spec"]
    wanted = ("--assignment", "affinity", "--guess", 8)
    more = json.loads(plan(source, tmp_path, *asked, *wanted, "--json")[0])["spec"]
    assert more.endswith("\nassignment: affinity\nguess: {rank: 8}\n")
    read = parse_spec(more, "s")
    assert (read.assignment, read.guess) == ("affinity", 8)
    assert len(figures["sensitivities"]) == 2 * LAYERS
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["kl"]) for r in rows] == [p["kl"] for p in figures["frontier"]]
    assert [r["schedule"] for r in rows] == [p["schedule"] for p in figures["frontier"]]
    assert [(str(k.schedule), k.tracks, k.guess, k.kl) for k in read_frontier(table)] == [
        (p["schedule"], 4, 0, p["kl"]) for p in figures["frontier"]
    ]
    plan(source, tmp_path, *asked, "--guess", 8, "--frontier", table)
    assert {known.guess for known in read_frontier(table)} == {8}
    html = page.read_text()
    assert html.count("<svg") > 3 and "Sensitivity of each sublayer" in html
    assert str(read_spec(spec).schedule()) == chosen["schedule"]
    run("transform", source, tmp_path / "converted", "--spec", spec)
    shown = json.loads(run("show", tmp_path / "converted", "--json")[0])
    assert shown["schedule"] == chosen["schedule"]
    assert shown["waited_for"]["after"] == chosen["waited_for"]


def test_it_computes_in_what_is_fast(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptconvert.measure.dtype.fastest_dtype", lambda *_: "bfloat16")
    size = ("--window", 24, "--windows", 2, "--rounds", 1, "--cache", tmp_path / "cache")
    asked = ("--tracks", 4, "--max-syncs", 6, "--json", "--time-limit", 0.01)
    figures = json.loads(run("plan", source, "--text", TEXT, *size, *asked)[0])
    assert figures["dtype"] == "bfloat16" and figures["chosen"]["waited_for"] <= 6
    assert all(0 <= point["kl"] < 10 for point in figures["frontier"])


def test_max_loss_and_no_overlap(source: Path, tmp_path: Path) -> None:
    base = ("--tracks", 2, "--no-overlap", "--json")
    frontier = json.loads(plan(source, tmp_path, *base, "--max-syncs", 12)[0])["frontier"]
    bound = sorted(p["loss_increase"] for p in frontier)[len(frontier) // 2]
    planned = json.loads(plan(source, tmp_path, *base, "--max-loss", max(bound, 0))[0])
    chosen, *both = planned["chosen"], planned["frontier"], frontier
    # it has tried more about what is asked for, and may need fewer
    own, before = ([p for p in some if p["loss_increase"] <= max(bound, 0)] for some in both)
    assert chosen == min(own, key=lambda p: p["waited_for"])
    assert chosen["waited_for"] <= min(p["waited_for"] for p in before)
    assert chosen["all_reduces"] == chosen["waited_for"]


@pytest.mark.parametrize("most", [2, 4, 6])
def test_a_spec_says_what_is_as_in_the_dense_model(most: int, source: Path, tmp_path: Path) -> None:
    """And of a range in the midst of a longer run that its cost is told where that begins."""
    asked = ("--tracks", 4, "--no-overlap", "--max-syncs", most, "--json")
    planned = json.loads(plan(source, tmp_path, *asked)[0])
    stages = planned["chosen"]["schedule"].split()
    ranges = re.findall(r"layers: (\d+)(?:-(\d+))? +# (.*)", planned["spec"])
    assert ranges
    for first, last, said in ranges:
        start, stop = 2 * int(first), 2 * int(last or first) + 2
        entered, own = stages[max(0, start - 1)], stages[start:stop]
        dense = all(stage.endswith("!") for stage in own) and (entered.endswith("!") or not start)
        assert dense == (said == "as the dense model"), (first, last, said, stages)
        begins = (
            stage.endswith(".") and (not place or stages[place - 1].endswith("!"))
            for place, stage in enumerate(stages[start:stop], start)
        )
        assert any(begins) == (said not in ("as the dense model", "in a figure above"))


def test_without_overlap_no_objective_overlaps(source: Path, tmp_path: Path) -> None:
    asked = ("--tracks", 4, "--objective", "latency", "--hardware", "h100-pcie", "--max-loss", 5)
    for overlap, wanted in (("--overlap", True), ("--no-overlap", False)):
        figures = json.loads(plan(source, tmp_path, *asked, overlap, "--json")[0])
        found = [Schedule.parse(row["schedule"]).counts for row in figures["frontier"]]
        assert any(c.waited_for < c.all_reduces for c in found) == wanted


def test_latency_is_the_estimates(source: Path, tmp_path: Path) -> None:
    """Which --hardware alone asks for; the guesses that the spec will have are counted."""
    asked = ("--tracks", 4, "--max-loss", 0.5, "--guess", 8, "--json")
    out, _ = plan(source, tmp_path, *asked, "--hardware", "h100-pcie")
    figures = json.loads(out)
    assert figures["objective"] == "latency"
    times = [p["milliseconds"] for p in figures["frontier"]]
    assert times == sorted(times) and figures["chosen"]["loss_increase"] <= 0.5
    assert figures["frontier"][-1]["schedule"] == str(dense_schedule(LAYERS))
    spec = tmp_path / "spec.yaml"
    spec.write_text(figures["spec"])
    arguments = ("--model", source, "--hardware", "h100-pcie", "--ranks", 4, "--json")
    row = json.loads(run("estimate", spec, *arguments)[0])["rows"][1]
    seconds = 512 / row["tokens_per_second"]
    assert figures["chosen"]["milliseconds"] == pytest.approx(1e3 * seconds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tracks", 3, "--max-syncs", 4), "3"),
        (("--tracks", 4), "--max-syncs"),
        (("--tracks", 4, "--max-syncs", 4, "--max-loss", 0.1), "--max-syncs"),
        (("--tracks", 4, "--max-syncs", 4, "--frontier", "f.png"), ".csv"),
        (("--tracks", 4, "--max-syncs", 4, "-o", "none/spec.yaml"), "in a directory that exists"),
        (("--tracks", 4, "--max-syncs", 4, "-o", TEXT), f"--output {TEXT}: it is read, too"),
        (
            ("--tracks", 4, "--max-syncs", 4, "-o", "a.csv", "--frontier", "a.csv"),
            "--frontier a.csv: it is --output, too; name another file",
        ),
        (("--tracks", 4, "--max-syncs", 4, "--device", "cuda:99"), "--device"),
        (("--tracks", 4, "--max-syncs", 4, "--window", 100_000), "positions"),
        (("--tracks", 4, "--max-syncs", 4, "--objective", "latency"), "--hardware"),
        (("--tracks", 4, "--max-syncs", 4, "--ranks", 2), "--ranks: for latency only"),
        (("--tracks", 4, "--max-syncs", 4, "--hardware", "h100-pcie"), "needs --max-loss X"),
        (
            ("--tracks", 4, "--max-loss", 1, "--objective", "syncs", "--hardware", "h100-pcie"),
            "--hardware: for latency only",
        ),
        (
            ("--tracks", 4, "--max-loss", 1, "--objective", "latency", "--hardware", "none"),
            "none",
        ),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[object, ...],
    message: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, err = plan(source, tmp_path, *arguments, code=2)
    last = err.strip().splitlines()[-1]
    assert last.lower().startswith("error: ") and message in last
    assert not list(tmp_path.iterdir())


def test_other_errors(source: Path, convert: Convert, tmp_path: Path) -> None:
    converted = convert(source, 4, "use: ladder")
    _, err = plan(converted, tmp_path, "--tracks", 4, "--max-syncs", 4, code=2)
    assert "converted already" in err or "can't be converted" in err
    text = tmp_path / "text.bin"
    text.write_bytes(b"\xff\xfe\x00")
    arguments = ("--tracks", 4, "--max-syncs", 4)
    _, err = run("plan", source, "--text", text, *arguments, code=2)
    assert err.startswith("error: ") and "UTF-8" in err


def test_outputs_that_are_not_finite_are_an_error(source: Path, tmp_path: Path) -> None:
    path = shutil.copytree(source, tmp_path / "overflowing")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _, err = plan(path, tmp_path, "--tracks", 4, "--max-syncs", 4, code=2)
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: {path}: its outputs are not all finite in float32")


def test_a_budget_out_of_reach_writes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the dense schedule, which always fits a loss of at least 0."""
    real: Callable[..., Any] = sensitivity.Cost.loss.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(sensitivity.Cost, "loss", property(lambda self: 1 + abs(real(self))))
    spec = tmp_path / "spec.yaml"
    _, err = plan(source, tmp_path, "--tracks", 2, "--max-loss", 0.5, "-o", spec, code=2)
    assert "nothing found fits" in err and not spec.exists()


def test_interrupted_says_where_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "_measure", stop)
    arguments = ["plan", source, "--text", TEXT, "--tracks", 4, "--max-syncs", 4]
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--cache", tmp_path)])
    assert result.exit_code == 130 and f"kept in {tmp_path}" in result.output


# The trained model


@pytest.mark.slow
@pytest.mark.skipif(
    not FIXTURE.is_dir(), reason="shared/fixtures/stdlib-llama is not beside this checkout"
)
def test_layer_0_is_what_the_trained_model_is_sensitive_in(tmp_path: Path) -> None:
    """And the README's planned schedules lose what it says, on text that no plan has seen."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    splits = json.loads((FIXTURE / "splits.json").read_text())
    calibration, dev = (tuple(stdlib / n for n in splits[k]) for k in ("calibration", "dev"))
    few = make_meter(FIXTURE / "model", 4, tmp_path / "few", calibration, 128, 2)
    deferred = [run_of(p, p + 2, BLOCKING) for p in (0, 1, 2, 3, 12, 13)]
    a0, m0, *others = few.alone(deferred, "sensitivities")
    assert a0 > 0.5 and m0 > 3 * max(others) and a0 > 20 * max(others)
    meter = make_meter(FIXTURE / "model", 4, tmp_path / "dev", dev, 256, 24)
    found = meter.costs(map(Schedule.parse, README_LOSSES), "dev")
    assert [c.loss for c in found] == pytest.approx(list(README_LOSSES.values()), abs=1e-4)
