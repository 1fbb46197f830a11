"""What is planned for, on what text, and how it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ptconvert.calibrate.conversion import check_windows
from ptconvert.calibrate.stand_ins import KEYS, TOKENS, StandIns
from ptconvert.calibrate.streams import HELD_OUT
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.windows import Windows, joined_ids, windows_between, windows_of
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.load import shape_of


@dataclass(frozen=True)
class Case:
    """A dense checkpoint that is to be cut into so many tracks, measured on windows of a text.

    `dtype` is torch's name of one, or `auto` for the one stored. Costs are measured with what is
    `in_place`, if anything.
    """

    source: Checkpoint
    tracks: int
    windows: Windows
    dtype: str
    device: str
    batch: BatchSize
    in_place: StandIns | None = None

    @cached_property
    def shape(self) -> ModelShape:
        """The source's sizes. Raises ConfigError."""
        return shape_of(self.source)


def read_texts(
    source: Checkpoint,
    texts: Sequence[Path],
    length: int | None,
    count: int | None,
    wanted: Mapping[str, Any],
) -> tuple[Windows, StandIns | None]:
    """A case's windows, cut by `windows_of`, and what is in place of what a spec wants, fitted on
    others of the texts, or on the same where they have too few more. Raises PTConvertError."""
    ids = joined_ids(source, texts)
    windows = windows_of(source, ids, length, count)
    wanted = {key: wanted[key] for key in KEYS if key in wanted}
    if not wanted:
        return windows, None
    tokens = max(TOKENS, HELD_OUT * windows.length)
    fitted_on = windows_between(windows, ids, tokens)
    own = min(tokens, windows.ids[:, 1:].numel())
    apart = len(fitted_on) >= HELD_OUT and 2 * fitted_on[:, 1:].numel() >= own
    if not apart:
        count = min(len(windows.ids), tokens // windows.length)
        fitted_on = windows.ids[[n * len(windows.ids) // count for n in range(count)]]
    check_windows(wanted, len(fitted_on), windows.length)
    return windows, StandIns(wanted, fitted_on, apart)
