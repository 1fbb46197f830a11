"""FarSkip against a literal reference of its definition."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Convert, MakeDense, load, spec_text
from reference import ended, layer_inputs, parts, reference_logits
from test_mixture_parts import SHARED, TRACKED, apart, logits
from test_modeling import TOLERANCE, left_padded
from test_transform import back, same, tensors
from test_verify import expected_of, job, run_many

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.cli import main
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import ConfigError, ScheduleError, SpecError
from ptconvert.measure.opening import is_dense, open_model
from ptconvert.models.mixtures import divisible_layers
from ptconvert.models.shape import ModelShape
from ptconvert.report.html_schedule import schedule_diagram
from ptconvert.runtime.launch import launch
from ptconvert.schedule.presets import dense_schedule, farskip
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.theirs import from_farskip
from ptconvert.spec.document import parse_spec, read_spec
from ptconvert.verify.run import _checks

FARSKIP = "use: farskip"
# FarSkip's keys in config.json.
KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"attn_only_farskip": True},
    "mlp": {"mlp_only_farskip": True},
    "middle": {"farskip_start_idx": 2, "farskip_end_idx": 3},
    "rest": {"farskip_start_idx": 3, "farskip_end_idx": 1e4},
}


def shared_of(mlp: Any, x_BSD: torch.Tensor) -> torch.Tensor:
    """What the experts give that all tokens go to."""
    if hasattr(mlp, "shared_experts"):
        found: torch.Tensor = mlp.shared_experts(x_BSD)
        return found
    gate_BS1: torch.Tensor = torch.sigmoid(mlp.shared_expert_gate(x_BSD))
    weighed_BSD: torch.Tensor = gate_BS1 * mlp.shared_expert(x_BSD)
    return weighed_BSD


@torch.no_grad()
def farskip_logits(
    model: Any,
    start: int = 0,
    end: float = 1e4,
    attention_only: bool = False,
    mlp_only: bool = False,
) -> torch.Tensor:
    """FarSkip's equations on a dense model, layer by layer, as FarSkipDecoderLayer of
    amd/Instella-MoE-16B-A3B-Think has them: beside the stream R there is A, without the last
    layer's routed experts. With u the sublayers' outputs and S the shared experts',

        attention reads A, the MLP reads R;  R' = R + u_a + u_m;  A' = R + u_a + S
    """
    ids_BS, keep_BS = left_padded()
    positions = (keep_BS.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids_BS, "attention_mask": keep_BS, "position_ids": positions}
    r_BSD, contexts, _ = layer_inputs(model, given)
    a_BSD = r_BSD
    for index, (layer, context) in enumerate(
        zip(model.get_decoder().layers, contexts, strict=True)
    ):
        skips = start <= index <= end
        norm, attention, _ = parts(layer, "a")
        x_BSD = norm(a_BSD if skips and not mlp_only else r_BSD)
        if hasattr(attention, "conv1d"):
            out_BSD = attention(x_BSD, None, context["attention_mask"])
        else:
            out_BSD = attention(hidden_states=x_BSD, **context)[0]
        after_BSD = r_BSD + out_BSD
        y_BSD = layer.post_attention_layernorm(r_BSD if skips and not attention_only else after_BSD)
        r_BSD = after_BSD + layer.mlp(y_BSD)
        a_BSD = r_BSD
        if hasattr(layer.mlp, "experts"):
            a_BSD = after_BSD + shared_of(layer.mlp, y_BSD)
    return ended(model, r_BSD)


@pytest.mark.parametrize("tracks", [1, 2, 4])
@pytest.mark.parametrize("variant", SHARED)
def test_farskip_is_as_defined(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert
) -> None:
    """In a prefill and in cached steps, for every number of tracks, which all read the same."""
    source = make_dense(variant)
    model, expected = load(convert(source, tracks, FARSKIP)), farskip_logits(load(source))
    assert not model.model.layers.schedule.track_layers
    assert apart(logits(model), expected) < TOLERANCE
    assert apart(logits(model, 7), expected) < TOLERANCE
    assert apart(expected, logits(load(source))) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("changed", "to"),
    [("a3~2", "a3~1"), ("a3~2", "a3!"), ("s3~1", "s3!"), ("r3~1", "r3!"), ("r3~1", "r3~2")],
)
def test_negative_controls(changed: str, to: str, make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("deepseek_v3")
    text = str(schedule_for(source))
    assert text.count(changed) == 1
    other = load(convert(source, 2, f"stages: '{text.replace(changed, to)}'"))
    assert apart(logits(other), farskip_logits(load(source))) > 20 * TOLERANCE


def schedule_for(source: Path) -> Schedule:
    """FarSkip of a checkpoint's model."""
    return Schedule(farskip(range(6), divisible=divisible_layers(read_config(source), 6)))


