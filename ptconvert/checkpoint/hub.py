"""Checkpoints from and to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ptconvert.errors import CheckpointError

# Weights under transformers' own names (not a vendor's second copy of them), and the small files.
_WEIGHTS = ("model.safetensors", "model-[0-9]*.safetensors")
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")


def is_hub_id(source: str) -> bool:
    """Whether a source names a hub repository: `org/name`, with no directory of that name."""
    if Path(source).exists():
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1 and not source.startswith((".", "~"))


def fetch(source: str, revision: str | None) -> Path:
    """The directory of a checkpoint: the one given, or a hub repository's download.

    Only safetensors, tokenizer and config files are downloaded. Raises CheckpointError.
    """
    if not is_hub_id(source):
        if not Path(source).is_dir():
            raise CheckpointError(
                f"{source} is neither a directory nor a hub id such as meta-llama/Llama-3.1-8B"
            )
        if revision is not None:
            raise CheckpointError(f"--revision {revision}: {source} is a directory, not a hub id")
        return Path(source)
    with _one_line(source, revision):
        patterns = [*_WEIGHTS, *_SMALL]
        path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if not any(path.glob("*.safetensors")):
            files = HfApi().list_repo_files(source, revision=revision)
            pickles = [f for f in files if f.endswith((".bin", ".pth", ".pt"))]
            has = f"only pickle weights ({pickles[0]})" if pickles else "no model weights"
            raise CheckpointError(
                f"{source} has {has}, not safetensors; save it with transformers' "
                "save_pretrained, which writes safetensors, and convert that"
            )
    return path


def fetch_config(source: str, revision: str | None) -> Path:
    """The config.json of a directory, a file given as such, or a hub repository."""
    if is_hub_id(source):
        with _one_line(source, revision):
            return Path(hf_hub_download(source, "config.json", revision=revision))
    return Path(source)


def create(repo: str) -> None:
    """Makes sure that a hub repository exists and may be written. Raises CheckpointError."""
    with _one_line(repo, None):
        HfApi().create_repo(repo, exist_ok=True)


def push(directory: Path, repo: str) -> str:
    """Uploads a checkpoint; returns the commit's address. Raises CheckpointError."""
    with _one_line(repo, None):
        commit = HfApi().upload_folder(
            repo_id=repo, folder_path=directory, commit_message="Converted by ptconvert"
        )
    return str(commit.commit_url)


@contextmanager
def _one_line(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what can go wrong with the hub into one line each."""
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is not on the hub, or is private: check the name, or `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} can't be downloaded and is not in the cache: the hub is out of reach"
        ) from None
    except (HTTPError, HFValidationError, OSError) as error:
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{repo}: the hub refused or failed: {what}") from None
