"""Whether to convert: the ways to serve a model against each other, and what the verdict says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from estimating import H100, ROOT, SHAPE, VLLM
from hypothesis import given, settings
from hypothesis import strategies as st

from ptconvert.cli import main
from ptconvert.estimate.advice import WORTH, Advice, Way, advise, recipes, verdict
from ptconvert.estimate.alternatives import Served, group_sizes, named, pipeline, replicas
from ptconvert.estimate.collective import point_to_point
from ptconvert.estimate.compare import Setting, compare, faster
from ptconvert.estimate.hardware import Link, Protocol, to_yaml
from ptconvert.estimate.model import Workload, estimate, step, vocabulary_seconds
from ptconvert.estimate.roofline import Pass, head_seconds, rank_bytes
from ptconvert.estimate.sources import Sources
from ptconvert.plan.frontier import to_csv
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.recipes import RECIPES

GAINS = ("ttft", "tpot", "tokens_per_second")
CONFIGS = ROOT / "specs" / "configs"
LINK = Link(
    name="wire",
    ranks=2,
    base_us=5,
    algorithm="ring",
    protocols=(Protocol(step_us=2, gb_s=10), Protocol(step_us=9, gb_s=20)),
)
SLOW = replace(LINK, ranks=4, base_us=50, protocols=(Protocol(step_us=30, gb_s=1),))


def run_command(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["estimate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.stdout.split()), " ".join(result.stderr.split())


def figures(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_command(*arguments, "--json")[0])
    return found


def setting(batch: int, *, ranks: int = 4, layers: int = 10, step_us: float = 620) -> Setting:
    """A model of 10 layers on 2 pairs of devices, with a slow link between the pairs."""
    hardware = replace(H100, links=(LINK, SLOW))
    shape = SHAPE.with_layers(layers)
    workload = Workload(batch, 100, 21)
    return Setting(
        shape, hardware, replace(VLLM, step_us=step_us, request_us=3e6), "vllm", ranks, workload
    )


def test_a_transfer_goes_over_the_innermost_link_that_joins_the_two() -> None:
    """5 + 2 us and 10 GB/s within a pair, or 5 + 9 us and 20 GB/s where that is faster."""
    small, large = (point_to_point(n, 0, 1, [LINK, SLOW]) for n in (1e3, 1e9))
    assert (small.fixed, small.moving) == pytest.approx((7e-6, 1e3 / 10e9))
    assert (large.fixed, large.moving) == pytest.approx((14e-6, 1e9 / 20e9))
    between = point_to_point(1e3, 1, 2, [LINK, SLOW])
    assert (between.fixed, between.moving) == pytest.approx((80e-6, 1e3 / 1e9))


def test_a_pipeline_by_hand() -> None:
    """7 requests on 4 devices: 4 groups of 2. The 10 layers are shared 3, 3, 2, 2 and lm_head; a
    group's stream crosses a fast link, the slow one and a fast one, its tokens the slow one back.
    """
    for step_us in (0.0, 1e5):  # where the slowest stage has most layers, and where it is the last
        s = setting(7, step_us=step_us)
        seen = {}
        for what, one in (("prefill", Pass(2, 100, 0, 121)), ("decode", Pass(2, 1, 110, 121))):
            device = s.hardware.device
            whole = step(dense_schedule(10), s.shape, s.hardware, s.engine, 1, one).seconds
            head = head_seconds(s.shape, device, s.engine, 1, one)
            stream = 2 * one.tokens * 8192 * 2
            within = min(7e-6 + stream / 10e9, 14e-6 + stream / 20e9)
            sent = 2 * within + 80e-6 + stream / 1e9 + (80e-6 + 8 / 1e9)
            slowest = max(3 * (whole - head) / 10, 2 * (whole - head) / 10 + head)
            assert (slowest > whole / 2) is (step_us > 0)
            seen[what] = (whole + sent, slowest)
        ttft = seen["prefill"][0] + 3 * seen["prefill"][1] + 3
        tpot = max(seen["decode"][0], 4 * seen["decode"][1])
        found = pipeline(s)
        assert (found.ttft, found.tpot) == pytest.approx((ttft, tpot))
        assert found.tokens_per_second == pytest.approx(7 * 21 / (ttft + 20 * tpot))


def test_a_stage_holds_its_layers_one_matrix_of_the_vocabulary_and_all_requests() -> None:
    s = setting(7)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    cache = 7 * 121 * 2 * 1024
    kept = pipeline(s).memory
    assert kept == pytest.approx(2 * (3 * (layer + cache) + 128256 * 8192), rel=1e-4)
    whole = rank_bytes(s.shape, s.engine, 1, s.workload.decode)
    assert whole / 4 < kept < whole / 2


@pytest.mark.parametrize(("batch", "each"), [(1, 1), (4, 1), (7, 2), (64, 16)])
def test_replicas_by_hand(batch: int, each: int) -> None:
    """Each of 4 devices is the whole model for its share; a request waits for nobody else's."""
    s = setting(batch)
    one = estimate(
        dense_schedule(10), s.shape, s.hardware, s.engine, 1, replace(s.workload, batch=each)
    )
    found = replicas(s)
    assert (found.ttft, found.tpot, found.memory) == (one.ttft, one.tpot, one.memory)
    assert found.tokens_per_second == pytest.approx(batch * 21 / (one.ttft + 20 * one.tpot))


