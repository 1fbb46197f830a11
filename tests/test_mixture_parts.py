"""Mixtures that run in two parts, each with an input of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import for_reference, random_calibration
from conftest import Convert, MakeDense, load
from reference import reference_logits
from test_modeling import TOLERANCE, difference, left_padded, step_logits
from test_transform import back, same, tensors

from ptconvert.calibrate.affinity import assignments, units_of
from ptconvert.calibrate.guess import fit_guesses
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.section import read_section
from ptconvert.errors import ConfigError, SpecError
from ptconvert.estimate.hardware import read_engine
from ptconvert.estimate.roofline import Pass, sublayer_parts
from ptconvert.models.families import FAMILIES
from ptconvert.models.mixtures import divisible_layers
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import dense_schedule, with_only
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

SHARED = [name for name, family in FAMILIES.items() if family.shared is not None]
# Parts of mixtures with every ending, beside each other and beside other layers' sublayers.
TRACKED = "a0! m0! a1! m1. a2. s2. r2. a3^2 r3~1 s3^1 a4|a5. s4|s5. r4^1 r5!"


def logits(model: Any, prefill: int = 12) -> torch.Tensor:
    found: torch.Tensor = step_logits(model, *left_padded(), prefill)
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return difference(a, b, left_padded()[1])


def test_the_families() -> None:
    assert SHARED == ["glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text"]
    for name in SHARED:  # or a norm of the sum would have to be apart
        assert FAMILIES[name].mlp.after is None


@pytest.mark.parametrize("variant", SHARED)
@torch.no_grad()
def test_two_parts_are_the_whole(variant: str, make_dense: MakeDense, convert: Convert) -> None:
    """Side by side on what `m` reads, and with as many tracks as one likes."""
    source = make_dense(variant)
    divisible = divisible_layers(read_config(source), 6)
    assert 3 <= len(divisible) <= 6
    text = " ".join(f"a{i}! s{i}|r{i}!" if i in divisible else f"a{i}! m{i}!" for i in range(6))
    dense = logits(load(source))
    for tracks in (1, 4):
        assert apart(logits(load(convert(source, tracks, f"stages: '{text}'"))), dense) < TOLERANCE


@pytest.mark.parametrize(
    ("variant", "schedule", "why"),
    [
        (
            "llama",
            "use: farskip",
            "farskip is for mixtures with shared experts, which llama has not",
        ),
        ("mixtral", "use: farskip", "which mixtral has not; without them it is ladder"),
        (
            "qwen3_moe",
            "stages: 'a0! m0! a1! m1! a2! m2! a3! s3! r3! a4! m4! a5! m5!'",
            "runs s3 and r3, but layer 3 of qwen3_moe has no shared experts .* whole, as m3",
        ),
        (
            "deepseek_v3",
            "stages: 'a0! s0! r0! a1! m1! a2! m2! a3! m3! a4! m4! a5! m5!'",
            "runs s0 and r0, but layer 0 of deepseek_v3 has no shared experts",
        ),
    ],
)
def test_models_without_shared_experts_are_refused(
    variant: str, schedule: str, why: str, make_dense: MakeDense, convert: Convert
) -> None:
    with pytest.raises(SpecError, match=why) as error:
        convert(make_dense(variant), 2, schedule)
    assert len(str(error.value).splitlines()) == 1


def test_a_section_that_divides_what_can_not_be(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("qwen3_moe"), 2, "use: ladder")
    config: dict[str, Any] = dict(read_config(path))
    config["ptconvert"]["schedule"] = config["ptconvert"]["schedule"].replace("m3~1", "s3~1 r3~1")
    with pytest.raises(ConfigError, match="layer 3 of ptconvert_qwen3_moe has no shared experts"):
        read_section(config)


@pytest.mark.parametrize("tracks", [1, 2, 4])
@pytest.mark.parametrize("variant", ["glm4_moe", "qwen3_5_moe_text"])
def test_parts_of_tracks_match_the_reference(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """With every ending, guesses and an order of units; the source is got back bit for bit."""
    source = make_dense(variant)
    (ids_BS, keep_BS), dense = left_padded(), load(source)
    path = convert(source, tracks, f"stages: '{TRACKED}'")
    model = load(path)
    assert str(model.model.layers.schedule) == TRACKED
    expected = reference_logits(dense, TRACKED, tracks, ids_BS, keep_BS)
    assert apart(logits(model, 7), expected) < TOLERANCE
    assert same(tensors(back(path, tmp_path / "back")), tensors(source))
    if tracks > 1:
        control = TRACKED.replace("s3^1", "s3~1")
        assert apart(expected, reference_logits(dense, control, tracks, ids_BS, keep_BS)) > 0.01


def test_guesses_of_parts(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    """Each part's tracks guess the others' partials of that part."""
    source, tracks = make_dense("glm4_moe"), 2
    known = random_calibration(source, Schedule.parse(TRACKED), tracks)
    assert {"s", "r"} <= {str(sublayer)[0] for sublayer in known.values["guess"]}
    known = replace(known, assignments={})
    guessing = f"stages: '{TRACKED}'", "guess: {rank: 5}\n"
    path = convert(source, tracks, *guessing, calibration=known)
    guesses = for_reference(known, tracks)
    expected = reference_logits(load(source), TRACKED, tracks, *left_padded(), guesses=guesses)
    assert apart(logits(load(path), 7), expected) < TOLERANCE
    assert same(tensors(back(path, tmp_path / "back")), tensors(source))


def test_what_is_fitted(make_dense: MakeDense, convert: Convert) -> None:
    """Guesses and orders of units, on a text."""
    source, tracks = make_dense("glm4_moe"), 2
    schedule = Schedule.parse(TRACKED)
    ids_NT = torch.randint(3, 96, (10, 16), generator=torch.Generator().manual_seed(2))
    model = load(convert(source, tracks, f"stages: '{TRACKED}'"))
    shape = ModelShape.from_config(read_config(source))
    fitted = fit_guesses(model.get_decoder(), shape, ids_NT, 4, lambda *_: None)
    assert tuple(f.sublayer for f in fitted) == schedule.own_kept(tracks)
    assert all(f.error <= 1 for f in fitted)
    found, (before, after) = assignments(
        load(source), shape, schedule, tracks, ids_NT, lambda *_: None
    )
    assert found.keys() == schedule.track_layers and after < before
    for layer, one in found.items():
        size = shape.orders_of(layer)["shared_neurons"][-1]
        assert sorted(one.shared_neurons) == list(range(size))


def test_units_of_a_part_are_the_mixtures(make_dense: MakeDense) -> None:
    shape = ModelShape.from_config(read_config(make_dense("glm4_moe")))
    whole, shared, routed = (
        units_of(shape, Sublayer(2, kind)) for kind in (Kind.MLP, Kind.SHARED, Kind.ROUTED)
    )
    assert {u.of for u in shared} == {"shared_neurons"} and {u.of for u in routed} == {"neurons"}
    assert {*shared, *routed} == {*whole}


@pytest.mark.parametrize("variant", SHARED)
def test_parts_cost_what_the_whole_does(variant: str, make_dense: MakeDense) -> None:
    """By weights and FLOPs; what is in and out of a sublayer is so for each part."""
    shape, engine = ModelShape.from_config(read_config(make_dense(variant))), read_engine("vllm")
    layer = max(shape.divisible)
    for one in (Pass(4, 128, 0, 128), Pass(4, 1, 127, 128)):
        whole, *both = (
            sublayer_parts(Sublayer(layer, kind), shape, engine, 2, one)[0]
            for kind in (Kind.MLP, Kind.SHARED, Kind.ROUTED)
        )
        assert sum(part.flops for part in both) == pytest.approx(whole.flops)
        moved = one.total * 4 * shape.width * shape.bytes_per_token / shape.width
        assert sum(part.nbytes for part in both) == pytest.approx(whole.nbytes + moved)
        assert 0 < both[0].flops < whole.flops


def test_what_ran_counts_a_mixture_once() -> None:
    schedule, dense = Schedule.parse("a0! s0! r0! a1. s1. r1!"), dense_schedule(2)
    assert schedule.ran == (0, 1, 1, 2, 3, 3, 4)
    assert [step.completes for step in schedule.program] == [(), (), (0,), (), (), (1,)]
    blocks = list(schedule.blocks(dense))
    assert blocks == [range(1), range(1, 3), range(3, 6)]
    assert [str(with_only(schedule, b, dense)) for b in blocks] == [
        "a0! m0! a1! m1!",
        "a0! s0! r0! a1! m1!",
        "a0! m0! a1. s1. r1!",
    ]


def test_gradients_reach_the_parts(make_dense: MakeDense, convert: Convert) -> None:
    """Gradients reach every parameter of a schedule with parts, with checkpointing too."""
    model = load(convert(make_dense("glm4_moe"), 2, f"stages: '{TRACKED}'")).train()
    ids_BS = left_padded()[0]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys() == {n for n, _ in model.named_parameters()}
    assert all(torch.allclose(plain[n], again[n], atol=1e-5) for n in plain)
