"""Models with guesses and assignments of their own: parity, and everything that models must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import TOP, for_reference, permuted, random_calibration
from conftest import Convert, MakeDense, load, spec_text
from reference import reference_logits
from test_modeling import SCHEDULES, TOLERANCE, difference, left_padded, step_logits
from test_verify import expected_of, job, run_many

from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.modeling.executor import OneProcess, Streams, TorchEngine
from ptconvert.modeling.layers import Placement
from ptconvert.runtime.launch import launch
from ptconvert.runtime.load import load_rank
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec
from ptconvert.verify.run import _checks

GUESSING = ("track-4", "sync_point_drop", "delayed-1", "delayed-3", "track-2-overlap-1", "mixed")


def calibrated(source: Path, tracks: int, name: str, convert: Convert) -> tuple[Path, Calibration]:
    parallel = read_section(read_config(source)).parallel
    schedule = parse_spec(spec_text(tracks, SCHEDULES[name]), "s").schedule(parallel)
    calibration = random_calibration(source, schedule, tracks)
    return convert(source, tracks, SCHEDULES[name], TOP, calibration=calibration), calibration


@pytest.mark.parametrize(("tracks", "variant"), [(2, "llama"), (4, "llama-biases"), (4, "qwen3")])
@pytest.mark.parametrize("name", GUESSING)
def test_matches_the_reference_in_prefill_and_decode(
    name: str, tracks: int, variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant)
    path, calibration = calibrated(source, tracks, name, convert)
    model, dense = load(path), load(source)
    permuted(calibration, dense)
    ids_BS, keep_BS = left_padded()
    text, guesses = str(model.model.layers.schedule), for_reference(calibration, tracks)
    expected = reference_logits(dense, text, tracks, ids_BS, keep_BS, guesses=guesses)
    assert difference(step_logits(model, ids_BS, keep_BS, 12), expected, keep_BS) < TOLERANCE
    assert difference(step_logits(model, ids_BS, keep_BS, 7), expected, keep_BS) < TOLERANCE


@pytest.mark.parametrize("name", ["track-4", "delayed-3", "mixed"])
def test_two_sublayers_of_a_stage_that_read_one_norm(
    name: str, make_dense: MakeDense, convert: Convert
) -> None:
    """Each has guesses of its own; norms of queries and keys go with their heads."""
    test_matches_the_reference_in_prefill_and_decode(name, 4, "cohere", make_dense, convert)


def test_negative_controls(make_dense: MakeDense, convert: Convert) -> None:
    """A guess left out, tracks' guesses exchanged, units not where they are said to be."""
    source = make_dense("llama")
    path, calibration = calibrated(source, 4, "mixed", convert)
    model, dense = load(path), load(source)
    ids_BS, keep_BS = left_padded()
    found, text = step_logits(model, ids_BS, keep_BS, 12), str(model.model.layers.schedule)
    guesses = for_reference(calibration, 4)
    contiguous = reference_logits(dense, text, 4, ids_BS, keep_BS, guesses=guesses)
    assert difference(found, contiguous, keep_BS) > 100 * TOLERANCE
    permuted(calibration, dense)
    for name in guesses:
        for changed in ({k: v for k, v in guesses.items() if k != name},
                        {**guesses, name: guesses[name][::-1]}):  # fmt: skip
            control = reference_logits(dense, text, 4, ids_BS, keep_BS, guesses=changed)
            assert difference(found, control, keep_BS) > 100 * TOLERANCE, name


