"""What assignment and guesses are worth: loss of planned schedules without, with one, with both.

    python examples/bench/guess.py MODEL --tracks 4 --calibrate FILE... --report FILE...

Plans and fits on the one text, and measures on the other, which neither has seen. Prints a table
in Markdown: rise of the loss and KL(source || model), nats per token.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plan import meter_of  # beside this file

from ptconvert.calibrate.conversion import calibrate, calibration_windows
from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.cli.common import step_progress
from ptconvert.evaluate.divergence import Reference, Windows, measure, reference
from ptconvert.evaluate.models import BatchSize, Progress, open_model
from ptconvert.planning.planner import choose, search, waited_for
from ptconvert.planning.spec_text import spec_text
from ptconvert.schedule import Schedule
from ptconvert.spec import parse_spec
from ptconvert.transform import execute, plan_conversion


def main() -> None:
    """Parses, plans, fits, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tracks", type=int, default=4)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--report", type=Path, nargs="+", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16384, help="to fit on")
    parser.add_argument("--waits", type=int, nargs="*", default=[8, 6, 4, 3, 2])
    parser.add_argument("--in-all", type=int, nargs="*", default=[8], help="without overlap")
    parser.add_argument("--ranks", type=int, nargs="*", default=[64])
    parser.add_argument("--cache", type=Path, required=True)
    given = parser.parse_args()
    source = open_checkpoint(given.model)
    tops = _tops(given.ranks)
    print(f"| all-reduces | {' | '.join(tops)} |\n| --- |{' --- |' * len(tops)}")
    with step_progress() as progress:
        for name, cells in _rows(given, source, progress):
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _tops(ranks: Sequence[int]) -> dict[str, str]:
    """The columns, and the lines that each has in its spec."""
    affinity = "assignment: affinity"
    guesses = {f"+ guess, rank {r}": f"{affinity}\nguess: {{rank: {r}}}" for r in ranks}
    return {"planned": "assignment: contiguous", "+ affinity": affinity, **guesses}


def _rows(
    given: argparse.Namespace, source: Checkpoint, progress: Progress
) -> Iterator[tuple[str, list[str]]]:
    planning = meter_of(given, given.calibrate, progress)
    windows = meter_of(given, given.report, progress).windows
    dense = reference(
        open_model(source, "float32", "cpu"), windows, BatchSize(None, "cpu"), progress
    )
    text = calibration_windows(source, given.calibrate, given.tokens, given.window)
    for overlap, budgets, what in (
        (False, given.in_all, "in all"),
        (True, given.waits, "waited for"),
    ):
        frontier = search(planning, waited_for(overlap), target=8) if budgets else None
        for budget in budgets:
            assert frontier is not None
            point = choose(frontier, budget, None)
            assert point is not None, f"no schedule waits for {budget}"
            yield (
                f"{budget} {what}",
                [
                    _measured(source, _spec(point.schedule, given.tracks, top), text, windows,
                              dense, progress)
                    for top in _tops(given.ranks).values()
                ],
            )  # fmt: skip


def _spec(schedule: Schedule, tracks: int, top: str) -> Any:
    return parse_spec(spec_text(schedule, tracks, [], lambda _: "", [top]), "planned")


def _measured(
    source: Checkpoint,
    spec: Any,
    text: Windows,
    windows: Windows,
    dense: Reference,
    progress: Progress,
) -> str:
    """The rise of the loss, and the KL, of the source converted by a spec."""
    with tempfile.TemporaryDirectory() as directory:
        path, known = Path(directory) / "model", None
        if spec.needs_text:
            known = calibrate(source, spec, text, "cpu", Path(directory), progress).calibration
        execute(plan_conversion(source, spec, source_name="source", calibration=known), path)
        model = open_model(open_checkpoint(path), "float32", "cpu")
    tokens = measure(model, dense, windows, BatchSize(None, "cpu"), progress)
    return f"{(tokens.converted_loss - tokens.source_loss).mean():+.4f} ({tokens.kl.mean():.4f})"


if __name__ == "__main__":
    main()
