"""Where a checkpoint comes from: a directory, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from ptconvert.errors import CheckpointError

_CONFIGS = Path(__file__).parents[1] / "models" / "configs"
_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def is_hub_id(source: str) -> bool:
    """Whether a source names a hub repository: `org/name`, with nothing of that name here."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def display_name(source: str) -> str:
    """What cards and reports call a model: its hub id, or its directory's own name."""
    return source if is_hub_id(source) else Path(source).resolve().name


def config_names() -> list[str]:
    """The public models whose config.json comes with the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.json"))


def locate(source: str, revision: str | None, config_only: bool = False) -> Path:
    """The directory of a checkpoint, downloaded if `source` is a hub id.

    With `config_only`, only its config.json is needed, and `source` may be such a file, or one of
    `config_names`, where nothing here is called so.
    Raises CheckpointError.
    """
    if is_hub_id(source):
        from ptconvert.checkpoint import hub  # it takes a fifth of a second to import

        return hub.fetch_config(source, revision) if config_only else hub.fetch(source, revision)
    path = Path(source)
    if config_only and not path.exists() and source in config_names():
        path = _CONFIGS / f"{source}.json"
    if not path.is_dir() and not (config_only and path.is_file()):
        named = f", nor one of {', '.join(config_names())}" if config_only else ""
        raise CheckpointError(
            f"{source} is neither a directory nor a hub id such as meta-llama/Llama-3.1-8B{named}"
        )
    check_revision(revision, source)
    return path


def check_revision(revision: str | None, source: str) -> None:
    """Raises CheckpointError for a revision of a source that is no hub id."""
    if revision is not None:
        raise CheckpointError(f"--revision {revision}: {source} is not a hub id")