@pytest.mark.parametrize("variant", ["llama-biases", "llama-mqa", "qwen2-two-kv-tied"])
def test_the_dense_function_stays(variant: str, make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense(variant)
    path, _ = calibrated(source, 4, "mixed", convert)
    model = load(path)
    ids_BS, keep_BS = left_padded()
    expected = step_logits(load(source), ids_BS, keep_BS, 12)
    assert difference(step_logits(model, ids_BS, keep_BS, 12), expected, keep_BS) > 100 * TOLERANCE
    model.model.layers.schedule = dense_schedule(6)
    assert difference(step_logits(model, ids_BS, keep_BS, 12), expected, keep_BS) < TOLERANCE
    mlp = model.model.layers[1].tracks["1"].mlp  # control: a unit out of its place
    mlp.down_proj.weight.data = mlp.down_proj.weight.data.roll(1, 1)
    assert difference(step_logits(model, ids_BS, keep_BS, 12), expected, keep_BS) > 100 * TOLERANCE


@pytest.mark.slow
def test_everything_else_a_model_does(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Compiling, gradient checkpointing, generating with a cache, saving and opening again."""
    source = make_dense("llama")
    path, calibration = calibrated(source, 4, "mixed", convert)
    model = load(path)
    ids_BS, keep_BS = left_padded()
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids_BS).logits, model(ids_BS).logits)
    settings = {"attention_mask": keep_BS, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids_BS, use_cache=False, **settings)
    assert torch.equal(model.generate(ids_BS, **settings), plain)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = load(tmp_path / "again")
    a, b = (step_logits(m, ids_BS, keep_BS, 12) for m in (model, again))
    assert torch.equal(a, b)
    order = again.model.layers[1].assignment.neurons
    assert torch.equal(order, torch.from_numpy(calibration.assignments[1].neurons))
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids_BS, attention_mask=keep_BS, labels=ids_BS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    ordinary = gradients()
    assert all(g.abs().sum() > 0 for g in ordinary.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, ordinary[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("tracks", "ranks"), [(4, 1), (4, 2), (2, 2)])
def test_on_real_ranks(tracks: int, ranks: int, make_dense: MakeDense, convert: Convert) -> None:
    """verify's checks hold: the same counts, each rank with its own tracks' guesses only."""
    source = make_dense("llama-biases")
    paths = [calibrated(source, tracks, name, convert)[0] for name in ("mixed", "track-4")]
    by_rank = launch(run_many, [job(path) for path in paths], ranks, "gloo", "cpu", 300)
    for index, path in enumerate(paths):
        expected, results = expected_of(path), [r["results"][index] for r in by_rank]
        assert not [c for c in _checks(results, expected) if not c.ok]
        assert len(results[0]["counted"]["prefill"]) == expected.schedule.counts.all_reduces


def test_a_rank_loads_its_own_guesses_only(make_dense: MakeDense, convert: Convert) -> None:
    path, calibration = calibrated(make_dense("llama"), 4, "track-4", convert)
    model: Any = load_rank(path, Placement(1, 2), None)  # type: ignore[arg-type]
    found = {n for n, _ in model.named_parameters() if ".guess." in n}
    assert found == {n for n in calibration.tensors if ".tracks.2." in n or ".tracks.3." in n}


def test_config_says_which_sublayers_guess(make_dense: MakeDense, convert: Convert) -> None:
    path, calibration = calibrated(make_dense("llama"), 4, "mixed", convert)
    section = read_section(open_checkpoint(path).config)
    assert section.guesses == calibration.values["guess"] and section.assigned
    parameters = sum(p.numel() for n, p in load(path).named_parameters() if ".guess." in n)
    assert parameters * 4 == sum(t.nbytes for t in calibration.tensors.values())


def test_schedule_says_where_own_partials_are_read_alone() -> None:
    schedule = Schedule.parse("a0! m0^2 a1|m1. a2. m2~1 a3^1 m3!")
    assert [str(s) for s in schedule.own_kept(2)] == ["m0", "a1", "m1", "a2", "a3"]
    assert not schedule.own_kept(1)
    pairs = {f"{w}>{r}" for w, r in schedule.own_read()}
    assert pairs == {"m0>a1", "m0>m1", "m0>a2", "a1>a2", "m1>a2", "a1>m2", "m1>m2", "a2>m2",
                     "a3>m3"}  # fmt: skip


def test_what_is_in_flight_has_landed_once_a_deferred_stage_is_over(
    make_dense: MakeDense, convert: Convert
) -> None:
    rest = "  - {layers: 2-5, use: tensor_parallel}\n"
    items = '  - {layers: 0-1, stages: "a0! m0^1 a1. m1!"}\n' + rest
    decoder = load(convert(make_dense("llama"), 2, items)).model
    embedded_BSD = decoder.embed_tokens(torch.tensor([[5, 6, 7, 8]]))
    run, dense = decoder.runner(embedded_BSD), dense_schedule(decoder.layers.schedule.layers)
    engine = TorchEngine(run, OneProcess())
    student, whole = Streams(embedded_BSD), Streams(embedded_BSD)
    for index in range(2):
        for schedule, streams in ((decoder.layers.schedule, student), (dense, whole)):
            step = schedule.program[index]
            streams.end(step, engine.run(step, streams), engine)
    view = student.view(decoder.layers.schedule.program[2])
    for landed_BSD, view_BSD in zip(student.landed(), view, strict=False):
        assert torch.allclose(landed_BSD, whole.settled(), atol=1e-5)
        assert not torch.allclose(view_BSD, whole.base, atol=1e-3)