@given(st.integers(1, 64), st.floats(1, 1e3), st.sampled_from([2, 3, 4]), st.integers(1, 12))
@settings(max_examples=60)
def test_a_pipeline_is_no_faster_than_its_device_and_its_links(
    batch: int, times: float, ranks: int, layers: int
) -> None:
    s = setting(batch, ranks=ranks, layers=layers)
    found, slower = (
        pipeline(replace(s, hardware=h)) for h in (s.hardware, faster(s.hardware, 1 / times))
    )
    assert slower.ttft >= found.ttft and slower.tpot >= found.tpot
    alone = replicas(s)  # the same groups, each on a device of its own
    assert alone.ttft < found.ttft and alone.tpot < found.tpot
    assert found.tokens_per_second < alone.tokens_per_second and math.isfinite(slower.ttft)
    assert found.memory < alone.memory or layers == 1


AS_IT_IS = {
    "tensor_parallel": "tensor parallel as it is",
    "pipeline": "as it is, in pipeline stages of one device each",
    "replicas": "as it is, in replicas of one device each",
}


def test_groups_that_are_tensor_parallel_within() -> None:
    """7 requests on 2 pairs: 2 crowds of 4, each through 5 of 10 layers on each pair. The stream
    crosses the slow link once, the tokens once back."""
    s = setting(7)
    assert group_sizes(s) == [1, 2] and group_sizes(setting(7, ranks=1)) == []
    three = replace(LINK, ranks=3)  # pairs would lie across what joins threes
    across = replace(s.hardware, links=(three, replace(SLOW, ranks=6)))
    assert group_sizes(replace(s, hardware=across, ranks=6)) == [1]
    assert [named("pipeline", g, 4) for g in (1, 2)] == ["pipeline", "pipeline 2x2"]
    engine, seen = s.engine.serving(False), {}
    for what, one in (("prefill", Pass(4, 100, 0, 121)), ("decode", Pass(4, 1, 110, 121))):
        whole = step(dense_schedule(10), s.shape, s.hardware, s.engine, 2, one).seconds
        on = (s.hardware.device, engine, 2, one)
        head = head_seconds(s.shape, *on) + vocabulary_seconds(s.shape, s.hardware, *on[1:])
        sent = 80e-6 + 4 * one.tokens * 8192 * 2 / 1e9 + (80e-6 + 16 / 1e9)
        seen[what] = (whole + sent, (whole - head) / 2 + head)
    found = pipeline(s, 2)
    ttft = seen["prefill"][0] + seen["prefill"][1] + 3
    tpot = max(seen["decode"][0], 2 * seen["decode"][1])
    assert (found.ttft, found.tpot) == pytest.approx((ttft, tpot))
    assert found.tokens_per_second == pytest.approx(7 * 21 / (ttft + 20 * tpot))
    on_a_pair = estimate(
        *(dense_schedule(10), s.shape, s.hardware, s.engine, 2, replace(s.workload, batch=4))
    )
    shared = replicas(s, 2)
    assert (shared.ttft, shared.tpot, shared.memory) == (
        *(on_a_pair.ttft, on_a_pair.tpot, on_a_pair.memory),
    )
    assert shared.tokens_per_second == pytest.approx(on_a_pair.tokens_per_second * 7 / 4)
    assert found.memory < pipeline(s).memory < shared.memory


