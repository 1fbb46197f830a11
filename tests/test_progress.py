"""What a log gets of a long step, on a clock of its own."""

from __future__ import annotations

import io
import itertools
import re
import threading
import time
from datetime import timedelta

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress

from ptconvert.cli import progress
from ptconvert.cli.progress import Lines, byte_progress, step_progress, waiting


class Log:
    """Lines with a clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.of = Lines(self.lines.append, clock=lambda: self.now)

    def times(self, seconds: int) -> list[float]:
        """The seconds, from now on, at which a step that says nothing gets its lines."""
        began, found = self.now, []
        for _ in range(seconds):
            self.now += 1
            before = len(self.lines)
            self.of.tick()
            found += [self.now - began] * (len(self.lines) - before)
        return found


def test_lines_come_at_growing_intervals_up_to_a_minute() -> None:
    log = Log()
    log.of.tell("opening", 0, None)
    times = log.times(1000)
    assert times[:6] == [2, 12, 22, 32, 43, 58]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == sorted(gaps) and gaps[-1] == 60 and len(times) < 30
    assert log.lines[1] == "opening: 0:00:12 so far"


def test_a_line_says_how_far_and_how_long_it_takes() -> None:
    log = Log()
    log.of.tell("source", 0, 64)
    log.now += 1
    log.of.tell("source", 8, 64)
    assert log.lines == []
    log.now += 1
    log.of.tell("source", 16, 64, "loss 1.5")
    assert log.lines == ["source: 16 of 64, 0:00:02 so far, about 0:00:06 left, loss 1.5"]
    log.now += 3600
    log.of.tell("source", 64, 64)
    assert log.lines[1:] == ["source: 64 of 64, 1:00:02 so far"]


def test_what_an_earlier_run_did_is_not_this_ones_speed() -> None:
    log = Log()
    log.of.tell("training", 900, 1000)
    log.now += 10
    log.of.tell("training", 910, 1000)
    assert log.lines == ["training: 910 of 1000, 0:00:10 so far, about 0:01:30 left"]


def test_the_time_left_falls_while_nothing_is_heard() -> None:
    log = Log()
    log.of.tell("source model", 0, 30)
    log.now += 60
    log.of.tell("source model", 15, 30)
    log.times(100)
    left = [line.rsplit("about ", 1)[1] for line in log.lines]
    assert left == ["0:01:00 left", "0:00:40 left", "0:00:13 left", "0:00:00 left"]


@pytest.mark.parametrize(("first", "second"), [((8, 8), (0, 8)), ((8, 8), (8, 80))])
def test_a_step_of_the_same_name_once_more_has_a_time_of_its_own(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    """As a round of `plan` searches again and again, each time over so many candidates."""
    log = Log()
    log.of.tell("round 1: longer runs", 0, 8)
    log.now += 3600
    log.of.tell("round 1: longer runs", *first)
    log.of.tell("round 1: longer runs", *second)
    log.now += 30
    done, total = second[0] + 2, second[1]
    log.of.tell("round 1: longer runs", done, total)
    left = timedelta(seconds=15 * (total - done))
    assert log.lines[1:] == [
        f"round 1: longer runs: {done} of {total}, 0:00:30 so far, about {left} left"
    ]


def test_the_bar_begins_again_with_its_step() -> None:
    now = [0.0]
    with Progress(console=Console(file=io.StringIO()), get_time=lambda: now[0]) as bar:
        advance = progress._on(bar)
        for done in (0, 4, 8, 0, 2):
            advance("round 1: longer runs", done, 8)
            now[0] += 30
        (task,) = bar.tasks
        assert (task.completed, task.elapsed) == (2, 60)


def test_short_steps_and_many_calls_are_few_lines() -> None:
    log = Log()
    for _ in range(18):  # 1.8 s: nothing
        log.now += 0.1
        log.of.tell("quick", 0, None)
    assert log.lines == []
    for number in range(100):  # 50 s of steps that are over in half a second
        log.now += 0.5
        log.of.tell(f"round {number}", number, 100)
    assert len(log.lines) == 4
    log = Log()
    for number in range(10_000):  # 100 s of one step
        log.now += 0.01
        log.of.tell("windows", number, 10_000)
    assert len(log.lines) == 7


def test_a_new_step_that_lasts_is_said_at_once() -> None:
    log = Log()
    log.of.tell("source", 0, None)
    log.times(3)
    log.of.tell("converted", 0, None)
    assert log.times(3) == [2] and log.lines[-1] == "converted: 0:00:02 so far"


def test_bytes_are_said_as_sizes() -> None:
    lines: list[str] = []
    now = [0.0]
    log = Lines(lines.append, decimal, lambda: now[0])
    log.tell("writing out", 0, 16 * 10**9)
    now[0] = 4.0
    log.tell("writing out", 4 * 10**9, 16 * 10**9)
    assert lines == ["writing out: 4.0 GB of 16.0 GB, 0:00:04 so far, about 0:00:12 left"]


@click.command()
def command() -> None:
    with waiting("waits"):
        time.sleep(0.05)
    with step_progress() as advance:
        advance("steps", 1234, 5000)
        time.sleep(0.05)
    with byte_progress(10_000, "writes") as wrote:
        threads = [threading.Thread(target=wrote, args=(1000,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.05)
    click.echo("figures")


def test_all_of_them_go_to_standard_error_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", (1e4, 1e4))
    quiet = CliRunner().invoke(command)
    assert (quiet.stdout, quiet.stderr) == ("figures\n", "")  # over before a line is due
    monkeypatch.setattr(progress, "_INTERVAL", (0.02, 0.02))
    monkeypatch.setattr(progress, "_TICK", 0.01)
    done = CliRunner().invoke(command)
    assert done.stdout == "figures\n"
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert all(re.match(stamp, line) for line in done.stderr.splitlines())
    for said in (
        "waits: 0:00:\\d\\d so far",
        "steps: 1,234 of 5,000, ",
        "writes: 4.0 kB of 10.0 kB",
    ):
        assert re.search(f" {said}", done.stderr)
    again = CliRunner().invoke(command, env={"RANK": "1"})  # the first process speaks for all
    assert (again.stdout, again.stderr) == ("figures\n", "")
