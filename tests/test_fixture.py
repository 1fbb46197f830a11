"""A trained 12-layer model: the loss on its dev split under the schedules of its README."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path

import pytest
from conftest import FIXTURE, Convert

from ptconvert.calibrate.conversion import calibrate, calibration_windows
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.reader import open_checkpoint, same_bytes
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.evaluate.harness import Settings
from ptconvert.evaluate.run import evaluate
from ptconvert.evaluate.tasks import CLOZE_TASK, make_tasks
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.divergence import Reference, measure, reference
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import Windows, windows_for
from ptconvert.spec.document import parse_spec

WHY = "shared/fixtures/stdlib-llama is not beside this checkout"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FIXTURE.is_dir(), reason=WHY)]
WINDOWS, LENGTH = 24, 256


# A task whose metric is a mean, for which lm-eval has a standard error.
NEXT_LINE = """
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
target_delimiter: ""
process_results: !function loss.per_character
metric_list: [{{metric: loss, aggregation: mean, higher_is_better: false}}]
"""
LOSS = """
def per_character(doc, results):
    return {"loss": -results[0][0] / len(doc["choices"][doc["answer"]])}
"""


def quiet(*_: object) -> None:
    """No progress."""


def split(name: str) -> tuple[Path, ...]:
    """The files of a split, in the README's order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return tuple(stdlib / n for n in json.loads((FIXTURE / "splits.json").read_text())[name])


@pytest.fixture(scope="module")
def dev() -> tuple[Path, ...]:
    """The dev files."""
    return split("dev")


@pytest.fixture(scope="module")
def source(dev: tuple[Path, ...]) -> tuple[Windows, Reference]:
    """The README's windows, and the source model's predictions on them in fp32."""
    checkpoint = open_checkpoint(FIXTURE / "model")
    windows = windows_for(checkpoint, dev, LENGTH, WINDOWS)
    model = open_model(checkpoint, "float32", "cpu")
    return windows, reference(model, windows, BatchSize(None, "cpu"), quiet)


def layers(first: int, use: str) -> str:
    rest = f"  - {{layers: {first}-11, use: {use}}}\n"
    return f"  - {{layers: 0-{first - 1}, use: tensor_parallel}}\n{rest}" if first else rest


@pytest.mark.parametrize(
    ("first", "use", "two", "four"),
    [
        (0, "tensor_parallel", 2.7025, 2.7025),
        (0, "ladder", 4.6996, 4.6996),
        (1, "ladder", 3.4633, 3.4633),
        (6, "ladder", 2.7220, 2.7220),
        (1, "parallel_block", 2.7807, 2.7807),
        (2, "layer_parallel", 2.7345, 2.7345),
        (1, "sync_point_drop", 2.7291, 2.7494),
        (1, "delayed, delay: 2", 2.7586, 2.8069),
        (0, "parallel_track, depth: 4", 3.8716, 5.8716),
        (1, "parallel_track, depth: 2", 2.7663, 2.8142),
        (1, "parallel_track, depth: 4", 2.8499, 2.9826),
        (1, "parallel_track, depth: 2, overlap: 1", 2.7826, 2.8534),
    ],
)
def test_dev_loss_agrees_with_the_readme(
    first: int,
    use: str,
    two: float,
    four: float,
    source: tuple[Windows, Reference],
    convert: Convert,
) -> None:
    """By eval's own divergence: `--text` with the dev files, --window 256 --windows 24."""
    windows, predictions = source
    for tracks, expected in ((2, two), (4, four)):
        converted = open_checkpoint(convert(FIXTURE / "model", tracks, layers(first, use)))
        model = open_model(converted, "float32", "cpu")
        tokens = measure(model, predictions, windows, BatchSize(None, "cpu"), quiet)
        assert tokens.source_loss.mean() == pytest.approx(2.7025, abs=1e-4)
        assert tokens.converted_loss.mean() == pytest.approx(expected, abs=1e-4)


def test_the_paired_test_finds_what_unpaired_errors_hide(
    dev: tuple[Path, ...], convert: Convert, tmp_path: Path
) -> None:
    """ladder in layers 6-11 costs 0.02 nats; between documents losses differ by far more."""
    make_tasks(tmp_path / "tasks", dev, 0)
    questions = tmp_path / "tasks" / f"{CLOZE_TASK}.jsonl"
    (tmp_path / "tasks" / "next_line.yaml").write_text(NEXT_LINE.format(questions=questions))
    (tmp_path / "tasks" / "loss.py").write_text(LOSS)
    asked = Settings(("next_line",), (tmp_path / "tasks",), limit=120, dtype="float32")
    converted = convert(FIXTURE / "model", 4, layers(6, "ladder"))
    (row,) = evaluate(converted, FIXTURE / "model", asked, None, tmp_path / "cache", quiet).rows
    assert row.source_stderr is not None and row.converted_stderr is not None
    assert row.source is not None and row.difference is not None
    apart = abs(row.converted.value - row.source.value)
    assert apart < 1.96 * math.hypot(row.source_stderr, row.converted_stderr)
    assert row.difference.p_value is not None and row.difference.p_value < 0.05
    assert row.verdict == "worse"


# A schedule that was planned: 8 all-reduces in all.
PLANNED = (
    "a0! m0! a1! m1. a2! m2. a3. m3. a4! m4. a5. m5. a6. m6. a7! m7. a8. m8. a9. m9. a10! m10. "
    "a11. m11!"
)


def test_assignment_and_guesses_bring_eight_all_reduces_near_the_source(
    source: tuple[Windows, Reference], tmp_path: Path
) -> None:
    """Calibrated on a fortieth of the calibration split, reported on dev, with no training."""
    windows, predictions = source
    checkpoint, losses = open_checkpoint(FIXTURE / "model"), list[float]()
    text = calibration_windows(checkpoint, split("calibration"), LENGTH, tokens=8192)
    affinity, guess = "assignment: affinity\n", "guess: {rank: 16}\n"
    schedule = f'schedule:\n  - layers: 0-11\n    stages: "{PLANNED}"\n'
    specs = [
        parse_spec(f"format: 1\ntracks: 4\n{top}{schedule}", "planned")
        for top in ("", affinity, affinity + guess)
    ]
    whole, _ = calibrate(checkpoint, specs[-1], text, "cpu", "auto", tmp_path, quiet)
    for spec, known in zip(specs, (None, Calibration(whole.assignments), whole), strict=True):
        path = tmp_path / f"converted-{len(losses)}"
        execute(plan_conversion(checkpoint, spec, source_name="x", calibration=known), path)
        model = open_model(open_checkpoint(path), "float32", "cpu")
        tokens = measure(model, predictions, windows, BatchSize(None, "cpu"), quiet)
        losses.append(float((tokens.converted_loss - tokens.source_loss).mean()))
    planned, assigned, guessed = losses
    assert planned == pytest.approx(0.063, abs=0.001)
    assert assigned < 0.8 * planned
    assert guessed < 0.04 and guessed < 0.75 * assigned


def test_round_trip_bit_for_bit(convert: Convert, tmp_path: Path) -> None:
    converted = convert(FIXTURE / "model", 4, layers(0, "parallel_track, depth: 4"))
    execute(plan_to_dense(open_checkpoint(converted)), tmp_path / "back")
    a, b = open_checkpoint(FIXTURE / "model"), open_checkpoint(tmp_path / "back")
    assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
    assert all(same_bytes(a.tensors[name], b.tensors[name]) for name in a.tensors)