def ways(**rates: float | tuple[float, float]) -> Advice:
    """Advice on ways of these tokens/s, as asked and with 8 at once (0: no room for them)."""
    found = []
    for name, value in rates.items():
        rate, many = value if isinstance(value, tuple) else (value, 8 * value)
        asked, crowded = (
            Served(1 / r, 1 / r, r, 1e9) if r else Served(1, 1, 1, 9e9) for r in (rate, many)
        )
        found.append(
            Way(name, AS_IT_IS.get(name, ""), "", None, asked, crowded, rate > 0, many > 0)
        )
    return Advice(tuple(found), 1, 8)


def test_the_threshold_is_the_least_gain_that_is_worth_it() -> None:
    enough, short = (ways(tensor_parallel=100, gentle=90, x=100 * (1 + g)) for g in (0.05, 0.0499))
    assert WORTH == 0.05 and [w.name for w in enough.worth] == ["x"] and not short.worth
    assert verdict(enough).startswith("Convert with x: 5% faster prefill, 5% faster decode, 5% ")
    assert verdict(short) == (
        "Don't convert: the best schedule, x, gains 4.9% over tensor_parallel (5% faster prefill, "
        "5% faster decode), and 5% is the least that is worth it. Serve it tensor parallel as it "
        "is."
    )
    assert enough.to_json()["gains"] == pytest.approx(dict.fromkeys(GAINS, 0.05))
    assert (enough.to_json()["convert"], short.to_json()["convert"]) == (True, False)


def test_the_fastest_way_that_needs_no_conversion_is_what_a_schedule_must_beat() -> None:
    """Were it tensor parallelism's 100, x would gain 20%."""
    found = ways(tensor_parallel=100, x=120, pipeline=50, replicas=130)
    assert not found.worth and found.to_json()["instead"] == "replicas"
    assert verdict(found).startswith("Don't convert: the best schedule, x, is 7.7% slower than rep")
    assert verdict(found).endswith("Serve it as it is, in replicas of one device each.")
    full = ways(tensor_parallel=100, x=120, pipeline=50, replicas=0)
    assert full.worth and full.to_json()["instead"] == "tensor_parallel"
    assert full.to_json()["ways"][3]["fits"] is False


def test_all_schedules_that_are_worth_it_are_named() -> None:
    found = ways(tensor_parallel=100, gentle=106, balanced=130, aggressive=150, other=104)
    assert "Convert with aggressive: 50% faster" in verdict(found)
    assert "Also worth it: balanced, 30%; gentle, 6%. What" in verdict(found)
    assert found.to_json()["worth_it"] == ["aggressive", "balanced", "gentle"]


def test_many_requests_at_once_may_have_another_way() -> None:
    """Where it gains enough there; of schedules, where they gain enough over the others."""
    busy = ways(tensor_parallel=(100, 400), x=(120, 500), replicas=(50, 800))
    assert verdict(busy).endswith(
        "For 8 requests at once take replicas: 800 tokens/s, where x has 500."
    )
    little = ways(tensor_parallel=(100, 400), x=(120, 500), replicas=(50, 520))
    assert "at once" not in verdict(little)
    grown = ways(tensor_parallel=(100, 400), x=(104, 500), replicas=(50, 450))
    assert verdict(grown).startswith("Don't convert for one request at a time: the best schedule")
    assert verdict(grown).endswith(
        "For 8 requests at once convert with x: 500 tokens/s, where tensor_parallel has 400."
    )
    close = ways(tensor_parallel=(100, 400), x=(104, 410), replicas=(50, 405))
    assert "Don't" in verdict(close) and "at once" not in verdict(close)
    room = ways(tensor_parallel=(100, 0), x=(120, 0), pipeline=(50, 60))
    assert verdict(room).endswith(
        "take pipeline: 60 tokens/s, where x has no room for their cache."
    )
    none = ways(tensor_parallel=(100, 0), x=(120, 0))
    assert "at once" not in verdict(none)


