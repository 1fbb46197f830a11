"""The program that vLLM's model walks: what a schedule is lowered to. (Needs no vLLM.)"""

from __future__ import annotations

import pytest

from ptconvert.schedule.lower import Step, lower
from ptconvert.schedule.stages import Merge, Schedule

# Each step as: index, ending, stages seen, stages merged, sublayers counted.
GOLDEN = {
    "a0! m0!": ["0 ! sees [] merges [] counts a0", "1 ! sees [] merges [] counts m0"],
    "a0. m0. a1. m1!": [
        "0 . sees [] merges [] counts ",
        "1 . sees [] merges [] counts ",
        "2 . sees [] merges [] counts ",
        "3 ! sees [] merges [] counts a0 m0 a1 m1",
    ],
    "a0~1 m0~1 a1~1 m1~1": [
        "0 ~ sees [] merges [] counts ",
        "1 ~ sees [] merges [0] counts a0",
        "2 ~ sees [] merges [1] counts m0",
        "3 ~ sees [] merges [2, 3] counts a1 m1",
    ],
    "a0^2 m0. a1|m1!": [
        "0 ^ sees [] merges [] counts ",
        "1 . sees [0] merges [] counts ",
        "2 ! sees [0] merges [0] counts m0 a1 m1 a0",
    ],
}


def printed(step: Step) -> str:
    counted = " ".join(map(str, step.counted))
    sees, merged = list(step.sees), list(step.merged)
    return f"{step.index} {step.ending.value} sees {sees} merges {merged} counts {counted}"


@pytest.mark.parametrize("text", GOLDEN)
def test_golden(text: str) -> None:
    assert [printed(step) for step in lower(Schedule.parse(text))] == GOLDEN[text]


@pytest.mark.parametrize("text", GOLDEN)
def test_every_sublayer_is_counted_once_and_what_is_launched_is_merged(text: str) -> None:
    schedule = Schedule.parse(text)
    program = lower(schedule)
    run = [str(s) for step in program for s in step.sublayers]
    assert sorted(run) == sorted(str(s) for step in program for s in step.counted)
    launched = [step.index for step in program if step.ending.overlapped]
    assert launched == sorted(stage for step in program for stage in step.merged)
    blocking = sum(step.ending is Merge.BLOCKING for step in program)
    assert blocking + len(launched) == schedule.counts.all_reduces
