"""What a plan weighs with: an assignment and guesses for no schedule in particular."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import TOP
from conftest import LAYERS, Convert, MakeDense, byte_level, load, with_bytes
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_calibrate import quiet, reading, shape_at
from test_cli import run
from test_plan import SIZE, TEXT

from ptconvert.calibrate import stand_ins
from ptconvert.calibrate.conversion import _stored, calibrate, check_device
from ptconvert.calibrate.guess import guess_alone
from ptconvert.calibrate.stand_ins import KEYS, StandIns
from ptconvert.calibrate.streams import HELD_OUT
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import EvaluationError
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import Windows, cut_windows, windows_between
from ptconvert.models.families import guesses_of
from ptconvert.plan import planner
from ptconvert.plan.case import Case, read_texts
from ptconvert.plan.sensitivity import Meter, Store, store_file
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec, written

WANTED = {"assignment": "affinity", "guess": 8}
PARALLEL = "a0|m0^1 a1|m1! a2|m2. a3|m3! a4|m4. a5|m5!"
MIXED = "a0^1 m0! a1. m1. a2! m2! a3^1 m3^1 a4. m4! a5! m5!"


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("plan") / "source")


def dense_streams(source: Path, ids_BT: torch.Tensor) -> dict[Sublayer, torch.Tensor]:
    """The dense model's residual stream after each sublayer."""
    model, updates = load(source), {}
    for i, layer in enumerate(model.model.layers):
        for kind, block in ((Kind.ATTENTION, layer.self_attn), (Kind.MLP, layer.mlp)):

            def keep(_: object, __: object, out: Any, *, at: Sublayer) -> None:
                updates[at] = out[0] if isinstance(out, tuple) else out

            block.register_forward_hook(functools.partial(keep, at=Sublayer(i, kind)))
    with torch.no_grad():
        model(input_ids=ids_BT)
        stream_BTD, found = model.model.embed_tokens(ids_BT), {}
        for sublayer, update_BTD in updates.items():
            stream_BTD = stream_BTD + update_BTD
            found[sublayer] = stream_BTD
    return found


def case_of(source: Path, wanted: dict[str, Any]) -> Case:
    checkpoint = open_checkpoint(source)
    windows, in_place = read_texts(checkpoint, (TEXT,), 24, 8, wanted)
    return Case(checkpoint, 4, windows, "float32", "cpu", BatchSize(4, "cpu"), in_place)


def of_random_tokens(path: Path, wanted: dict[str, Any], tracks: int = 2) -> Case:
    """For models without a tokenizer."""
    ids = torch.randint(3, 90, (48, 25), generator=torch.Generator().manual_seed(0))
    in_place = StandIns(wanted, ids[8:], apart=True) if wanted else None
    windows, batch = Windows(ids[:8], 24, ids.numel()), BatchSize(8, "cpu")
    return Case(open_checkpoint(path), tracks, windows, "float32", "cpu", batch, in_place)


def meter_of(case: Case, file: Path) -> Meter:
    return Meter(case, Store(file), quiet)


