"""The user's texts."""

from __future__ import annotations

from pathlib import Path

from ptconvert.errors import EvaluationError


def read_text(path: Path) -> str:
    """A text file's content. Raises EvaluationError where it isn't text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not a text in UTF-8") from error
