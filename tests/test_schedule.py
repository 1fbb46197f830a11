"""Schedules as text and data: parsing, validation, counts, and where tracks differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptconvert.errors import ScheduleError
from ptconvert.schedule.presets import (
    PRESETS,
    dense_schedule,
    join,
    parameters,
    with_only,
)
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.theirs import from_ladder_layers, to_ladder_layers

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> list[tuple[str, str, str]]:
    """Rows of such a file: preset with parameters, layers, schedule."""
    lines = (GOLDEN / name).read_text().splitlines()
    rows = [line.split(" | ", 2) for line in lines if line and not line.startswith("#")]
    return [(preset, layers, text) for preset, layers, text in rows]


def schedule_of(description: str, layers: str, of: int = 12, parallel: bool = False) -> Schedule:
    """The schedule of 12 layers, or so many: a preset in a range, tensor parallel elsewhere."""
    name, *pairs = description.split()
    arguments = {k: int(v) for k, v in (pair.split("=") for pair in pairs)}
    first, last = map(int, layers.split("-"))
    parts = []
    if first:
        parts.append(("tensor_parallel", PRESETS["tensor_parallel"](range(first), parallel)))
    parts.append((name, PRESETS[name](range(first, last + 1), parallel, **arguments)))
    if last < of - 1:
        rest = range(last + 1, of)
        parts.append(("tensor_parallel", PRESETS["tensor_parallel"](rest, parallel)))
    return join(parts)


@pytest.mark.parametrize(("preset", "layers", "text"), golden("presets.txt"))
def test_presets_give_the_golden_schedules(preset: str, layers: str, text: str) -> None:
    schedule = schedule_of(preset, layers)
    assert str(schedule) == text
    assert Schedule.parse(text) == schedule


@pytest.mark.parametrize(("preset", "layers", "text"), golden("parallel-presets.txt"))
def test_presets_of_parallel_layers(preset: str, layers: str, text: str) -> None:
    assert str(schedule_of(preset, layers, of=6, parallel=True)) == text


def test_every_preset_has_a_golden_schedule() -> None:
    for name in ("presets.txt", "parallel-presets.txt"):
        assert {preset.split()[0] for preset, _, _ in golden(name)} == set(PRESETS)


def test_blocks_of_parallel_layers_are_whole_ones() -> None:
    """Between `a1!` and `m1!` their dense model has never been."""
    schedule, dense = Schedule.parse("a0|m0! a1! m1! a2. m2!"), dense_schedule(3, parallel=True)
    blocks = list(schedule.blocks(dense))
    assert blocks == [range(1), range(1, 3), range(3, 5)]
    assert len(list(schedule.blocks(dense_schedule(3)))) == 4
    alone = [str(with_only(schedule, block, dense)) for block in blocks]
    assert alone == [str(dense), "a0|m0! a1! m1! a2|m2!", "a0|m0! a1|m1! a2. m2!"]
    assert dense.running(s for stage in schedule.stages[1:] for s in stage.sublayers) == range(1, 3)


@pytest.mark.parametrize(
    ("preset", "layers", "all_reduces", "waited_for"),
    [
        # the table of the fixture's README
        ("tensor_parallel", "0-11", 24, 24),
        ("ladder", "0-11", 24, 1),
        ("ladder", "1-11", 24, 2),
        ("ladder", "6-11", 24, 12),
        ("parallel_block", "1-11", 13, 13),
        ("layer_parallel", "2-11", 14, 14),
        ("sync_point_drop", "1-11", 13, 13),
        ("delayed delay=2", "1-11", 24, 3),
        ("parallel_track depth=4", "0-11", 3, 3),
        ("parallel_track depth=2", "1-11", 8, 8),
        ("parallel_track depth=4", "1-11", 5, 5),
        ("parallel_track depth=2 overlap=1", "1-11", 8, 3),
        ("laneformer delay=2", "0-11", 24, 5),
        ("farskip", "0-11", 35, 1),
        ("farskip", "1-11", 34, 3),
        # and of DESIGN 2.3, for L = 12
        ("parallel_block", "0-11", 12, 12),
        ("layer_parallel", "0-11", 12, 12),
        ("sync_point_drop", "0-11", 12, 12),
        ("delayed delay=3", "0-11", 24, 1),
        ("desync every=4", "0-11", 6, 6),
        ("parallel_track depth=4 overlap=2", "0-11", 3, 1),
    ],
)
def test_counts(preset: str, layers: str, all_reduces: int, waited_for: int) -> None:
    counts = schedule_of(preset, layers).counts
    assert (counts.all_reduces, counts.waited_for) == (all_reduces, waited_for)


@pytest.mark.parametrize(
    ("text", "marked", "why"),
    [
        ("a0! m0", ">>m0<<", "is not a stage"),
        ("a0! m0! b1!", ">>b1!<<", "is not a stage"),
        ("a0! m00!", ">>m00!<<", "is not a stage"),
        ("a0~ m0!", ">>a0~<<", "needs a lag"),
        ("a0^0 m0!", ">>a0^0<<", "needs a lag"),
        ("a0!2 m0!", ">>a0!2<<", "has a lag"),
        ("m0! a0!", ">>m0!<<", "runs m0 before a0"),
        ("a0! m0! a0! m1!", ">>a0!<<", "runs a0 again"),
        ("a0|a0! m0!", ">>a0|a0!<<", "runs a0 again"),
        ("a0! m0.", ">>m0.<<", "leaves its partial pending"),
        ("a0! m0! a5000! m1!", ">>a5000!<<", "is past layer"),
        ("a0! s0! s0! r0!", ">>s0!<<", "runs s0 again"),
        ("a0! m0! r0!", ">>r0!<<", "runs r0 beside m0; an MLP runs whole, as m0, or a mixture in"),
        ("a0! s0! r0! m0!", ">>m0!<<", "runs m0 beside s0"),
        ("s0! a0! r0!", ">>s0!<<", "runs s0 before a0"),
        ("a0! s0! r0.", ">>r0.<<", "leaves its partial pending"),
    ],
)
def test_what_breaks_a_rule_is_printed_with_the_stage_marked(
    text: str, marked: str, why: str
) -> None:
    with pytest.raises(ScheduleError, match=why) as error:
        Schedule.parse(text)
    assert marked in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("a0! m0! a2! m2!", "a1"), ("a0!", "m0"), ("a0! s0!", "r0"), ("a0|r0!", "s0")],
)
def test_missing_sublayers_are_named(text: str, missing: str) -> None:
    with pytest.raises(ScheduleError, match=f"{missing} is missing"):
        Schedule.parse(text)
    with pytest.raises(ScheduleError, match="no stages"):
        Schedule.parse(" ")


@st.composite
def schedules(draw: st.DrawFn, divided: bool = False) -> Schedule:
    """Valid schedules: sublayers in order, some side by side, any endings but the last; some MLPs
    `divided` into their two parts."""
    kinds = st.sampled_from(["am", "asr", "ars"] if divided else ["am"])
    names = [f"{kind}{i}" for i in range(draw(st.integers(1, 6))) for kind in draw(kinds)]
    words, stage = [], ""
    for name in names:
        stage = f"{stage}|{name}" if stage else name
        if name == names[-1]:
            words.append(stage + draw(st.sampled_from(["!", "~1", "^4"])))
        elif draw(st.booleans()):
            words.append(stage + draw(st.sampled_from(["!", ".", "~1", "~3", "^1", "^2"])))
            stage = ""
    return Schedule.parse(" ".join(words))


@given(schedules(divided=True))
def test_prints_and_parses_back_to_itself(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule
    assert schedule.counts.waited_for <= schedule.counts.all_reduces <= len(schedule.stages)


@given(schedules(divided=True), st.booleans())
def test_blocks_cover_a_schedule_and_can_be_exchanged(schedule: Schedule, parallel: bool) -> None:
    dense = dense_schedule(schedule.layers, parallel)
    blocks = list(schedule.blocks(dense))
    assert [i for block in blocks for i in block] == list(range(len(schedule.stages)))
    for block in blocks:
        alone = with_only(schedule, block, dense)
        stages = schedule.stages[block.start : block.stop]
        assert alone.layers == schedule.layers
        assert str(alone).find(" ".join(map(str, stages))) >= 0
    if all(with_only(schedule, b, dense) == dense for b in blocks):
        assert schedule == dense


@given(st.text(alphabet="amsr0123 |!.~^x\n", max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        assert Schedule.parse(str(Schedule.parse(text))) == Schedule.parse(text)
    except ScheduleError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "tracked"),
    [
        ("a0! m0! a1! m1!", []),
        ("a0~1 m0~1 a1~5 m1!", []),
        ("a0|m0! a1|m1!", []),
        ("a0. m0! a1! m1!", [0]),
        ("a0! m0^1 a1! m1!", [0, 1]),
        ("a0! m0^2 a1! m1!", [0, 1]),
        ("a0! m0^1 a1! m1! a2! m2!", [0, 1]),
        ("a0! m0! a1! m1^3", []),
        ("a0! m0. a1~1 m1!", [0, 1]),
    ],
)
def test_layers_in_which_tracks_differ(text: str, tracked: list[int]) -> None:
    schedule = Schedule.parse(text)
    assert sorted(schedule.track_layers) == tracked


def test_parameters_come_from_the_presets() -> None:
    assert parameters("parallel_track") == {"depth": None, "overlap": 0}
    assert parameters("ladder") == {}


@pytest.mark.parametrize(
    ("value", "starts", "back"),
    [
        (2, "a0! m0~1 a1~1 m1~1 a2~1 m2!", 2),
        ([0, 1, 2], "a0~1 m0~1 a1~1 m1~1 a2~1 m2!", 3),
        ([1], "a0! m0~1 a1~1 m1! a2! m2!", [1]),
        ([], "a0! m0! a1! m1! a2! m2!", []),
    ],
)
def test_ladder_layers(value: object, starts: str, back: object) -> None:
    schedule = from_ladder_layers(value, 3)
    assert str(schedule) == starts
    assert to_ladder_layers(schedule) == back


@pytest.mark.parametrize("value", [4, -1, True, "2", [3], [0, "1"], {}])
def test_wrong_ladder_layers_are_refused(value: object) -> None:
    with pytest.raises(ScheduleError, match="ladder_layers is"):
        from_ladder_layers(value, 3)


def test_ladder_layers_of_parallel_layers() -> None:
    schedule = from_ladder_layers([1], 3, parallel=True)
    assert str(schedule) == "a0|m0~1 a1|m1! a2|m2!"
    assert to_ladder_layers(schedule) is None  # the authors' code knows no such layers


def test_other_schedules_have_no_ladder_layers() -> None:
    assert to_ladder_layers(Schedule.parse("a0. m0!")) is None
    assert to_ladder_layers(Schedule.parse("a0~1 m0~2 a1! m1!")) is None


def test_schedules_and_the_transform_need_no_torch() -> None:
    code = (
        "import sys, ptconvert.schedule.stages, ptconvert.spec.document;"
        "import ptconvert.convert.transform, ptconvert.cli;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
