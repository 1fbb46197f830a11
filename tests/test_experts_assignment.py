"""Which track gets which neurons of each expert: any order is the same model, and affinity finds
those that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrating import random_assignments
from conftest import Convert, MakeDense, load, spec_text
from numpy.typing import NDArray
from test_experts import fused
from test_modeling import SCHEDULES, TOLERANCE, difference, left_padded
from test_transform import back, same, tensors

from ptconvert.calibrate import affinity, needs
from ptconvert.checkpoint import writer
from ptconvert.checkpoint.calibration import Assignment, Calibration, contiguous
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import plan_conversion, plan_to_dense
from ptconvert.errors import CheckpointError
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec

AFFINITY = "assignment: affinity\n"
DEFERRED = SCHEDULES["track-2-rest"]
VARIANTS = ["qwen3_moe", "glm4_moe", "qwen3_next", "qwen3_5_moe_text"]


def quiet(*_: object) -> None:
    """No progress."""


def shape_at(path: Path) -> ModelShape:
    return ModelShape.from_config(read_config(path))


def schedule_of(schedule: str, tracks: int) -> Schedule:
    return parse_spec(spec_text(tracks, schedule), "spec.yaml").schedule()


def orders(source: Path, schedule: str, tracks: int) -> Calibration:
    """Random ones of neurons; heads stay in order."""
    shape = shape_at(source)
    random = random_assignments(shape, schedule_of(schedule, tracks))
    return Calibration(
        {
            i: Assignment(contiguous(shape, i).kv_heads, order.neurons, order.shared_neurons)
            for i, order in random.items()
        }
    )


def permuted(mlp: Any, order: Assignment) -> None:
    """Puts the neurons of an MLP or a mixture into this order by hand."""

    def put(module: Any, neurons: NDArray[np.int32]) -> None:
        rows = torch.from_numpy(neurons).long()
        for projection in (module.gate_proj, module.up_proj):
            projection.weight.data = projection.weight.data[rows]
        module.down_proj.weight.data = module.down_proj.weight.data[:, rows]

    if not hasattr(mlp, "experts"):
        return put(mlp, order.neurons)
    for name in ("shared_expert", "shared_experts"):
        if hasattr(mlp, name):
            put(getattr(mlp, name), order.shared_neurons)
    for expert, neurons in enumerate(order.neurons):
        rows = torch.from_numpy(neurons).long()
        both = mlp.experts.gate_up_proj.data[expert]
        mlp.experts.gate_up_proj.data[expert] = both[torch.cat([rows, len(rows) + rows])]
        down = mlp.experts.down_proj.data[expert]
        mlp.experts.down_proj.data[expert] = down[:, rows]
    return None


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_order_is_the_source_with_its_neurons_moved(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Each expert's for itself; to the bit, in either layout, and so under any schedule."""
    source, (ids_BS, keep_BS) = make_dense(variant), left_padded()
    known = orders(source, DEFERRED, tracks)
    moved = load(source)
    for i, order in known.assignments.items():
        permuted(moved.model.layers[i].mlp, order)
    moved.save_pretrained(tmp_path / "moved")
    path = convert(source, tracks, DEFERRED, AFFINITY, calibration=known)
    by_hand = convert(tmp_path / "moved", tracks, DEFERRED)
    found = {n: t for n, t in tensors(path).items() if ".assignment." not in n}
    assert same(found, tensors(by_hand))
    source_fused = fused(source, tmp_path / "fused")
    path_fused = convert(source_fused, tracks, DEFERRED, AFFINITY, calibration=known)
    assert same(load(path_fused).state_dict(), load(path).state_dict())
    with torch.no_grad():
        ours, theirs, in_order = (
            load(p)(input_ids=ids_BS, attention_mask=keep_BS).logits
            for p in (path, by_hand, convert(source, tracks, DEFERRED))
        )
    assert difference(ours, theirs, keep_BS) < TOLERANCE
    assert difference(ours, in_order, keep_BS) > 100 * TOLERANCE


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tracks_that_read_the_same_sum_to_the_source(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant)
    known = orders(source, DEFERRED, tracks)
    dense, model = (
        load(p) for p in (source, convert(source, tracks, DEFERRED, AFFINITY, calibration=known))
    )
    x_BSD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in known.assignments:
            expected = dense.model.layers[i].mlp(x_BSD)
            parts = [track.mlp(x_BSD) for track in model.model.layers[i].tracks.values()]
            torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_comes_back_from_either_layout(
    variant: str,
    tracks: int,
    make_dense: MakeDense,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, in blocks that end within experts, and after transformers saved it."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 300)
    apart = make_dense(variant)
    for number, source in enumerate((apart, fused(apart, tmp_path / "fused"))):
        there, shape = tensors(source), shape_at(source)
        known = Calibration(random_assignments(shape, schedule_of(DEFERRED, tracks)))
        path = convert(source, tracks, DEFERRED, AFFINITY, calibration=known)
        assert any(".experts.0." in name for name in tensors(path)) == (number == 0)
        assert same(tensors(back(path, tmp_path / f"back-{number}")), there)
        load(path).save_pretrained(tmp_path / f"saved-{number}")
        held = load(tmp_path / f"saved-{number}").model.layers
        for i, order in known.assignments.items():
            for of in shape.orders_of(i):
                kept = getattr(held[i].assignment, of)
                assert torch.equal(kept, torch.from_numpy(getattr(order, of)))
    # saved by transformers, which has experts apart
    assert same(tensors(back(tmp_path / "saved-0", tmp_path / "again")), tensors(apart))


def test_one_expert_with_a_damaged_order(make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("qwen3_moe")
    known = orders(source, DEFERRED, 2)
    layer, order = next((i, o) for i, o in known.assignments.items() if o.neurons.ndim == 2)
    order.neurons[2, 0] = order.neurons[2, 1]
    path = convert(source, 2, DEFERRED, AFFINITY, calibration=known)
    with pytest.raises(CheckpointError, match=rf"layers.{layer}.assignment.neurons .* each expert"):
        plan_to_dense(open_checkpoint(path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_activities_are_what_the_model_does(variant: str, make_dense: MakeDense) -> None:
    """What a neuron writes is what the mixture's output loses without it, over all tokens; what it
    reads is of the tokens that come to its expert."""
    model, shape, layer = load(make_dense(variant)), shape_at(make_dense(variant)), 3
    assert shape.is_mixture(layer)
    every = affinity.units_of(shape, Sublayer(layer, Kind.MLP))
    ids_NT = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    mlp = model.model.layers[layer].mlp
    inputs: list[torch.Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    seen = affinity.observe(model, shape, every, 2, ids_NT, quiet)
    hook.remove()
    x_NTD = torch.cat(inputs).clone()
    shared = [getattr(mlp, n) for n in ("shared_expert", "shared_experts") if hasattr(mlp, n)]
    with torch.no_grad():
        whole = mlp(x_NTD)
        chosen = mlp.gate(x_NTD.flatten(0, 1))[2]
        for units in every:
            for expert, activity in enumerate(seen[units]):
                down = mlp.experts.down_proj[expert]
                x_PD = x_NTD.flatten(0, 1)
                if units.of == "shared_neurons":
                    down, (first,) = shared[0].down_proj.weight, [shared[0].gate_proj.weight]
                else:
                    first = mlp.experts.gate_up_proj[expert]
                    x_PD = x_PD[(chosen == expert).any(-1)]
                assert (activity.tokens, activity.passed) == (64, len(x_PD))
                rows_R = next(iter(activity.read.values()))
                torch.testing.assert_close(rows_R, (x_PD @ first.T).pow(2).sum(0))
                kept = down[:, 5].clone()
                down[:, 5] = 0
                lost = (whole - mlp(x_NTD)).pow(2).sum()
                down[:, 5] = kept
                wrote = activity.written[5, 0, 0] * kept.pow(2).sum()
                torch.testing.assert_close(wrote, lost, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("variant", ["qwen3_moe", "qwen3_next"])
def test_neurons_and_heads_that_belong_together_are_found(
    variant: str, reads: bool, make_dense: MakeDense
) -> None:
    """Planted: half of the neurons of each expert have to do with the first half of the stream
    only, as the first half of the heads, the others with the rest. Experts read what heads wrote,
    or the other way round."""
    source = make_dense(variant)
    model, shape, draw = load(source), shape_at(source), np.random.default_rng(3)
    stages = "a0! m0! a1! m1! a2! m2! a3. m3! a4! m4! a5! m5!"
    attention, mixture = Sublayer(3, Kind.ATTENTION), Sublayer(3, Kind.MLP)
    if not reads:
        stages = "a0! m0! a1! m1! a2! m2! a3! m3. a4! m4! a5! m5!"
        attention = Sublayer(4, Kind.ATTENTION)
    halves = torch.arange(32) // 16
    planted: dict[affinity.Units, NDArray[np.int64]] = {}
    for sublayer in (attention, mixture):
        layer = model.model.layers[sublayer.layer]
        for units in affinity.units_of(shape, sublayer):
            size = units.size(shape, 2)
            group = np.broadcast_to(np.arange(size[-1]) * 2 // size[-1], size)
            if sublayer == mixture:
                group = draw.permuted(group, axis=-1)
            planted[units] = group
            for rule, writes in affinity._rules(shape, units):
                if writes != (sublayer == (attention if reads else mixture)):
                    continue
                for expert, own in enumerate(group.reshape(-1, size[-1])):
                    rows_RD = affinity._rows(layer, rule, expert)
                    for segment, begin in shape.segments(rule):
                        each = shape.length(segment) // len(own)
                        of = torch.tensor(own).repeat_interleave(each)
                        rows_RD.data[begin : begin + len(of)] *= of[:, None] == halves
    ids_NT = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    schedule = schedule_of(f"stages: '{stages}'", 2)
    found, (before, after) = affinity.assignments(model, shape, schedule, 2, ids_NT, quiet)
    assert before > 0.2 and after < 1e-6
    sides = set[tuple[int, ...]]()  # of the stream: those of each track's units
    for units, group in planted.items():
        if units.layer in found:
            by_track = np.take_along_axis(group, getattr(found[units.layer], units.of), axis=-1)
            halves_of = by_track.reshape(-1, 2, group.shape[-1] // 2)
            assert (halves_of == halves_of[:, :, :1]).all()
            sides |= {tuple(side) for side in halves_of[:, :, 0].tolist()}
    assert sides in ({(0, 1)}, {(1, 0)})


def test_each_expert_keeps_its_balance(make_dense: MakeDense) -> None:
    """Where all neurons of one would rather be on the first track, and of another on the second."""
    shape = shape_at(make_dense("qwen3_moe"))
    heads, neurons = (
        affinity.Units(Sublayer(0, kind), of)
        for kind, of in ((Kind.ATTENTION, "kv_heads"), (Kind.MLP, "neurons"))
    )
    found = np.random.default_rng(0).random((4, 4, 32)).astype(np.float32)  # heads, experts, own
    found[:2, :2] += 5
    found[2:, 2:] += 5
    owners, before, after = affinity.assign(shape, {(heads, neurons): found.reshape(4, -1)}, 2)
    assert after < before
    assert (owners[neurons].reshape(4, 32).sum(1) == 16).all()
    assert owners[neurons].reshape(4, 2, 16).sum(2).tolist() != [[0, 16]] * 4  # they moved


def test_pairs_with_experts_are_with_attention(make_dense: MakeDense) -> None:
    """Or there would be as many affinities as the square of all experts' neurons."""
    shape = shape_at(make_dense("qwen3_next"))
    pairs = affinity.own_read(shape, schedule_of("use: parallel_track, depth: 3", 2))
    sizes = [[u.size(shape, 2) for u in pair] for pair in pairs]
    assert any(len(size) == 2 for pair in sizes for size in pair)
    for pair, own in zip(pairs, sizes, strict=True):
        assert max(map(len, own)) == 1 or any(u.of == "kv_heads" for u in pair)
    kinds = {tuple(u.of for u in pair) for pair in pairs}
    assert {
        ("neurons", "kv_heads"),
        ("kv_heads", "neurons"),
        ("shared_neurons", "neurons"),
    } <= kinds


def test_a_dry_run_counts_them(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    """All affinities of a block are held, and of the products one expert's."""
    seconds = {"bfloat16": 1.0, "float32": 1e-9}
    monkeypatch.setattr(needs, "forward_seconds", lambda _, dtype, __: seconds[dtype])
    source = make_dense("qwen3_moe")
    spec = parse_spec(spec_text(2, "use: parallel_track, depth: 1", AFFINITY), "spec.yaml")
    plan = plan_conversion(open_checkpoint(source), spec, source_name="source")
    (phase,) = needs.calibration_needs(plan, spec, 4, 16, "bfloat16", "cpu").phases
    held = {one.what: one.nbytes for one in phase.held}
    heads, experts, neurons, channels = 4, 4, 32, 64
    assert shape_at(source).orders_of(0) == {"kv_heads": (heads,), "neurons": (experts, neurons)}
    assert held["all pairs of a run"] == 4 * heads * experts * neurons
    assert held["one pair's affinity"] == 5 * 4 * 48 * channels  # of the one layer that has an MLP
    assert phase.seconds == pytest.approx(4 * (6 + 5))  # five layers' experts run twice


def test_activities_of_experts_with_biases(make_dense: MakeDense) -> None:
    """GPT-OSS's, whose gate and up channels lie side by side: what a neuron writes is what the
    output loses without it."""
    model, shape = load(make_dense("gpt_oss")), shape_at(make_dense("gpt_oss"))
    (units,) = affinity.units_of(shape, Sublayer(3, Kind.MLP))
    ids_NT = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    inputs: list[torch.Tensor] = []
    mlp = model.model.layers[3].mlp
    hook = mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    seen = affinity.observe(model, shape, [units], 2, ids_NT, quiet)[units]
    hook.remove()
    x_NTD = torch.cat(inputs).clone()

    def out() -> torch.Tensor:
        found = mlp(x_NTD)
        whole: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return whole

    with torch.no_grad():
        whole = out()
        for expert, activity in enumerate(seen):
            kept = mlp.experts.down_proj[expert, 5].clone()
            mlp.experts.down_proj[expert, 5] = 0
            lost = (whole - out()).pow(2).sum()
            mlp.experts.down_proj[expert, 5] = kept
            wrote = activity.written[5, 0, 0] * kept.pow(2).sum()
            torch.testing.assert_close(wrote, lost, rtol=1e-3, atol=1e-9)
            assert activity.passed < activity.tokens == 64
