"""What a plan weighs with: an assignment and guesses for no schedule in particular."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Convert, MakeDense, byte_level, load
from hypothesis import assume, given
from hypothesis import strategies as st
from test_calibrate import dense_streams, quiet, reading, shape_at
from test_cli import run
from test_plan import SIZE, TEXT

from ptconvert.calibrate import stand_ins
from ptconvert.calibrate.conversion import _stored
from ptconvert.calibrate.guess import Fitted, fit_alone, fitted_tensors, put_guesses
from ptconvert.calibrate.streams import HELD_OUT
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import EvaluationError
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import cut_windows, windows_between
from ptconvert.plan.case import Case, read_texts
from ptconvert.plan.sensitivity import Meter, Store, store_file
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec, written

WANTED = {"assignment": "affinity", "guess": 8}
MIXED = "a0^1 m0! a1. m1. a2! m2! a3^1 m3^1 a4. m4! a5! m5!"


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("plan") / "source")


def case_of(source: Path, wanted: dict[str, Any]) -> Case:
    checkpoint = open_checkpoint(source)
    windows, apart = read_texts(checkpoint, (TEXT,), 24, 8, wanted)
    batch = BatchSize(4, "cpu")
    return Case(checkpoint, 4, windows, "float32", "cpu", batch, wanted, apart)


def meter_of(case: Case, file: Path) -> Meter:
    return Meter(case, Store(file), quiet)


def test_a_guess_errs_on_the_dense_models_streams_as_it_says(
    make_dense: MakeDense, convert: Convert
) -> None:
    """As the next sublayer reads it, on the windows held out; and in place it gives just that."""
    path = make_dense("llama")
    shape = shape_at(path)
    decoder = load(convert(path, 4, f"use: parallel_track, depth: {LAYERS}")).model
    decoder.layers.schedule = stand_ins.overlapped(shape)
    ids_NT = torch.randint(3, 96, (40, 24), generator=torch.Generator().manual_seed(0))
    fitted = fit_alone(decoder, shape, ids_NT, 8, quiet)
    assert [str(f.sublayer) for f in fitted] == [f"{b}{i}" for i in range(6) for b in "am"][:-1]
    assert sum(f.rank > 0 for f in fitted) > 6
    put_guesses(decoder, fitted)
    ids_BT, errors = ids_NT[32:], {}  # each fifth batch of 8
    dense = dense_streams(path, ids_BT)
    before_BTD, run_sublayer = decoder.entry(input_ids=ids_BT)
    with torch.no_grad():
        for step in decoder.layers.schedule.program:
            (sublayer,) = step.sublayers
            after_BTD, sums = dense[sublayer], [0.0, 0.0]
            own = run_sublayer(sublayer, [before_BTD], True)
            for t, guess_BTD in enumerate(own.guesses or ()):
                lacks_BTD = after_BTD - before_BTD - own.partials[t]
                size_BT = after_BTD.square().mean(-1) + decoder.config.rms_norm_eps
                metric_DD = reading(decoder, step, t)
                for i, missed_BTD in enumerate((lacks_BTD - guess_BTD, lacks_BTD)):
                    counted_BT = (missed_BTD @ metric_DD * missed_BTD).sum(-1) / size_BT
                    sums[i] += float(counted_BT.sum())
                errors[sublayer] = sums[0] / sums[1]
            before_BTD = after_BTD
    assert errors == pytest.approx({f.sublayer: f.error for f in fitted if f.rank}, rel=1e-3)
    assert min(errors.values()) < 0.9
    for f in fitted:
        block = {"a": "self_attn", "m": "mlp"}[str(f.sublayer)[0]]
        for track in decoder.layers[f.sublayer.layer].tracks.values():
            if f.rank:
                assert not track.guess[block].from_partial.weight.any()  # from its input only
            else:
                assert block not in getattr(track, "guess", ())


def test_costs_are_of_a_conversion_with_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the assignment and the guesses that were found, in a checkpoint by that schedule."""
    found: dict[str, Any] = {}
    assign, fit = stand_ins.assign, fit_alone

    def assigned(*args: Any) -> Any:
        found["assignment"] = assign(*args)
        return found["assignment"]

    def fitted(*args: Any) -> list[Fitted]:
        found["guess"] = fit(*args)
        return list(found["guess"])

    monkeypatch.setattr(stand_ins, "assign", assigned)
    monkeypatch.setattr("ptconvert.calibrate.stand_ins.fit_alone", fitted)
    case, schedule = case_of(source, WANTED), Schedule.parse(MIXED)
    (cost,) = meter_of(case, tmp_path / "with").costs([schedule], "step")
    kept = set(schedule.own_kept(4))
    guesses = [f for f in found["guess"] if f.rank and f.sublayer in kept]
    assert len(guesses) > 4 and len(found["assignment"]) == LAYERS
    calibration = Calibration(
        found["assignment"],
        {"assignment": "affinity", "guess": {f.sublayer: f.rank for f in guesses}},
        {name: _stored(t, "F32") for name, t in fitted_tensors(guesses, case.shape)},
    )
    text = [
        *("format: 1", "tracks: 4", *written(WANTED), "schedule:"),
        *(f"  - layers: 0-{LAYERS - 1}", f'    stages: "{MIXED}"'),
    ]
    spec = parse_spec("\n".join(text), "s")
    plan = plan_conversion(case.source, spec, source_name="s", calibration=calibration)
    execute(plan, tmp_path / "out")
    models = [
        open_model(open_checkpoint(path), "float32", "cpu") for path in (source, tmp_path / "out")
    ]
    reference = divergence.reference(models[0], case.windows, case.batch, quiet)
    tokens = divergence.measure(models[1], reference, case.windows, case.batch, quiet)
    assert cost.kl == pytest.approx(tokens.kl.mean(), rel=1e-3)
    (plain,) = meter_of(case_of(source, {}), tmp_path / "without").costs([schedule], "step")
    assert cost.kl < 0.95 * plain.kl


