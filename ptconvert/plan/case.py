"""What is planned for, on what text, and how it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.stand_ins import TOKENS
from ptconvert.calibrate.streams import HELD_OUT
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import EvaluationError
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.windows import Windows, joined_ids, windows_between, windows_of
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.load import shape_of

# What costs are measured with, of what will be computed from a text, by the spec's key.
STOOD_FOR = ("assignment", "guess")


@dataclass(frozen=True)
class Case:
    """A dense checkpoint that is to be cut into so many tracks, measured on windows of a text.

    `dtype` is torch's name of one, or `auto` for the one stored. `wanted` is what will be computed
    from a text, by the spec's key. Costs are with an assignment and guesses, where they are wanted,
    that are fitted on the windows `apart` (N, T + 1).
    """

    source: Checkpoint
    tracks: int
    windows: Windows
    dtype: str
    device: str
    batch: BatchSize
    wanted: Mapping[str, Any] = field(default_factory=dict)
    apart: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int64))

    @cached_property
    def shape(self) -> ModelShape:
        """The source's sizes. Raises ConfigError."""
        return shape_of(self.source)

    @property
    def affinity(self) -> str | None:
        """How units will be assigned to tracks, where that is computed."""
        return self.wanted.get("assignment")

    @property
    def rank(self) -> int | None:
        """The largest rank of the guesses that there will be, if any."""
        return self.wanted.get("guess")


def read_texts(
    source: Checkpoint,
    texts: Sequence[Path],
    length: int | None,
    count: int | None,
    wanted: Mapping[str, Any],
) -> tuple[Windows, torch.Tensor]:
    """A case's windows, cut by `windows_of`, and those apart from them; where the texts have too
    few more, these are the same. Raises PTConvertError, also where they are too few to fit what is
    wanted."""
    ids = joined_ids(source, texts)
    windows = windows_of(source, ids, length, count)
    found = windows_between(windows, ids, max(HELD_OUT, TOKENS // windows.length))
    if len(found) < HELD_OUT:
        found = windows.ids
    if "guess" in wanted and len(found) < HELD_OUT:
        raise EvaluationError(
            f"the text gives {len(found)} windows of {windows.length} tokens; guesses need at "
            f"least {HELD_OUT}: a longer text, more --windows or a smaller --window"
        )
    return windows, found
