"""What is computed from a text: affinity, guesses, and the command that does both."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gc
import json
import os
import re
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrating import TOP, random_assignments, random_calibration
from click.testing import CliRunner
from conftest import Convert, MakeDense, byte_level, load, random_model, spec_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_modeling import SCHEDULES
from test_transform import back, same, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptconvert.calibrate import affinity, guess, on_disk
from ptconvert.calibrate import streams as stagewise
from ptconvert.calibrate.conversion import calibrate
from ptconvert.calibrate.guess import Fitted, _pick_rank, fit_guesses
from ptconvert.calibrate.reading import UNREAD
from ptconvert.calibrate.regression import MATRICES, RIDGES, Moments, best, fits
from ptconvert.calibrate.streams import most_streams
from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.errors import CheckpointError, EvaluationError, SpecError
from ptconvert.measure.windows import Windows
from ptconvert.modeling.executor import OneProcess, Streams, TorchEngine, Update, add_per_track
from ptconvert.models.guesses import guess_cost
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.lower import Step
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec

AFFINITY = "assignment: affinity\n"
FIRST_MLP = "a0! m0. a1! m1! a2! m2! a3! m3! a4! m4! a5! m5!"
QKV = ("q_proj", "k_proj", "v_proj")


def quiet(*_: object) -> None:
    """No progress."""


def shape_at(path: Path) -> ModelShape:
    return ModelShape.from_config(read_config(path))


# ---- the checkpoint


@pytest.mark.parametrize("tracks", [2, 4, 8])
@pytest.mark.parametrize("variant", ["llama-biases", "llama-mqa", "qwen3"])
def test_to_dense_gives_back_the_source(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = make_dense(variant, torch.float32)
    schedule = parse_spec(spec_text(tracks, SCHEDULES["mixed"]), "s").schedule()
    calibration = random_calibration(source, schedule, tracks)
    path = convert(source, tracks, SCHEDULES["mixed"], TOP, calibration=calibration)
    assert any(".guess." in name for name in tensors(path))
    assert same(tensors(back(path, tmp_path / "back")), tensors(source))
    # after transformers saved it, too
    load(path).save_pretrained(tmp_path / "saved")
    assert same(tensors(back(tmp_path / "saved", tmp_path / "again")), tensors(source))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_order_comes_back(make_dense: MakeDense, data: st.DataObject) -> None:
    source = make_dense("llama-biases", torch.bfloat16)
    shape = shape_at(source)
    spec = parse_spec(spec_text(4, "use: parallel_track, depth: 2", AFFINITY), "s")
    orders = {
        layer: Assignment(
            *(np.array(data.draw(st.permutations(range(n))), np.int32)
              for n in (shape.kv_heads, shape.neurons))
        )
        for layer in data.draw(st.sets(st.integers(0, 5)))
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "converted"
        plan = plan_conversion(
            open_checkpoint(source), spec, source_name="x", calibration=Calibration(orders)
        )
        execute(plan, path)
        found = tensors(path)
        for layer, order in orders.items():
            up = [found[f"model.layers.{layer}.tracks.{t}.mlp.up_proj.weight"] for t in range(4)]
            dense = tensors(source)[f"model.layers.{layer}.mlp.up_proj.weight"]
            assert torch.equal(torch.cat(up), dense[torch.from_numpy(order.neurons).long()])
        assert same(tensors(back(path, Path(directory) / "back")), tensors(source))


def test_a_damaged_order_is_refused(make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("llama")
    orders = {1: Assignment(np.zeros(4, np.int32), np.arange(48, dtype=np.int32))}
    path = convert(source, 4, "use: parallel_track, depth: 2", AFFINITY,
                   calibration=Calibration(orders))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"layers.1.assignment.kv_heads must hold each"):
        plan_to_dense(open_checkpoint(path))


def test_costs_are_those_of_the_models_parameters(make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("llama")
    spec = parse_spec(spec_text(4, SCHEDULES["mixed"], TOP), "s")
    calibration = random_calibration(source, spec.schedule(), 4)
    path = convert(source, 4, SCHEDULES["mixed"], TOP, calibration=calibration)
    counted = {n: p for n, p in load(path).named_parameters() if ".guess." in n}
    cost = guess_cost(shape_at(source), calibration.values["guess"], 4)
    assert cost is not None
    assert cost["parameters"] == sum(p.numel() for p in counted.values())
    assert cost["flops_per_token"] == 2 * sum(p.numel() for p in counted.values() if p.ndim == 2)
    dense = load(source)
    assert cost["parameters_share"] == cost["parameters"] / dense.num_parameters()
    matrices = [p.numel() for n, p in dense.named_parameters() if p.ndim == 2 and "embed" not in n]
    assert cost["flops_share"] == cost["flops_per_token"] / (2 * sum(matrices))
    full = plan_conversion(open_checkpoint(source), spec, source_name="x").summary()["guess"]
    assert full["ranks"] == {str(s): 5 for s in spec.schedule().own_kept(4)}


# ---- affinity


def test_affinity_is_kept_better_than_contiguously(make_dense: MakeDense) -> None:
    source = make_dense("llama", num_key_value_heads=8)
    schedule = parse_spec(spec_text(4, "use: parallel_track, depth: 2"), "s").schedule()
    ids_NT = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
    orders, (before, after) = affinity.assignments(
        load(source), shape_at(source), schedule, 4, ids_NT, quiet
    )
    assert set(orders) == set(range(6))
    for order in orders.values():
        assert sorted(order.neurons) == list(range(48)) and sorted(order.kv_heads) == list(range(8))
    assert after < before - 0.03


def test_units_that_read_each_other_are_found(make_dense: MakeDense) -> None:
    """Planted: two groups of units, hidden by a permutation, with nothing between them."""
    shape = shape_at(make_dense("llama"))
    draw = np.random.default_rng(1)
    a, b = (affinity.Units(Sublayer(i, Kind.MLP), "neurons") for i in (0, 1))
    groups = {s: draw.permutation(np.arange(48) % 2) for s in (a, b)}
    found = (groups[a][:, None] == groups[b][None, :]) * draw.random((48, 48))
    owners, before, after = affinity.assign(shape, {(a, b): found.astype(np.float32)}, 2)
    assert before > 0.3 and after == 0
    for s in (a, b):
        assert len({(int(g), int(o)) for g, o in zip(groups[s], owners[s], strict=True)}) == 2


def test_what_is_lost_is_what_the_model_loses(make_dense: MakeDense) -> None:
    """The affinity of neurons is the squared share of a reader's inputs that a writer gives."""
    source = make_dense("llama")
    model, shape = load(source), shape_at(source)
    ids_NT = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    a, b = (affinity.Units(Sublayer(i, Kind.MLP), "neurons") for i in (1, 2))
    seen = affinity.observe(model, shape, [a, b], 4, ids_NT, quiet)
    found = affinity.affinity(model, shape, (a, seen[a]), (b, seen[b]))
    caught: dict[str, torch.Tensor] = {}
    writer, reader = model.model.layers[1], model.model.layers[2]
    writer.mlp.down_proj.register_forward_pre_hook(lambda _, x: caught.update(h=x[0]))
    reader.mlp.down_proj.register_forward_pre_hook(lambda _, x: caught.update(out=x[0]))
    reader.post_attention_layernorm.register_forward_pre_hook(lambda _, x: caught.update(x=x[0]))
    with torch.no_grad():
        model(ids_NT)
        inverse = (1 / (caught["x"].pow(2).mean(-1) + 1e-6)).mean()
        u, v, want = 5, 7, 0.0
        put_D = writer.mlp.down_proj.weight[:, u] * reader.post_attention_layernorm.weight
        normed = reader.post_attention_layernorm(caught["x"])
        for linear in (reader.mlp.gate_proj, reader.mlp.up_proj):
            lost = caught["h"][..., u].pow(2).mean() * (linear.weight[v] @ put_D) ** 2
            want += float(inverse * lost / linear(normed)[..., v].pow(2).mean())
        wrote = reader.mlp.down_proj.weight[:, v].pow(2).sum() * caught["out"][..., v].pow(2).mean()
    assert found[u, v] == pytest.approx(want * float(wrote), rel=1e-3)