def test_what_waits_for_nothing_is_as_without(source: Path, tmp_path: Path) -> None:
    """Where no track goes on without the others' partials, there is nothing to guess."""
    (dense,) = meter_of(case_of(source, WANTED), tmp_path / "costs").costs(
        [dense_schedule(LAYERS)], "step"
    )
    assert dense.kl < 1e-6 and dense.agreement == 1


def test_the_store_is_by_what_is_in_place(source: Path, tmp_path: Path) -> None:
    case = case_of(source, WANTED)
    cases = [
        case,
        *(dataclasses.replace(case, wanted={k: WANTED[k]}) for k in WANTED),
        dataclasses.replace(case, wanted={**WANTED, "guess": 4}),
        dataclasses.replace(case, apart=case.apart[1:]),
    ]
    assert len({store_file(tmp_path, "digest", one) for one in cases}) == len(cases)
    # a scale is not measured with
    other = dataclasses.replace(case, wanted={**WANTED, "scale": "fitted"})
    assert store_file(tmp_path, "digest", case) == store_file(tmp_path, "digest", other)


@given(
    tokens=st.integers(30, 400),
    length=st.integers(1, 30),
    count=st.integers(1, 20),
    wanted=st.integers(1, 20),
)
def test_windows_between_share_no_predicted_token(
    tokens: int, length: int, count: int, wanted: int
) -> None:
    ids = list(range(tokens))
    assume((tokens - 1) // length >= count)  # no windows that overlap
    windows = cut_windows(ids, length, count)
    found = windows_between(windows, ids, wanted)
    assert found.shape[1] == length + 1 and len(found) <= wanted
    rows = [*windows.ids.tolist(), *found.tolist()]
    assert all(row == list(range(row[0], row[0] + length + 1)) for row in rows)
    predicted = [i for row in rows for i in row[1:]]
    assert len(set(predicted)) == len(predicted)
    if len(found) < wanted:  # no more fit
        taken = sorted(row[0] for row in rows)
        ends = [*taken[1:], tokens - 1]
        assert all(b - a < 2 * length for a, b in zip(taken, ends, strict=True))


def test_where_the_text_has_no_more_they_are_fitted_on_the_same_windows(
    source: Path, tmp_path: Path
) -> None:
    checkpoint, text = open_checkpoint(source), tmp_path / "short.txt"
    text.write_text(TEXT.read_text()[: 6 * 24])
    windows, apart = read_texts(checkpoint, (text,), 24, None, WANTED)
    assert len(windows.ids) == 6 and torch.equal(apart, windows.ids)
    assert len(read_texts(checkpoint, (text,), 24, 1, WANTED)[1]) == HELD_OUT
    windows, apart = read_texts(checkpoint, (text,), 48, None, {"assignment": "affinity"})
    assert len(windows.ids) == 3 and torch.equal(apart, windows.ids)
    with pytest.raises(EvaluationError, match="3 windows of 48 tokens; guesses need at least 5"):
        read_texts(checkpoint, (text,), 48, None, WANTED)


def test_the_command_says_that_they_are_in_place(source: Path, tmp_path: Path) -> None:
    size = (*SIZE, "--rounds", 1, "--cache", tmp_path / "cache")
    asked = ("--tracks", 4, "--max-syncs", 5, *size)
    wanted = ("--assignment", "affinity", "--guess", 8)
    plain = json.loads(run("plan", source, "--text", TEXT, *asked, "--json")[0])
    figures = json.loads(run("plan", source, "--text", TEXT, *asked, *wanted, "--json")[0])
    assert plain["in_place"] == {} and figures["in_place"] == WANTED
    assert figures["chosen"]["kl"] < plain["chosen"]["kl"]
    told = " ".join(figures["spec"].replace("#", " ").split())
    assert "Measured above with others in place, fitted for no schedule in particular." in told
    out, _ = run("plan", source, "--text", TEXT, *asked, *wanted)
    assert (
        "All with assignment and guess in place, fitted for no schedule in particular."
        in " ".join(out.split())
    )
    assert list((tmp_path / "cache" / "plan").glob("*")) and not list(
        (tmp_path / "cache" / "plan").glob("tracks-*")
    )
