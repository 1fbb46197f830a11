"""`ptconvert estimate`: tables, figures, the report, wrong input."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from estimating import GPT_FAST, H100, LAYERS, ROOT, SCHEDULES, SHAPE, VLLM
from hypothesis import example, given, settings
from test_schedule import schedules

from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.config import converted_config
from ptconvert.checkpoint.section import trained_config
from ptconvert.cli import main
from ptconvert.errors import HardwareError
from ptconvert.estimate.compare import UNCHECKED, Candidate, Setting, compare
from ptconvert.estimate.hardware import (
    Engine,
    engine_names,
    hardware_names,
    read_engine,
    read_hardware,
)
from ptconvert.estimate.model import Workload, reduction, step, vocabulary_seconds
from ptconvert.estimate.report import lane_group, layer_group, to_html
from ptconvert.estimate.roofline import Pass, head_seconds
from ptconvert.estimate.sources import origins
from ptconvert.models.guesses import most_guesses
from ptconvert.models.shape import DTYPES, ModelShape
from ptconvert.schedule.presets import PRESETS
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import read_spec


def run_command(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["estimate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


SPEC = ROOT / "specs" / "llama-3.1-8b-balanced.yaml"
MODEL = ROOT / "specs" / "configs" / "llama-3.1-8b.json"
GIVEN = (SPEC, "--model", MODEL, "--hardware", "l40s-pcie", "--ranks", 8)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_the_table_and_the_figures() -> None:
    out, err = run_command(*GIVEN)
    title = "8x L40S over PCIe, vllm (0.23.0, 2026-06), 8 ranks, batch 1, 1024 + 512 tokens\n"
    assert out.startswith(title) and not err
    assert all(
        word in out for word in ("TTFT", "TPOT", "tokens", "/s", "waited", "64", "22", "1.00")
    )
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


def test_what_the_pages_show_is_what_is_printed() -> None:
    """docs/estimate.md all of it; the README the table and the verdict, and that of another box."""

    def printed(model: str, *more: object) -> list[str]:
        out, _ = run_command("--model", model, "--hardware", *more)
        return [line.rstrip() for line in out.splitlines()]

    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/estimate.md"))
    lines = printed("llama-3.1-70b", "h100-pcie")
    no = printed("llama-3.1-8b", "a100-sxm", "--ranks", 2)
    end = lines.index(next(line for line in lines if line.startswith("estimated")))
    yes, refused = (next(i for i, line in enumerate(x) if "onvert" in line) for x in (lines, no))
    drafted = printed("llama-3.1-70b", "h100-pcie", "--speculate", 3, "--accepted", 1.5)
    assert "\n".join(drafted[1 : drafted.index(next(x for x in drafted if "note" in x))]) in page
    served = printed("llama-3.1-70b", "h100-pcie", "--rate", 3.2)
    begin = next(i for i, x in enumerate(served) if "requests a second," in x)
    second = next(i for i, x in enumerate(served) if x.startswith("note") and i > begin)
    assert "\n".join(served[begin:second]) in page
    note = next(i for i, x in enumerate(served) if "these saturate" in x)
    stop = next(i for i, x in enumerate(served) if x.startswith("estimated"))
    assert "\n".join(served[note:stop]) in page
    load = next(i for i, x in enumerate(served) if x.startswith("As a server"))
    assert "\n".join(served[load:]) in page
    assert "\n".join(lines) in page and "\n".join(lines[:end]) in readme
    assert "\n".join(lines[yes:]) in readme and "\n".join(no[refused:]) in readme


def test_a_whole_vocabulary_gathers_nothing_and_reads_all_of_lm_head() -> None:
    """By the formulas of docs/estimate.md: what is saved is the gathering of logits, what it costs
    is reading lm_head's other shares. Tensor parallelism's is as it was, and nobody all-reduces the
    embeddings of a conversion in vLLM, which has them whole."""
    one, steps, dense = Pass(1, 1, 1024), {}, {}
    for vocabulary in ("sharded", "replicated"):
        options = (*GIVEN, "--vocabulary", vocabulary, "--json")
        (base, ours) = json.loads(run_command(*options)[0])["rows"]
        steps[vocabulary], dense[vocabulary] = ours["tpot_seconds"], base["tpot_seconds"]
    row, engine = read_hardware("l40s-pcie"), read_engine("vllm")
    shape = ModelShape.from_config(json.loads(MODEL.read_text()))
    saved = vocabulary_seconds(shape, row, engine, 8, one)
    embedded = reduction(shape, row, engine, 8, one).blocking.seconds
    assert vocabulary_seconds(shape, row, engine.serving(False), 8, one) == pytest.approx(
        saved + embedded
    )
    whole = read_engine("vllm", "replicated")
    assert not vocabulary_seconds(shape, row, whole, 8, one)
    more = head_seconds(shape, row.device, whole, 8, one) - head_seconds(
        *(shape, row.device, engine, 8, one)
    )
    assert saved > 0 and more > 0
    assert steps["replicated"] - steps["sharded"] == pytest.approx(more - saved, rel=1e-6)
    assert dense["replicated"] == dense["sharded"]


def test_several_specs_and_what_does_not_fit() -> None:
    more = ROOT / "specs" / "llama-3.1-70b-aggressive.yaml"
    config = ROOT / "specs" / "configs" / "llama-3.1-70b.json"
    given = (more, more.with_name("llama-3.1-70b-gentle.yaml"), "--model", config)
    out, _ = run_command(*given, "--hardware", "l40s-pcie", "--ranks", 2)
    assert "can't run" in out.replace("\n", " ") and "gentle" in out.replace("\n", "")


def test_tracks_with_kv_heads_of_their_own_need_more_memory(tmp_path: Path) -> None:
    """16 tracks repeat the 8 KV heads: their weights and cache are twice as large on 8 ranks."""
    spec, config = tmp_path / "tracks.yaml", ROOT / "specs" / "configs" / "llama-3.1-70b.json"
    spec.write_text(
        "format: 1\ntracks: 16\nschedule:\n"
        "  - layers: 0-39\n    use: parallel_track\n    depth: 4\n"
        "  - layers: 40-79\n    use: ladder\n"
    )
    given = (spec, "--model", config, "--hardware", "h100-sxm", "--ranks", 8, "--batch", 700)
    base, ours = json.loads(run_command(*given, "--json")[0])["rows"]
    head = 2 * 128 * 2  # a key's and a value's bytes
    more: float = 40 * head * (700 * 1536 + 8192)  # the cache and the weights of one more head
    more += 128256 * 8192 * 2 * 7 / 8  # and all of the embedding, not an eighth of it
    assert ours["bytes_per_rank"] - base["bytes_per_rank"] == pytest.approx(more)
    out = " ".join(run_command(*given)[0].split())
    assert "tracks needs 86 GB for weights and cache on each rank, which has 80 GB" in out


def test_gpt_oss_is_estimated_as_it_is_published() -> None:
    """MXFP4 in its experts, 4 bits of each number and 8 for every 32, the rest of its 116.83e9 in
    bf16: so 120B fits two H100."""
    given = ("--model", "gpt-oss-120b", "--hardware", "h100-sxm", "--ranks", 2, "--json")
    (base, *_) = json.loads(run_command(*given)[0])["rows"]
    experts = 36 * 128 * 3 * 2880**2
    weights = experts * 4.25 / 8 + (116.83e9 - experts) * 2
    cache = 18 * 2 * 8 * 64 * 2 * (1536 + 128)  # half of the layers keep a window of it
    assert base["bytes_per_rank"] == pytest.approx((weights + cache) / 2, rel=0.01)
    assert base["bytes_per_rank"] < 40e9


def test_notes_and_the_accuracy_say_what_was_not_checked() -> None:
    text = {n: " ".join(run_command(*GIVEN, "--dtype", n)[0].split()) for n in DTYPES}
    assert "served in float32, but the hardware's rate of matrix products" in text["float32"]
    assert "hardware's rate" not in text["bfloat16"] + text["float16"]
    assert UNCHECKED in text["bfloat16"]
    checked = json.loads(run_command(*GIVEN[:4], "h100-sxm", *GIVEN[5:], "--json")[0])
    assert checked["accuracy"] == f"{H100.accuracy}; {VLLM.accuracy}" and H100.accuracy
    fitted = (*GIVEN[:4], "h100-sxm", *GIVEN[5:], "--engine", "gpt-fast", "--json")
    assert json.loads(run_command(*fitted)[0])["accuracy"] == H100.accuracy


def test_the_answer_says_what_is_measured_and_what_is_assumed(tmp_path: Path) -> None:
    """In a line of the terminal, whole in --json, in both ways in the report."""
    file, name = tmp_path / "report.html", "rtx-3090-p2p-off"
    given = (*GIVEN[:4], name, *GIVEN[5:])
    out = " ".join(run_command(*given, "--html", file)[0].split())
    row = read_hardware(name)
    assert f" {origins(row, row.sources)} " in out and "assumed: bandwidth that kernels" in out
    sources = json.loads(run_command(*given, "--json")[0])["sources"]
    assert sources == row.sources.by_kind() and set(sources) == {
        "measured",
        "data_sheet",
        "assumed",
    }
    text = html.unescape(file.read_text())
    assert origins(row, row.sources)[1:] in text
    for kind, texts in sources.items():
        for path, source in texts.items():
            if path != "links.0.one_shot_us":  # there is none
                line = re.search(f">{path}</td>.*?</tr>", text, flags=re.DOTALL)
                assert line and source in line[0] and f">{kind.replace('_', ' ')}<" in line[0]
    engine = json.loads(run_command(*given, "--json")[0])["engine_sources"]
    assert engine == read_engine("vllm").sources.by_kind() and engine["measured"]["step_us"]
    for kind, texts in engine.items():
        for path, source in texts.items():
            line = re.search(f">{path}</td>.*?</tr>", text, flags=re.DOTALL)
            assert line and source in line[0] and f">{kind.replace('_', ' ')}<" in line[0]


def test_the_answer_names_the_all_reduces_of_tensor_parallelism(tmp_path: Path) -> None:
    """Those of a decode step and of a prefill; and what fewer bits on the wire would change."""

    def said(row: str, *more: object) -> list[str]:
        given = ("--model", "llama-3.1-70b", "--hardware", row, "--json", *more)
        return [str(note) for note in json.loads(run_command(*given)[0])["notes"]]

    assert said("h100-sxm") == [
        "tensor_parallel all-reduces by one-shot kernel, fused with the norm (a decode step); in "
        "the switch (a prefill)."
    ]
    assert "tensor_parallel all-reduces by ring." in said("rtx-pro-6000-pcie")[-1]
    assert "one-shot kernel (a decode step)" in said("rtx-pro-6000-pcie", "--ranks", 2)[-1]
    how, fewer = said("mi300x")
    assert "one-shot kernel (a decode step); ring (a prefill)" in how
    (row, engine, shape) = (read_hardware("mi300x"), read_engine("vllm"), SHAPE)
    setting = Setting(
        shape, row, replace(engine, quantised="blocking"), "vllm", 8, Workload(1, 1024, 512)
    )
    (base,) = compare([], setting)
    assert fewer.startswith("With VLLM_ROCM_QUICK_REDUCE_QUANTIZATION=INT4, which changes what is")
    assert f"would have a TTFT of {base.estimate.ttft * 1e3:,.1f} ms" in fewer
    file = tmp_path / "mine.yaml"  # asked for by an engine's file
    text = (ROOT / "ptconvert" / "estimate" / "rows" / "engines" / "vllm.yaml").read_text()
    file.write_text(text.replace("quantised: none", "quantised: blocking"))
    (asked,) = said("mi300x", "--engine", file)
    assert "quantised by VLLM_ROCM_QUICK_REDUCE_QUANTIZATION=INT4 (a prefill)" in asked


def test_fewer_ranks_than_tracks_are_said_to_be_slow() -> None:
    """With what as many tracks as ranks would give, which is what the specs for them give; in one
    note of all. On one rank there is nothing to gain."""
    slow = [SPEC.with_stem(f"llama-3.1-8b-{name}") for name in ("balanced", "aggressive")]
    fast = [path.with_stem(f"{path.stem}-2-ranks") for path in slow]
    specs = (*slow, *fast, SPEC.with_stem("llama-3.1-8b-gentle"))
    config = (*specs, "--model", MODEL, "--hardware", "h100-sxm", "--ranks")
    out = " ".join(run_command(*config, 2)[0].split())
    figures = json.loads(run_command(*config, 2, "--json")[0])
    balanced, aggressive, *more, _ = (
        row["speed_up"]["tokens_per_second"] for row in figures["rows"][1:]
    )
    assert balanced < 0.9 and aggressive < 0.9 and all(speed_up > 1 for speed_up in more)
    said = (
        "Each of 2 ranks runs several tracks one after another, with kernels of their own. With 2 "
        f"tracks the speed-up would be: llama-3.1-8b-balanced {more[0]:.2f}, not {balanced:.2f}; "
        f"llama-3.1-8b-aggressive {more[1]:.2f}, not {aggressive:.2f}."
    )
    assert figures["notes"][0] == said and len(figures["notes"]) == 2
    assert out.count("note:") == 2 and f"note: {said}" in out
    (one,) = json.loads(run_command(*config, 1, "--json")[0])["notes"]
    names = ", ".join(path.stem for path in specs[:4])
    assert one.startswith(f"One rank runs all tracks of {names} one after another")
    assert one.endswith("take the dense checkpoint, which needs no tracks.")
    whole = run_command(SPEC, *config[5:], 8, "--json")[0]
    (how,) = json.loads(whole)["notes"]
    assert how.startswith("tensor_parallel all-reduces by")
    assert "note:" not in run_command(*config[4:], 1)[0]


def test_guesses_of_a_spec_and_of_a_checkpoint_are_counted(tmp_path: Path) -> None:
    """A checkpoint's are those that it has, a spec's all that there can be."""
    spec = tmp_path / "guessing.yaml"
    spec.write_text(SPEC.read_text() + "guess: {rank: 64}\n")
    config = json.loads(MODEL.read_text())
    read, shape = read_spec(spec), ModelShape.from_config(config)
    all_of_them = most_guesses(read.schedule(), 8, 64, shape)
    for name, guesses in (("all", all_of_them), ("one", dict([*all_of_them.items()][:1]))):
        (tmp_path / name).mkdir()
        known = Calibration(values={"guess": guesses})
        section = converted_config(config, read, read.schedule(), "source", known, {})
        (tmp_path / name / "config.json").write_text(json.dumps(section))
    out, _ = run_command(SPEC, spec, tmp_path / "all", tmp_path / "one", *GIVEN[1:], "--json")
    plain, *guessing = json.loads(out)["rows"][1:]
    assert [len(row["guesses"]) for row in guessing] == [42, 42, 1] and plain["guesses"] == {}
    times = [row["tpot_seconds"] - plain["tpot_seconds"] for row in guessing]
    assert times[0] == times[1] == pytest.approx(42 * times[2]) and times[2] > 0
    assert guessing[0]["bytes_per_rank"] - plain["bytes_per_rank"] == 42 * 2 * (3 * 64 + 1) * 4096


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 16}, "other: its layers are 32, and 16 those of the model that is"),
        ({"intermediate_size": 8192}, "other: its neurons are 14336, and 8192 those of the model"),
        ({"quantization_config": FP8}, "other: its weights are quantised otherwise than the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_a_line(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Whose schedule would be estimated with this model's sizes."""
    config, read = json.loads(MODEL.read_text()), read_spec(SPEC)
    section = converted_config(config, read, read.schedule(), "source", Calibration(), {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(section))
    (tmp_path / "model.json").write_text(json.dumps(config | changed))
    on = ("--hardware", "h100-pcie", "--ranks", 8)
    _, err = run_command(tmp_path / "other", "--model", tmp_path / "model.json", *on, code=2)
    assert err.startswith(f"error: {tmp_path}/{said}") and err.count("\n") == 1
    run_command(tmp_path / "other", "--model", MODEL, *on)


def test_a_page_over_a_spec_is_a_line(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.read_text())
    _, err = run_command(spec, *GIVEN[1:], "--html", spec, code=2)
    assert f"--html {spec}: it is read, too; name another file" in err
    assert spec.read_text() == SPEC.read_text()


def test_a_lora_beside_a_checkpoints_weights_is_said_not_to_be_counted(tmp_path: Path) -> None:
    config, read = json.loads(MODEL.read_text()), read_spec(SPEC)
    section = converted_config(config, read, read.schedule(), "source", Calibration(), {})
    for name, own in (("healed", trained_config(section, adapter=True)), ("before", section)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(own))
    out, _ = run_command(tmp_path / "healed", tmp_path / "before", *GIVEN[1:], "--json")
    told = json.loads(out)
    assert [row["lora"] for row in told["rows"]] == [False, True, False]
    (said,) = (note for note in told["notes"] if "LoRA" in note)
    assert said.startswith("healed: the LoRA beside the weights (heal --lora) isn't counted")


def test_the_report_is_whole_and_draws_to_scale(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    run_command(*GIVEN, "--html", file)
    text = file.read_text()
    Balanced().feed(text)
    assert "<script" not in text and "http" not in text and "@media print" in text
    headings = re.findall(r"<h2>(.*?)</h2>", html.unescape(text))
    charts = [f"Speed-up against: {what}" for what in ("link speed", "batch", "ranks")]
    groups = [f"A layer group in a {what}" for what in ("decode step", "prefill")]
    assert headings == [
        *("Result", *groups, "By hand", *charts),
        *("Where the hardware's numbers come from", "Where this is wrong", "Schedules"),
    ]
    assert "cut by rank" in text and UNCHECKED in text
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


@given(schedules())
@example(Schedule.parse("m0|a0!"))
@example(Schedule.parse("m0|a0! a1|m1! m2|a2~1 a3. m3!"))
@settings(max_examples=25)
def test_any_schedule_has_a_report(schedule: Schedule) -> None:
    layers = layer_group(schedule)
    assert set(layers) and set(layers) <= set(range(schedule.layers))
    assert len(layers) >= min(2, schedule.layers - layers.start)
    shape = SHAPE.with_layers(schedule.layers)
    setting = Setting(shape, H100, GPT_FAST, "gpt-fast", 2, Workload(1, 8, 8))
    Balanced().feed(to_html(compare([Candidate("drawn", schedule, 4)], setting), setting))


def test_a_schedules_name_is_text_in_the_report() -> None:
    setting = Setting(SHAPE, H100, GPT_FAST, "gpt-fast", 8, Workload(1, 8, 8))
    named = Candidate("<script>alert(1)</script>", SCHEDULES["ladder"], 8)
    text = to_html(compare([named], setting), setting)
    Balanced().feed(text)
    # in the table, both timelines, every chart's legend and the list of schedules
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


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
        (
            (*GIVEN[:5], "--ranks", 3),
            "--ranks 3: 3 ranks don't divide 32 heads, 8 KV heads and 14336 FFN neurons; possible "
            "are 1, 2, 4, 8 ",
        ),
        ((*GIVEN[:5], "--ranks", 16), "--ranks 16: llama-3.1-8b-balanced has 8 tracks"),
        ((*GIVEN[:3], "--hardware", "abacus", "--ranks", 8), "neither a file nor one of"),
        ((*GIVEN[:3], "--hardware", "4-workstations-10gbe", "--ranks", 8), "at most 4 ranks"),
        ((*GIVEN, "--engine", "steam"), "neither a file nor one of"),
        ((SPEC, "--hardware", "h100-sxm", "--ranks", 8), "needs --model"),
        ((SPEC, "--model", MODEL, "--ranks", 8), "--hardware NAME is missing"),
        ((*GIVEN, "--batch", "1" * 321), "is not in the range"),
        ((*GIVEN, "--new", 2**24 + 1), "is not in the range"),
        ((*GIVEN[:5], "--ranks", "1" * 5000), "is not"),
        (("--measure", "/nowhere/row.yaml", "--ranks", 2), "in a directory that exists"),
        (("--measure", "row.yaml", "--batch", 4), "--measure has no use for --batch; leave it"),
        (("--measure", "row.yaml", "llama-3.1-8b"), "--measure has no use for a SPEC or model;"),
        (("--list", "--hardware", "nope"), "--list has no use for --hardware; leave it out"),
    ],
)
def test_wrong_input_is_a_line(arguments: tuple[object, ...], what: str) -> None:
    _, err = run_command(*arguments, code=2)
    assert what in err.replace("\n", " ") and "Traceback" not in err


