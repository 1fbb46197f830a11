"""Where a checkpoint comes from: a directory, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from ptconvert.errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def is_hub_id(source: str) -> bool:
    """Whether a source names a hub repository: `org/name`, with nothing of that name here."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def display_name(source: str) -> str:
    """What cards and reports call a model: its hub id, or its directory's own name."""
    return source if is_hub_id(source) else Path(source).resolve().name


def locate(source: str, revision: str | None, config_only: bool = False) -> Path:
    """The directory of a checkpoint, downloaded if `source` is a hub id.

    With `config_only`, only its config.json is needed, and `source` may be such a file.
    Raises CheckpointError.
    """
    if is_hub_id(source):
        from ptconvert.checkpoint import hub  # it takes a fifth of a second to import

        return hub.fetch_config(source, revision) if config_only else hub.fetch(source, revision)
    path = Path(source)
    if not path.is_dir() and not (config_only and path.is_file()):
        raise CheckpointError(
            f"{source} is neither a directory nor a hub id such as meta-llama/Llama-3.1-8B"
        )
    if revision is not None:
        raise CheckpointError(f"--revision {revision}: {source} is not a hub id")
    return path
