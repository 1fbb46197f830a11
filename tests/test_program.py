"""The program that everything walks: what a schedule is lowered to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from ptconvert.schedule.endings import KINDS
from ptconvert.schedule.schedule import Schedule

GOLDEN = {
    text: program.splitlines()
    for text, _, program in (
        part.partition("\n")
        for part in (Path(__file__).parent / "golden" / "programs.txt").read_text().split("\n\n")
    )
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden(text: str) -> None:
    assert [str(step) for step in Schedule.parse(text).program] == GOLDEN[text]


@pytest.mark.parametrize("text", GOLDEN)
def test_every_bucket_is_launched_once_and_merged_once(text: str) -> None:
    """So every sublayer's partials, and its output bias, join the stream once."""
    schedule = Schedule.parse(text)
    buckets = {step.bucket for step in schedule.program}
    launched = [step.index for step in schedule.program if step.launches]
    assert launched == sorted(buckets)
    assert launched == sorted(bucket for step in schedule.program for bucket in step.merges)
    assert len(launched) == schedule.counts.all_reduces


def drawn_stages(random: Random) -> Iterator[str]:
    layers = random.randint(1, 5)
    for position in range(2 * layers):
        last = position == 2 * layers - 1
        ending = random.choice([kind for kind in KINDS.values() if kind.launches or not last])
        lag = random.randint(1, 3) if ending.lagged else ""
        yield f"{'am'[position % 2]}{position // 2}{ending.symbol}{lag}"


@pytest.mark.parametrize("seed", range(200))
def test_what_is_read_is_what_was_written_and_not_merged(seed: int) -> None:
    """By a count of its own, sublayer by sublayer, of who sees what."""
    stages = " ".join(drawn_stages(Random(seed))).split()
    schedule = Schedule.parse(" ".join(stages))
    pending: list[tuple[int, bool]] = []  # stage, and whether its own track sees its partial
    flights: list[tuple[int, list[tuple[int, bool]]]] = []  # when merged, and what
    pairs = set()
    for index, stage in enumerate(stages):
        kind, lag = KINDS[stage[2]], int(stage[3:] or 0)
        seen = [*pending, *(each for _, flight in flights for each in flight)]
        pairs |= {(writer, index) for writer, is_seen in seen if is_seen}
        pending.append((index, kind.own_seen))
        if kind.launches:
            merged = min(index + lag, len(stages) - 1)
            flights.append((merged, [(writer, kind.own_seen) for writer, _ in pending]))
            pending = []
        flights = [(at, flight) for at, flight in flights if at > index]
    assert {(w.position, r.position) for w, r in schedule.own_read()} == pairs
