"""A frontier on disk: CSV with a header, a row for each point, KL and losses in nats per token."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptconvert.errors import PlanError, PTConvertError
from ptconvert.schedule.schedule import Schedule

SUFFIX = ".csv"
_READ = ("tracks", "kl", "schedule")


@dataclass(frozen=True)
class Known:
    """A schedule of a frontier: for how many tracks, and what KL was measured, nats per token."""

    schedule: Schedule
    tracks: int
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
        lines = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        if missing := [name for name in _READ if name not in (lines.fieldnames or ())]:
            raise PlanError(
                f"{file}: it has no column {missing[0]}; write it with `ptconvert plan --frontier`"
            )
        return [_point(f"{file}:{lines.line_num}", row) for row in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: can't be read as UTF-8 text: {error}") from None


def _point(where: str, row: Mapping[str, Any]) -> Known:
    try:
        return Known(Schedule.parse(row["schedule"]), int(row["tracks"]), float(row["kl"]))
    except PTConvertError as error:
        raise PlanError(f"{where}: {error}") from None
    except (TypeError, ValueError):
        raise PlanError(
            f"{where}: tracks is {row['tracks']}, kl {row['kl']}; they must be numbers"
        ) from None