def test_what_does_not_fit_is_not_advised() -> None:
    assert verdict(ways(tensor_parallel=100, x=0)).startswith("Don't convert: no schedule fits")
    gone = ways(tensor_parallel=0, x=0)
    assert verdict(gone) == "Nothing serves it here: weights and cache take 9 GB or more of a rank."
    assert gone.to_json()["convert"] is False and gone.to_json()["gains"] is None


def test_a_small_model_over_nvlink_is_not_worth_it() -> None:
    """Two ranks' all-reduces are 4% of a decode step there; the same question over PCIe is."""
    common = ("--model", "llama-3.1-8b", "--hardware")
    said = figures(*common, "a100-sxm", "--ranks", 2)["verdict"]
    assert said["convert"] is False and said["worth_it"] == []
    assert 0 < said["gains"]["tokens_per_second"] < said["threshold"] == WORTH
    assert said["instead"] == "tensor_parallel"
    out, _ = run_command(*common, "a100-sxm", "--ranks", 2)
    assert out.endswith(said["text"]) and said["text"].startswith("Don't convert")


def test_over_pcie_without_peer_to_peer_it_is() -> None:
    found = figures("--model", "llama-3.1-8b", "--hardware", "rtx-pro-6000-p2p-off")
    said, rows = found["verdict"], {row["name"]: row for row in found["rows"]}
    assert found["ranks"] == 8 and {row["tracks"] for row in rows.values()} == {8}
    assert list(rows) == ["tensor_parallel", "gentle", "balanced", "aggressive"]
    assert said["convert"] is True and said["worth_it"] == ["aggressive", "balanced", "gentle"]
    assert [way["name"] for way in said["ways"]] == [*rows, "pipeline 2x4", "replicas 2x4"]
    # a request at a time is better off with half of the ranks, and that is what must be beaten
    assert said["instead"] == "replicas 2x4"
    best, half = (way["tokens_per_second"] for way in (said["ways"][3], said["ways"][-1]))
    assert said["gains"]["tokens_per_second"] == pytest.approx(best / half - 1)
    assert best / half < rows["aggressive"]["speed_up"]["tokens_per_second"]
    assert said["requests_at_once"] == 8
    out, _ = run_command("llama-3.1-8b", "--hardware", "rtx-pro-6000-p2p-off")
    assert out.endswith(said["text"]) and "layers: 2-31, use: parallel_track, depth: 4" in out
    for way in said["ways"][-2:]:
        line = f"{way['name']} 0 0 {way['ttft_seconds'] * 1e3:.1f} {way['tpot_seconds'] * 1e3:.2f}"
        assert line in out


def test_many_small_requests_want_replicas() -> None:
    said = figures("llama-3.2-1b", "--hardware", "h100-pcie", "--batch", 128)["verdict"]
    assert said["convert"] is False and said["instead"] == "replicas 4x2"


def test_replicas_need_the_whole_model_on_a_device(tmp_path: Path) -> None:
    given = ("llama-3.1-405b", "--hardware", "2x8-h100-sxm-ib400", "--html", tmp_path / "page.html")
    out, _ = run_command(*given)
    note = "replicas 2x8 would need 102 GB for weights and cache on each rank, which has 80 GB."
    page = (tmp_path / "page.html").read_text()
    assert f"note: {note}" in out and note in page
    assert "Convert with aggressive (layers: 2-125, use: parallel_track" in page
    assert "tokens/s, 16 at once" in page
    ways = {way["name"]: way for way in figures(*given[:3])["verdict"]["ways"]}
    assert not ways["replicas 2x8"]["fits"] and ways["pipeline 2x8"]["fits"]
    assert "pipeline" not in ways  # of 16 stages: slower, for one request and for many
    nothing, _ = run_command("llama-3.1-70b", "--hardware", "l40s-pcie", "--ranks", 2)
    assert nothing.endswith("weights and cache take 71 GB or more of a rank.")


