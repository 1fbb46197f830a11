"""Families whose layers run attention and MLP side by side: what the model itself runs is L stages
of `a|m!`, and everything that is compared with it is compared with that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Convert, MakeDense, load, spec_text
from reference import reference_logits
from test_modeling import (
    DENSE_FOR_ONE_TRACK,
    SAME_FOR_EVERY_N,
    SCHEDULES,
    TOLERANCE,
    difference,
    left_padded,
    step_logits,
)

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.cli import main
from ptconvert.convert.transform import plan_conversion
from ptconvert.errors import SpecError
from ptconvert.measure.opening import is_dense
from ptconvert.models.families import FAMILIES
from ptconvert.spec.document import parse_spec

PARALLEL = [name for name, family in FAMILIES.items() if family.parallel]
DENSE = "a0|m0! a1|m1! a2|m2! a3|m3! a4|m4! a5|m5!"
ONE_AFTER_THE_OTHER = " ".join(f"a{i}! m{i}!" for i in range(6))


def figures(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = step_logits(model, *left_padded(), 12)
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return difference(a, b, left_padded()[1])


def test_the_families() -> None:
    assert PARALLEL == ["cohere", "cohere2"]


@pytest.mark.parametrize("variant", PARALLEL)
def test_the_mlp_after_the_attention_is_another_model(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """It reads what the schedule says; for one track that isn't the source either."""
    source = make_dense(variant)
    dense, (ids_BS, keep_BS) = load(source), left_padded()
    found = [logits(load(convert(source, n, f"stages: '{ONE_AFTER_THE_OTHER}'"))) for n in (1, 2)]
    expected = reference_logits(dense, ONE_AFTER_THE_OTHER, 2, ids_BS, keep_BS)
    assert apart(found[0], expected) < TOLERANCE and apart(found[1], expected) < TOLERANCE
    assert apart(expected, logits(dense)) > 100 * TOLERANCE
    assert apart(reference_logits(dense, DENSE, 2, ids_BS, keep_BS), logits(dense)) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULES)
def test_matches_the_reference(name: str, make_dense: MakeDense, convert: Convert) -> None:
    source, (ids_BS, keep_BS) = make_dense("cohere"), left_padded()
    model = load(convert(source, 4, SCHEDULES[name]))
    expected = reference_logits(load(source), str(model.model.layers.schedule), 4, ids_BS, keep_BS)
    assert apart(step_logits(model, ids_BS, keep_BS, 7), expected) < TOLERANCE


@pytest.mark.parametrize("name", [*SAME_FOR_EVERY_N, "sync_point_drop"])
def test_same_function_for_every_number_of_tracks(
    name: str, make_dense: MakeDense, convert: Convert
) -> None:
    one, four = (logits(load(convert(make_dense("cohere2"), n, SCHEDULES[name]))) for n in (1, 4))
    assert apart(one, four) < TOLERANCE


@pytest.mark.parametrize("name", [*DENSE_FOR_ONE_TRACK, "parallel_block"])
def test_one_track_is_the_dense_model(name: str, make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("cohere2")
    assert (
        apart(logits(load(convert(source, 1, SCHEDULES[name]))), logits(load(source))) < TOLERANCE
    )


def test_what_the_model_itself_runs(make_dense: MakeDense, convert: Convert) -> None:
    """By a config.json, converted or not, and in an open model."""
    source = make_dense("cohere")
    converted = convert(source, 2, "use: ladder")
    for path in (source, converted):
        assert str(read_section(read_config(path)).dense) == DENSE
    assert str(read_section(read_config(make_dense("llama"))).dense) == ONE_AFTER_THE_OTHER
    assert is_dense(open_checkpoint(source)) and not is_dense(open_checkpoint(converted))
    layers = load(converted).model.layers
    assert str(layers.dense) == DENSE and str(layers.schedule) != DENSE


def test_counts_are_against_one_all_reduce_a_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    source, spec = make_dense("cohere"), tmp_path / "spec.yaml"
    spec.write_text(spec_text(2, "use: parallel_track, depth: 3"))
    shown = figures("show", spec, "--model", source)
    assert shown["schedule"] == "a0|m0. a1|m1. a2|m2! a3|m3. a4|m4. a5|m5!"
    plan = plan_conversion(
        open_checkpoint(source), parse_spec(spec.read_text(), "s"), source_name="s"
    )
    for found in (shown, plan.summary()):
        assert found["all_reduces"] == found["waited_for"] == {"before": 6, "after": 2}
    assert "| all-reduces per forward pass | 6 | 2 |" in plan.texts["README.md"]
    without = figures("show", spec, "--layers", 6)["all_reduces"]
    assert without == {"before": 12, "after": 2}
    estimated = figures("estimate", spec, "--model", source, "--hardware", "h100-sxm", "--ranks", 2)
    assert [(row["all_reduces"], row["name"]) for row in estimated["rows"]] == [
        (6, "tensor_parallel"),
        (2, "spec"),
    ]
    ready = figures("estimate", source, "--hardware", "h100-sxm", "--ranks", 2)["rows"]
    assert [row["schedule"] for row in ready[:2]] == [
        DENSE,
        "a0|m0! a1|m1! a2|m2~1 a3|m3~1 a4|m4~1 a5|m5!",
    ]


def test_the_ladder_authors_know_no_such_layers(make_dense: MakeDense, convert: Convert) -> None:
    with pytest.raises(SpecError, match="the MLP after the attention"):
        convert(make_dense("cohere"), 2, "use: ladder", ladder_layers_config=True)
