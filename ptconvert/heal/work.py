"""The work folder: what a healing has reached, for the same command to go on from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ptconvert.errors import HealError
from ptconvert.shorten import clipped, few

Tensors = dict[str, torch.Tensor]
_START = "start-"  # what the KL stage begins with, written when it does
_KEY, _LOCK = "key.json", "lock"
_POLL_SECONDS = 0.5


def start_file(path: Path, key: Mapping[str, object]) -> Path:
    """Where the first process leaves what the KL stage begins with, for the others to find.

    Named by the healing: theirs may be quicker than the first one to clean up after another.
    """
    digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
    return path / f"{_START}{digest[:16]}.safetensors"


def _plain(key: Mapping[str, object]) -> dict[str, object]:
    """A key as JSON gives it back."""
    plain: dict[str, object] = json.loads(json.dumps(dict(key), default=str))
    return plain


@contextmanager
def work_folder(path: Path, key: Mapping[str, object]) -> Iterator[Path]:
    """The folder of the healing that `key` describes, held by this process alone.

    Raises HealError where it holds what another healing trained, naming what differs, something
    else, or where another process is at work in it.
    """
    made = not path.exists()
    if not made and not (path / _KEY).is_file() and any(p.name != _LOCK for p in path.iterdir()):
        raise HealError(f"{path} is no healing's work folder; name another with --work")
    path.mkdir(exist_ok=True)
    handle = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HealError(f"{path}: another process is healing there") from None
        _check_key(path, _plain(key))
        yield path
    finally:
        os.close(handle)


def _check_key(path: Path, key: dict[str, object]) -> None:
    file = path / _KEY
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise HealError(f"{file} can't be read; remove {path}, or name another with --work")
    differing = [name for name in key | found if key.get(name) != found.get(name)]
    differing.sort(key=lambda name: name not in found)
    if differing and _trained(path):
        what = [f"{n} was {_short(found.get(n))}, is {_short(key.get(n))}" for n in differing]
        raise HealError(
            f"{path} holds the state of another healing ({few(what, joint='; ')}): remove it, or "
            "name another with --work"
        )
    if differing:
        for stale in path.glob(f"{_START}*"):
            stale.unlink()
        write_text(file, json.dumps(key, indent=2) + "\n")


def _trained(path: Path) -> bool:
    """Whether a folder holds anything that took time to make."""
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith(_START))
    return any(p.name not in (_KEY, _LOCK) for p in files)


def _short(value: object) -> str:
    return clipped(json.dumps(value), 40)


def write_text(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def save_tensors(file: Path, tensors: Tensors) -> None:
    """Writes tensors to a file that is there whole or not at all, whoever else writes the same."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
    partial.replace(file)


def load_tensors(file: Path) -> Tensors:
    """What save_tensors wrote."""
    tensors: Tensors = load_file(file)
    return tensors


def wait_for(file: Path) -> None:
    """Until the first of several processes has written a file; if it fails, the launcher ends
    this one."""
    while not file.is_file():
        time.sleep(_POLL_SECONDS)