def test_one_rank_has_nothing_to_save() -> None:
    found = figures("llama-3.1-8b", "--hardware", "h100-pcie", "--ranks", 1)["verdict"]
    assert found["convert"] is False and len(found["ways"]) == 4
    assert found["gains"]["tokens_per_second"] == pytest.approx(0, abs=1e-9)
    assert found["text"] == (
        "Don't convert: one rank has no all-reduce to save. Serve it as it is."
    )


def test_a_model_is_named_in_any_of_the_ways() -> None:
    """By a name of the package, its file or as the only argument; what is here goes first."""
    at = ("--hardware", "h100-pcie", "--json")
    config = CONFIGS / "qwen3-8b.json"
    said = [run_command(*given, *at)[0] for given in (("--model", "qwen3-8b"), ("--model", config), (config,), ("qwen3-8b",))]  # fmt: skip # noqa: E501
    assert len(set(said)) == 1
    with CliRunner().isolated_filesystem():
        Path("qwen3-8b").mkdir()
        Path("qwen3-8b", "config.json").write_text((CONFIGS / "qwen3-0.6b.json").read_text())
        other = run_command("--model", "qwen3-8b", *at)[0]
        assert other != said[0] and other == run_command("qwen3-8b", *at)[0]


def test_every_recipe_suits_ranks_that_divide_the_model() -> None:
    s = setting(1, ranks=4)
    found = advise(compare(recipes(s), s), s)
    assert [w.name for w in found.ways if w.converts] == ["gentle", "balanced", "aggressive"]
    assert found.crowd == 4


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--hardware", "h100-sxm"), "--model SRC is missing"),
        (("--model", "qwen2.5-7b"), "--hardware NAME is missing"),
        (
            ("--model", "qwen2.5-7b", "--hardware", "h100-sxm", "--ranks", "8"),
            "--ranks 8: 8 ranks don't divide 28 heads, 4 KV heads and 18944 FFN neurons; possible "
            "are 1, 2, 4",
        ),
        (("qwen2.5-8b", "--hardware", "h100-sxm"), "nor one of gemma-4-31b, "),
        (("nowhere.yaml", "--model", "qwen3-8b", "--hardware", "h100-sxm"), "no such file"),
        (("nowhere.yaml", "--hardware", "h100-sxm"), "a spec file needs --model SRC"),
    ],
)
def test_wrong_input_is_a_line(arguments: tuple[object, ...], what: str) -> None:
    _, err = run_command(*arguments, code=2)
    assert what in err and "Traceback" not in err


def test_a_box_without_links_has_no_ranks_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(to_yaml(replace(H100, links=(), sources=Sources(), name="one H100")))
    _, err = run_command("llama-3.1-8b", "--hardware", file, code=2)
    assert err == ("error: one H100 has no link that joins ranks: add one to it, or say --ranks 1")
    assert figures("llama-3.1-8b", "--hardware", file, "--ranks", 1)["ranks"] == 1


def test_of_a_box_as_many_ranks_as_the_model_can_be_shared_among() -> None:
    out, err = run_command("--model", "qwen2.5-7b", "--hardware", "h100-sxm", "--json")
    assert json.loads(out)["ranks"] == 4
    assert err.startswith("4 of 8 ranks: 8 tracks don't divide 28 heads")


def test_fewer_tracks_are_named_where_they_would_be_worth_it() -> None:
    """Four tracks on each rank lose what one on each would gain."""
    spec, row = ROOT / "specs" / "llama-3.1-8b-balanced.yaml", "rtx-pro-6000-p2p-off"
    out, _ = run_command(spec, "--model", "llama-3.1-8b", "--hardware", row, "--ranks", 2)
    gain = re.search(r"llama-3.1-8b-balanced with a track for each rank would gain (\d+)%", out)
    assert "Don't convert" in out and gain and 5 <= int(gain[1]) < 20
    assert "%: convert it so, or serve it tensor parallel as it is." in out


