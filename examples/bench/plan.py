"""What planning is worth: loss against all-reduces waited for, uniform against planned.

    python examples/bench/plan.py MODEL --tracks 4 --calibrate FILE... --report FILE...

Plans on the one text, with and without overlapped all-reduces, and measures uniform and planned
schedules on the other, which no plan has seen. Prints a table in Markdown: rise of the loss and
KL(source || schedule), nats per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli.progress import step_progress
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import cache_directory, content_digest
from ptconvert.measure.progress import Progress
from ptconvert.plan.case import Case, read_texts
from ptconvert.plan.planner import choose, search, waited_for
from ptconvert.plan.sensitivity import Cost, Meter, Store, store_file
from ptconvert.schedule import presets
from ptconvert.schedule.schedule import Schedule

WAITS = (12, 8, 6, 4, 3, 2)


def main() -> None:
    """Parses, plans, measures, prints."""
    parser = parser_of(__doc__, windows=24)
    parser.add_argument("--cache", type=Path, default=cache_directory())
    given = parser.parse_args()
    with step_progress() as progress:
        calibrate, report = (
            meter_of(given, texts, progress) for texts in (given.calibrate, given.report)
        )
        rows = list(_rows(calibrate, report))
    names = list(rows[0][1])
    print(f"| waited for, at most | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for waits, found in rows:
        print(f"| {waits} | {' | '.join(found[name] for name in names)} |")


def parser_of(doc: str, windows: int) -> argparse.ArgumentParser:
    """What a benchmark of plans is told: the model, the tracks, and the two texts."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tracks", type=int, default=4)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--report", type=Path, nargs="+", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=windows)
    return parser


def meter_of(
    given: argparse.Namespace,
    texts: list[Path],
    progress: Progress,
    wanted: Mapping[str, Any] | None = None,
) -> Meter:
    """What measures on these texts, with what is `wanted` in place."""
    case = case_of(given, texts, wanted)
    store = Store(store_file(given.cache, content_digest(case.source, progress), case))
    return Meter(case, store, progress)


def case_of(
    given: argparse.Namespace, texts: list[Path], wanted: Mapping[str, Any] | None = None
) -> Case:
    source, wanted = open_checkpoint(given.model), wanted or {}
    windows, in_place = read_texts(source, texts, given.window, given.windows, wanted)
    batch = BatchSize(None, "cpu")
    return Case(source, given.tracks, windows, "float32", "cpu", batch, in_place)


def _rows(calibrate: Meter, report: Meter) -> Iterator[tuple[int, dict[str, str]]]:
    planned = {"planned, no overlap": waited_for(False), "planned": waited_for(True)}
    for waits in WAITS:
        schedules = {name: make(report.layers, waits) for name, make in UNIFORM.items()}
        for name, objective in planned.items():
            point = choose(search(calibrate, objective, target=waits), waits, None)
            schedules[name] = point.schedule if point is not None else None
        yield waits, {name: _cell(report, s) for name, s in schedules.items()}


def _cell(meter: Meter, schedule: Schedule | None) -> str:
    if schedule is None:
        return "-"
    cost: Cost = meter.costs([schedule], "reporting")[0]
    counts = schedule.counts
    return f"{cost.loss:+.4f}, KL {cost.kl:.4f} ({counts.waited_for} of {counts.all_reduces})"


def _desync(layers: int, waits: int, dense: int) -> Schedule | None:
    """One all-reduce in every so many sublayers, after some dense layers."""
    left, sublayers = waits - 2 * dense, 2 * (layers - dense)
    if left < 1:
        return None
    every = -(-sublayers // left)
    return presets.join(
        [
            ("tensor_parallel", presets.tensor_parallel(range(dense))),
            ("desync", presets.desync(range(dense, layers), every=every)),
        ]
    )


def _delayed(layers: int, waits: int) -> Schedule:
    """Dense layers, then every all-reduce one stage late."""
    dense = (waits - 1) // 2
    return presets.join(
        [
            ("tensor_parallel", presets.tensor_parallel(range(dense))),
            ("delayed", presets.delayed(range(dense, layers), delay=1)),
        ]
    )


UNIFORM = {
    "uniform: `desync`": lambda layers, waits: _desync(layers, waits, 0),
    "the same, layer 0 dense": lambda layers, waits: _desync(layers, waits, 1),
    "`delayed` in the last layers": _delayed,
}


if __name__ == "__main__":
    main()
