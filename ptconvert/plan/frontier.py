"""A frontier on disk: CSV with a header, a row for each point, KL and losses in nats per token."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptconvert.errors import PlanError, PTConvertError
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.terms import MAX_GUESS_RANK, MAX_TRACKS

SUFFIX = ".csv"
_READ = ("tracks", "guess_rank", "kl", "schedule")


@dataclass(frozen=True)
class Known:
    """A schedule of a frontier: for how many tracks, of which rank their guesses are to be (0:
    none), and what KL was measured with such in place, nats per token."""

    schedule: Schedule
    tracks: int
    guess: int
    kl: float


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_frontier(file: Path) -> list[Known]:
    """The points of a file. Raises PlanError where it isn't one that `plan --frontier` writes."""
    try:
        lines = csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines())
        if missing := [name for name in _READ if name not in (lines.fieldnames or ())]:
            raise PlanError(
                f"{file}: it has no column {missing[0]}; write it with `ptconvert plan --frontier`"
            )
        return [_point(f"{file}:{lines.line_num}", row) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"{file}: can't be read as CSV in UTF-8: {error}") from None


def _point(where: str, row: Mapping[str, Any]) -> Known:
    try:
        tracks, guess, kl = int(row["tracks"]), int(row["guess_rank"]), float(row["kl"])
        if not (1 <= tracks <= MAX_TRACKS and 0 <= guess <= MAX_GUESS_RANK and 0 <= kl < math.inf):
            raise ValueError
    except (TypeError, ValueError):
        raise PlanError(
            f"{where}: tracks is {row['tracks']}, guess_rank {row['guess_rank']}, kl {row['kl']}; "
            f"they must be numbers, 1, 0 and 0 at least, tracks at most {MAX_TRACKS} and ranks "
            f"{MAX_GUESS_RANK}"
        ) from None
    try:
        return Known(Schedule.parse(row["schedule"] or ""), tracks, guess, kl)
    except PTConvertError as error:
        raise PlanError(f"{where}: {error}") from None