@pytest.mark.parametrize("which", KEYS)
@pytest.mark.parametrize("variant", ["deepseek_v3", "qwen3_next"])
def test_a_config_of_theirs_opens_and_converts(
    variant: str, which: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """A checkpoint whose config.json says `farskip` runs so where it is opened, and converts
    without a spec."""
    keys = KEYS[which]
    theirs = make_dense(variant, farskip=True, **keys)
    expected = farskip_logits(
        load(make_dense(variant)),
        keys.get("farskip_start_idx", 0),
        keys.get("farskip_end_idx", 1e4),
        keys.get("attn_only_farskip", False),
        keys.get("mlp_only_farskip", False),
    )
    checkpoint = open_checkpoint(theirs)
    assert not is_dense(checkpoint)
    opened = open_model(checkpoint, "float32", "cpu")
    assert apart(logits(opened), expected) < TOLERANCE
    execute(plan_conversion(checkpoint, None, source_name="theirs"), tmp_path / "ours")
    assert apart(logits(load(tmp_path / "ours"), 7), expected) < TOLERANCE
    spec = (tmp_path / "ours" / "ptconvert.yaml").read_text()
    assert "farskip in the source's config.json" in spec
    assert same(tensors(back(tmp_path / "ours", tmp_path / "again")), tensors(theirs))
    assert read_config(tmp_path / "again")["farskip"] is True
    if which == "all":  # which the preset is
        schedule = opened.model.layers.schedule
        assert schedule == schedule_for(theirs)
        with pytest.raises(SpecError, match=r"runs a schedule already \(farskip in its config"):
            plan_conversion(checkpoint, parse_spec(spec_text(2, FARSKIP), "s"), source_name="s")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"farskip": 1}, "farskip is 1; it must be true or false"),
        ({"attn_only_farskip": "no"}, "attn_only_farskip is 'no'; it must be true or false"),
        ({"farskip_end_idx": 2.5}, "farskip_end_idx is 2.5; it must be the number of a layer"),
        ({"farskip_start_idx": None}, "farskip_start_idx is None; it must be the number"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(why)) as error:
        from_farskip({"farskip": True, **keys}, 3, {1, 2})
    assert "\n" not in str(error.value)


def config_of(**changed: Any) -> dict[str, Any]:
    """A config.json of DeepSeek-V3's."""
    return {"model_type": "deepseek_v3", "num_hidden_layers": 6, **changed}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (config_of(model_type="mixtral", farskip=True), "no layer is a mixture with shared"),
        (config_of(first_k_dense_replace=6, farskip=True), "no layer is a mixture with shared"),
        (config_of(farskip=True, ladder_layers=2), "ladder_layers and farskip say two schedules"),
    ],
)
def test_configs_that_say_no_schedule(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ScheduleError, match=why):
        read_section(config)
    assert read_section(config_of(farskip=False)).schedule == dense_schedule(6)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (
            {"gated_attention": True, "architectures": ["InstellaMoEForCausalLM"]},
            "deepseek_v3 with gated_attention True can't be converted: what its heads give goes",
        ),
        ({"model_type": "laneformer_tp"}, "laneformer_tp can't be converted: its lanes are never"),
        ({"model_type": "laneformer"}, "laneformer can't be converted: its lanes are never merged"),
    ],
)
def test_what_no_schedule_says_is_refused_by_name(changed: dict[str, Any], why: str) -> None:
    config = {"auto_map": {"AutoModel": "modeling.Model"}, **config_of(**changed)}
    with pytest.raises(ConfigError, match=why) as error:
        ModelShape.from_config(config)
    assert "\n" not in str(error.value)


