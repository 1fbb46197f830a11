"""Compensations as a registry: every table has a row for each, and nothing else knows them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from calibrating import TOP, random_calibration
from conftest import MakeDense, spec_text

import ptconvert
from ptconvert.calibrate.conversion import FITS
from ptconvert.calibrate.needs import PHASES
from ptconvert.checkpoint import section
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.compensations import COMPENSATIONS
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import plan_conversion
from ptconvert.spec.document import COMPUTED, parse_spec, written

PACKAGE = Path(ptconvert.__file__).parent
KEYS = [row.key for row in COMPENSATIONS]
# Where a compensation is what the module is about: its data, its fit, its modules, its time.
OWN = {
    "spec/terms.py",
    "checkpoint/section.py",
    "checkpoint/compensations.py",
    "calibrate/conversion.py",
    "calibrate/needs.py",
    "calibrate/stand_ins.py",
    "modeling/layers.py",
    "engines/base.py",
    "cli/plan.py",  # the rank whose time is in its latency
}


def test_every_table_has_a_row_for_each() -> None:
    assert [f.name for f in COMPUTED] == list(section.READERS) == KEYS
    assert list(FITS) == list(PHASES) == KEYS


def named(source: str) -> set[str]:
    """The keys and words of compensations that code has as text."""
    words = {*KEYS, "affinity"}
    texts = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
    return {text for text in texts if isinstance(text, str)} & words


def test_nothing_else_knows_one_by_its_name() -> None:
    assert named('if key == "guess": f(x["affinity"])') == {"guess", "affinity"}
    files = {str(f.relative_to(PACKAGE)): named(f.read_text()) for f in PACKAGE.rglob("*.py")}
    assert {name for name, found in files.items() if found} <= OWN
    assert all((PACKAGE / name).is_file() for name in OWN)


@pytest.mark.parametrize("lines", [[], ["assignment: affinity"], ["guess: {rank: 8}"]])
def test_what_is_wanted_reads_back(lines: list[str]) -> None:
    top = "".join(f"{line}\n" for line in lines)
    text = "format: 1\ntracks: 4\nschedule:\n  - {layers: 0-5, use: parallel_track, depth: 2}\n"
    spec = parse_spec(text + top, "s")
    assert written(spec.wanted) == lines and spec.needs_text == bool(lines)
    assert spec.only([]).wanted == {} and spec.only(KEYS) == spec


def test_a_plan_is_complete_with_all_that_is_added(make_dense: MakeDense) -> None:
    source = make_dense("llama")
    spec = parse_spec(spec_text(4, "use: parallel_track, depth: 2", TOP), "s")
    whole = random_calibration(source, spec.schedule(), 4)
    less = Calibration(whole.assignments, whole.values, dict([*whole.tensors.items()][1:]))
    for known, complete in ((whole, True), (less, False), (None, False)):
        plan = plan_conversion(open_checkpoint(source), spec, source_name="x", calibration=known)
        assert plan.complete == complete
