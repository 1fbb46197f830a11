"""What is planned for, on what text, and how it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.conversion import check_windows
from ptconvert.calibrate.stand_ins import TOKENS
from ptconvert.calibrate.streams import HELD_OUT
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.windows import Windows, joined_ids, windows_between, windows_of
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.load import shape_of

# What costs are measured with, of what a spec may want to be computed from a text, by its key.
MEASURED_WITH = ("assignment", "guess")


@dataclass(frozen=True)
class InPlace:
    """What is in place while costs are measured: an assignment and guesses for no schedule in
    particular, as `wanted` by the spec's keys. They are fitted on windows (N, T + 1), `apart` from
    those that costs are measured on, or not."""

    wanted: Mapping[str, Any]
    ids: torch.Tensor
    apart: bool

    @property
    def rank(self) -> int | None:
        """The guesses' largest rank, if there are any."""
        return self.wanted.get("guess")


@dataclass(frozen=True)
class Case:
    """A dense checkpoint that is to be cut into so many tracks, measured on windows of a text.

    `dtype` is torch's name of one, or `auto` for the one stored.
    """

    source: Checkpoint
    tracks: int
    windows: Windows
    dtype: str
    device: str
    batch: BatchSize
    in_place: InPlace | None = None

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
) -> tuple[Windows, InPlace | None]:
    """A case's windows, cut by `windows_of`, and what is in place of what a spec wants, fitted on
    others of the texts, or on the same where they have too few more. Raises PTConvertError."""
    ids = joined_ids(source, texts)
    windows = windows_of(source, ids, length, count)
    wanted = {key: wanted[key] for key in MEASURED_WITH if key in wanted}
    if not wanted:
        return windows, None
    tokens = max(TOKENS, HELD_OUT * windows.length)
    fitted_on = windows_between(windows, ids, tokens)
    apart = len(fitted_on) >= HELD_OUT
    if not apart:
        count = min(len(windows.ids), tokens // windows.length)
        fitted_on = windows.ids[[n * len(windows.ids) // count for n in range(count)]]
    if "guess" in wanted:
        check_windows("guess", len(fitted_on), windows.length)
    return windows, InPlace(wanted, fitted_on, apart)