def test_ranks_give_what_one_process_does(make_dense: MakeDense, convert: Convert) -> None:
    """Real all-reduces, as many as the schedule says, of FarSkip and of parts on tracks."""
    paths = [
        convert(make_dense("deepseek_v3"), 2, FARSKIP),
        convert(make_dense("qwen3_5_moe_text"), 2, f"stages: '{TRACKED}'"),
    ]
    by_rank = launch(run_many, [job(path) for path in paths], 2, "gloo", "cpu", 300)
    for index, path in enumerate(paths):
        expected, results = expected_of(path), [r["results"][index] for r in by_rank]
        failed = [check for check in _checks(results, expected) if not check.ok]
        assert not failed, failed
        counts = expected.schedule.counts
        assert all(len(r["counted"]["prefill"]) == counts.all_reduces for r in results)


def test_counts(make_dense: MakeDense) -> None:
    schedule = schedule_for(make_dense("deepseek_v3"))
    assert str(schedule) == (
        "a0|m0! a1~2 s1~1 r1~1 a2~2 s2~1 r2~1 a3~2 s3~1 r3~1 a4~2 s4~1 r4~1 a5~1 m5!"
    )
    assert (schedule.counts.all_reduces, schedule.counts.waited_for) == (15, 2)
    assert schedule.divided == {1, 2, 3, 4}


def test_the_example() -> None:
    root = Path(__file__).parents[1]
    spec = read_spec(root / "examples" / "farskip.yaml")
    shape = ModelShape.from_config(read_config(root / "specs" / "configs" / "qwen3.6-35b-a3b.json"))
    spec.check(shape)
    counts = spec.schedule(shape.family.parallel, shape.divisible).counts
    assert (counts.all_reduces, counts.waited_for) == (3 * 40 - 1, 1)


def test_show_and_estimate(make_dense: MakeDense, tmp_path: Path) -> None:
    """Diagrams have a row for each part, and estimates a price."""
    source, spec = make_dense("deepseek_v3"), tmp_path / "spec.yaml"
    spec.write_text(spec_text(2, FARSKIP))
    shown = CliRunner().invoke(main, ["show", str(spec), "--model", str(source)])
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line.split()[1:] for line in shown.output.splitlines() if line.split()}
    assert rows["MLP"] == ["!", "!"] and rows["shared"] == rows["routed"] == ["~1"] * 4
    without = CliRunner().invoke(main, ["show", str(spec), "--layers", "6", "--json"])
    assert json.loads(without.stdout)["schedule"].startswith("a0~2 s0~1 r0~1 a1~2")
    command = ["estimate", str(spec), "--model", str(source), "--hardware", "h100-sxm"]
    done = CliRunner().invoke(
        main, [*command, "--ranks", "2", "--json", "--html", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0, done.output
    assert [row["waited_for"] for row in json.loads(done.stdout)["rows"]] == [12, 2]
    drawn = schedule_diagram(schedule_for(source), 2, 12)
    assert ">routed</text>" in drawn and drawn.count(">~1</text>") == 2 * 4 + 1


def test_a_range_among_others(make_dense: MakeDense, convert: Convert) -> None:
    """A range of FarSkip among others leaves nothing outstanding at either end."""
    source = make_dense("glm4_moe")
    items = (
        "  - {layers: 0-1, use: tensor_parallel}\n  - {layers: 2-4, use: farskip}\n"
        "  - {layers: 5, use: sync_point_drop}\n"
    )
    model = load(convert(source, 2, items))
    text = "a0! m0! a1! m1! a2~2 s2~1 r2~1 a3~2 s3~1 r3~1 a4~1 m4! a5. m5!"
    assert str(model.model.layers.schedule) == text
    expected = reference_logits(load(source), text, 2, *left_padded())
    assert apart(logits(model), expected) < TOLERANCE
