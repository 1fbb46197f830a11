"""What each step is worth: loss against all-reduces waited for, from uniform to planned to healed.

    python examples/bench/heal.py MODEL --tracks 4 --calibrate FILE... --report FILE... --work DIR

For each number of all-reduces to wait for: a uniform schedule, the planned one, the same with heads
and neurons assigned by affinity, with guesses fitted, healed block by block, and healed end to end;
each step on top of those before it. It is planned with an assignment and guesses in place, where
these are among the steps. Everything is fitted on the one text and measured on others;
each --report is one, with a table of its own.
The yardstick is the source itself, trained on the same tokens in the same way but on the text, not
on itself: what ordinary training would gain.

Prints tables in Markdown: rise of the loss over the source's, and in brackets KL(source || model),
both in nats per token, and the share of tokens whose first choice is the source's, each with half
its 95% interval over windows. Finished cells and checkpoints are kept in --work; the same command
goes on from there.

--top-k also heals what the last step but KL has made with so many of the teacher's likeliest tokens
kept in place of the teacher, twice: a second table has that, and the seconds of both as shares of
those that `heal` takes with the teacher.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

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
    *("tokens", "rank", "heal", "yardstick", "no_overlap", "planned_with"),
)


@dataclass(frozen=True)
class Cell:
    """A model on one report text: the source's loss, its rise, KL from the source, and the share of
    tokens for which both have the same first choice; `_half` is half of a 95% interval."""

    source: float
    loss: float
    loss_half: float
    kl: float
    kl_half: float
    same: float
    same_half: float

    def __str__(self) -> str:
        loss = f"{self.loss:+.4f} ± {self.loss_half:.4f}"
        kl = f"{self.kl:.4f} ± {self.kl_half:.4f}"
        return f"{loss} ({kl}, {100 * self.same:.1f} ± {100 * self.same_half:.1f}%)"


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
    parser.add_argument(
        "--plain-plan", action="store_true", help="plan without assignment and guesses in place"
    )
    parser.add_argument("--without", default="", help="steps to leave out: affinity,guess,...")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[], help="of the teacher, for the second table"
    )
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
        bench = Bench(given, steps, progress)
        rows = [
            (waits, bench.all_reduces(waits), {s: bench.cells(waits, s, steps) for s in steps})
            for waits in given.waits
        ]
        yardstick = None if YARDSTICK in left_out else bench.yardstick()
        taught = {
            waits: {k: bench.taught(waits, k, steps) for k in (None, *given.top_k)}
            for waits in (given.waits if given.top_k else ())
        }
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
    if taught:
        _print_taught(given, taught)
    if given.csv is not None:
        _write(given, rows, yardstick)


def _print_taught(
    given: argparse.Namespace, taught: dict[int, dict[int | None, tuple[Cells, list[float]]]]
) -> None:
    for number, files in enumerate(given.report):
        print(f"\n{' '.join(map(str, files))}: healed end to end, by tokens of the teacher kept\n")
        print("| waited for, at most | tokens kept | healed | seconds | again |")
        print("| --- | --- | --- | --- | --- |")
        for waits, found in taught.items():
            whole = found[None][1][0]
            for k, (cells, seconds) in found.items():
                shares = [f"{s / whole:.2f}" for s in seconds]
                row = [str(waits), "none: the teacher runs" if k is None else str(k)]
                print(f"| {' | '.join([*row, str(cells[number]), *shares])} |")


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

    def __init__(self, given: argparse.Namespace, steps: list[str], progress: Progress) -> None:
        self.given, self.progress = given, progress
        self.source = open_checkpoint(given.model)
        self.layers = int(str(self.source.config["num_hidden_layers"]))
        self._plans: dict[int, Schedule] = {}
        self._told = json.loads(json.dumps(vars(given), default=str))
        of_steps = {"affinity": ("assignment", "affinity"), "guess": ("guess", given.rank)}
        wanted = dict(of_steps[step] for step in steps if step in of_steps)
        self._told["planned_with"] = {} if given.plain_plan else wanted
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

    def taught(self, waits: int, k: int | None, steps: list[str]) -> tuple[Cells, list[float]]:
        """What is healed end to end with k of the teacher's tokens kept, or by the teacher itself;
        and the seconds of that, and of the same again."""
        before = [step for step in steps if step not in ("uniform", "KL")]
        name = f"n{self.given.tracks}-w{waits}-{'+'.join(before)}-top-{k or 'all'}"

        def make() -> dict[str, Any]:
            start, seconds = self._made(waits, before), list[float]()
            healed = self.given.work / f"{name}-healed"
            kept = [] if k is None else ["--top-k", str(k), "--cache", str(self.given.work / name)]
            for _ in range(2):
                started = time.perf_counter()
                self._heal(start, healed, [*kept, "--overwrite"])
                seconds.append(time.perf_counter() - started)
            cells = self._measured(healed)
            return {"cells": [asdict(cell) for cell in cells], "seconds": seconds}

        found = self._stored(name, make)
        return [Cell(**cell) for cell in found["cells"]], found["seconds"]

    def _kept(self, name: str, make: Callable[[], Cells]) -> Cells:
        found = self._stored(name, lambda: {"cells": [asdict(cell) for cell in make()]})
        return [Cell(**cell) for cell in found["cells"]]

    def _stored(self, name: str, make: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """What an earlier run with the same options made of that name, or this one makes."""
        told = {key: self._told[key] for key in DECISIVE}
        file = self.given.work / f"{name}.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text())
            other = [key for key in DECISIVE if found["of"].get(key, {}) != told[key]]
            if other:
                sys.exit(f"{file} was made with another {', '.join(other)}; name another --work")
            return found
        made = make()
        file.write_text(json.dumps({"of": told, **made}))
        return made

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
            self._heal(self._made(waits, before), destination, stage)
        return destination

    def _heal(self, start: Path, destination: Path, more: list[str]) -> None:
        given = self.given
        tokens = given.tokens // (1 if given.without_stage else 2)
        sizes = ["--tokens", str(tokens), "--window", str(given.window)]
        options = ["--teacher", str(given.model), *self.texts, *sizes, *more]
        command = ["heal", str(start), str(destination), *options, *shlex.split(given.heal)]
        self._run(destination.name, command)

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
            found = self._stored(f"n{self.given.tracks}-w{waits}-plan", lambda: self._found(waits))
            self._plans[waits] = Schedule.parse(found["stages"])
        return self._plans[waits]

    def _found(self, waits: int) -> dict[str, str]:
        """The plan, as its stages."""
        objective = waited_for(not self.given.no_overlap)
        point = choose(search(self._meter, objective, target=waits), waits, None)
        if point is None:
            sys.exit(f"no schedule waits for {waits} all-reduces")
        return {"stages": str(point.schedule)}

    @cached_property
    def _meter(self) -> Meter:
        return meter_of(self.given, self.given.calibrate, self.progress, self._told["planned_with"])

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
            cell_of(divergence.measure(model, reference, windows, BatchSize(None, "cpu"), _quiet))
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


def cell_of(tokens: Tokens) -> Cell:
    """What was measured of a model on a text, with its intervals."""
    found = tokens.closeness(seed=0)
    told = [found.source_loss.value]
    for estimate in (found.loss, found.kl, found.agreement):
        low, high = estimate.interval or (math.nan, math.nan)
        told += [estimate.value, (high - low) / 2]
    return Cell(*told)


def _quiet(*_: object) -> None:
    """No progress."""


if __name__ == "__main__":
    main()
