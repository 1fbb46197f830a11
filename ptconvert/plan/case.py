"""What is planned for, on what text, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.windows import Windows
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.load import shape_of


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

    @cached_property
    def shape(self) -> ModelShape:
        """The source's sizes. Raises ConfigError."""
        return shape_of(self.source)
