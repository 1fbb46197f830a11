"""Quantised checkpoints: what a cut of them means, that it is undone, and what can't be cut."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from conftest import LAYERS, Convert, MakeDense, load, random_model, spec_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantising import (
    FORMATS,
    GROUP,
    Tensors,
    meant,
    meant_of_experts,
    mxfp4_experts,
    packed,
    quantise,
    unpacked,
)
from safetensors.torch import load_file, save_file
from test_modeling import SCHEDULES, left_padded
from test_random_schedules import logits_on_a_rank
from test_transform import back, same, tensors
from transformers import FineGrainedFP8Config

from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.errors import CheckpointError, ConfigError, SpecError
from ptconvert.estimate.hardware import read_engine, read_hardware
from ptconvert.estimate.roofline import Pass, sublayer_parts
from ptconvert.measure.opening import open_model
from ptconvert.models.quantised import Width, of_tracks, weight_width
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.dequantise import dequantised as dequantised_weight
from ptconvert.runtime.launch import launch
from ptconvert.runtime.load import opened, shape_of
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec

TRACKED = "use: parallel_track, depth: 2"
TOLERANCE = 3e-4  # of logits of size 5, of weights of size 1
SIZES: dict[str, Any] = {
    **{"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    **{"intermediate_size": 256, "num_hidden_layers": LAYERS},
}
# By what ends a module's name: along which axis of its weight (O, I) it is cut.
CUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}


def share(weight: torch.Tensor, module: str, track: int, tracks: int) -> torch.Tensor:
    """What a track owns of a weight; with fewer KV heads than tracks some own the same."""
    axis, owners = CUT[module.rsplit(".", 1)[1]], tracks
    if module.endswith(("k_proj", "v_proj")):
        owners = min(tracks, SIZES["num_key_value_heads"])
    return weight.chunk(owners, axis)[track * owners // tracks]


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def quantised_modules(found: Tensors) -> set[str]:
    """Those of a checkpoint."""
    floats = (torch.float32, torch.bfloat16)
    names = (t for t, v in found.items() if v.dtype not in floats)
    return {t.rsplit(".", 1)[0] for t in names if t.endswith(("weight", "_packed", "qweight"))}


def of_a_track(module: str, track: int) -> str:
    return re.sub(r"(layers\.\d+)", rf"\1.tracks.{track}", module)


def given_back(converted: Path, source: Path, destination: Path) -> bool:
    """Whether undoing a conversion gives all of its source."""
    again = back(converted, destination)
    configs = [json.loads((path / "config.json").read_text()) for path in (again, source)]
    return same(tensors(again), tensors(source)) and configs[0] == configs[1]


@pytest.mark.parametrize("tracks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_tracks_mean_their_share_and_give_it_back(
    name: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**SIZES), tmp_path / "source", name)
    converted = convert(source, tracks, TRACKED)
    before, after = tensors(source), tensors(converted)
    modules = quantised_modules(before)
    assert len(modules) == 7 * LAYERS
    for module in modules:
        whole = meant(before, name, module)
        for track in range(tracks):
            own = meant(after, name, of_a_track(module, track))
            assert torch.equal(own, share(whole, module, track, tracks)), (module, track)
    assert given_back(converted, source, tmp_path / "back")


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_is_that_of_the_weights_that_are_meant(
    name: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Opened on the CPU, source and conversion, against a dense model with those weights."""
    dense = make_dense(**SIZES)
    source = quantise(dense, tmp_path / "source", name)
    plain = dequantised(source, name, tmp_path / "plain", dense)
    ids_BS = left_padded()[0]
    for path in (source, convert(source, 2, "use: tensor_parallel")):
        model = open_model(open_checkpoint(path), "float32", "cpu")
        assert furthest(model(ids_BS).logits, load(plain)(ids_BS).logits) < TOLERANCE
    tracked = open_model(open_checkpoint(convert(source, 2, TRACKED)), "float32", "cpu")
    expected = load(convert(plain, 2, TRACKED))(ids_BS).logits
    assert furthest(tracked(ids_BS).logits, expected) < TOLERANCE


