"""Estimated against measured decode and prefill times, on this machine's ranks.

RUNS times over: measures a hardware row (`ptconvert estimate --measure`), and lets `verify` time
tensor_parallel, parallel_track and ladder. Medians of the runs are compared. `verify` times the
same weights under tensor parallelism beside each schedule: that one is timed four times in a run.

    python examples/bench/estimate.py           # 2 ranks, the 12-layer model beside this repository

Exit code 0 where every median is within LIMIT of its estimate, 1 where one isn't, 2 where the model
is missing. A machine is too noisy to tell where half of a time's runs are further apart than LIMIT:
that is said, and the exit code is 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import PTConvertError
from ptconvert.estimate.compare import Candidate
from ptconvert.estimate.hardware import Engine, Hardware, read_engine, read_hardware
from ptconvert.estimate.model import step
from ptconvert.estimate.roofline import Pass
from ptconvert.models.shape import ModelShape
from ptconvert.spec.document import parse_spec

MODEL = Path(__file__).parents[3] / "shared" / "fixtures" / "stdlib-llama" / "model"
PRESETS = {
    "tensor_parallel": "tensor_parallel",
    "parallel_track, depth 4": "parallel_track, depth: 4",
    "ladder": "ladder",
}
DENSE = "tensor_parallel"
LIMIT = 0.15
RUNS = 5
PROMPT, NEW = 16, 8


def ptconvert(*arguments: object) -> None:
    """Runs a command; ends with its output where it fails."""
    command = [sys.executable, "-m", "ptconvert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"estimate: {' '.join(command)}\n{done.stdout}{done.stderr}")


def convert(source: Path, destination: Path, preset: str, ranks: int) -> Candidate:
    checkpoint = open_checkpoint(source)
    layers = ModelShape.from_config(checkpoint.config).layers
    items = f"  - {{layers: 0-{layers - 1}, use: {preset}}}\n"
    spec = parse_spec(f"format: 1\ntracks: {ranks}\nschedule:\n{items}", preset)
    plan = plan_conversion(checkpoint, spec, source_name=source.name)
    execute(plan, destination)
    return Candidate(preset, plan.schedule, ranks)


def measured(checkpoint: Path, ranks: int, repeats: int, file: Path) -> dict[str, Any]:
    """verify's seconds of prefill and decode step, in the fastest repeat, as the row's are."""
    ptconvert(
        *("verify", checkpoint, "--ranks", ranks, "--device", "cpu", "--repeats", repeats),
        *("--prompt", PROMPT, "--new", NEW, "--report", file),
    )
    compared = json.loads(file.read_text())["comparison"]
    return {
        name: {kind: min(compared[name]["seconds"][kind]) for kind in ("prefill", "decode")}
        for name in ("schedule", "baseline")
    }


def estimated(
    candidate: Candidate, shape: ModelShape, hardware: Hardware, engine: Engine, ranks: int
) -> dict[str, float]:
    """Seconds of a prefill and of the decode step in the middle."""
    passes = {"prefill": Pass(1, PROMPT), "decode": Pass(1, 1, past=PROMPT + NEW // 2)}
    return {
        kind: step(candidate.schedule, shape, hardware, engine, ranks, one).seconds
        for kind, one in passes.items()
    }


def bench(source: Path, ranks: int, repeats: int, runs: int, directory: Path) -> int:
    """Prints the comparison; the exit code."""
    row, engine = directory / "here.yaml", read_engine("ptconvert")
    shape = replace(ModelShape.from_config(open_checkpoint(source).config), dtype="F32")
    dense = Candidate(DENSE, shape.dense, ranks)
    paths = {name: directory / f"converted-{i}" for i, name in enumerate(PRESETS)}
    candidates = {n: convert(source, paths[n], preset, ranks) for n, preset in PRESETS.items()}
    seen: dict[tuple[str, str], list[float]] = {}
    said: dict[tuple[str, str], list[float]] = {}
    for run in range(runs):
        print(f"run {run + 1} of {runs}", file=sys.stderr)
        ptconvert("estimate", "--measure", row, "--ranks", ranks)  # each time, as machines drift
        hardware = read_hardware(str(row))
        for name, candidate in {**candidates, DENSE: dense}.items():
            for kind, value in estimated(candidate, shape, hardware, engine, ranks).items():
                said.setdefault((name, kind), []).append(value)
        for name, path in paths.items():
            times = measured(path, ranks, repeats, directory / "report.json")
            for label, found in ((name, times["schedule"]), (DENSE, times["baseline"])):
                for kind, value in found.items():
                    seen.setdefault((label, kind), []).append(value)
    table = Table(
        *("schedule", "pass", "measured (middle half)", "estimated", "error", "speed-up"),
        "estimated",
        title=f"{ranks} ranks, {runs} runs: decode step and prefill of {PROMPT} tokens, ms",
    )
    errors, noise = [], []
    for (name, kind), values in seen.items():
        found, guess = statistics.median(values), statistics.median(said[name, kind])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        errors.append(abs(guess / found - 1))
        noise.append((high - low) / found)
        table.add_row(
            *(name, kind, f"{found * 1e3:.2f} ({low * 1e3:.2f}-{high * 1e3:.2f})"),
            *(f"{guess * 1e3:.2f}", f"{guess / found - 1:+.0%}"),
            f"{statistics.median(seen[DENSE, kind]) / found:.2f}",
            f"{statistics.median(said[DENSE, kind]) / guess:.2f}",
        )
    Console(width=100).print(table)
    over = sum(error > LIMIT for error in errors)
    print(f"{over} of {len(errors)} medians are more than {LIMIT:.0%} off")
    if max(noise) > LIMIT:
        print(
            f"too noisy to tell: the middle half of a time's runs is {max(noise):.0%} of it wide; "
            "run it where nothing else runs"
        )
        return 3
    return 1 if over else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated against measured step times.")
    parser.add_argument("--model", type=Path, default=MODEL, help="a dense checkpoint")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        print(f"estimate: skipped, there is no model at {arguments.model}", file=sys.stderr)
        raise SystemExit(2)
    try:
        with tempfile.TemporaryDirectory(prefix="ptconvert-estimate-") as directory:
            how = arguments.ranks, arguments.repeats, arguments.runs
            code = bench(arguments.model, *how, Path(directory))
    except PTConvertError as error:
        print(f"estimate: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
