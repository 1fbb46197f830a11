"""What a user can cause. Every message is one line: what was wrong, and what would be right."""

from __future__ import annotations

from collections.abc import Sequence


class PTConvertError(ValueError):
    """Base of all errors that a user's input can cause; the command line prints it and exits 2.

    Control characters, which names and values of a hostile file may have, are printed escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


class ScheduleError(PTConvertError):
    """A schedule breaks a rule; the message prints the schedule with the stage marked."""


class ConfigError(PTConvertError):
    """A config.json describes a model that can't be converted."""


class CheckpointError(PTConvertError):
    """A checkpoint's files are missing, damaged, or don't match its config.json."""


class EvaluationError(PTConvertError):
    """A model can't be scored as asked: a task, its data, a text or the memory is missing."""


class PlanError(PTConvertError):
    """A plan can't be made as asked: for this model, or within this budget."""


class HealError(PTConvertError):
    """A checkpoint can't be healed as asked: by this teacher, on this text, or from this state."""


class FileError(PTConvertError):
    """One or more faults of a file, each a line `file:line: what, and what would be right`."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(_printable(fault) for fault in faults)
        ValueError.__init__(self, "\n".join(self.faults))


class SpecError(FileError):
    """Faults of a spec."""


class HardwareError(FileError):
    """Faults of a hardware file, or a use of it that it has no numbers for."""


class EngineError(PTConvertError):
    """A serving engine isn't there, or did not start."""


def _printable(text: str) -> str:
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to a line: the first, and the second where that
    ends with a colon."""
    line, *more = str(error).splitlines() or [type(error).__name__]
    if line.endswith(":") and more:
        line = f"{line} {more[0].strip()}"
    return f"unknown {line}" if isinstance(error, KeyError) else line