def dequantised(source: Path, name: str, destination: Path, dense: Path) -> Path:
    """The dense checkpoint that a quantised one means."""
    found = tensors(source)
    modules = quantised_modules(found)
    inside = tuple(f"{module}." for module in modules)
    plain = {t: v for t, v in found.items() if t.endswith("bias") or not t.startswith(inside)}
    plain |= {f"{m}.weight": meant(found, name, m).float().contiguous() for m in modules}
    shutil.copytree(dense, destination, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(plain, destination / "model.safetensors", {"format": "pt"})
    return destination


@pytest.mark.parametrize("schedule", ["mixed", "ladder"])
@pytest.mark.parametrize("name", ["block FP8", "W4A16 in act-order", "GPTQ", "AWQ", "NVFP4"])
def test_ranks_are_one_process(
    name: str, schedule: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Layers held dense are cut among ranks as they are read, and dequantised by each."""
    source = quantise(make_dense(**SIZES), tmp_path / "source", name)
    path = convert(source, 2, SCHEDULES[schedule])
    alone = open_model(open_checkpoint(path), "float32", "cpu")(left_padded()[0]).logits
    for rank in launch(logits_on_a_rank, [path], 2, "gloo", "cpu", 300):
        assert furthest(torch.tensor(rank["logits"][0]), alone) < TOLERANCE


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    tracks=st.sampled_from([2, 3, 4, 6]),
    eighths=st.integers(1, 24),
    head_size=st.sampled_from([8, 16, 32]),
    kv_heads=st.sampled_from([2, 4, 6, 12]),
)
def test_a_cut_is_exact_or_refused_in_a_line(
    name: str,
    tracks: int,
    eighths: int,
    head_size: int,
    kv_heads: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Any number of neurons and heads: what fits is cut and given back, what doesn't is refused."""
    form, tmp_path = FORMATS[name], tmp_path_factory.mktemp("drawn")
    sizes: dict[str, Any] = {
        **{"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": kv_heads},
        **{"intermediate_size": 32 * eighths, "num_hidden_layers": 2, "head_dim": head_size},
    }
    random_model("llama", **sizes).save_pretrained(tmp_path / "dense")
    source = quantise(tmp_path / "dense", tmp_path / "source", name)
    spec = parse_spec(
        f"format: 1\ntracks: {tracks}\nschedule:\n  - {{layers: 0-1, {TRACKED}}}\n", "spec.yaml"
    )
    q, kv = 12 * head_size // tracks, max(kv_heads // tracks, 1) * head_size
    neurons = 32 * eighths / tracks
    divides = kv_heads % tracks == 0 or tracks % kv_heads == 0
    group = math.lcm(form.outputs, form.inputs)  # of which a track may have more than another
    aligned = (
        all(own % form.outputs == 0 for own in (q, kv))
        and q % form.inputs == 0
        and (neurons % group == 0 or (32 * eighths % group == 0 and 32 * eighths >= tracks * group))
    )
    try:
        plan = plan_conversion(open_checkpoint(source), spec, source_name="source")
    except SpecError as error:
        assert not (divides and aligned and neurons == int(neurons)), error
        assert re.fullmatch(
            rf"spec\.yaml:2: {tracks} tracks don't divide .*possible are 1\b.*", str(error)
        )
        return
    assert divides and aligned and neurons == int(neurons)
    execute(plan, tmp_path / "converted")
    assert given_back(tmp_path / "converted", source, tmp_path / "back")


def test_what_would_divide_groups_says_what_fits(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Three groups over four tracks."""
    dense = make_dense(**{**SIZES, "intermediate_size": 3 * GROUP})
    source = quantise(dense, tmp_path / "source", "W4A16")
    with pytest.raises(SpecError) as refused:
        convert(source, 4, TRACKED)
    assert str(refused.value) == (
        "spec.yaml:2: 4 tracks don't divide the quantised weights: mlp.down_proj.weight_packed has "
        "one number for each 8 of 48, and a track would own 12 of these; possible are 1, 2"
    )
    convert(source, 4, "use: ladder")  # which rewrites none of them


@pytest.mark.parametrize("name", FORMATS)
def test_a_pure_reroute_touches_no_tensor(
    name: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**SIZES), tmp_path / "source", name)
    assert same(tensors(convert(source, 2, "use: ladder")), tensors(source))


def test_modules_left_as_they_were(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    """A recipe that leaves some modules in bf16, one of them on its own, and says so by names."""
    left = ["lm_head", "model.layers.1.mlp.down_proj", "re:.*layers\\.2\\.self_attn.*"]
    dense = make_dense(dtype=torch.bfloat16, **SIZES)

    def chosen(module: str) -> bool:
        return ".layers." in module and not (
            module == left[1] or module.startswith("model.layers.2.self_attn")
        )

    source = quantise(dense, tmp_path / "source", "W4A16", chosen, ignore=left)
    converted = convert(source, 2, TRACKED)
    assert given_back(converted, source, tmp_path / "back")
    ignored = json.loads((converted / "config.json").read_text())["quantization_config"]["ignore"]
    names = [f"model.layers.1.tracks.{t}.mlp.down_proj" for t in range(2)]
    meant_by_pattern = [
        f"model.layers.2.tracks.{t}.self_attn.{p}_proj" for p in "qkvo" for t in range(2)
    ]
    assert sorted(ignored) == sorted([*left, *names, *meant_by_pattern])
    after = tensors(converted)
    assert all(after[f"{name}.weight"].dtype == torch.bfloat16 for name in names)


DENSE = "model.layers.3.mlp.down_proj"
TRACKS = [f"model.layers.3.tracks.{t}.mlp.down_proj" for t in range(2)]


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (
            {"quant_method": "compressed-tensors", "ignore": ["re:model.layers.3.mlp.*", "x"]},
            {"ignore": ["re:model.layers.3.mlp.*", "x", *TRACKS]},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"one": {"targets": [DENSE]}, "two": {"targets": ["Linear"]}},
            },
            {
                "config_groups": {
                    "one": {"targets": [DENSE, *TRACKS]},
                    "two": {"targets": ["Linear"]},
                }
            },
        ),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["down_proj", "lm_head"]},
            {"modules_to_not_convert": ["down_proj", "lm_head"]},  # which names end with
        ),
        (
            {"quant_method": "awq", "modules_to_not_convert": ["model.layers.3.mlp"]},
            {"modules_to_not_convert": ["model.layers.3.mlp", *TRACKS]},
        ),
        (
            {"quant_method": "modelopt", "exclude_modules": ["model.layers.3.mlp*"]},
            {"exclude_modules": ["model.layers.3.mlp*", *TRACKS]},
        ),
        (
            {"quant_method": "auto-round", "extra_config": {DENSE: {"bits": 16}, "a": {"bits": 8}}},
            {
                "extra_config": {
                    **{DENSE: {"bits": 16}, "a": {"bits": 8}},
                    **{name: {"bits": 16} for name in TRACKS},
                }
            },
        ),
        (
            {"quant_method": "gptq", "dynamic": {r"-:model\.layers\.3\.mlp.*": {}}},
            {
                "dynamic": {
                    r"-:model\.layers\.3\.mlp.*": {},
                    **{f"-:{re.escape(name)}$": {} for name in TRACKS},
                }
            },
        ),
    ],
)
def test_what_a_config_says_of_a_module_it_says_of_its_tracks(
    quantization: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert of_tracks(quantization, {DENSE: TRACKS}) == {**quantization, **expected}


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "exl3"}, "'exl3'"),
        ({"quant_method": "gguf"}, "'gguf'"),
        ({"quant_method": "hqq"}, "'hqq'"),
        ("none", "None"),
        (
            {**FORMATS["W4A16"].config, "sparsity_config": {"format": "sparse-bitmask"}},
            "weights kept sparse",
        ),
        ({**FORMATS["W4A16"].config, "transform_config": {"config_groups": {"r": 1}}}, "mixes"),
        ({**FORMATS["W4A16"].config, "config_groups": [1]}, "must be a mapping of mappings"),
    ],
)
def test_what_cant_be_cut_is_refused_with_the_way_out(
    quantization: Any, said: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**SIZES), tmp_path / "source", "W4A16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ConfigError) as refused:
        convert(source, 2, TRACKED)
    assert said in str(refused.value)
    assert "convert the unquantised checkpoint, and quantise the result" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("mlp.down_proj.weight_scale", lambda t: t[:, :5]), r"has shape \[128, 5\]"),
        (("mlp.down_proj.weight_shape", lambda t: t + 1), "isn't that of the weight"),
        (("mlp.down_proj.weight_shape", lambda t: t.float()), "is F32, not I32 or I64"),
        (("mlp.down_proj.weight_packed", lambda t: t[:, :-1]), r"has shape \[128, 31\]"),
        (
            ("mlp.down_proj.weight_scale", lambda _: None),
            r"mlp\.down_proj\.\* has no scales beside",
        ),
    ],
)
def test_tensors_that_are_no_weight_s(
    change: Any, said: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**SIZES), tmp_path / "source", "W4A16")
    found, (name, changed) = tensors(source), change
    name = f"model.layers.1.{name}"
    if (new := changed(found.pop(name))) is not None:
        found[name] = new.contiguous()
    save_file(found, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said) as refused:
        convert(source, 2, TRACKED)
    assert "model.layers.1.mlp.down_proj" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["W4A16", "GPTQ", "AWQ", "block FP8", "FP8 per channel"])
def test_whole_groups_are_assigned(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    """In any order of units, which are what the format keeps together, and back again."""
    source = quantise(make_dense(**SIZES), tmp_path / "source", name)
    checkpoint, rng = open_checkpoint(source), torch.Generator().manual_seed(1)
    shape = shape_of(checkpoint)
    groups = math.lcm(FORMATS[name].inputs, FORMATS[name].outputs)
    assert shape.orders_of(0) == {
        "kv_heads": (4,),
        "neurons": (SIZES["intermediate_size"] // groups,),
    }
    orders = {
        layer: Assignment(
            **{of: torch.randperm(*n, generator=rng).int().numpy() for of, n in sizes.items()}
        )
        for layer in range(LAYERS)
        if (sizes := shape.orders_of(layer))
    }
    spec = parse_spec(spec_text(2, TRACKED, "assignment: {method: affinity}\n"), "spec.yaml")
    known = Calibration(orders, {"assignment": "affinity"})
    plan = plan_conversion(checkpoint, spec, source_name="source", calibration=known)
    execute(plan, tmp_path / "converted")
    before, after = tensors(source), tensors(tmp_path / "converted")
    for layer, order in orders.items():
        for module, axis, units in (
            ("mlp.down_proj", 1, order.neurons),
            ("mlp.up_proj", 0, order.neurons),
        ):
            whole = meant(before, name, f"model.layers.{layer}.{module}")
            parts = whole.chunk(len(units), axis)
            expected = torch.cat([parts[unit] for unit in units.tolist()], axis)
            own = [
                meant(after, name, f"model.layers.{layer}.tracks.{t}.{module}") for t in range(2)
            ]
            assert torch.equal(torch.cat(own, axis), expected)
    execute(plan_to_dense(open_checkpoint(tmp_path / "converted")), tmp_path / "back")
    assert same(tensors(tmp_path / "back"), before)
    if name == "block FP8":  # which transformers opens on a CPU by itself
        ids_BS, given = left_padded()[0], FineGrainedFP8Config(dequantize=True)
        options = {"quantization_config": given, "dtype": torch.float32}
        ours = open_model(open_checkpoint(tmp_path / "converted"), "float32", "cpu")
        theirs = load(tmp_path / "converted", **options)
        assert furthest(theirs(ids_BS).logits, ours(ids_BS).logits) < TOLERANCE
    shared = tmp_path / "converted" / "shared.safetensors"
    held = load_file(shared)
    moved = held["model.layers.0.assignment.neurons"]
    moved[:2] = moved[[1, 0]]
    save_file(held, shared)
    if groups == 1:
        return
    with pytest.raises(CheckpointError, match=rf"neurons must keep {groups} numbers together"):
        plan_to_dense(open_checkpoint(tmp_path / "converted"))


OTHERS = {
    "phi3": ({**SIZES, "pad_token_id": 0}, lambda m: ".layers." in m),
    "qwen3": (SIZES, lambda m: ".layers." in m),
    "qwen3_moe": (
        {**SIZES, "moe_intermediate_size": 64, "num_experts": 4},
        lambda m: m.endswith("_proj"),
    ),
    "deepseek_v3": (
        {
            **{"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64},
            **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16},
            "qk_nope_head_dim": 8,
        },
        lambda m: m.endswith(("_proj", "_proj_with_mqa")),
    ),
    "qwen3_next": (
        {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64},
        lambda m: m.endswith(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ),
}


@pytest.mark.parametrize("name", ["FP8 per channel", "block FP8", "W4A16", "GPTQ", "NVFP4"])
@pytest.mark.parametrize("family", OTHERS)
def test_families(
    family: str, name: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Fused projections, experts apart, latent and linear attention: the model that is meant."""
    sizes, chosen = OTHERS[family]
    source = quantise(make_dense(family, **sizes), tmp_path / "source", name, chosen)
    plain = dequantised(source, name, tmp_path / "plain", source)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    ids_BS = left_padded()[0]
    schedule = SCHEDULES["mixed"]
    converted = convert(source, 2, schedule)
    found = open_model(open_checkpoint(converted), "float32", "cpu")(ids_BS).logits
    expected = load(convert(plain, 2, schedule))(ids_BS).logits
    assert furthest(found, expected) < TOLERANCE
    assert given_back(converted, source, tmp_path / "back")


def test_mxfp4_experts(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    """gpt-oss as it is published: gates beside their up channels, and 32 neurons in a block."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    source = mxfp4_experts(make_dense("gpt_oss", **sizes), tmp_path / "source")
    converted = convert(source, 2, TRACKED)
    before, after = tensors(source), tensors(converted)
    for layer in range(LAYERS):
        for name, axis in (("gate_up_proj", 2), ("down_proj", 1)):
            inside = f"mlp.experts.{name}"
            whole = meant_of_experts(before, f"model.layers.{layer}.{inside}")
            for track in range(2):
                own = meant_of_experts(after, f"model.layers.{layer}.tracks.{track}.{inside}")
                assert torch.equal(own, whole.chunk(2, axis)[track])
    assert given_back(converted, source, tmp_path / "back")
    ids_BS = left_padded()[0]
    one, other = (
        open_model(open_checkpoint(p), "float32", "cpu")(ids_BS).logits
        for p in (source, convert(source, 2, "use: tensor_parallel"))
    )
    assert furthest(one, other) < TOLERANCE
    with pytest.raises(SpecError, match=r"possible are 1, 2, 4$"):
        convert(source, 8, TRACKED)


@pytest.mark.parametrize("name", FORMATS)
def test_what_weights_take_is_known_from_the_config(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Against the tensors, a scale of fp32 for each row and what describes a weight left out."""
    source = quantise(make_dense(dtype=torch.bfloat16, **SIZES), tmp_path / "source", name)
    checkpoint = open_checkpoint(source)
    shape = ModelShape.from_config(checkpoint.config)
    for layer in range(LAYERS):
        told = sum(
            math.prod(shape.size(r)) * shape.bytes_of(layer, r) for r in shape.rules_of(layer)
        )
        entries = checkpoint.tensors.values()
        there = sum(
            e.nbytes
            for e in entries
            if e.name.startswith(shape.layer(layer)) and not e.name.endswith(("shape", "g_idx"))
        )
        assert told == pytest.approx(there, rel=0.04)


def test_what_a_recipe_leaves_takes_what_it_took(make_dense: MakeDense, tmp_path: Path) -> None:
    left = ["lm_head", "model.layers.1.mlp.down_proj", "re:.*self_attn.*"]
    source = quantise(make_dense(**SIZES), tmp_path / "source", "W4A16", ignore=left)
    shape = ModelShape.from_config(open_checkpoint(source).config)
    kept = {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert kept <= shape.widths.keys()
    assert not any("self_attn" in name or "1.mlp.down" in name for name in shape.widths)
    assert set(shape.widths.values()) == {Width(4 + 16 / GROUP)}
    assert shape.alike(0) != shape.alike(1) and shape.alike(0) == shape.alike(2)


COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}


def scheme(bits: int, kind: str, activations: dict[str, Any] | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {**COMPRESSED, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "width"),
    [
        (scheme(8, "float", {"num_bits": 8, "type": "float", "dynamic": True}), Width(8, "fp8")),
        (scheme(8, "int", {"num_bits": 8, "type": "int"}), Width(8, "int8")),
        (scheme(4, "int", {"num_bits": 8, "type": "float"}), Width(4, "fp8")),
        (scheme(4, "float", {"num_bits": 4, "type": "float"}), Width(4, "fp4")),
        (scheme(8, "float", None), Width(8)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Width(8, "fp8")),
        ({"quant_method": "fbgemm_fp8"}, Width(8, "fp8")),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Width(8, "fp8")),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Width(4.5, "fp4")),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, Width(4.5)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Width(4 + 20 / 128)),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, Width(4 + 20 / 128)),
    ],
)
def test_what_is_multiplied_in_what(quantization: dict[str, Any], width: Width) -> None:
    """Products are as narrow as their inputs, so weights alone don't make them faster."""
    assert weight_width(quantization, "model.layers.0.mlp.up_proj") == width
    assert weight_width(scheme(8, "float", None), "lm_head") is None