def test_a_guess_errs_on_the_dense_models_streams_as_it_says(
    make_dense: MakeDense, convert: Convert
) -> None:
    """As the next sublayer reads it, on the windows held out; and in place it gives just that."""
    path = make_dense("llama")
    shape = shape_at(path)
    decoder = load(convert(path, 4, f"use: parallel_track, depth: {LAYERS}")).model
    ids_NT = torch.randint(3, 96, (40, 24), generator=torch.Generator().manual_seed(0))
    fitted = guess_alone(decoder, shape, stand_ins.overlapped(shape), ids_NT, 8, quiet)
    assert [str(f.sublayer) for f in fitted] == [f"{b}{i}" for i in range(6) for b in "am"][:-1]
    assert sum(f.rank > 0 for f in fitted) > 6
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


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize(
    "variant",
    [
        *("llama", "llama-biases", "starcoder2", "cohere", "gemma2", "gemma4_text", "glm4"),
        *("granite", "qwen3_moe", "glm4_moe", "qwen3_5_text"),
    ],
)
def test_costs_are_of_a_conversion_with_them(
    variant: str, rank: int | None, make_dense: MakeDense, tmp_path: Path
) -> None:
    """A checkpoint by that schedule with the assignment and the guesses that were in place."""
    wanted: dict[str, Any] = {"assignment": "affinity"} | ({"guess": rank} if rank else {})
    path = make_dense(variant)
    case = of_random_tokens(path, wanted)
    stages = PARALLEL if case.shape.family.parallel else MIXED
    meter, schedule = meter_of(case, tmp_path / "with.jsonl"), Schedule.parse(stages)
    (cost,) = meter.costs([schedule], "step")
    kept_file = tmp_path / "with.safetensors"
    orders, guesses = stand_ins.read_orders(kept_file), stand_ins.read_guesses(kept_file)
    assert len(orders) == LAYERS
    sizes = {n: len(t) for n, t in guesses.items() if n.endswith("0.guess.mlp.from_input.weight")}
    assert bool(sizes) == bool(rank)
    kept = {
        s: len(guesses[first])
        for s in schedule.own_kept(2)
        if (first := f"{track_of(s)}.from_input.weight") in guesses
    }
    assert bool(kept) == bool(rank)
    spec = parse_spec(
        "\n".join(
            [
                *("format: 1", "tracks: 2", *written(wanted), "schedule:"),
                *(f"  - layers: 0-{LAYERS - 1}", f'    stages: "{stages}"'),
            ]
        ),
        "s",
    )
    tensors = {
        f"model.{name}": _stored(tensor, "F32")
        for name, tensor in guesses.items()
        if any(f"layers.{s.layer}." in name and f".{guesses_of(s.kind)}." in name for s in kept)
    }
    calibration = Calibration(orders, {"assignment": "affinity", "guess": kept}, tensors)
    plan = plan_conversion(case.source, spec, source_name="s", calibration=calibration)
    execute(plan, tmp_path / "out")
    reference = divergence.reference(
        open_model(case.source, "float32", "cpu"), case.windows, case.batch, quiet
    )
    converted = open_model(open_checkpoint(tmp_path / "out"), "float32", "cpu")
    tokens = divergence.measure(converted, reference, case.windows, case.batch, quiet)
    assert cost.kl == pytest.approx(tokens.kl.mean(), rel=1e-3, abs=1e-7)
    (plain,) = meter_of(of_random_tokens(path, {}), tmp_path / "without.jsonl").costs(
        [schedule], "step"
    )
    assert cost.kl_by_window != pytest.approx(plain.kl_by_window, rel=1e-3) and plain.kl > 1e-4
    assert not rank or cost.kl < plain.kl


def track_of(sublayer: Sublayer) -> str:
    return f"layers.{sublayer.layer}.tracks.0.guess.{guesses_of(sublayer.kind)}"


def test_what_was_fitted_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that all costs of a store are with the same, and the next command doesn't fit again."""
    schedule, case = Schedule.parse(MIXED), case_of(source, WANTED)
    (cost,) = meter_of(case, tmp_path / "costs.jsonl").costs([schedule], "step")
    (tmp_path / "costs.jsonl").unlink()
    (tmp_path / "costs.safetensors").write_bytes(b"damaged")  # as by a power failure: fitted again
    (again,) = meter_of(case, tmp_path / "costs.jsonl").costs([schedule], "step")
    assert again == cost
    (tmp_path / "costs.jsonl").unlink()
    monkeypatch.setattr(stand_ins, "assignments", None)
    monkeypatch.setattr("ptconvert.calibrate.stand_ins.guess_alone", None)
    (again,) = meter_of(case, tmp_path / "costs.jsonl").costs([schedule], "step")
    assert again == cost


