"""Models that norm what a sublayer gives before it joins the stream: the sums over tracks are what
is normed, and what a track sees of its own partial before the merge is scaled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import LAYERS, Convert, MakeDense, byte_level, load, spec_text
from drawing import drawn_schedule
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from reference import reference_logits
from test_modeling import TOLERANCE, difference, left_padded
from test_random_schedules import logits_on_a_rank
from test_wrappers import WRAPPERS, check_wrapped, trained

import ptconvert.modeling.layers as layers_module
from ptconvert.calibrate.scale import fit_scales
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.convert.transform import plan_conversion
from ptconvert.errors import CheckpointError, ConfigError, SpecError
from ptconvert.estimate.compare import dividing
from ptconvert.estimate.hardware import read_engine, read_hardware
from ptconvert.estimate.model import Workload, step
from ptconvert.modeling import executor
from ptconvert.modeling.executor import OneProcess
from ptconvert.modeling.layers import Placement
from ptconvert.models import families
from ptconvert.models.families import FAMILIES
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.launch import launch
from ptconvert.runtime.load import load_rank
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer
from ptconvert.spec.document import parse_spec
from ptconvert.verify.expected import Expected

POST_NORM = ["gemma2", "gemma3_text", "gemma4_text", "gemma4-values-apart", "glm4", "exaone4"]
POST_NORM += ["gemma4_unified_text", "hyperclovax"]
# layers of which both sublayers wait or are in flight while what multiplies the stream comes
CROSSING = "a0. m0. a1^3 m1. a2. m2~3 a3|m3^2 a4. m4! a5~1 m5!"


def shape_at(path: Path) -> ModelShape:
    return ModelShape.from_config(read_config(path))


def with_scales(schedule: Schedule, tracks: int) -> tuple[str, Calibration]:
    """What a spec says on top, and scales of any size for all sublayers that have one."""
    random = Random(3)
    scales = {s: random.uniform(0.2, 1.4) for s in schedule.own_kept(tracks)}
    return ("scale: fitted\n" if scales else ""), Calibration(values={"scale": scales})


@pytest.mark.slow
@settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(schedule=CROSSING, tracks=4, variant="gemma4_text")
@given(
    schedule=st.randoms(use_true_random=False).map(lambda r: str(drawn_schedule(r, LAYERS))),
    tracks=st.sampled_from([1, 2, 4]),
    variant=st.sampled_from(POST_NORM),
)
def test_random_schedules_are_the_literal_reference(
    schedule: str, tracks: int, variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    source, (ids_BS, keep_BS) = make_dense(variant), left_padded()
    top, known = with_scales(Schedule.parse(schedule), tracks)
    path = convert(source, tracks, f'stages: "{schedule}"', top, calibration=known)
    with torch.no_grad():
        found = load_rank(path, Placement(), OneProcess())(ids_BS, attention_mask=keep_BS).logits
    scales = {str(s): c for s, c in known.values["scale"].items()}
    expected = reference_logits(load(source), schedule, tracks, ids_BS, keep_BS, own_scales=scales)
    # norms of sums make small ones large, and what they were rounded by
    assert difference(found, expected, keep_BS) < 5 * TOLERANCE


def test_on_real_ranks(make_dense: MakeDense, convert: Convert) -> None:
    """Two sublayers' sums in one all-reduce, layers held dense beside tracks, and in flight."""
    spanning = "a0! m0|a1! m1. a2. m2! a3|m3! a4^2 m4. a5. m5!"
    cases = [(v, s) for v in ("gemma4_text", "gemma2", "exaone4") for s in (CROSSING, spanning)]
    ids_BS, paths, expected = left_padded()[0], [], []
    for variant, schedule in cases:
        top, known = with_scales(Schedule.parse(schedule), 4)
        source = make_dense(variant)
        paths.append(convert(source, 4, f'stages: "{schedule}"', top, calibration=known))
        scales = {str(s): c for s, c in known.values["scale"].items()}
        expected.append(reference_logits(load(source), schedule, 4, ids_BS, own_scales=scales))
    for of_rank in launch(logits_on_a_rank, paths, 2, "gloo", "cpu", 300):
        for found, wanted in zip(of_rank["logits"], expected, strict=True):
            assert difference(torch.tensor(found), wanted, torch.ones_like(ids_BS)) < TOLERANCE


