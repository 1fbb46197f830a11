"""How far a long step has come: bars on a terminal, elsewhere lines for a log, both on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

_INTERVAL = 10.0, 60.0  # seconds between lines, at first and at most
_FIRST = 1 / 5  # of an interval: what a step lasts before it is worth a line
_TICK = 1.0  # seconds between looks at the clock, while a step says nothing

_At = tuple[str, int, int | None]  # a step's name, what is done and of how much


class Advance(Protocol):
    """Told how far a long step has come: its name, how much is done and of how much (None:
    unknown), and how well it goes."""

    def __call__(self, step: str, done: int, total: int | None, note: str = "") -> None: ...


@contextmanager
def step_progress() -> Iterator[Advance]:
    """Steps that are counted, one after the other. To be called from one thread."""
    columns = (SpinnerColumn(), _name(), BarColumn(), _Count())
    with _shown((*columns, TimeElapsedColumn(), TimeRemainingColumn()), "{:,}".format) as advance:
        yield advance


@contextmanager
def byte_progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """One step of so many bytes; told, from any thread, the bytes done since the last call."""
    columns = (_name(), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    done, lock = 0, threading.Lock()
    with _shown(columns, decimal) as tell:

        def advance(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                tell(label, done, total)

        yield advance


@contextmanager
def waiting(label: str, bars_of_its_own: bool = False) -> Iterator[None]:
    """A step of which no more is known than that it goes on. What has bars of its own on a
    terminal, as the hub's library has, is left to them there."""
    if bars_of_its_own and sys.stderr.isatty():
        yield
        return
    with _shown((SpinnerColumn(), _name(), TimeElapsedColumn()), str) as tell:
        tell(label, 0, None)
        yield


def first_process() -> bool:
    """Whether this is the only process, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _shown(columns: tuple[ProgressColumn, ...], amount: Callable[[int], str]) -> Iterator[Advance]:
    """A bar of these columns on a terminal, lines elsewhere; nothing but in the first process."""
    if not first_process():
        yield lambda *_, **__: None
    elif sys.stderr.isatty():
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _on(bar)
    else:
        with _logged(amount) as advance:
            yield advance


def _begins(now: _At, before: _At | None) -> bool:
    """Whether a step begins: another one, or one of the same name once more, as in a loop."""
    if before is None:
        return True
    (name, done, total), (name_before, done_before, total_before) = now, before
    return (name, total) != (name_before, total_before) or done < done_before


def _name() -> ProgressColumn:
    return TextColumn("{task.description}", markup=False)


class _Count(MofNCompleteColumn):
    """How much of how much, where that is known."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


def _on(bar: Progress) -> Advance:
    """Shows the step at hand alone."""
    shown: _At | None = None

    def advance(step: str, done: int, total: int | None, note: str = "") -> None:
        nonlocal shown
        now = step, done, total
        if _begins(now, shown):
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(step, total=total)
        shown = now
        description = f"{step}: {note}" if note else step
        bar.update(bar.task_ids[0], completed=done, total=total, description=description)

    return advance


@contextmanager
def _logged(amount: Callable[[int], str]) -> Iterator[Advance]:
    """Lines on the stderr of now, each with the time of day, also while nobody calls."""
    stream, over = sys.stderr, threading.Event()

    def write(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk must not end what is logged
            print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=stream, flush=True)

    lines = Lines(write, amount)

    def watch() -> None:
        while not over.wait(_TICK):
            lines.tick()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lines.tell
    finally:
        over.set()
        watcher.join()


@dataclass
class _Step:
    """A step as far as it is known; `began` and `before` are time and amount at its first call, so
    that what an earlier run did doesn't count as this one's speed, and `moved` is when it last got
    on."""

    name: str
    began: float
    before: int
    moved: float
    done: int = 0
    total: int | None = None
    note: str = ""
    said: bool = False

    @property
    def at(self) -> _At:
        return self.name, self.done, self.total


class Lines:
    """Progress as lines, few enough for a log: what, how far, how long so far, and time left.

    They come at intervals that grow with the time gone by, from 10 s to a minute; a new step gets
    its first line once it has lasted a fifth of one. So what is over in 2 s says nothing. May be
    called from several threads.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        amount: Callable[[int], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._amount, self._clock = write, amount, clock
        self._started = self._last = clock()
        self._step: _Step | None = None
        self._lock = threading.Lock()

    def tell(self, step: str, done: int, total: int | None, note: str = "") -> None:
        """Takes in how far a step has come, and says it where a line is due."""
        with self._lock:
            now = self._clock()
            if self._step is None or _begins((step, done, total), self._step.at):
                self._step = _Step(step, now, done, now)
            if self._step.done != done:
                self._step.moved = now
            self._step.done, self._step.total, self._step.note = done, total, note
            self._say(self._step)

    def tick(self) -> None:
        """Says how far the step at hand is, where a line is due."""
        with self._lock:
            if self._step is not None:
                self._say(self._step)

    def _say(self, step: _Step) -> None:
        now = self._clock()
        least, most = _INTERVAL
        interval = min(max((now - self._started) / 4, least), most)
        new = not step.said and now - step.began >= interval * _FIRST
        if new or now - self._last >= interval:
            self._last, step.said = now, True
            self._write(self._line(step, now))

    def _line(self, step: _Step, now: float) -> str:
        parts = [f"{_duration(now - step.began)} so far"]
        if step.total is not None:
            parts.insert(0, f"{self._amount(step.done)} of {self._amount(step.total)}")
            if step.before < step.done < step.total:
                each = (step.moved - step.began) / (step.done - step.before)
                left = each * (step.total - step.done) - (now - step.moved)
                parts.append(f"about {_duration(max(left, 0))} left")
        elif step.done:
            parts.insert(0, self._amount(step.done))
        if step.note:
            parts.append(step.note)
        return f"{step.name}: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as rich's columns have them."""
    return str(timedelta(seconds=round(seconds)))