def test_listing_and_imports() -> None:
    out, _ = run_command("--list")
    assert "  ptconvert                  2026-11\n" in out
    assert all(name in out for name in (*hardware_names(), *engine_names()))
    listed = json.loads(run_command("--list", "--json")[0])
    assert list(listed["hardware"]) == hardware_names() and "llama-3.1-8b" in listed["models"]
    script = (
        "import sys; from click.testing import CliRunner; from ptconvert.cli import main; "
        f"r = CliRunner().invoke(main, {['estimate', *map(str, GIVEN)]!r}); "
        "assert r.exit_code == 0, r.output; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'scipy', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_ranks_are_as_many_as_the_tracks_can_share() -> None:
    """All that the hardware joins, unless a spec has fewer tracks."""
    spec = ROOT / "specs" / "llama-3.1-8b-balanced-4-ranks.yaml"
    asked = (spec, "--model", "llama-3.1-8b", "--hardware", "h100-pcie")
    out, err = run_command(*asked, "--json")
    assert json.loads(out)["ranks"] == 4
    assert "4 of 8 ranks: they must divide the 4 tracks" in err
    assert "tracks" in run_command(*asked, "--ranks", 8, code=2)[1]


def test_a_setting_needs_ranks_that_the_hardware_joins() -> None:
    engine: Engine = VLLM
    setting = Setting(SHAPE, H100, engine, "vllm", 16, Workload(1, 8, 8))
    with pytest.raises(HardwareError, match="at most 8 ranks"):
        compare([Candidate("ladder", SCHEDULES["ladder"], 16)], setting)