@pytest.mark.parametrize(
    ("row", "ratio"), [("h100-sxm", 989.4 / 1979), ("l40s-pcie", 362.05 / 733), ("a100-sxm", 1)]
)
def test_a_prefill_in_fp8_takes_less_where_the_device_has_it(row: str, ratio: float) -> None:
    """A long one, whose time is that of the products; attention's own stay as they were."""
    config = read_config(Path(__file__).parents[1] / "specs" / "configs" / "llama-3.1-70b.json")
    fp8 = {"quantization_config": scheme(8, "float", {"num_bits": 8, "type": "float"})}
    shapes = [ModelShape.from_config({**config, **more}) for more in ({}, fp8)]
    device, engine = read_hardware(row).device, read_engine("vllm")

    def seconds(kind: Kind, one: Pass) -> float:
        """Of the one in FP8, as a share of the other's."""
        whole, quantised = (
            sum(
                part.seconds(device, engine)
                for part in sublayer_parts(Sublayer(0, kind), shape, engine, 1, one)
            )
            for shape in shapes
        )
        return quantised / whole

    long = Pass(1, 8192)
    assert seconds(Kind.MLP, long) == pytest.approx(ratio)
    assert ratio < seconds(Kind.ATTENTION, long) < 1 or ratio == 1
    # of one token the time is that of reading weights, of half as many bytes
    assert seconds(Kind.MLP, Pass(1, 1, 8192, 8193)) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("name", ["W4A16", "FP8 per channel"])