@pytest.fixture
def frontier(tmp_path: Path) -> Path:
    """What a plan wrote: the model's own schedule, and two that wait less, for 8 tracks."""
    schedules = (dense_schedule(32), *(RECIPES[i].schedule(32) for i in (1, 2)))
    file = tmp_path / "frontier.csv"
    rows = [
        {"tracks": 8, "guess_rank": 0, "kl": kl, "schedule": str(schedule)}
        for kl, schedule in zip((0.0, 0.0123, 0.4567), schedules, strict=True)
    ]
    file.write_text(to_csv(rows))
    return file


def test_a_frontier_is_tried_with_what_it_costs(frontier: Path) -> None:
    asked = (frontier, "--model", "llama-3.1-8b", "--hardware", "h100-pcie")
    found = figures(*asked)
    names = ["tensor_parallel", "frontier-22", "frontier-5"]
    assert [row["name"] for row in found["rows"]] == names
    assert [row["kl"] for row in found["rows"]] == [None, 0.0123, 0.4567]
    out, _ = run_command(*asked)
    best = "Convert with frontier-5 (of frontier.csv, with 5 waits): "
    assert best in out and "frontier-5 costs KL 0.4567 before any training." in out
    assert re.search(r"Also worth it: frontier-22, \d+% for KL 0\.0123\.", out)
    assert re.search(r"frontier-22 22 22 0\.0123", out)  # in a column of its own
    assert "KL" not in run_command("llama-3.1-8b", *asked[3:])[0]


def test_the_guesses_of_a_frontier_take_their_time(frontier: Path) -> None:
    asked = (frontier, "--model", "llama-3.1-8b", "--hardware", "h100-pcie")
    without = figures(*asked)["rows"][1]
    frontier.write_text(frontier.read_text().replace("8,0,", "8,64,"))
    guessing = figures(*asked)["rows"][1]
    assert set(guessing["guesses"].values()) == {64} and not without["guesses"]
    assert guessing["tpot_seconds"] > 1.02 * without["tpot_seconds"]


def test_schedules_that_wait_as_often_have_names_of_their_own(frontier: Path) -> None:
    lines = frontier.read_text().splitlines(keepends=True)
    frontier.write_text("".join([*lines, lines[2]]))
    found = figures(frontier, "--model", "llama-3.1-8b", "--hardware", "h100-pcie")
    names = [row["name"] for row in found["rows"]]
    assert names[1:] == ["frontier-22", "frontier-5", "frontier-22-2"]


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("tracks,", "ranks,", "it has no column tracks; write it with `ptconvert plan --frontier`"),
        ("0,0.0123", "0,little", ":3: tracks is 8, guess_rank 0, kl little; they must be numbers"),
        ("0,0.0123", "0,nan", "kl nan; they must be numbers, 1, 0 and 0 at least"),
        ("8,0,0.0123", "0,0,0.0123", "tracks is 0"),
        ("8,0,0.0123", f"{10**26},0,0.0123", "tracks at most 1024 and ranks 4096"),
        ("8,0,0.0123", "64,0,0.0123", "64 tracks don't divide 32 heads"),
        (",0.0123,", ",", ":3: tracks is 8, guess_rank 0, kl "),
        ("a0! m0! a1! m1!", "x" * 200_000, "can't be read as CSV in UTF-8: field larger than"),
        ("m31", "m31!", ":2: "),
    ],
)
def test_what_is_no_frontier(frontier: Path, old: str, new: str, what: str) -> None:
    frontier.write_text(frontier.read_text().replace(old, new, 1))
    asked = (frontier, "--model", "llama-3.1-8b", "--hardware", "h100-pcie")
    assert what in run_command(*asked, code=2)[1]


def test_another_models_frontier_is_refused(frontier: Path) -> None:
    at = ("--hardware", "h100-pcie")
    said = run_command(frontier, "--model", "llama-3.1-70b", *at, code=2)[1]
    assert "its schedules have 32 layers, the model 80" in said
    assert "needs --model SRC" in run_command(frontier, *at, code=2)[1]
