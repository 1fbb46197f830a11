"""Serving engines by entry point: what verify does with one, installed or not. (vLLM's own tests
are in tests/serving.)"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ptconvert import engines
from ptconvert.cli import main
from ptconvert.engines import ServingEngine
from ptconvert.engines.base import is_for_others, own_weights
from ptconvert.models.shape import EMBEDDING, HEAD
from ptconvert.verify.run import Check, Report


def verified(path: Path, settings: Any, eager: bool) -> Report:
    """An engine that runs nothing: it reports what it was asked for."""
    asked = f"{path.name} on {settings.ranks} ranks{', eagerly' * eager}"
    return Report((Check("asked for", settings.ranks == 2, asked),))


HERE = ServingEngine("pytest", "pip install pytest", verified)
AWAY = ServingEngine("no_such_package", "pip install no-such-package", verified)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of another package: one is installed, one is not."""
    entries = [EntryPoint(n, f"test_engines:{n.upper()}", engines.GROUP) for n in ("here", "away")]

    def entry_points(group: str, name: str = "") -> list[EntryPoint]:
        assert group == engines.GROUP
        return [entry for entry in entries if name in ("", entry.name)]

    monkeypatch.setattr(engines, "entry_points", entry_points)


def test_vllm_is_registered() -> None:
    assert "vllm" in engines.engine_names()


@pytest.mark.usefixtures("registered")
def test_a_registered_engine_is_found_and_one_that_is_not_installed_is_named() -> None:
    assert engines.engine_names() == ["away", "here"]
    assert engines.find_engine("here") is HERE
    with pytest.raises(ValueError, match="away is not installed: pip install no-such-package"):
        engines.find_engine("away")


@pytest.mark.parametrize(("ranks", "code"), [("2", 0), ("3", 1)])
def test_verify_runs_it_and_prints_its_report(
    ranks: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = sys.modules["ptconvert.cli.verify"]  # the package has the command by that name
    monkeypatch.setattr(command, "find_engine", lambda name: {"vllm": HERE}[name])
    given = ["verify", "some", "--runtime", "vllm", "--ranks", ranks, "--enforce-eager"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == code and f"some on {ranks} ranks, eagerly" in done.output


def test_a_ranks_tensors_are_its_own_tracks_and_what_is_shared() -> None:
    layer = "model.layers.0"
    names = [EMBEDDING, f"{layer}.mlp.up_proj.weight", f"{layer}.tracks.1.mlp.up_proj.weight"]
    others = [f"{layer}.tracks.2.mlp.up_proj.weight", f"{layer}.assignment.neurons"]
    assert [is_for_others(name, range(2)) for name in [*names, *others]] == [False] * 3 + [True] * 2
    given = [(name, name) for name in [*names, *others]]
    tied = [name for name, _ in own_weights(given, range(2), tied=True)]  # type: ignore[arg-type]
    assert tied == [EMBEDDING, HEAD, *names[1:]]
    own = own_weights([(HEAD, "head"), *given], range(2), tied=True)  # type: ignore[list-item]
    assert [tensor for name, tensor in own if name == HEAD] == ["head"]
