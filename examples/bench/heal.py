"""What each step is worth: loss against all-reduces waited for, from uniform to planned to healed.

    python examples/bench/heal.py MODEL --tracks 4 --calibrate FILE... --report FILE... --work DIR

For each number of all-reduces to wait for: a uniform schedule, the planned one, the same with heads
and neurons assigned by affinity, with guesses fitted, healed block by block, and healed end to end;
each step on top of those before it. Everything is fitted on the one text and measured on others;
each --report is one, with a table of its own.
The yardstick is the source itself, trained on the same tokens in the same way but on the text, not
on itself: what ordinary training would gain.

Prints tables in Markdown: rise of the loss over the source's with half its 95% interval, and in
brackets KL(source || model), both in nats per token, and the share of tokens whose first choice is
the source's. Finished cells and checkpoints are kept in --work; the same command goes on from
there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from pathlib import Path

from plan import meter_of
from transformers.utils.logging import disable_progress_bar

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli.progress import step_progress
from ptconvert.heal.data import read_data
from ptconvert.heal.distill import distill
from ptconvert.heal.models import put
from ptconvert.heal.settings import Settings
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import cache_directory
from ptconvert.measure.divergence import Reference, Tokens
from ptconvert.measure.opening import open_model
from ptconvert.measure.progress import Progress
from ptconvert.measure.windows import Windows, windows_for
from ptconvert.plan.planner import choose, search, waited_for
from ptconvert.plan.sensitivity import Meter
from ptconvert.schedule import presets
from ptconvert.schedule.schedule import Schedule

WAITS = (24, 12, 8, 6, 4, 3, 2)
STEPS = ("uniform", "planned", "affinity", "guess", "blockwise", "KL")
YARDSTICK = "yardstick"
DECISIVE = (  # the options that a cell depends on
    *("model", "calibrate", "report", "window", "windows", "report_windows", "fit_windows"),
    *("tokens", "rank", "heal", "yardstick", "no_overlap"),
)


@dataclass(frozen=True)
class Cell:
    """A model on one report text: the source's loss, its rise with half of the rise's 95% interval,
    KL from the source, and the share of tokens for which both have the same first choice."""

    source: float
    loss: float
    half: float
    kl: float
    same: float

    def __str__(self) -> str:
        return f"{self.loss:+.4f} ± {self.half:.4f} ({self.kl:.4f}, {self.same:.1%})"


Cells = list[Cell]  # one for each report text


def main() -> None:
    """Parses, makes every cell that isn't there yet, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tracks", type=int, default=4)
    parser.add_argument("--waits", type=int, nargs="+", default=list(WAITS))
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--report", type=Path, nargs="+", required=True, action="append")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="to plan on")
    parser.add_argument("--report-windows", type=int, help="of each report text [as --windows]")
    parser.add_argument(
        "--fit-windows", type=int, help="for assignment and guesses [65,536 tokens]"
    )
    parser.add_argument(
        "--tokens", type=int, default=500_000, help="to heal on, in all stages together"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the guesses")
    parser.add_argument("--heal", default="", help="further options of `ptconvert heal`")
    parser.add_argument(
        "--yardstick", type=json.loads, default={}, help="its Settings, JSON, as --heal has them"
    )
    parser.add_argument("--no-overlap", action="store_true", help="plan without overlap")
    parser.add_argument("--without", default="", help="steps to leave out: affinity,guess,...")
    parser.add_argument("--cache", type=Path, default=cache_directory())
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    disable_progress_bar()  # of transformers; ours are shown
    left_out = set(given.without.split(","))
    steps = [step for step in STEPS if step not in left_out]
    given.without_stage = bool(left_out & {"blockwise", "KL"})
    given.report_windows = given.report_windows or given.windows
    given.work.mkdir(parents=True, exist_ok=True)
    with step_progress() as progress:
        bench = Bench(given, progress)
        rows = [
            (waits, bench.all_reduces(waits), {s: bench.cells(waits, s, steps) for s in steps})
            for waits in given.waits
        ]
        yardstick = None if YARDSTICK in left_out else bench.yardstick()
    names = [f"+ {s}" if s in STEPS[2:] else s for s in steps]
    for number, files in enumerate(given.report):
        measured = [*(c for _, _, cells in rows for c in cells.values()), yardstick or []]
        source = measured[0][number].source
        print(f"\n{' '.join(map(str, files))}: the source's loss is {source:.4f}\n")
        print(f"| waited for, at most | as planned | {' | '.join(names)} |")
        print(f"| --- | --- |{' --- |' * len(names)}")
        for waits, counts, cells in rows:
            row = [str(waits), counts, *(str(cells[s][number]) for s in steps)]
            print(f"| {' | '.join(row)} |")
        if yardstick is not None:
            told = "the source, trained on the same tokens"
            print(f"| {told} | |{' |' * (len(names) - 1)} {yardstick[number]} |")
    if given.csv is not None:
        _write(given, rows, yardstick)


Rows = list[tuple[int, str, dict[str, Cells]]]


def _write(given: argparse.Namespace, rows: Rows, yardstick: Cells | None) -> None:
    with given.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        of = ["text", "tracks", "waited_for_at_most", "as_planned", "step"]
        writer.writerow([*of, *(field.name for field in fields(Cell))])
        for number, files in enumerate(given.report):
            first = [" ".join(map(str, files)), given.tracks]
            for waits, counts, cells in rows:
                for step, found in cells.items():
                    writer.writerow([*first, waits, counts, step, *astuple(found[number])])
            if yardstick is not None:
                writer.writerow([*first, "", "", YARDSTICK, *astuple(yardstick[number])])


class Bench:
    """Makes and measures the models, each from the one before it, by the commands users type."""

    def __init__(self, given: argparse.Namespace, progress: Progress) -> None:
        self.given, self.progress = given, progress
        self.source = open_checkpoint(given.model)
        self.layers = int(str(self.source.config["num_hidden_layers"]))
        self._plans: dict[int, Schedule] = {}
        self._told = json.loads(json.dumps(vars(given), default=str))
        self.texts = [part for file in given.calibrate for part in ("--text", str(file))]

    def all_reduces(self, waits: int) -> str:
        """Of the planned schedule: how many are waited for, of how many."""
        counts = self._planned(waits).counts
        return f"{counts.waited_for} of {counts.all_reduces}"

    def cells(self, waits: int, step: str, steps: list[str]) -> Cells:
        """A step on each report text, measured now or by an earlier run."""

        def make() -> Cells:
            if step == "uniform":
                name = f"n{self.given.tracks}-w{waits}-uniform"
                return self._measured(self._converted(self._uniform(waits), name))
            so_far = steps[: steps.index(step) + 1]
            return self._measured(self._made(waits, [s for s in so_far if s != "uniform"]))

        steps_so_far = "+".join(steps[: steps.index(step) + 1])
        return self._kept(f"n{self.given.tracks}-w{waits}-{steps_so_far}", make)

    def yardstick(self) -> Cells:
        """The source, trained on the text by cross-entropy."""
        return self._kept(YARDSTICK, self._trained)

    def _kept(self, name: str, make: Callable[[], Cells]) -> Cells:
        told = {key: self._told[key] for key in DECISIVE}
        file = self.given.work / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            other = [key for key in DECISIVE if found["of"].get(key) != told[key]]
            if other:
                sys.exit(f"{file} was made with another {', '.join(other)}; name another --work")
            return [Cell(**cell) for cell in found["cells"]]
        cells = make()
        file.write_text(json.dumps({"of": told, "cells": [asdict(cell) for cell in cells]}))
        return cells

    def _made(self, waits: int, steps: list[str]) -> Path:
        """The checkpoint after these steps, the last of which makes it."""
        if self._planned(waits) == presets.dense_schedule(self.layers):
            steps = steps[:1]  # nothing is left to gain
        before, step, given = steps[:-1], steps[-1], self.given
        name = f"n{given.tracks}-w{waits}-{'+'.join(steps)}"
        if step not in ("blockwise", "KL"):
            top = "assignment: {method: affinity}\n" if "affinity" in steps else ""
            top += f"guess: {{rank: {given.rank}}}\n" if "guess" in steps else ""
            return self._converted(self._planned(waits), name, top)
        destination: Path = given.work / name
        if not destination.exists():
            stage = ["--blockwise", "--no-kl"] if step == "blockwise" else []
            tokens = given.tokens // (1 if given.without_stage else 2)
            sizes = ["--tokens", str(tokens), "--window", str(given.window)]
            teacher = ["--teacher", str(given.model)]
            source = str(self._made(waits, before))
            options = [*teacher, *self.texts, *sizes, *stage, *shlex.split(given.heal)]
            self._run(name, ["heal", source, str(destination), *options])
        return destination

    def _converted(self, schedule: Schedule, name: str, top: str = "") -> Path:
        destination: Path = self.given.work / name
        if not destination.exists():
            spec = self.given.work / f"{name}.yaml"
            spec.write_text(
                f"format: 1\ntracks: {self.given.tracks}\n{top}schedule:\n"
                f'  - layers: 0-{self.layers - 1}\n    stages: "{schedule}"\n'
            )
            texts = [*self.texts, "--window", str(self.given.window)] if top else []
            if top and self.given.fit_windows:
                texts += ["--windows", str(self.given.fit_windows)]
            command = ["transform", str(self.given.model), str(destination), "--spec", str(spec)]
            self._run(name, [*command, *texts])
        return destination

    def _run(self, name: str, arguments: list[str]) -> None:
        self.progress(name, 0, None)
        command = [sys.executable, "-m", "ptconvert", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def _uniform(self, waits: int) -> Schedule:
        every = -(-2 * self.layers // waits)
        return presets.join([("desync", presets.desync(range(self.layers), every=every))])

    def _planned(self, waits: int) -> Schedule:
        if waits not in self._plans:
            objective = waited_for(not self.given.no_overlap)
            point = choose(search(self._meter, objective, target=waits), waits, None)
            if point is None:
                sys.exit(f"no schedule waits for {waits} all-reduces")
            self._plans[waits] = point.schedule
        return self._plans[waits]

    @cached_property
    def _meter(self) -> Meter:
        return meter_of(self.given, self.given.calibrate, self.progress)

    @cached_property
    def _reported(self) -> list[tuple[Windows, Reference]]:
        """The report texts, and the source's predictions on them."""
        given, model = self.given, open_model(self.source, "float32", "cpu")
        texts = [
            windows_for(self.source, files, given.window, given.report_windows)
            for files in given.report
        ]
        return [
            (w, divergence.reference(model, w, BatchSize(None, "cpu"), self.progress))
            for w in texts
        ]

    def _measured(self, path: Path) -> Cells:
        return self._compared(open_model(open_checkpoint(path), "float32", "cpu"))

    def _compared(self, model: object) -> Cells:
        return [
            _cell(divergence.measure(model, reference, windows, BatchSize(None, "cpu"), _quiet))
            for windows, reference in self._reported
        ]

    def _trained(self) -> Cells:
        given, checkpoint = self.given, self.source
        model, teacher = (open_model(checkpoint, "float32", "cpu") for _ in range(2))
        data = read_data(
            checkpoint, given.calibrate, None, (), given.window, given.tokens, self.progress
        )
        settings = Settings(tokens=given.tokens, objective="cross_entropy", **given.yardstick)
        names = [n for n, _ in model.named_parameters() if n.startswith("model.layers.")]
        folder = given.work / "yardstick"
        moved = distill(model, teacher, names, data, settings, folder, self.progress, _quiet)
        fresh = open_model(checkpoint, "float32", "cpu")
        put(fresh, moved.items())
        return self._compared(fresh)


def _cell(tokens: Tokens) -> Cell:
    found = tokens.closeness(seed=0)
    low, high = found.loss.interval or (math.nan, math.nan)
    source, kl, same = (e.value for e in (found.source_loss, found.kl, found.agreement))
    return Cell(source, found.loss.value, (high - low) / 2, kl, same)


def _quiet(*_: object) -> None:
    """No progress."""


if __name__ == "__main__":
    main()