def test_a_kv_head_on_several_tracks_is_a_unit_of_each(make_dense: MakeDense) -> None:
    """With two KV heads for four tracks, what stays within a track is what its own query heads
    read and write: as in the model that holds each KV head twice, whose units are one a track."""
    two = load(make_dense("llama", num_key_value_heads=2))
    four = random_model("llama", num_key_value_heads=4)
    tensors = two.state_dict()
    for name in [n for n in tensors if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        heads = tensors[name].view(2, 4, 32)  # (KV head, channel, width)
        tensors[name] = heads.repeat_interleave(2, 0).reshape(16, 32)
    four.load_state_dict(tensors)
    schedule = parse_spec(spec_text(4, "use: parallel_track, depth: 2"), "s").schedule()
    ids_NT = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for model, heads in ((two, 2), (four, 4)):
        shape = dataclasses.replace(shape_at(make_dense("llama")), kv_heads=heads)
        sublayers = [
            Sublayer(0, Kind.ATTENTION),
            Sublayer(0, Kind.MLP),
            Sublayer(1, Kind.ATTENTION),
        ]
        every = [units for s in sublayers for units in affinity.units_of(shape, s)]
        seen = affinity.observe(model, shape, every, 4, ids_NT, quiet)
        pairs = [p for p in affinity.own_read(shape, schedule) if set(p) <= set(every)]
        found.append(
            [affinity.affinity(model, shape, (w, seen[w]), (r, seen[r])) for w, r in pairs]
        )
        orders, _ = affinity.assignments(model, shape, schedule, 4, ids_NT, quiet)
        assert heads == 4 or all(list(o.kv_heads) == [0, 1] for o in orders.values())
        assert all(sorted(o.kv_heads) == list(range(heads)) for o in orders.values())
    assert len(found[0]) == 3
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


# ---- guesses


def planted(noise: float, pairs: int = 4000) -> tuple[Moments, Moments, torch.Tensor]:
    """Targets that are an affine map of rank 2 of the features, and noise."""
    generator = torch.Generator().manual_seed(0)
    z_PF = torch.randn(pairs, 12, generator=generator) * torch.logspace(-2, 2, 12) + 1
    true_FD = torch.randn(12, 2, generator=generator) @ torch.randn(2, 6, generator=generator)
    true_FD /= torch.logspace(-2, 2, 12)[:, None]
    y_PD = z_PF @ true_FD + 3 + noise * torch.randn(pairs, 6, generator=generator)
    both = Moments(12, 6), Moments(12, 6)
    for moments, rows in zip(both, (slice(0, 3000), slice(3000, None)), strict=True):
        parts = (torch.split(p[rows], 500) for p in (z_PF, y_PD))
        for some_PF, some_PD in zip(*parts, strict=True):
            moments.add(some_PF, some_PD, torch.ones(500))
    return *both, true_FD


def test_regression_recovers_a_planted_map() -> None:
    train, test, true_FD = planted(noise=0.1)
    (fit,) = best([[f] for f in fits(train, test, 6, torch.eye(6))], 2)
    affine = fit.affine(2)
    scale_F1 = torch.logspace(-2, 2, 12)[:, None]  # of the features
    found_FD = (affine.up @ affine.down).T.float()
    torch.testing.assert_close(scale_F1 * found_FD, scale_F1 * true_FD, atol=0.01, rtol=0)
    least = 1000 * 6 * 0.1**2  # the noise's own
    assert float(fit.errors[2]) == pytest.approx(least, rel=0.1)
    assert float(fit.errors[1]) > 10 * least  # one direction is not enough,
    assert float(fit.errors[6]) == pytest.approx(least, rel=0.1)  # and more than two gain nothing
    whole = fits(train, test, 6, torch.eye(6), [1e-9])[0]  # without rank and ridge: least squares
    found_FD = (whole.affine(6).up @ whole.affine(6).down).T.float()
    torch.testing.assert_close(scale_F1 * found_FD, scale_F1 * true_FD, atol=0.02, rtol=0)


def test_smallest_rank_with_nearly_all_of_the_gain() -> None:
    errors = [0.9, 0.5, 0.3, 0.22, 0.21] + [0.2] * 4
    assert _pick_rank(errors, 8) == 4  # rank 2 has only 0.7 of the gain of 0.8
    assert _pick_rank([1.0, 0.995, 0.992], 2) == 0  # below 1% of the error
    assert _pick_rank([1.0, 1.2], 1) == 0


def test_a_guess_on_noise_is_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = Moments(12, 6), Moments(12, 6)
    for moments in (train, test):
        z_PF, y_PD = (torch.randn(300, n, generator=generator) for n in (12, 6))
        moments.add(z_PF, y_PD, torch.ones(300))
    (fit,) = best([[f] for f in fits(train, test, 6, torch.eye(6))], 6)
    energy = test.energy(torch.eye(6))
    assert _pick_rank([float(e) / energy for e in fit.errors], 6) == 0


def test_a_pair_counts_as_often_as_it_weighs() -> None:
    generator = torch.Generator().manual_seed(0)
    z_PF, y_PD = (torch.randn(200, n, generator=generator) for n in (12, 6))
    often_P = torch.randint(1, 5, (200,), generator=generator)
    weighed, repeated = Moments(12, 6), Moments(12, 6)
    weighed.add(z_PF, y_PD, often_P)
    many_PF, many_PD = (p.repeat_interleave(often_P, 0) for p in (z_PF, y_PD))
    repeated.add(many_PF, many_PD, torch.ones(len(many_PF)))
    assert weighed.pairs == pytest.approx(float(often_P.sum()))
    for one, other in zip(weighed.means(), repeated.means(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    metric_DD = torch.eye(6)
    errors, expected = (fits(m, m, 6, metric_DD)[0].errors for m in (weighed, repeated))
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=0)


def test_a_rank_goes_where_errors_count() -> None:
    """Two targets, of which one is larger and the other is read: rank 1 has room for one only, and
    among all maps of rank 1 none errs less as it is read."""
    generator = torch.Generator().manual_seed(0)
    z_PF = torch.randn(4000, 2, generator=generator)
    y_PD = z_PF * torch.tensor([3.0, 1.0]) + 0.01 * torch.randn(4000, 2, generator=generator)
    moments = Moments(2, 2)
    moments.add(z_PF, y_PD, torch.ones(4000))
    root_DD = torch.tensor([[0.1, 0.02], [0.0, 1.0]])
    for metric_DD, read in ((torch.eye(2), 0), (root_DD.T @ root_DD, 1)):
        fit = fits(moments, moments, 1, metric_DD, [1e-9])[0]
        affine = fit.affine(1)
        missed_PD = y_PD - affine(z_PF.double())
        counted = float((missed_PD @ metric_DD.double() * missed_PD).sum())
        assert float(fit.errors[1]) == pytest.approx(counted, rel=1e-3)
        assert int(affine.up[:, 0].abs().argmax()) == read
        for angle in torch.linspace(
            0, torch.pi, 181
        ).double():  # other maps: onto any one direction
            onto_D = torch.stack([angle.cos(), angle.sin()])
            weights_D = torch.linalg.lstsq(
                z_PF.double(), (y_PD.double() @ metric_DD.double() @ onto_D)[:, None]
            ).solution / (onto_D @ metric_DD.double() @ onto_D)
            missed_PD = y_PD - z_PF.double() @ weights_D * onto_D
            other = float((missed_PD @ metric_DD.double() * missed_PD).sum())
            assert other >= 0.999 * counted


def test_fitted_guesses_bring_the_model_nearer_to_its_source(
    make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model whose tracks' partials are all alike, a guess can be nearly exact."""
    monkeypatch.setattr(guess, "NEARLY_ALL", 0.9999)
    source = make_dense("llama")
    path = convert(source, 2, "use: sync_point_drop")
    model = load(path)
    with torch.no_grad():  # both tracks the same: the other's partial is one's own
        for layer in model.model.layers:
            first, second = layer.tracks.values()
            second.load_state_dict(first.state_dict())
    ids_NT = torch.randint(3, 96, (40, 24), generator=torch.Generator().manual_seed(0))
    found = fit_guesses(model.model, shape_at(source), ids_NT, 32, quiet)
    assert [str(f.sublayer) for f in found] == [f"a{i}" for i in range(6)]
    assert all(f.rank and f.error < 0.01 for f in found)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("name", ["track-4", "track-2-overlap-1", "sync_point_drop"])
def test_the_model_errs_as_the_fit_says(
    name: str, rank: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    """What its tracks lack of the others' partials after each stage that guesses, with its guess
    over without it, on the held-out windows: so each fit saw all guesses before it."""
    source = byte_level(make_dense, tmp_path / "source")
    spec = parse_spec(spec_text(4, SCHEDULES[name], f"guess: {{rank: {rank}}}\n"), "s")
    ids = torch.randint(3, 96, (40, 25), generator=torch.Generator().manual_seed(0))
    checkpoint, windows = open_checkpoint(source), Windows(ids, 25, ids.numel())
    calibration, figures = calibrate(checkpoint, spec, windows, "cpu", "auto", tmp_path, quiet)
    execute(
        plan_conversion(checkpoint, spec, source_name="s", calibration=calibration),
        tmp_path / "out",
    )
    ids_BT, decoder = ids[32:, :-1], load(tmp_path / "out").model  # each fifth batch of 8
    schedule = decoder.layers.schedule
    base_BTD = decoder.embed_tokens(ids_BT)
    streams, run = Streams(base_BTD), decoder.runner(base_BTD)
    errors = {}
    engine = TorchEngine(run, OneProcess())
    with torch.no_grad():
        for step in schedule.program:
            own = engine.run(step, streams)
            if own.guesses is not None:
                target_BTD = torch.stack(own.partials).sum(0)
                got_and_without = [
                    (g, g - guess) for g, guess in zip(own.seen, own.guesses, strict=True)
                ]
                sums = [0.0, 0.0]
                for t, ended_BTD in enumerate(add_per_track(streams.landed(), whole_of(own))):
                    metric_DD = reading(decoder, step, t)
                    size_BT = ended_BTD.square().mean(-1) + decoder.config.rms_norm_eps
                    for i, given_BTD in enumerate(got_and_without[t]):
                        missed_BTD = target_BTD - given_BTD
                        counted_BT = (missed_BTD @ metric_DD * missed_BTD).sum(-1) / size_BT
                        sums[i] += float(counted_BT.sum())
                errors[str(step.sublayers[-1])] = sums[0] / sums[1]
            streams.end(step, own, engine)
    assert errors and errors == pytest.approx(
        {f["sublayer"]: f["error"] for f in figures["guesses"] if f["rank"]}, rel=1e-3
    )
    assert len(errors) > 2 or rank == 1


def whole_of(update: Update) -> list[torch.Tensor]:
    """All that joins every track's stream, once for each track."""
    whole_BTD = torch.stack(update.partials).sum(0)
    return [whole_BTD if update.common is None else whole_BTD + update.common] * len(
        update.partials
    )


def reading(decoder: Any, step: Step, track: int) -> torch.Tensor:
    """What a Llama's track makes of its stream where it reads a stage's guess, (D, D)."""
    found_DD = torch.zeros(decoder.config.hidden_size, decoder.config.hidden_size)
    for later in decoder.layers.schedule.program[step.index + 1 :]:
        for sublayer in later.sublayers if step.bucket in later.reads else ():
            own = decoder.layers[sublayer.layer].tracks[str(track)]
            norm, block = own.post_attention_layernorm, own.mlp
            reads: tuple[str, ...] = ("gate_proj", "up_proj")
            if sublayer.kind is Kind.ATTENTION:
                norm, block, reads = own.input_layernorm, own.self_attn, QKV
            for name in reads:
                weight_RD = getattr(block, name).weight * norm.weight
                found_DD += weight_RD.T @ weight_RD / weight_RD.square().sum()
    return found_DD + UNREAD * found_DD.diagonal().mean() * torch.eye(len(found_DD))


def test_tokens_with_huge_activations_do_not_outweigh_the_others(
    make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trained models have them, at the first token: a guess is fitted to the others as if it
    weren't there. By plain squares it is fitted to that token, for which one rank is enough."""
    source = make_dense("llama")
    decoder = load(convert(source, 2, f'  - {{layers: 0-5, stages: "{FIRST_MLP}"}}\n')).model
    with torch.no_grad():  # token 3 alone has something in channel 0, and a neuron that answers it
        decoder.embed_tokens.weight[:, 0] = 0
        decoder.embed_tokens.weight[3, 0] = 20
        for track in decoder.layers[0].tracks.values():
            track.self_attn.o_proj.weight[0] = 0
        mlp = decoder.layers[0].tracks["0"].mlp
        mlp.gate_proj.weight[0], mlp.up_proj.weight[0], mlp.down_proj.weight[:, 0] = 0, 0, 0
        mlp.gate_proj.weight[0, 0] = mlp.up_proj.weight[0, 0] = 5
        mlp.down_proj.weight[1, 0] = 10
    ids_NT = torch.randint(4, 96, (80, 24), generator=torch.Generator().manual_seed(0))

    def fitted(first: int) -> Fitted:
        ids_NT[:, 0] = first
        (found,) = fit_guesses(decoder, shape_at(source), ids_NT, 16, quiet)
        return found

    usual, beside = fitted(4), fitted(3)
    assert usual.rank >= 8 and beside.rank >= 8
    assert beside.error == pytest.approx(usual.error, rel=0.1)
    pairs = guess._pairs
    monkeypatch.setattr(
        guess,
        "_pairs",
        lambda *a: (*pairs(*a)[:2], torch.ones(a[0].streams.base.shape[:2].numel())),
    )
    assert fitted(4).rank >= 8 and fitted(3).rank == 1


def test_a_sublayer_that_writes_nothing_is_not_guessed(
    make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("llama")
    model = load(convert(source, 2, "use: sync_point_drop"))
    for track in model.model.layers[0].tracks.values():
        torch.nn.init.zeros_(track.self_attn.o_proj.weight)
    ids_NT = torch.randint(3, 96, (40, 24), generator=torch.Generator().manual_seed(0))
    fitted = fit_guesses(model.model, shape_at(source), ids_NT, 8, quiet)
    found = {str(f.sublayer): f.rank for f in fitted}
    assert found["a0"] == 0 and found["a1"]


def test_guesses_of_overlapping_windows_see_what_is_before_them(
    make_dense: MakeDense, convert: Convert
) -> None:
    """Every schedule goes through, one that reorders sublayers and one that hides some too."""
    source = make_dense("llama-biases")
    ids_NT = torch.randint(3, 96, (10, 12), generator=torch.Generator().manual_seed(0))
    for name in ("mixed", "delayed-3", "track-2-overlap-1"):
        model = load(convert(source, 4, SCHEDULES[name]))
        found = fit_guesses(model.model, shape_at(source), ids_NT, 4, quiet)
        assert tuple(f.sublayer for f in found) == model.model.layers.schedule.own_kept(4)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made inside of it: now, and the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._storages = set[int]()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, nbytes: int) -> None:
        self._storages.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("widths", [1, 2])
def test_a_regression_keeps_low_rank_factors_and_needs_so_many_matrices(widths: int) -> None:
    rank, width = 8, 256
    features = widths * width
    with Alive() as alive:
        moments = [Moments(features, width) for _ in range(2)]
        for some in moments:
            for _ in range(2 * width // 64 + 1):
                some.add(torch.randn(64, features), torch.randn(64, width), torch.ones(64))
        found = fits(moments[0], moments[1], rank, torch.eye(width))
        assert alive.most <= 8 * MATRICES * (features + width) ** 2
        del some, moments
        gc.collect()
        factors = 8 * len(RIDGES) * rank * (features + width)
        assert factors <= alive.now <= factors + 8 * (len(found) + 2) * (features + width)
    # at the shape of an 8B model in 8 tracks, with guesses of rank 64, what the docstring says
    assert pytest.approx(6.0e9, rel=0.01) == 8 * MATRICES * (8192 + 4096) ** 2
    assert 8 * 8 * len(RIDGES) * 64 * (8192 + 4096) == pytest.approx(0.2e9, rel=0.01)


@pytest.mark.parametrize(
    ("stages", "streams"),
    [
        ("a0. m0. a1. m1!", 9 + 5),  # 2n + 1, and n + 1 for a sublayer at hand
        ("a0. m0. a1|m1!", 9 + 5),
        ("a0. m0|a1. m1!", 9 + 2 * 5),
        ("a0^3 m0. a1. m1!", 9 + 5 + 5),  # n + 1 for an all-reduce in flight,
        ("a0~3 m0. a1. m1!", 9 + 5 + 1),  # 1 where nobody sees its own partial
        ("a0^3 m0^2 a1^1 m1!", 1 + 5 + 2 * 5),  # and nothing waits
        ("a0! m0! a1! m1!", 1),
    ],
)
def test_how_many_streams_there_are_at_most(stages: str, streams: int) -> None:
    assert most_streams(Schedule.parse(stages), 4) == streams


def test_streams_in_flight_count_for_what_goes_to_disk(
    make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ids_NT = make_dense("llama", num_hidden_layers=2), torch.zeros(5, 24, dtype=torch.int64)
    items = '  - {layers: 0-1, stages: "a0^3 m0. a1. m1!"}\n'
    decoder = load(convert(source, 4, items)).model
    for streams in (18, 19):
        monkeypatch.setattr(stagewise, "MEMORY_BYTES", streams * 5 * 24 * 32 * 4)
        first, *_ = stagewise.batches(decoder, ids_NT, None)
        assert (first.keep is stagewise._here) == (streams == 19)


@pytest.mark.parametrize("stages", ["a0. m0|a1. m1!", "a0^3 m0. a1. m1!"])
def test_of_all_windows_only_streams_are_kept(
    stages: str, make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 20 windows more take at most."""
    monkeypatch.setattr(stagewise, "BATCH_TOKENS", 2 * 24)
    width, most = 32, list[int]()
    source = make_dense("llama", num_hidden_layers=2)
    model = load(convert(source, 4, f'  - {{layers: 0-1, stages: "{stages}"}}\n'))
    for windows in (20, 40):
        ids_NT = torch.randint(3, 96, (windows, 24), generator=torch.Generator().manual_seed(0))
        with Alive() as alive:
            fit_guesses(model.model, shape_at(source), ids_NT, 4, quiet)
        most.append(alive.most)
    streams = most_streams(model.model.layers.schedule, 4) * 20 * 24 * width * 4
    assert 0.8 * streams < most[1] - most[0] <= 1.15 * streams
    # at the shape of an 8B model in 8 tracks
    eight_B = most_streams(Schedule.parse("a0. m0. a1. m1!"), 8) * 65536 * 4096 * 4
    assert pytest.approx(28e9, rel=0.01) == eight_B


@pytest.mark.parametrize("tracks", [2, 4])
def test_a_sublayer_runs_once_however_many_tracks_are_fitted(
    tracks: int, make_dense: MakeDense, convert: Convert
) -> None:
    source, calls = make_dense("llama", num_hidden_layers=2), list[object]()
    path = convert(source, tracks, '  - {layers: 0-1, stages: "a0. m0. a1. m1!"}\n')
    decoder = load(path).model
    for layer in decoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(None))
    ids_NT = torch.randint(3, 96, (10, 12), generator=torch.Generator().manual_seed(0))
    fit_guesses(decoder, shape_at(source), ids_NT, 4, quiet)  # 5 batches of 2
    assert len(calls) == 5 * 3  # sublayers


@pytest.mark.parametrize("name", ["mixed", "delayed-3"])
def test_streams_on_disk_give_the_same_guesses(
    name: str,
    make_dense: MakeDense,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_dense("llama-biases")
    model, shape = load(convert(source, 4, SCHEDULES[name])), shape_at(source)
    ids_NT = torch.randint(3, 96, (10, 12), generator=torch.Generator().manual_seed(0))
    expected = fit_guesses(model.model, shape, ids_NT, 4, quiet)
    monkeypatch.setattr(stagewise, "MEMORY_BYTES", 0)
    mapped, folders = on_disk.mapped, set[Path | None]()

    def seen(folder: Path | None, tensor: torch.Tensor) -> torch.Tensor:
        folders.add(folder)
        return mapped(folder, tensor)

    monkeypatch.setattr(stagewise, "mapped", seen)
    folder = tmp_path / "scratch"
    folder.mkdir()
    found = fit_guesses(model.model, shape, ids_NT, 4, quiet, folder)
    assert folders == {folder} and not list(folder.iterdir())
    assert [(f.sublayer, f.rank, f.error) for f in found] == [
        (f.sublayer, f.rank, f.error) for f in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a.up, b.up) for a, b in zip(one.guesses, other.guesses, strict=True))


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EvaluationError, match=r"No space left on device: .* too much for memory"):
        on_disk.mapped(tmp_path, torch.zeros(3))
    assert not list(tmp_path.iterdir())


# ---- the command and the spec


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("assignment: random\n", "s:3: assignment is random; it must be contiguous or affinity"),
        ("assignment: {}\n", "s:3: method is missing; it must be contiguous or affinity"),
        ("assignment: {method: x}\n", "s:3: method is x; it must be contiguous or affinity"),
        ("assignment: {method: affinity, y: 1}\n", "s:3: unknown key 'y'; assignment takes method"),
        ("guess: 3\n", "s:3: guess is 3; it must be a mapping of rank"),
        ("guess: {}\n", "s:3: rank is missing; it must be a whole number, 1 to 4096"),
        ("guess: {rank: 0}\n", "s:3: rank is 0; it must be a whole number, 1 to 4096"),
        ("guess: {rank: 2, x: 1}\n", "s:3: unknown key 'x'; guess takes rank"),
    ],
)
def test_spec_errors(top: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec_text(4, "use: parallel_track, depth: 2", top), "s")
    assert str(caught.value) == message


@pytest.mark.parametrize("tracks", [1, 4])
@pytest.mark.parametrize("use", ["use: ladder", "use: tensor_parallel"])
def test_nothing_to_compute_is_said(use: str, tracks: int) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec_text(tracks, use, TOP), "s")
    first, second = str(caught.value).splitlines()
    assert first.startswith("s:3: assignment is affinity, but the tracks' streams never differ")
    assert second.startswith("s:4: guess: no track goes on without the others' partials")


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_the_command(make_dense: MakeDense, tmp_path: Path) -> None:
    source = byte_level(make_dense, tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    spec = tmp_path / "spec.yaml"
    spec.write_text(spec_text(4, "use: parallel_track, depth: 2", TOP))
    plain = tmp_path / "plain.yaml"
    plain.write_text(spec_text(4, "use: parallel_track, depth: 2"))
    code, out = run("transform", source, tmp_path / "out", "--spec", spec)
    assert code == 2 and out == f"error: {spec}: guess is computed from a text: --text FILE\n"
    unused = ("--spec", plain, "--text", text, "--dry-run")
    code, out = run("transform", source, tmp_path / "out", *unused)
    assert code == 0 and out.startswith("--text isn't read: nothing in the spec needs a text\n")
    code, out = run("transform", source, tmp_path / "out", "--spec", spec, "--dry-run")
    assert code == 0 and "rank 5" in out and not (tmp_path / "out").exists()
    code, out = run("transform", source, tmp_path / "out", "--spec", spec, "--text", text,
                    "--windows", 32, "--window", 64, "--device", "cpu", "--json")  # fmt: skip
    assert code == 0, out
    figures: dict[str, Any] = json.loads(out[out.index("{") :])  # after what is said meanwhile
    assert figures["assignment"] == "affinity" and figures["calibration"]["tokens"] == 2048
    shares = figures["calibration"]["affinity_between_tracks"]
    assert shares["after"] < shares["before"]
    kept = {g["sublayer"]: g["rank"] for g in figures["calibration"]["guesses"] if g["rank"]}
    assert kept and figures["guess"]["ranks"] == kept
    config = read_config(tmp_path / "out")
    assert config["ptconvert"]["guess"] == kept  # type: ignore[index]
    assert same(tensors(back(tmp_path / "out", tmp_path / "back")), tensors(source))
    assert {p.name for p in tmp_path.iterdir()} == {"source", "text.txt", "spec.yaml", "plain.yaml",
                                                    "out", "back"}  # fmt: skip
    code, out = run("transform", source, tmp_path / "few", "--spec", spec, "--text", text,
                    "--windows", 4, "--window", 64)  # fmt: skip
    assert code == 2 and "error: the text gives 4 windows of 64 tokens; guesses need at" in out
    code, out = run("show", tmp_path / "out", "--json")
    assert json.loads(out)["guess"] == figures["guess"]
    code, out = run("transform", source, tmp_path / "two", "--spec", spec, "--text", text,
                    "--tokens", 2048, "--window", 64, "--device", "cpu")  # fmt: skip
    assert code == 0 and out.startswith("--tokens N: use --windows")  # the name that it had
    assert "affinity between units of different tracks" in out and "guesses: " in out
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "two"))


@pytest.mark.parametrize("top", [TOP, "assignment: {method: affinity}\n", "guess: {rank: 2}\n"])
def test_what_is_not_finite_is_one_line(top: str, make_dense: MakeDense, tmp_path: Path) -> None:
    source = byte_level(make_dense, tmp_path / "source")
    given = load_file(source / "model.safetensors")
    given["model.layers.1.mlp.up_proj.weight"][0] = float("nan")
    save_file(given, source / "model.safetensors", {"format": "pt"})
    text, spec = tmp_path / "text.txt", tmp_path / "spec.yaml"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    spec.write_text(spec_text(4, "use: parallel_track, depth: 2", top))
    code, out = run("transform", source, tmp_path / "out", "--spec", spec, "--text", text,
                    "--windows", 16, "--window", 64, "--device", "cpu")  # fmt: skip
    assert code == 2 and not (tmp_path / "out").exists()
    last = out.splitlines()[-1]
    assert re.match("error: layer [12]: what it computes from the text isn.t all finite", last)


@pytest.mark.parametrize(
    ("device", "asked", "opened"),
    [
        ("cpu", "auto", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
        ("meta", "auto", "bfloat16"),
        ("meta", "float16", "float16"),
    ],
)
def test_what_the_text_is_run_in(
    device: str,
    asked: str,
    opened: str,
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = functools.partial(make_dense, dtype=torch.bfloat16)
    source, seen = byte_level(stored, tmp_path / "source"), []
    (tmp_path / "text.txt").write_text("the quick brown fox " * 40)
    (tmp_path / "spec.yaml").write_text(spec_text(4, "use: parallel_track, depth: 2", TOP))

    def stop(_: object, dtype: str, device: str) -> None:
        seen.append((dtype, device))
        raise CheckpointError("far enough")

    monkeypatch.setattr("ptconvert.calibrate.conversion.open_model", stop)
    files = ("--spec", tmp_path / "spec.yaml", "--text", tmp_path / "text.txt", "--window", 32)
    code, out = run("transform", source, tmp_path / "out", *files, "--device", device,
                    "--dtype", asked)  # fmt: skip
    assert (code, out, seen) == (2, "error: far enough\n", [(opened, device)])


def test_random_assignments_cover_layers_of_tracks(make_dense: MakeDense) -> None:
    schedule = Schedule.parse("a0! m0! a1. m1! a2! m2! a3! m3! a4! m4! a5! m5!")
    assert set(random_assignments(shape_at(make_dense("llama")), schedule)) == {1}