NO_NORM_AFTER = {
    name: dataclasses.replace(
        FAMILIES[name], **{b: dataclasses.replace(getattr(FAMILIES[name], b), after=None)}
    )
    for name, b in (("gemma2", "attention"), ("glm4", "mlp"))
}


@pytest.mark.parametrize("name", NO_NORM_AFTER)
def test_a_table_without_a_norm_is_not_the_reference(
    name: str, make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, (ids_BS, keep_BS) = make_dense(name), left_padded()
    schedule = "a0! m0! " + " ".join(f"a{i}. m{i}!" for i in range(1, LAYERS))
    path = convert(source, 2, f'stages: "{schedule}"')
    expected = reference_logits(load(source), schedule, 2, ids_BS, keep_BS)

    def off() -> float:
        model = load_rank(path, Placement(), OneProcess())
        with torch.no_grad():
            return difference(model(ids_BS, attention_mask=keep_BS).logits, expected, keep_BS)

    assert off() < TOLERANCE
    changed = {**families.FAMILIES, name: NO_NORM_AFTER[name]}
    monkeypatch.setattr(layers_module, "FAMILIES", changed)
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing"):  # tracks have it yet
        off()


@pytest.mark.parametrize("fault", ["norms before the sum", "nothing multiplied in flight"])
def test_wrong_sums_are_not_the_reference(
    fault: str, make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, (ids_BS, keep_BS) = make_dense("gemma4_text"), left_padded()
    model = load(convert(source, 2, f'stages: "{CROSSING}"'))
    expected = reference_logits(load(source), CROSSING, 2, ids_BS, keep_BS)

    def off() -> float:
        with torch.no_grad():
            return difference(model(ids_BS, attention_mask=keep_BS).logits, expected, keep_BS)

    assert off() < TOLERANCE
    if fault == "norms before the sum":

        def joins(bucket: Any, sum_BSD: torch.Tensor) -> torch.Tensor:
            own = [sum_BSD.sum(0) / len(bucket.normed)] * len(bucket.normed)
            return torch.stack([n(x) for n, x in zip(bucket.normed, own, strict=True)]).sum(0)

        monkeypatch.setattr(executor.Bucket, "joins", joins)
    else:
        monkeypatch.setattr(executor.Bucket, "scale", lambda *_: None)
    assert off() > 100 * TOLERANCE


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_layers_give_the_same(
    wrapper: str, make_dense: MakeDense, convert: Convert
) -> None:
    """What norms a sum is a layer that may be sharded, compiled, or run again for gradients."""
    check_wrapped(wrapper, convert(make_dense("gemma4_text"), 4, f'stages: "{CROSSING}"'))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("gemma2"), 4, f'stages: "{CROSSING}"')).train()
    _, plain = trained(model)
    plain = [gradient.clone() for gradient in plain]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(trained(model)[1], plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("gemma4_text"), 4, f'stages: "{CROSSING}"'))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    ids_BS, _ = left_padded()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids_BS).logits, model(ids_BS).logits)


