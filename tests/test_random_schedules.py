"""Random schedules of every kind against the literal reference, in one process and on ranks."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from calibrating import for_reference, permuted, random_calibration
from conftest import LAYERS, Convert, MakeDense, load
from drawing import drawn_schedule, spans_both
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from reference import reference_logits
from test_modeling import TOLERANCE, difference, left_padded

from ptconvert.modeling.executor import OneProcess, Streams, TorchEngine, Update, run_program
from ptconvert.modeling.layers import Placement
from ptconvert.runtime.communicator import ProcessGroupCommunicator
from ptconvert.runtime.launch import Rank, launch
from ptconvert.runtime.load import load_rank
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer

SPANNING = f"a0! m0|a1! m1. a2. m2! {' '.join(f'a{i}! m{i}!' for i in range(3, LAYERS))}"


def test_the_partial_of_a_layer_held_dense_is_counted_once() -> None:
    """Beside tracks too: every output is 1, of which each of the four tracks has a quarter."""
    schedule = Schedule.parse("a0! m0|a1! m1. a2! m2!")
    tracked = schedule.track_layers

    def ones(sublayer: Sublayer, view: list[torch.Tensor], guess: bool) -> Update:
        assert guess == (str(sublayer) == "m1") and len(view) in (1, 4)
        return Update([torch.ones(()) / 4] * 4 if sublayer.layer in tracked else [torch.ones(())])

    engine = TorchEngine(ones, OneProcess())
    streams = Streams(torch.ones(()))
    run_program(schedule.program, streams, engine)
    assert float(streams.settled()) == 7


@settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],  # shrinking opens a model hundreds of times
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(schedule=SPANNING, tracks=4, deferred="sum", guesses=False)
@given(
    schedule=st.randoms(use_true_random=False).map(lambda r: str(drawn_schedule(r, LAYERS))),
    tracks=st.sampled_from([1, 2, 4]),
    deferred=st.sampled_from(["sum", "mean"]),
    guesses=st.booleans(),
)
def test_in_one_process(
    schedule: str,
    tracks: int,
    deferred: str,
    guesses: bool,
    make_dense: MakeDense,
    convert: Convert,
) -> None:
    """With random assignments and guesses where the schedule has use for them."""
    source = make_dense("llama-biases")
    dense, ids_BS = load(source), left_padded()[0]
    items, top = f'stages: "{schedule}"', f"deferred: {deferred}\n"
    options: dict[str, Any] = {}
    expecting: dict[str, Any] = {"deferred": deferred}
    if guesses and Schedule.parse(schedule).own_kept(tracks):
        calibration = random_calibration(source, Schedule.parse(schedule), tracks)
        top += "assignment: affinity\nguess: {rank: 5}\n"
        options["calibration"] = calibration
        expecting["guesses"] = for_reference(calibration, tracks)
        permuted(calibration, dense)
    model: Any = load_rank(
        convert(source, tracks, items, top, **options), Placement(), OneProcess()
    )
    with torch.no_grad():
        found = model(ids_BS).logits
    expected = reference_logits(dense, schedule, tracks, ids_BS, **expecting)
    assert difference(found, expected, torch.ones_like(ids_BS)) < TOLERANCE


def logits_on_a_rank(paths: list[Path], rank: Rank) -> dict[str, Any]:
    communicator, ids_BS = ProcessGroupCommunicator(None, rank.journal), left_padded()[0]
    place = Placement(rank.rank, rank.ranks)
    with torch.inference_mode():
        return {
            "logits": [
                load_rank(path, place, communicator)(ids_BS).logits.tolist() for path in paths
            ]
        }


@pytest.mark.slow
def test_on_real_ranks(make_dense: MakeDense, convert: Convert) -> None:
    """Of 16 schedules, some of them such as span layers held dense and layers of tracks."""
    random, source, tracks = Random(7), make_dense("llama-biases"), 4
    schedules = [Schedule.parse(SPANNING)]
    while len(schedules) < 16:
        schedule = drawn_schedule(random, LAYERS)
        if len(schedules) >= 6 or spans_both(schedule):
            schedules.append(schedule)
    rules = ["sum" if i % 3 else "mean" for i in range(len(schedules))]
    calibrations = [
        random_calibration(source, s, tracks) if i % 2 and s.own_kept(tracks) else None
        for i, s in enumerate(schedules)
    ]
    paths = []
    for schedule, rule, calibration in zip(schedules, rules, calibrations, strict=True):
        top, options = f"deferred: {rule}\n", {}
        if calibration is not None:
            top += "assignment: affinity\nguess: {rank: 5}\n"
            options["calibration"] = calibration
        paths.append(convert(source, tracks, f'stages: "{schedule}"', top, **options))
    by_rank = launch(logits_on_a_rank, paths, 2, "gloo", "cpu", 300)
    ids_BS = left_padded()[0]
    for i, (schedule, rule, calibration) in enumerate(
        zip(schedules, rules, calibrations, strict=True)
    ):
        dense, guesses = load(source), None
        if calibration is not None:
            permuted(calibration, dense)
            guesses = for_reference(calibration, tracks)
        expected = reference_logits(
            dense, str(schedule), tracks, ids_BS, deferred=rule, guesses=guesses
        )
        for rank in by_rank:
            found = torch.tensor(rank["logits"][i])
            assert difference(found, expected, torch.ones_like(ids_BS)) < TOLERANCE, str(schedule)
