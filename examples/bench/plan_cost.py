"""What planning costs and finds: `plan` against a thorough search.

    python examples/bench/plan_cost.py MODEL --tracks 4 --calibrate FILE... --report FILE...

The thorough search weighs each segment on as many windows as it searches on, up to 8 of them,
measures up to 32 mixtures of all weights in each of up to 12 rounds, and up to 32 points whole.
Both plan on the one text. Prints in Markdown what each computed, in forward passes over that text
and in seconds, and what the schedule that it chose for each number of all-reduces waited for, asked
for one by one, costs on the other text: KL(source || schedule) and rise of the loss, nats per
token, over as many windows. With --rank all of it, on the other text, too, is with an assignment
and guesses in place, fitted on the first.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

from plan import case_of, parser_of

from ptconvert.cli.progress import step_progress
from ptconvert.measure.progress import Progress
from ptconvert.plan import planner
from ptconvert.plan.case import Case
from ptconvert.plan.sensitivity import Meter, Store
from ptconvert.schedule.schedule import Schedule

THOROUGH = {"MIXTURES": 32, "REFINEMENTS": 0, "POINTS": 32, "SEARCH_EACH": 1, "SCREEN_EACH": 1}
THOROUGH_ROUNDS = 12


def main() -> None:
    """Parses, plans twice, measures, prints."""
    parser = parser_of(__doc__, windows=16)
    parser.add_argument("--waits", type=int, nargs="+", help="[1/2, 1/3, 1/4, ... of all]")
    parser.add_argument("--only", choices=["plan", "thorough"], help="one of the two")
    parser.add_argument("--rank", type=int, help="of guesses in place, beside affinity [none]")
    given = parser.parse_args()
    wanted = {} if given.rank is None else {"assignment": "affinity", "guess": given.rank}
    planned, reported = (case_of(given, text, wanted) for text in (given.calibrate, given.report))
    reported = replace(reported, in_place=planned.in_place)
    with step_progress() as progress, tempfile.TemporaryDirectory() as cache:
        report = _meter(reported, Path(cache) / "report", progress)
        waits = given.waits or [2 * report.layers // part for part in (2, 3, 4, 6, 10, 15)]
        names = [given.only] if given.only else ["thorough", "plan"]
        head = dict[str, tuple[float, float]]()
        cells = dict[tuple[str, int], str]()
        for name in names:
            meter = _meter(planned, Path(cache) / name, progress)
            for at_most in waits:
                started = time.monotonic()
                frontier = _search(meter, name == "thorough", at_most)
                # what one plan takes: the next ones find nearly everything measured
                head.setdefault(name, (frontier.passes, time.monotonic() - started))
                point = planner.choose(frontier, at_most, None)
                cells[name, at_most] = "-" if point is None else _cell(report, point.schedule)
    print("| waited for, at most | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for at_most in waits:
        print(f"| {at_most} | " + " | ".join(cells[name, at_most] for name in names) + " |")
    for unit, place in (("forward passes", 0), ("seconds", 1)):
        print(f"| {unit} | " + " | ".join(f"{head[name][place]:.0f}" for name in names) + " |")


def _search(meter: Meter, thorough: bool, at_most: int) -> planner.Frontier:
    rounds = THOROUGH_ROUNDS if thorough else planner.ROUNDS
    with mock.patch.dict(vars(planner), THOROUGH if thorough else {}):
        return planner.search(meter, planner.waited_for(overlap=True), rounds, at_most)


def _cell(report: Meter, schedule: Schedule) -> str:
    (cost,), counts = report.costs([schedule], "reporting"), schedule.counts
    found = f"{counts.waited_for} of {counts.all_reduces}"
    return f"KL {cost.kl:.4f}, {cost.loss:+.4f} ({found})"


def _meter(case: Case, cache: Path, progress: Progress) -> Meter:
    return Meter(case, Store(cache / "costs.jsonl"), progress)


if __name__ == "__main__":
    main()