def test_fitted_scales_err_least(make_dense: MakeDense, convert: Convert) -> None:
    """That of the first stage by hand: of what joins the stream and of each track's own norm."""
    source, stages = make_dense("gemma2", attention_bias=False), "a0. m0! a1. m1^1 a2. m2!"
    rest = " ".join(f"a{i}! m{i}!" for i in range(3, LAYERS))
    path = convert(source, 2, f'stages: "{stages} {rest}"')
    decoder = load(path).get_decoder()
    ids_NT = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0))
    found = {str(f.sublayer): f for f in fit_scales(decoder, ids_NT, lambda *_: None)}
    assert list(found) == ["a0", "a1", "m1", "a2"]
    assert all(f.error < 1 for f in found.values())
    with torch.no_grad():
        entered, run = decoder.entry(input_ids=ids_NT)
        update = run(Sublayer.at(0), [entered], True)
        whole = update.normed[0](update.partials[0][0])
    own = [track / 2**-0.5 for track in update.kept]
    best = float(sum((whole * t).sum() for t in own) / sum((t * t).sum() for t in own))
    assert found["a0"].scale == pytest.approx(best, rel=1e-4)
    assert found["a0"].scale != pytest.approx(2**-0.5, rel=1e-2)

    def left(scale: float) -> float:
        return float(sum((whole - scale * t).square().sum() for t in own))

    assert found["a0"].error == pytest.approx(left(best) / left(2**-0.5), rel=1e-3)
    assert left(best) < min(left(0.98 * best), left(1.02 * best))


def test_what_an_all_reduce_carries(make_dense: MakeDense) -> None:
    schedule = Schedule.parse(
        "a0. m0. a1|m1! a2~1 m2! " + " ".join(f"a{i}! m{i}!" for i in range(3, LAYERS))
    )
    assert schedule.carried == (0, 0, 4, 1, 1, *[1] * 6)
    post, llama = shape_at(make_dense("gemma2")), shape_at(make_dense("llama"))
    for shape, streams in ((post, 12), (llama, 9)):
        assert shape.bytes_all_reduced(schedule) == streams * 32 * 4
        assert shape.bytes_all_reduced(dense_schedule(LAYERS)) == 12 * 32 * 4
        expected = Expected(schedule, shape, torch.float32, 2, 7, 3)
        first = (4,) if shape is post else ()
        assert expected.shape("prefill", schedule.carried[2]) == (*first, 2, 7, 32)


def test_several_streams_take_longer_to_all_reduce() -> None:
    shape = dataclasses.replace(shape_of_gemma2(), kinds=shape_of_gemma2().kinds[:2])
    hardware, engine = read_hardware("h100-sxm"), read_engine("vllm")
    one = Workload(64, 2048, 16).prefill
    both = Schedule.parse("a0. m0. a1. m1!")
    found = step(both, shape, hardware, engine, 4, one).spans[-1].reduce
    alone = step(dense_schedule(2), shape, hardware, engine, 4, one).spans[-1].reduce
    assert found is not None and alone is not None
    assert found[1] - found[0] == pytest.approx(4 * (alone[1] - alone[0]), rel=0.1)


def shape_of_gemma2() -> ModelShape:
    """Of Gemma 2 27B's sizes."""
    sizes = {"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    return ModelShape.from_config(
        {"model_type": "gemma2", **sizes, **heads, "vocab_size": 256000, "dtype": "bfloat16"}
    )


@pytest.mark.parametrize(
    ("variant", "top", "says"),
    [
        ("gemma2", "deferred: mean\n", "s:3: deferred is mean, but gemma2 norms what sublayers"),
        ("llama", "scale: fitted\n", "s:3: scale is fitted, but llama doesn't norm what sublayers"),
    ],
)
def test_what_does_not_go_together(
    variant: str, top: str, says: str, make_dense: MakeDense
) -> None:
    spec = parse_spec(spec_text(2, "use: parallel_track, depth: 2", top), "s")
    with pytest.raises(SpecError, match=says) as error:
        plan_conversion(open_checkpoint(make_dense(variant)), spec, source_name="x")
    assert "\n" not in str(error.value)


def test_plan_says_so_before_it_begins(make_dense: MakeDense, tmp_path: Path) -> None:
    source = byte_level(make_dense, tmp_path / "source")
    (text := tmp_path / "text.txt").write_text("some words, and others. " * 400)
    asked = ["--tracks", "2", "--max-syncs", "6", "--text", str(text), "--scale", "fitted"]
    done = CliRunner().invoke(main, ["plan", str(source), *asked, "-o", str(tmp_path / "s.yaml")])
    assert done.exit_code == 2
    assert "error: --scale fitted, but llama doesn't norm what sublayers give" in done.output


