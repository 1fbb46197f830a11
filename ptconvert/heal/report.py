"""What a healing has to report, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ptconvert.heal.settings import Settings


@dataclass(frozen=True)
class Score:
    """What a model scored on a task, by one of its metrics."""

    metric: str
    value: float
    higher_is_better: bool

    @property
    def gain(self) -> float:
        """A number that is higher where the model is better."""
        return self.value if self.higher_is_better else -self.value


@dataclass(frozen=True)
class Measured:
    """A model on the held-out windows: its loss, and its KL from the teacher, in nats per token;
    and its score on the task that judges it, if one does."""

    name: str
    loss: float
    kl: float
    score: Score | None = None

    @property
    def gain(self) -> float:
        """A number that is higher where the model is better: by its score, or else by its KL."""
        return -self.kl if self.score is None else self.score.gain


@dataclass(frozen=True)
class Healed:
    """A healing's report: figures in the order of the stages, and which of them is the model
    written. `tokens` are those trained on, in all stages together; `quantised` says that there are
    weights which stay as they are; `head` is that for further tokens, before and after, against the
    model that is written."""

    teacher: str
    data: tuple[str, ...]
    data_digest: str
    held_out_tokens: int
    tokens: int
    settings: Settings
    rows: tuple[Measured, ...]
    kept: str
    quantised: bool = False
    head: tuple[Measured, Measured] | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return asdict(self)