def test_what_waits_for_nothing_is_as_without(source: Path, tmp_path: Path) -> None:
    """Where no track goes on without the others' partials, there is nothing to guess."""
    (dense,) = meter_of(case_of(source, WANTED), tmp_path / "costs").costs(
        [dense_schedule(LAYERS)], "step"
    )
    assert dense.kl < 1e-6 and dense.agreement == 1


def test_the_store_is_by_what_is_in_place(source: Path, tmp_path: Path) -> None:
    case, plain = case_of(source, WANTED), case_of(source, {})
    assert case.in_place is not None and plain.in_place is None
    others = [
        *({key: WANTED[key]} for key in WANTED),
        {**WANTED, "guess": 4},
    ]
    cases = [case, plain, *(case_of(source, wanted) for wanted in others)]
    fewer = replace(case.in_place, ids=case.in_place.ids[1:])
    cases.append(replace(case, in_place=fewer))
    assert len({store_file(tmp_path, "digest", one) for one in cases}) == len(cases)
    # a scale is not measured with
    other = case_of(source, {**WANTED, "scale": "fitted"})
    assert store_file(tmp_path, "digest", case) == store_file(tmp_path, "digest", other)


def test_the_time_to_fit_is_not_the_searchs(source: Path, tmp_path: Path) -> None:
    plain = meter_of(case_of(source, {}), tmp_path / "plain.jsonl")
    meter = meter_of(case_of(source, WANTED), tmp_path / "costs.jsonl")
    for one in (plain, meter):
        one.costs([dense_schedule(LAYERS)], "step")
    assert plain.fitting_seconds == 0 < meter.fitting_seconds
    found = planner._Search(meter, planner.waited_for(True), 5, None, 60.0)
    for passed, late in ((59.0, False), (61.0, True)):
        found.started = time.monotonic() - meter.fitting_seconds - passed
        assert found.is_late() is late


