"""What each step is worth: loss against all-reduces waited for, from uniform to planned to healed.

    python examples/bench/heal.py MODEL --tracks 4 --calibrate FILE... --report FILE... --work DIR

For each number of all-reduces to wait for: a uniform schedule, the planned one, the same with heads
and neurons assigned by affinity, with guesses fitted, healed block by block, and healed end to end;
each step on top of those before it. Everything is fitted on the one text and measured on the other.
The yardstick is the source itself, trained on the same tokens in the same way but on the text, not
on itself: what ordinary training would gain.

Prints a table in Markdown: rise of the loss over the source's and KL(source || model), nats per
token. Finished cells and checkpoints are kept in --work; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ptconvert import presets
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli.progress import step_progress
from ptconvert.evaluate import divergence
from ptconvert.evaluate.divergence import Reference, Windows, windows_for
from ptconvert.evaluate.models import (
    BatchSize,
    Progress,
    cache_directory,
    content_digest,
    open_model,
)
from ptconvert.healing.data import read_data
from ptconvert.healing.distill import distill
from ptconvert.healing.models import put
from ptconvert.healing.settings import Settings
from ptconvert.planning.planner import choose, search, waited_for
from ptconvert.planning.sensitivity import Meter, Store, store_file
from ptconvert.schedule import Schedule

WAITS = (24, 12, 8, 6, 4, 3, 2)
STEPS = ("uniform", "planned", "affinity", "guess", "blockwise", "KL")
YARDSTICK = "yardstick"
DECISIVE = (  # the options that a cell depends on
    *("model", "calibrate", "report", "window", "windows"),
    *("tokens", "rank", "heal", "yardstick", "no_overlap"),
)


@dataclass(frozen=True)
class Cell:
    """A model on the report text: rise of the loss over the source's, and KL from it."""

    loss: float
    kl: float

    def __str__(self) -> str:
        return f"{self.loss:+.4f} ({self.kl:.4f})"


def main() -> None:
    """Parses, makes every cell that isn't there yet, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tracks", type=int, default=4)
    parser.add_argument("--waits", type=int, nargs="+", default=list(WAITS))
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--report", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
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
    given.work.mkdir(parents=True, exist_ok=True)
    with step_progress() as progress:
        bench = Bench(given, progress)
        rows = [(waits, {s: bench.cell(waits, s, steps) for s in steps}) for waits in given.waits]
        yardstick = None if YARDSTICK in left_out else bench.yardstick()
    names = [f"+ {s}" if s in STEPS[2:] else s for s in steps]
    print(f"| waited for, at most | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for waits, cells in rows:
        print(f"| {waits} | {' | '.join(str(cells[s]) for s in steps)} |")
    if yardstick is not None:
        print(f"| the source, trained on the same tokens |{' |' * (len(names) - 1)} {yardstick} |")
    if given.csv is not None:
        _write(given, rows, yardstick)


def _write(
    given: argparse.Namespace, rows: list[tuple[int, dict[str, Cell]]], yardstick: Cell | None
) -> None:
    with given.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["tracks", "waited_for_at_most", "step", "loss_over_source", "kl"])
        for waits, cells in rows:
            for step, cell in cells.items():
                writer.writerow([given.tracks, waits, step, cell.loss, cell.kl])
        if yardstick is not None:
            writer.writerow([given.tracks, "", YARDSTICK, yardstick.loss, yardstick.kl])


class Bench:
    """Makes and measures the models, each from the one before it, by the commands users type."""

    def __init__(self, given: argparse.Namespace, progress: Progress) -> None:
        self.given, self.progress = given, progress
        self.source = open_checkpoint(given.model)
        self.layers = int(str(self.source.config["num_hidden_layers"]))
        self._plans: dict[int, Schedule] = {}
        self._told = json.loads(json.dumps(vars(given), default=str))
        self.texts = [part for file in given.calibrate for part in ("--text", str(file))]

    def cell(self, waits: int, step: str, steps: list[str]) -> Cell:
        """A cell, measured now or by an earlier run."""

        def make() -> Cell:
            if step == "uniform":
                name = f"n{self.given.tracks}-w{waits}-uniform"
                return self._measured(self._converted(self._uniform(waits), name))
            so_far = steps[: steps.index(step) + 1]
            return self._measured(self._made(waits, [s for s in so_far if s != "uniform"]))

        steps_so_far = "+".join(steps[: steps.index(step) + 1])
        return self._kept(f"n{self.given.tracks}-w{waits}-{steps_so_far}", make)

    def yardstick(self) -> Cell:
        """The source, trained on the text by cross-entropy."""
        return self._kept(YARDSTICK, self._trained)

    def _kept(self, name: str, make: Callable[[], Cell]) -> Cell:
        told = {key: self._told[key] for key in DECISIVE}
        file = self.given.work / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            other = [key for key in DECISIVE if found["of"][key] != told[key]]
            if other:
                sys.exit(f"{file} was made with another {', '.join(other)}; name another --work")
            return Cell(found["loss"], found["kl"])
        cell = make()
        file.write_text(json.dumps({"of": told, "loss": cell.loss, "kl": cell.kl}))
        return cell

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
        given, device, dtype = self.given, "cpu", "float32"
        windows = self._windows(given.calibrate)
        digest = content_digest(self.source, self.progress)
        store = Store(store_file(given.cache, digest, windows, given.tracks, dtype, device))
        batch = BatchSize(None, device)
        return Meter(self.source, given.tracks, windows, store, dtype, device, batch, self.progress)

    def _windows(self, texts: list[Path]) -> Windows:
        return windows_for(self.source, texts, self.given.window, self.given.windows)

    @cached_property
    def _reported(self) -> tuple[Windows, Reference]:
        """The report text, and the source's predictions on it."""
        windows = self._windows(self.given.report)
        model = open_model(self.source, "float32", "cpu")
        return windows, divergence.reference(model, windows, BatchSize(None, "cpu"), self.progress)

    def _measured(self, path: Path) -> Cell:
        return self._compared(open_model(open_checkpoint(path), "float32", "cpu"))

    def _compared(self, model: object) -> Cell:
        windows, reference = self._reported
        tokens = divergence.measure(model, reference, windows, BatchSize(None, "cpu"), _quiet)
        rise = tokens.converted_loss - tokens.source_loss
        return Cell(float(rise.mean()), float(tokens.kl.mean()))

    def _trained(self) -> Cell:
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
        put(fresh, moved)
        return self._compared(fresh)


def _quiet(*_: object) -> None:
    """No progress."""


if __name__ == "__main__":
    main()