GEMMA4: dict[str, Any] = {
    **{"model_type": "gemma4_text", "hidden_size": 5376, "intermediate_size": 21504},
    **{"num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16},
    **{"head_dim": 256, "vocab_size": 262144, "hidden_size_per_layer_input": 0},
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 4, "global_head_dim": 512},
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_size_per_layer_input": 256}, "its layers have inputs of their own"),
        ({"hidden_size_per_layer_input": None}, ""),
        ({"num_kv_shared_layers": 20}, "its layers share keys and values"),
        ({"enable_moe_block": True}, "its layers have experts beside an MLP"),
        ({"num_experts": 128}, "with experts can't be converted"),
        ({"num_global_key_value_heads": 3}, "num_global_key_value_heads must divide"),
        ({"layer_types": ["linear_attention"] * 60}, "it is full_attention or sliding_attention"),
        (
            {"per_layer_config": {"5": {"head_dim": 512}, "11": {"head_dim": 64}}},
            "per_layer_config",
        ),
        ({"per_layer_config": {"0": {"head_dim": 512}}}, "config.json: per_layer_config must give"),
        ({"per_layer_config": {"5": {"intermediate_size": 8}}}, "per_layer_config must give"),
        ({"per_layer_config": [1]}, "per_layer_config must give"),
        ({"per_layer_config": {"5": 3}}, "per_layer_config must give"),
    ],
)
def test_what_of_gemma4_is_refused(changed: dict[str, Any], says: str) -> None:
    if not says:
        ModelShape.from_config({**GEMMA4, **changed})
        return
    with pytest.raises(ConfigError, match=says) as error:
        ModelShape.from_config({**GEMMA4, **changed})
    assert "\n" not in str(error.value)


def test_the_e_models_are_refused_where_nothing_says_it() -> None:
    """The config class's default are inputs of each layer."""
    config = {k: v for k, v in GEMMA4.items() if k != "hidden_size_per_layer_input"}
    with pytest.raises(ConfigError, match="inputs of their own"):
        ModelShape.from_config(config)


def test_heads_of_full_attention_by_either_way_of_saying_it(tmp_path: Path) -> None:
    published = ModelShape.from_config(GEMMA4)
    by_layer = {k: v for k, v in GEMMA4.items() if "global" not in k}
    own = {"head_dim": 512, "num_key_value_heads": 4}
    by_layer["per_layer_config"] = {f"{i:02}": own for i in range(5, 60, 6)}
    assert ModelShape.from_config(by_layer) == published
    assert [i for i in range(60) if published.head_size_of(i) == 512] == [*range(5, 60, 6)]
    assert {published.kv_heads_of(i) for i in range(5, 60, 6)} == {4}
    others = {f"{i:02}": {"head_dim": 256, "num_key_value_heads": 16} for i in range(60)}
    spelt_out = {**by_layer, "per_layer_config": {**others, **by_layer["per_layer_config"]}}
    assert ModelShape.from_config(spelt_out) == published
    nothing: list[object] = [None, {}]
    for none in nothing:  # all layers alike, as transformers has it
        alike = ModelShape.from_config({**by_layer, "per_layer_config": none})
        assert {alike.head_size_of(i) for i in range(60)} == {256}
    apart = ModelShape.from_config({**GEMMA4, "attention_k_eq_v": False})
    assert {apart.kv_heads_of(i) for i in range(60)} == {16}
    assert max(dividing(64, published, ())) == 32 and published.indivisible(3)
    text = json.dumps(GEMMA4)
    (tmp_path / "config.json").write_text(text)
    assert read_config(tmp_path) == GEMMA4


def test_every_family_that_norms_sums_is_here() -> None:
    after = {name for name, family in FAMILIES.items() if family.attention.after is not None}
    named = {model_type.removesuffix("-values-apart") for model_type in POST_NORM}
    assert after == {"gemma4_text" if name == "gemma4" else name for name in named}
