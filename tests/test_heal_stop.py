"""heal --stop-on: what says which state is best, and when it is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, byte_level
from test_heal import MIDDLE, QUICK, SETTINGS, TEXT, data_of, differing, heal, kls

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.evaluate.tasks import make_tasks
from ptconvert.heal import run as healing
from ptconvert.heal.distill import distill
from ptconvert.heal.models import trainable
from ptconvert.heal.report import Measured, Score
from ptconvert.heal.settings import Settings
from ptconvert.measure.opening import open_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
PATIENT = replace(SETTINGS, tokens=2560, evaluations=8, patience=2)


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("heal") / "source")


def quiet(*_: object) -> None:
    """No progress."""


class Judging:
    """Scores by a list, and keeps the weights that it was shown."""

    def __init__(self, scores: Sequence[float], higher_is_better: bool = True) -> None:
        self.scores, self.higher_is_better = list(scores), higher_is_better
        self.shown: list[torch.Tensor] = []
        self.fails_at: int | None = None

    def __call__(self, model: Any) -> Score:
        if len(self.shown) == self.fails_at:
            raise KeyboardInterrupt
        self.shown.append(weight_of(dict(model.named_parameters())).clone())
        return Score("acc", self.scores[len(self.shown) - 1], self.higher_is_better)


def weight_of(tensors: dict[str, Any]) -> torch.Tensor:
    weight: torch.Tensor = tensors["model.layers.2.tracks.0.mlp.up_proj.weight"].detach()
    return weight


def trained(
    source: Path, converted: Path, work: Path, judge: Judging, settings: Settings = PATIENT
) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(converted)
    student, teacher = (
        open_model(c, "float32", "cpu") for c in (checkpoint, open_checkpoint(source))
    )
    names = trainable(dict(student.named_parameters()), checkpoint, "changed")
    data = data_of(checkpoint)
    return distill(student, teacher, names, data, settings, work, quiet, quiet, judge)


@pytest.mark.parametrize("sign", [1, -1])
def test_it_stops_when_the_score_no_longer_gains(
    sign: int, source: Path, convert: Convert, tmp_path: Path
) -> None:
    """The KL falls all the while; the first of these scores is before any training."""
    judge = Judging([sign * s for s in (0.1, 0.2, 0.4, 0.3, 0.4, 0.9)], sign == 1)
    moved = trained(source, convert(source, 4, MIDDLE), tmp_path / "w", judge)
    assert len(judge.shown) == 5
    assert torch.equal(weight_of(moved), judge.shown[2])
    assert not torch.equal(judge.shown[2], judge.shown[4])


def test_nothing_better_than_before_is_nothing(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    judge = Judging([0.1, 0.2, 0.3], higher_is_better=False)
    assert trained(source, convert(source, 4, MIDDLE), tmp_path / "w", judge) == {}


def test_interrupted_it_goes_on_with_the_patience_that_is_left(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    judge = Judging([0.1, 0.4, 0.3, 0.2, 0.9])
    judge.fails_at, converted = 3, convert(source, 4, MIDDLE)
    with pytest.raises(KeyboardInterrupt):
        trained(source, converted, tmp_path / "w", judge)
    judge.fails_at = None
    moved = trained(source, converted, tmp_path / "w", judge)
    assert len(judge.shown) == 4 and torch.equal(weight_of(moved), judge.shown[1])


def test_what_is_better() -> None:
    def judged(value: float, kl: float, higher: bool) -> float:
        return Measured("", 0.0, kl, Score("acc", value, higher)).gain

    assert judged(0.3, 0.9, True) > judged(0.2, 0.1, True)
    assert judged(0.2, 0.9, False) > judged(0.3, 0.1, False)
    assert Measured("", 2.0, 0.1).gain > Measured("", 1.0, 0.2).gain


@pytest.mark.slow
def test_a_task_judges_the_whole_command(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a score that says the opposite of the KL nothing is kept."""
    make_tasks(tmp_path / "tasks", (TEXT,), 0)
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    task = ("--stop-on", tmp_path / "tasks" / "text_perplexity.yaml", "--limit", 2)
    options = (
        "--text",
        TEXT,
        *QUICK,
        "--window",
        128,
        "--batch-size",
        2,
        "--evaluations",
        1,
        *task,
    )
    figures = heal(converted, out, source, *options)
    scores = {row["name"]: row["score"] for row in figures["rows"]}
    assert scores["source"] is None and kls(figures)["KL"] < kls(figures)["before"]
    assert all(scores[n]["metric"] == "text_perplexity bits_per_byte" for n in ("before", "KL"))
    assert not scores["before"]["higher_is_better"]
    better = scores["KL"]["value"] < scores["before"]["value"]
    assert (figures["kept"] == "KL") == better == bool(differing(converted, out))
    card = (out / "README.md").read_text()
    assert "text_perplexity bits_per_byte |" in card
    assert f"{scores['KL']['value']:.4f} |" in card

    def opposite(model: Any, *rest: Any) -> tuple[Measured, Measured]:
        first, row = measured(model, *rest)
        return first, replace(row, score=Score("acc", row.kl, True))

    measured = healing._measured
    monkeypatch.setattr(healing, "_measured", opposite)
    assert heal(converted, tmp_path / "o", source, *options)["kept"] == "before"


def test_what_is_refused(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"

    def refused(what: str, *options: object) -> None:
        error = heal(converted, out, source, "--text", TEXT, *QUICK, *options, code=2)
        assert what in error.splitlines()[-1] and not out.exists(), error

    make_tasks(tmp_path / "tasks", (TEXT,), 0)
    task = tmp_path / "tasks" / "text_cloze.yaml"
    refused("--limit: for --stop-on TASK only", "--limit", 2)
    refused("there is no task 'no_such'", "--stop-on", "no_such")
    refused("arc_*: names several tasks; name one", "--stop-on", "arc_*")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("a task is scored in one process only", "--stop-on", task)
