"""Where what was measured is kept, and what a model's measurements are named by."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptconvert import __version__
from ptconvert.checkpoint.files import small_files
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.measure.progress import Progress


def cache_directory() -> Path:
    """Where answers and measurements are kept: `ptconvert` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptconvert"


def named_by(told: Iterable[object], packages: Sequence[str] = ("torch", "transformers")) -> str:
    """A name for what was measured, by what decides it, and by the versions that measured it."""
    versions = [__version__, *map(importlib.metadata.version, packages)]
    return hashlib.sha256("\0".join(map(str, [*told, *versions])).encode()).hexdigest()[:32]


def content_digest(checkpoint: Checkpoint, progress: Progress) -> str:
    """SHA-256 over everything that decides a model's answers: its weights, config and tokenizer.

    Two directories with the same content have the same digest, wherever they lie.
    """
    path = checkpoint.path
    files = {t.file for t in checkpoint.tensors.values()} | set(small_files(path))
    sizes = {file: file.stat().st_size for file in sorted(files)}
    total, done, digest = sum(sizes.values()), 0, hashlib.sha256()
    label = f"reading {path.name}, MB"
    progress(label, 0, total // 10**6)
    with ThreadPoolExecutor(2) as pool:
        for (file, size), found in zip(sizes.items(), pool.map(_file_digest, sizes), strict=True):
            digest.update(f"{file.relative_to(path)}\0{found}\0".encode())
            done += size
            progress(label, done // 10**6, total // 10**6)
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
