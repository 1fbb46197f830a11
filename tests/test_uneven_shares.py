"""Tracks that have a group of quantised neurons more than others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, Convert, MakeDense, load, spec_text
from quantising import FORMATS, Tensors, meant, meant_of_experts, mxfp4_experts, quantise
from safetensors.torch import save_file
from test_modeling import SCHEDULES, left_padded
from test_quantised import SIZES, TOLERANCE, TRACKED, dequantised, furthest, given_back
from test_random_schedules import logits_on_a_rank
from test_transform import tensors

from ptconvert.calibrate.affinity import Units, assign
from ptconvert.checkpoint.calibration import Assignment, Calibration, in_order
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import CheckpointError, ConfigError
from ptconvert.measure.opening import open_model
from ptconvert.runtime.launch import launch
from ptconvert.runtime.load import shape_of
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec
from ptconvert.verify.run import Settings, check_ranks

# In act-order a group's inputs lie anywhere, and tracks have all scales.
GROUPED = [n for n, form in FORMATS.items() if form.inputs > 1 and "act-order" not in n]
GROUPS = 5
# Of five groups, those of each track.
SHARES = {2: [range(2), range(2, 5)], 4: [range(1), range(1, 2), range(2, 3), range(3, 5)]}


def group_of(name: str) -> int:
    return math.lcm(FORMATS[name].inputs, FORMATS[name].outputs)


def uneven(name: str) -> dict[str, Any]:
    return {**SIZES, "intermediate_size": GROUPS * group_of(name)}


def neurons(whole: torch.Tensor, axis: int, groups: range) -> torch.Tensor:
    """Those groups of so many that lie one after the other."""
    each = whole.shape[axis] // GROUPS
    return whole.narrow(axis, groups.start * each, len(groups) * each)


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("name", GROUPED)
def test_whole_groups_go_to_tracks_and_come_back(
    name: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = quantise(make_dense(**uneven(name)), tmp_path / "source", name)
    converted = convert(source, tracks, TRACKED)
    before, after = tensors(source), tensors(converted)
    for layer in range(LAYERS):
        for module, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            whole = meant(before, name, f"model.layers.{layer}.mlp.{module}")
            for track, groups in enumerate(SHARES[tracks]):
                own = meant(after, name, f"model.layers.{layer}.tracks.{track}.mlp.{module}")
                assert torch.equal(own, neurons(whole, axis, groups)), (module, track)
    section = json.loads((converted / "config.json").read_text())["ptconvert"]
    assert section["together"] == {"intermediate_size": group_of(name)}
    assert given_back(converted, source, tmp_path / "back")


def padded(plain: Path, destination: Path, tracks: int) -> Path:
    """A dense checkpoint whose neurons are filled up with zeros so that all tracks have as many,
    and each those that it has of the uneven shares."""
    config, found = json.loads((plain / "config.json").read_text()), tensors(plain)
    most = max(map(len, SHARES[tracks]))

    def filled(whole: torch.Tensor, axis: int) -> torch.Tensor:
        each = whole.shape[axis] // GROUPS
        parts = []
        for groups in SHARES[tracks]:
            size = list(whole.shape)
            size[axis] = (most - len(groups)) * each
            parts += [neurons(whole, axis, groups), torch.zeros(size)]
        return torch.cat(parts, axis)

    new: Tensors = {
        name: filled(t, int("down_proj" in name)) if ".mlp." in name else t
        for name, t in found.items()
    }
    destination.mkdir()
    config["intermediate_size"] = config["intermediate_size"] // GROUPS * most * tracks
    (destination / "config.json").write_text(json.dumps(config))
    save_file(new, destination / "model.safetensors", {"format": "pt"})
    return destination


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("name", ["W4A16", "block FP8", "GPTQ", "NVFP4"])
def test_the_model_is_that_of_even_shares_filled_up_with_zeros(
    name: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    dense = make_dense(**uneven(name))
    source = quantise(dense, tmp_path / "source", name)
    plain = dequantised(source, name, tmp_path / "plain", dense)
    even = padded(plain, tmp_path / "even", tracks)
    ids_BS = left_padded()[0]
    found = open_model(open_checkpoint(convert(source, tracks, TRACKED)), "float32", "cpu")
    expected = load(convert(even, tracks, TRACKED))(ids_BS).logits
    assert furthest(found(ids_BS).logits, expected) < TOLERANCE
    # and not that of groups that went to other tracks
    evenly = load(convert(plain, 1, TRACKED))(ids_BS).logits
    assert furthest(evenly, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("schedule", ["mixed", "ladder"])
def test_ranks_are_one_process(
    schedule: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Layers held dense are shared out among ranks by whole groups, too; and two tracks lie on each
    rank of two."""
    source = quantise(make_dense(**uneven("W4A16")), tmp_path / "source", "W4A16")
    paths = [convert(source, tracks, SCHEDULES[schedule]) for tracks in (2, 4)]
    alone = [
        open_model(open_checkpoint(path), "float32", "cpu")(left_padded()[0]).logits
        for path in paths
    ]
    for rank in launch(logits_on_a_rank, paths, 2, "gloo", "cpu", 300):
        for found, expected in zip(rank["logits"], alone, strict=True):
            assert furthest(torch.tensor(found), expected) < TOLERANCE


