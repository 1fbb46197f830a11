"""Checkpoints from and to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # the HTTP library's own, whichever it is
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from ptconvert.checkpoint.files import ADAPTER, INDEX, code_files, goes_along
from ptconvert.errors import CheckpointError
from ptconvert.shorten import clipped

# Weights under transformers' own names (not a vendor's second copy of them) and under ours.
_WEIGHTS = (
    "model.safetensors",
    "model-[0-9]*.safetensors",
    "shared.safetensors",
    "shared-[0-9]*.safetensors",
    "track-[0-9]*.safetensors",
)
_SECONDS = 20  # until a hub that doesn't answer counts as out of reach


def fetch(repo: str, revision: str | None) -> Path:
    """Downloads a repository's safetensors, tokenizer and config files; returns their directory.

    Of Python files only those come along that a config names. Raises CheckpointError.
    """

    def wanted(name: str) -> bool:
        return _is_weights(name) or name in (INDEX, "README.md") or goes_along(name)

    path = _download(repo, revision, wanted, weights=True)
    code: set[str] = set()
    while new := code_files(path) - code:  # what a file imports is known when it is there
        _download(repo, revision, new.__contains__)
        code |= new
    return path


def fetch_config(repo: str, revision: str | None) -> Path:
    """The same, of config.json alone."""
    return _download(repo, revision, lambda name: name == "config.json")


def _download(
    source: str, revision: str | None, wanted: Callable[[str], bool], weights: bool = False
) -> Path:
    """The directory of a repository's files that are wanted, from the cache if the hub is away."""
    with _one_line(source, revision):
        files = _list_files(source, revision)
        if files is not None and ADAPTER in files and (weights or "config.json" not in files):
            raise CheckpointError(
                f"{source} has an adapter ({ADAPTER}), which transformers loads onto its model: "
                "merge it (merge_and_unload of peft, then save_pretrained) and convert that"
            )
        if weights and files is not None and not any(map(_is_weights, files)):
            pickles = [f for f in files if f.endswith((".bin", ".pth", ".pt"))]
            has = f"only pickle weights ({pickles[0]})" if pickles else "no weights in safetensors"
            raise CheckpointError(
                f"{source} has {has}; save it with transformers' save_pretrained, which writes "
                "safetensors, and convert that"
            )
        if files is not None and "config.json" not in files:
            raise CheckpointError(f"{source} has no config.json, so it is not a transformers model")
        # Of a cached repository only what was wanted is there, and not all that patterns match.
        chosen = ["config.json"] if files is None else list(filter(wanted, files))
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=chosen,
                local_files_only=files is None,
            )
        )


def _is_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _WEIGHTS)


def _list_files(source: str, revision: str | None) -> list[str] | None:
    """A repository's files; None where the hub is out of reach.

    snapshot_download would ask the same, but without a time limit.
    """
    try:
        info = HfApi().model_info(source, revision=revision, timeout=_SECONDS)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except (HTTPError, OfflineModeIsEnabled):
        return None
    return [f.rfilename for f in info.siblings or ()]


def whole_id(repo: str) -> str:
    """A repository's id with its namespace: the user's own, where it has none."""
    if "/" in repo:
        return repo
    with _one_line(repo, None):
        return f"{HfApi().whoami()['name']}/{repo}"


def create(repo: str) -> None:
    """Makes sure that a hub repository exists and may be written. Raises CheckpointError."""
    with _one_line(repo, None):
        HfApi().create_repo(repo, exist_ok=True)


def push(directory: Path, repo: str) -> str:
    """Uploads a checkpoint; returns the commit's address. Raises CheckpointError."""
    with _one_line(repo, None):
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=directory,
            commit_message="Converted by ptconvert",
            # Weights of an earlier push would be loaded instead of these, or beside them.
            delete_patterns=["model*.safetensors*", "shared*.safetensors", "track-*.safetensors"],
        )
    return str(commit.commit_url)


@contextmanager
def _one_line(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what can go wrong with the hub into one line each."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is not on the hub, or is private (check the name, or `hf auth login`); nor is "
            "there a directory of that name here"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} can't be downloaded and is not in the cache: the hub is out of reach; nor is "
            "there a directory of that name here"
        ) from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # An upload's RuntimeError names only the file; its cause says what the hub answered.
        cause = f" {error.__cause__}" if isinstance(error, RuntimeError) else ""
        what = clipped(" ".join(f"{error}{cause}".split()), 300)
        raise CheckpointError(f"{repo}: the hub refused or failed: {what}") from None