@pytest.mark.parametrize("wanted", [WANTED, {"assignment": "affinity"}, {"guess": 8}, {}])
def test_outputs_that_are_not_finite_are_one_line(
    wanted: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    meter = meter_of(case_of(broken, wanted), tmp_path / "costs.jsonl")
    with pytest.raises(EvaluationError, match="its outputs are not all finite in float32"):
        meter.costs([Schedule.parse(MIXED)], "step")


@pytest.mark.parametrize("wanted", [{"assignment": "affinity"}, {"guess": 8}])
def test_what_is_not_finite_in_what_is_fitted_on_alone_is_one_line(
    wanted: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """As by a token that the measured windows don't have."""
    case = case_of(source, wanted)
    assert case.in_place is not None
    rare = next(t for t in case.in_place.ids.flatten().tolist() if t not in case.windows.ids)
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][rare] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    meter = meter_of(replace(case, source=open_checkpoint(broken)), tmp_path / "costs.jsonl")
    with pytest.raises(EvaluationError, match="layer 0: what it computes from the text isn't all"):
        meter.costs([Schedule.parse(MIXED)], "step")


def test_too_little_memory_to_fit_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("ptconvert.calibrate.stand_ins.guess_alone", full)
    meter = meter_of(case_of(source, {"guess": 8}), tmp_path / "costs.jsonl")
    with pytest.raises(EvaluationError, match="cpu: out of memory while what the spec"):
        meter.costs([Schedule.parse(MIXED)], "step")


def test_where_fits_are_refused(source: Path, tmp_path: Path) -> None:
    """By what reads quantised weights, or needs float64; before anything is done."""
    checkpoint = open_checkpoint(source)
    quantised = replace(
        checkpoint, config={**checkpoint.config, "quantization_config": {"quant_method": "fp8"}}
    )
    for one, device, wanted in (
        *((one, "cpu", KEYS) for one in (checkpoint, quantised)),
        (checkpoint, "cuda:1", KEYS),
        (checkpoint, "mps", ["assignment", "scale"]),
        (quantised, "cuda:1", ["scale"]),
    ):
        check_device(one, device, wanted)
    for one, device, key, why in (
        (checkpoint, "mps", "guess", "float64"),
        (quantised, "cuda:1", "guess", "reads what weights stand for"),
        (quantised, "cuda:1", "assignment", "reads what weights stand for"),
    ):
        with pytest.raises(EvaluationError, match=f"--device {device}: {key} .*{why}"):
            check_device(one, device, [key])
    spec = parse_spec(
        f"format: 1\ntracks: 4\n{TOP}schedule:\n"
        f"  - {{layers: 0-{LAYERS - 1}, use: parallel_track, depth: 2}}\n",
        "s",
    )
    windows, _ = read_texts(checkpoint, (TEXT,), 24, 8, {})
    with pytest.raises(EvaluationError, match="--device mps: guess "):
        calibrate(checkpoint, spec, windows, "mps", "float32", tmp_path, quiet)


@pytest.mark.parametrize("command", ["plan", "transform"])
def test_the_commands_ask_where(
    command: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object, device: str, wanted: Iterable[str]) -> None:
        raise EvaluationError(f"{device}: {' '.join(sorted(wanted))}")

    monkeypatch.setattr("ptconvert.calibrate.conversion.check_device", refused)
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"format: 1\ntracks: 4\n{TOP}schedule:\n"
        f"  - {{layers: 0-{LAYERS - 1}, use: parallel_track, depth: 2}}\n"
    )
    given = {
        "plan": (source, "--tracks", 4, "--max-syncs", 5, "--assignment", "affinity", "--guess", 5),
        "transform": (source, tmp_path / "out", "--spec", spec),
    }[command]
    for more in ((), ("--dry-run",)):
        _, err = run(command, *given, "--text", TEXT, *more, code=2)
        assert "cpu: assignment guess" in err


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
    own = found.shape[1] - 1
    assert len(found) <= max(1, wanted // own)
    assert own == length or (length <= 4 * own and own == windows.step - length)
    rows = [*windows.ids.tolist(), *found.tolist()]
    assert all(row == list(range(row[0], row[-1] + 1)) for row in rows)
    predicted = [i for row in rows for i in row[1:]]
    assert len(set(predicted)) == len(predicted)
    if 0 < len(found) < wanted // own and own == length:  # no more fit
        taken = sorted(row[0] for row in rows)
        ends = [*taken[1:], tokens - 1]
        assert all(b - a < 2 * length for a, b in zip(taken, ends, strict=True))


@pytest.mark.parametrize(
    ("tokens", "fitted_on", "length"), [(201, 0, 25), (281, 0, 25), (282, 11, 7), (1000, 26, 25)]
)
def test_a_text_a_little_longer_leaves_shorter_windows(
    tokens: int, fitted_on: int, length: int
) -> None:
    """Eight windows of 25 take 201 ids; gaps of a quarter of that and more are used."""
    ids = list(range(tokens))
    windows = cut_windows(ids, 25, 8)
    found = windows_between(windows, ids, 800)
    assert found.shape == (fitted_on, length + 1)


def test_where_the_text_has_no_more_they_are_fitted_on_the_same_windows(
    source: Path, tmp_path: Path
) -> None:
    checkpoint, text = open_checkpoint(source), tmp_path / "short.txt"
    text.write_text(TEXT.read_text()[: 6 * 24])
    windows, in_place = read_texts(checkpoint, (text,), 24, None, WANTED)
    assert in_place is not None and not in_place.apart
    assert len(windows.ids) == 6 and torch.equal(in_place.ids, windows.ids)
    _, in_place = read_texts(checkpoint, (text,), 24, 1, WANTED)
    assert in_place is not None and in_place.apart and len(in_place.ids) == HELD_OUT
    _, in_place = read_texts(checkpoint, (text,), 48, None, {"assignment": "affinity"})
    assert in_place is not None and len(in_place.ids) == 3
    with pytest.raises(EvaluationError, match="3 windows of 48 tokens; guesses need at least 5"):
        read_texts(checkpoint, (text,), 48, None, WANTED)


@pytest.mark.parametrize(("length", "given"), [(24, 8), (4000, 5)])
@pytest.mark.parametrize("copies", [1, 7])
def test_it_is_fitted_on_few_windows_but_enough(
    length: int, given: int, copies: int, tmp_path: Path, make_dense: MakeDense
) -> None:
    """About so many tokens, and five windows at least, however long: apart where there is room."""
    path = shutil.copytree(
        make_dense("llama", vocab_size=260, max_position_embeddings=8192), tmp_path / "long"
    )
    with_bytes(path)
    text = tmp_path / "text.txt"
    text.write_text("an even text, " * (copies * (given + 1) * length // 14 + 1))
    _, in_place = read_texts(open_checkpoint(path), (text,), length, given, WANTED)
    assert in_place is not None and in_place.apart is (copies > 1)
    least = HELD_OUT if length > 24 or copies == 1 else 20
    assert least <= len(in_place.ids) <= max(HELD_OUT, stand_ins.TOKENS // length)
    assert in_place.ids.shape[1] == length + 1


def test_the_command_says_that_they_are_in_place(source: Path, tmp_path: Path) -> None:
    size = (*SIZE, "--rounds", 1, "--cache", tmp_path / "cache")
    asked = ("--tracks", 4, "--max-syncs", 5, *size)
    wanted = ("--assignment", "affinity", "--guess", 8)
    plain = json.loads(run("plan", source, "--text", TEXT, *asked, "--json")[0])
    figures = json.loads(run("plan", source, "--text", TEXT, *asked, *wanted, "--json")[0])
    assert plain["in_place"] is None
    tokens = figures["in_place"]["tokens"]
    assert 10_000 < tokens <= stand_ins.TOKENS
    assert figures["in_place"] == {**WANTED, "tokens": tokens, "apart": True}
    assert figures["chosen"]["kl"] < plain["chosen"]["kl"]
    what = f"Measured with assignment and guess in place, fitted on {tokens:,} tokens, others,"
    sentence = f"{what} for no schedule in particular."
    assert f"\n# {sentence}\nassignment: affinity\n" in figures["spec"]
    out, _ = run("plan", source, "--text", TEXT, *asked, *wanted)
    assert sentence in " ".join(out.split())
    kept = sorted(file.suffix for file in (tmp_path / "cache" / "plan").iterdir())
    assert kept == [".jsonl", ".jsonl", ".safetensors"]  # and no model of tracks
    short = tmp_path / "short.txt"
    short.write_text(TEXT.read_text()[: 6 * 24])
    few = ("--window", 24, "--rounds", 1, "--cache", tmp_path / "cache", "--json")
    budget = ("--tracks", 4, "--max-syncs", 5, "--guess", 8)
    found = json.loads(run("plan", source, "--text", short, *budget, *few)[0])
    assert found["in_place"] == {"guess": 8, "tokens": 144, "apart": False}
    told = "fitted on 144 tokens, the same, for no schedule in particular.\nguess: {rank: 8}\n"
    assert told in found["spec"]


def test_the_spec_says_what_is_not_counted(make_dense: MakeDense, tmp_path: Path) -> None:
    """Of a model whose sums are normed, a scale."""
    path = shutil.copytree(
        make_dense("gemma2", vocab_size=260, max_position_embeddings=256), tmp_path / "gemma"
    )
    with_bytes(path)
    size = (*SIZE, "--rounds", 1, "--cache", tmp_path / "cache", "--json")
    asked = ("--tracks", 2, "--max-syncs", 5, *size, "--scale", "fitted")
    both = json.loads(run("plan", path, "--text", TEXT, *asked, "--guess", 4)[0])["spec"]
    assert "for no schedule in particular.\n# Not counted above: scale.\n" in both
    alone = json.loads(run("plan", path, "--text", TEXT, *asked)[0])["spec"]
    assert (
        "# Computed from a text, not counted above: transform needs --text FILE.\nscale: fitted\n"
        in alone
    )