def test_ranks_that_would_part_groups_are_refused(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """A rerouted checkpoint is cut only where it runs: by whole groups where there are as many as
    tracks."""
    dense = make_dense(**{**SIZES, "intermediate_size": 3 * group_of("W4A16")})
    source = quantise(dense, tmp_path / "source", "W4A16")
    checkpoint = open_checkpoint(convert(source, 4, "use: ladder"))
    with pytest.raises(CheckpointError, match=r"has 4 tracks, so it runs on 1 rank$"):
        check_ranks(checkpoint, Settings(ranks=2), torch.float32)
    path = convert(source, 2, "use: ladder")
    check_ranks(open_checkpoint(path), Settings(ranks=2), torch.float32)
    alone = open_model(open_checkpoint(path), "float32", "cpu")(left_padded()[0]).logits
    for rank in launch(logits_on_a_rank, [path], 2, "gloo", "cpu", 300):
        assert furthest(torch.tensor(rank["logits"][0]), alone) < TOLERANCE


def test_blocks_of_gpt_oss(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    """As its 90 blocks of 32 over 4: gates beside their up channels, one more on some tracks."""
    sizes = {"hidden_size": 64, "intermediate_size": GROUPS * 32}
    source = mxfp4_experts(make_dense("gpt_oss", **sizes), tmp_path / "source")
    converted = convert(source, 2, TRACKED)
    before, after = tensors(source), tensors(converted)
    for layer in range(LAYERS):
        for name, axis in (("gate_up_proj", 2), ("down_proj", 1)):
            inside = f"mlp.experts.{name}"
            whole = meant_of_experts(before, f"model.layers.{layer}.{inside}")
            for track, groups in enumerate(SHARES[2]):
                own = meant_of_experts(after, f"model.layers.{layer}.tracks.{track}.{inside}")
                assert torch.equal(own, neurons(whole, axis, groups))
    assert given_back(converted, source, tmp_path / "back")
    paths = [convert(source, 2, "use: tensor_parallel"), converted]
    expected = [
        open_model(open_checkpoint(path), "float32", "cpu")(left_padded()[0]).logits
        for path in (source, converted)
    ]
    for rank in launch(logits_on_a_rank, paths, 2, "gloo", "cpu", 300):
        for found, alone in zip(rank["logits"], expected, strict=True):
            assert furthest(torch.tensor(found), alone) < TOLERANCE


def test_shared_experts_of_deepseek(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Which are as one of twice an expert's neurons."""
    sizes = {
        **{"hidden_size": 128, "intermediate_size": 256, "n_shared_experts": 2},
        **{"moe_intermediate_size": GROUPS * group_of("W4A16"), "first_k_dense_replace": 1},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16},
        "qk_nope_head_dim": 8,
    }

    def chosen(module: str) -> bool:
        return ".mlp." in module and module.endswith("_proj")

    source = quantise(make_dense("deepseek_v3", **sizes), tmp_path / "source", "W4A16", chosen)
    converted = convert(source, 2, TRACKED)
    before, after = tensors(source), tensors(converted)
    module = "mlp.shared_experts.down_proj"
    whole = meant(before, "W4A16", f"model.layers.1.{module}")
    for track, groups in enumerate(SHARES[2]):
        own = meant(after, "W4A16", f"model.layers.1.tracks.{track}.{module}")
        assert torch.equal(own, neurons(whole, 1, groups))
    assert given_back(converted, source, tmp_path / "back")
    open_model(open_checkpoint(converted), "float32", "cpu")(left_padded()[0])


@pytest.mark.parametrize("tracks", [2, 4])
def test_affinity_leaves_tracks_as_many_groups(
    tracks: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    source = quantise(make_dense(**uneven("W4A16")), tmp_path / "source", "W4A16")
    checkpoint = open_checkpoint(source)
    shape = shape_of(checkpoint).shared_by(tracks)
    writer, reader = (Units(Sublayer(i, Kind.MLP), "neurons") for i in range(2))
    found = {(writer, reader): np.random.default_rng(0).random((5, 5), np.float32)}
    owners, before, after = assign(shape, found, tracks)
    assert after < before
    for own in owners.values():
        assert np.bincount(own).tolist() == [len(groups) for groups in SHARES[tracks]]
    neurons = np.argsort(owners[writer], kind="stable").astype(np.int32)
    heads = in_order((SIZES["num_key_value_heads"],))
    orders = {0: Assignment(kv_heads=heads, neurons=neurons)}
    spec = parse_spec(spec_text(tracks, TRACKED, "assignment: affinity\n"), "spec.yaml")
    known = Calibration(orders, {"assignment": "affinity"})
    plan = plan_conversion(checkpoint, spec, source_name="source", calibration=known)
    execute(plan, tmp_path / "converted")
    whole = meant(tensors(source), "W4A16", "model.layers.0.mlp.down_proj").chunk(GROUPS, 1)
    after_them = tensors(tmp_path / "converted")
    for track, groups in enumerate(SHARES[tracks]):
        own_of = meant(after_them, "W4A16", f"model.layers.0.tracks.{track}.mlp.down_proj")
        assert torch.equal(own_of, torch.cat([whole[neurons[g]] for g in groups], 1))
    assert given_back(tmp_path / "converted", source, tmp_path / "back")
    open_model(open_checkpoint(tmp_path / "converted"), "float32", "cpu")(left_padded()[0])


def test_owners_are_those_that_cuts_give(make_dense: MakeDense, tmp_path: Path) -> None:
    """Of a layer that was left as it was, too: whole groups, as in the others."""

    def chosen(module: str) -> bool:
        return ".layers." in module and not module.startswith("model.layers.0.mlp")

    source = quantise(make_dense(**uneven("W4A16")), tmp_path / "source", "W4A16", chosen)
    shape = shape_of(open_checkpoint(source))
    each = group_of("W4A16")
    assert shape.orders_of(0)["neurons"] == (GROUPS * each,)
    assert shape.orders_of(1)["neurons"] == (GROUPS,)
    writer, reader = (Units(Sublayer(i, Kind.MLP), "neurons") for i in range(2))
    rng = np.random.default_rng(0)
    found = {(writer, reader): rng.random((GROUPS * each, GROUPS), np.float32)}
    owners, _, _ = assign(shape, found, 2)
    assert np.bincount(owners[writer]).tolist() == [2 * each, 3 * each]
    assert np.bincount(owners[reader]).tolist() == [2, 3]


@pytest.mark.parametrize(
    "together", [{"hidden": 32}, {"intermediate_size": 0}, {"intermediate_size": "32"}, [32]]
)
def test_a_section_that_says_it_wrongly(
    together: Any, make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense(**SIZES), 2, TRACKED)
    config = json.loads((path / "config.json").read_text())
    config["ptconvert"]["together"] = together
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"ptconvert\.together must give"):
        shape_of(open_checkpoint(path))