def test_a_head_that_is_quantised_and_what_all_takes_as_it_is_opened(
    name: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    dense = make_dense(dtype=torch.bfloat16, **SIZES)
    source = quantise(dense, tmp_path / "source", name, lambda m: ".layers." in m or m == "lm_head")
    converted = convert(source, 2, TRACKED)
    assert given_back(converted, source, tmp_path / "back")
    as_opened = [opened(open_checkpoint(path)).nbytes for path in (source, converted)]
    plain = [open_checkpoint(path).nbytes for path in (dense, convert(dense, 2, TRACKED))]
    assert as_opened == plain
    model = open_model(open_checkpoint(converted), "float32", "cpu")
    whole = meant(tensors(source), name, "lm_head")
    assert furthest(model.lm_head.weight, whole) < 1e-5


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5", "llava"])
def test_language_models_within_others(
    name: str, inside: bool, convert: Convert, tmp_path: Path
) -> None:
    """Whether the whole's config.json says that they are quantised, or their own part of it."""
    dense = seeing.save(name, tmp_path / "dense")
    source = quantise(
        dense,
        tmp_path / "source",
        "FP8 per channel",
        lambda m: bool(re.search(r"(?<!vision_tower\.)(?<!visual\.)layers\.\d+\.mlp\.", m)),
    )
    if inside:
        config = json.loads((source / "config.json").read_text())
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        (source / "config.json").write_text(json.dumps(config))
    converted = convert(source, 2, "use: parallel_track, depth: 1")
    again = tensors(back(converted, tmp_path / "back"))
    assert same(again, seeing.under_todays_names(tensors(source)))
    ids_BS = left_padded()[0]
    one, other = (
        open_model(open_checkpoint(p), "float32", "cpu")(input_ids=ids_BS).logits
        for p in (source, convert(source, 1, "use: parallel_track, depth: 1"))
    )
    assert furthest(one, other) < 1e-3  # linear attention rounds more


def test_zero_points_of_autoround_are_less_one_in_one_format_only(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    found = []
    for packing in ("auto_round:auto_gptq", "auto_round"):
        source = quantise(
            make_dense(**SIZES),
            tmp_path / packing[-5:],
            "AutoRound with zero points",
            packing_format=packing,
        )
        model = open_model(open_checkpoint(source), "float32", "cpu")
        found.append(model.model.layers[0].mlp.down_proj.weight)
    scales = tensors(source)["model.layers.0.mlp.down_proj.scales"].float()
    apart = (found[1] - found[0]) / scales.repeat_interleave(GROUP, 0).T
    assert 0.85 < float((apart.round() == 1).float().mean()) < 1  # but for 15 and what it carries


def test_groups_that_dont_divide_the_inputs() -> None:
    """As 2880 in groups of 128: the last is shorter, and all begin at multiples of their size."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.rand(4, 3, generator=rng)
    kept = {
        "weight_packed": packed(torch.randint(16, (4, 40), generator=rng), 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor([4, 40]),
    }
    found = dequantised_weight(kept, FORMATS["W4A16"].config)
    values = unpacked(kept["weight_packed"], 1)[:, :40] - 8
    assert furthest(found, values * scale.repeat_interleave(GROUP, 1)[:, :40]) < 1e-6


@pytest.mark.parametrize(
    ("name", "lost", "said"),
    [
        ("FP8 per channel", "q_proj.weight", "has no values beside"),
        ("W4A16", "q_proj.weight_packed", "has no values beside"),
        ("GPTQ", "q_proj.qzeros", "has no scales or zero points beside"),
        ("GPTQ", "q_proj.qweight", "has no values beside"),
    ],
)
def test_weights_that_lack_a_tensor(
    name: str, lost: str, said: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**SIZES), tmp_path / "source", name)
    found = tensors(source)
    del found[f"model.layers.1.self_attn.{lost}"]
    save_file(found, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        convert(source, 2, TRACKED)


def test_scales_of_the_cache(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    """One for all heads comes along to each track; one for each is refused."""
    source = quantise(make_dense(**SIZES), tmp_path / "source", "FP8 per channel")
    found, name = tensors(source), "model.layers.1.self_attn.k_scale"
    save_file({**found, name: torch.ones(1)}, source / "model.safetensors", {"format": "pt"})
    assert given_back(convert(source, 2, TRACKED), source, tmp_path / "back")
    save_file({**found, name: torch.ones(4, 1, 1)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_scale has shape \[4, 1, 1\]"):
        convert(source, 2, TRACKED)


def test_what_comes_first_counts_and_what_would_mean_more_is_refused() -> None:
    first = {r"+:model\.layers\.3\.mlp\.down": {"bits": 8}, r"+:.*_proj": {"bits": 4}}
    found = of_tracks({"quant_method": "gptq", "dynamic": first}, {DENSE: TRACKS})["dynamic"]
    assert list(found) == [*(f"+:{re.escape(name)}$" for name in TRACKS), *first]
    assert all(found[f"+:{re.escape(name)}$"] == {"bits": 8} for name in TRACKS)
    for quantization in (
        {"quant_method": "gptq", "dynamic": {r"-:.*\.0\..*down.*": {}}},
        {"quant_method": "compressed-tensors", "ignore": [r"re:.*\.0\..*"]},
    ):
        with pytest.raises(ConfigError, match=r"would mean model\.layers\.3\.tracks\.0"):
            of_tracks(quantization, {DENSE: TRACKS})


@pytest.mark.parametrize(
    "change",
    [
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": None}}}},
    ],
)
def test_a_config_that_doesnt_say_how_is_refused_in_a_line(
    change: Any, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**SIZES), tmp_path / "source", "W4A16", **change)
    with pytest.raises(ConfigError, match=r"doesn't say how model\.layers\.0"):
        convert(source, 2, TRACKED)
