"""Converting on a machine with a GPU, and what a GPU's model is saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Convert, MakeDense, byte_level, load, spec_text
from places import on
from test_transform import back, same, tensors

from ptconvert.calibrate.conversion import calibrate
from ptconvert.calibrate.stand_ins import StandIns
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.windows import Windows
from ptconvert.plan.case import Case
from ptconvert.plan.sensitivity import Meter, Store
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec

PLACES = ["cpu", on(1, "cuda")]
TOLERANCE = 1e-4  # of logits, as `verify` has it in fp32


def quiet(*_: object) -> None:
    """No progress."""


@pytest.mark.parametrize("device", PLACES)
def test_to_a_gpu_and_back(
    device: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """The same logits there, the same bytes when it is saved from there, and the source again."""
    source = make_dense("llama-biases", torch.bfloat16)
    path = convert(source, 4, "use: parallel_track, depth: 2")
    ids_BS = torch.arange(24).view(2, 12) + 3
    with torch.no_grad():
        expected_BSV = load(path)(ids_BS).logits
        there_BSV = load(path, device_map=device)(ids_BS.to(device)).logits
    assert there_BSV.device.type == device
    torch.testing.assert_close(there_BSV.cpu(), expected_BSV, atol=TOLERANCE, rtol=0)
    load(path, dtype="auto", device_map=device).save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(path))
    assert same(tensors(back(tmp_path / "saved", tmp_path / "back")), tensors(source))


@pytest.mark.parametrize("device", PLACES)
def test_what_a_text_decides(device: str, make_dense: MakeDense, tmp_path: Path) -> None:
    """Affinity and guesses come out about as on a CPU, and the model that they make runs there."""
    source = open_checkpoint(byte_level(make_dense, tmp_path / "source"))
    ids = torch.randint(3, 96, (20, 25), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, 25, ids.numel())
    for top, key in (("assignment: affinity\n", "affinity_between_tracks"), (GUESS, "guesses")):
        spec = parse_spec(spec_text(4, "use: parallel_track, depth: 2", top), "spec.yaml")
        figures = {}
        for where in ("cpu", device):
            known, figures[where] = calibrate(
                source, spec, windows, where, "float32", tmp_path, quiet
            )
        here, there = (_numbers(figures[where][key]) for where in ("cpu", device))
        assert here and there == pytest.approx(here, rel=0.02)
        plan = plan_conversion(source, spec, source_name="source", calibration=known)
        execute(plan, tmp_path / key)
        model = load(tmp_path / key, device_map=device)
        assert torch.isfinite(model(ids[:2].to(device)).logits).all()


@pytest.mark.parametrize("device", PLACES)
def test_what_a_plan_measures_with(device: str, make_dense: MakeDense, tmp_path: Path) -> None:
    """Costs with an assignment and guesses in place are about those on a CPU."""
    source = open_checkpoint(make_dense("llama"))
    ids = torch.randint(3, 90, (48, 25), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids[:8], 24, ids.numel())
    in_place = StandIns({"assignment": "affinity", "guess": 8}, ids[8:], apart=True)
    schedule = Schedule.parse("a0^1 m0! a1. m1. a2! m2! a3^1 m3^1 a4. m4! a5! m5!")
    found = list[float]()
    for where in ("cpu", device):
        case = Case(source, 2, windows, "float32", where, BatchSize(8, where), in_place)
        meter = Meter(case, Store(tmp_path / f"{len(found)}.jsonl"), quiet)
        found += [cost.kl for cost in meter.costs([schedule], "step")]
    assert found[0] > 1e-3 and found[1] == pytest.approx(found[0], rel=0.05)


GUESS = "guess: {rank: 8}\n"


def _numbers(figures: Any) -> list[float]:
    """The errors of the guesses, or the affinities before and after."""
    if isinstance(figures, list):
        assert len(figures) <= 2 * LAYERS
        return [row["error"] for row in figures]
    return [float(value) for value in figures.values()]
