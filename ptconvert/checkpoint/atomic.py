"""A directory that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ptconvert.checkpoint.files import ADAPTER, FOLDERS, INDEX, goes_along, listed
from ptconvert.checkpoint.section import ADAPTER_FOLDER, SPEC_FILE
from ptconvert.errors import CheckpointError
from ptconvert.shorten import few

# What there is in checkpoints' directories beside what goes along with weights.
_WRITTEN = (
    *("*.safetensors", "*.bin", "*.index.json", "*.py", "params.json", SPEC_FILE, ADAPTER),
    *("README.md", "USE_POLICY.md", "vocab.bpe", ".gitattributes"),
    *("recipe.yaml", "quant_log.csv"),  # of quantisers
    f"{ADAPTER_FOLDER}/README.md",  # of peft
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_apart(destination: Path, source: Path) -> None:
    """Raises CheckpointError where writing the destination would touch the source."""
    if nested(destination, source):
        raise CheckpointError(f"{destination} and the source {source} must not contain each other")


def nested(one: Path, other: Path) -> bool:
    """Whether two paths are the same place, or one lies in the other."""
    one, other = _real(one), _real(other)
    return one.is_relative_to(other) or other.is_relative_to(one)


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises CheckpointError where a checkpoint can't or must not be written."""
    real = _real(destination)
    if not real.parent.is_dir():
        missing = "is no directory" if real.parent.exists() else "does not exist"
        raise CheckpointError(f"{destination}: the directory {real.parent} {missing}")
    if os.path.ismount(real):
        raise CheckpointError(f"{destination} is a mount point; name a directory inside it")
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise CheckpointError(f"{destination} exists; name another, or use --overwrite")
    if not destination.is_dir() or destination.is_symlink():
        raise CheckpointError(f"{destination} is not a directory; --overwrite replaces only those")
    if any(destination.iterdir()) and not _is_checkpoint(destination):
        raise CheckpointError(
            f"{destination} holds more or other than a checkpoint (config.json and safetensors, no "
            "directories); --overwrite replaces only checkpoints"
        )
    names = (p.relative_to(destination).as_posix() for p in listed(destination))
    if others := sorted(name for name in names if not _belongs(name)):
        raise CheckpointError(
            f"{destination} holds {few(others, 3)} beside a checkpoint, which --overwrite would "
            "remove; move it away first"
        )


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory is what this package or transformers writes, and nothing more."""
    weights = any((path / name).is_file() for name in ("model.safetensors", INDEX))
    directories = {p.name for p in path.iterdir() if p.is_dir()} - set(FOLDERS)
    return (path / "config.json").is_file() and weights and not directories


def _belongs(name: str) -> bool:
    """Whether a file or directory, by its path in a checkpoint's directory, is one of those that
    checkpoints have."""
    return name in FOLDERS or goes_along(name) or any(fnmatchcase(name, p) for p in _WRITTEN)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, it has an answer for a symlink loop


@contextmanager
def new_directory(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `destination` to write into; renamed to it when the block ends well.

    It is removed when the block fails, and where a run was killed, by the next run for the same
    destination. A lock on the directory tells a killed run from one at work.
    """
    destination = _real(destination)
    prefix = f".{destination.name}.ptconvert-"
    _remove_leftovers(destination.parent, prefix)
    temporary, lock = _locked_directory(destination.parent, prefix)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for path in temporary.iterdir():
            _fsync(path)
        os.fsync(lock)
        _rename(temporary, destination, overwrite)
        _fsync(destination.parent)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new directory, and the handle that holds its lock.

    Until the lock is held, another run may take the directory for a killed run's and remove it.
    """
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # as on a network file system without locks
                os.close(lock)
                temporary.rmdir()
                raise
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _rename(temporary: Path, destination: Path, overwrite: bool) -> None:
    """Puts the new directory in place; an old one, if any, takes the temporary's name."""
    if not os.path.lexists(destination):
        temporary.rename(destination)
    elif not overwrite:
        raise CheckpointError(f"{destination} was made by somebody else meanwhile")
    elif not _exchange(temporary, destination):
        # No atomic exchange on this file system: step aside first, under a name that no later
        # run removes, so that a kill between the two renames loses nothing.
        aside = destination.with_name(f"{destination.name}.replaced-{os.getpid()}")
        destination.rename(aside)
        try:
            temporary.rename(destination)
        except BaseException:
            aside.rename(destination)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories atomically (Linux's renameat2); False where that isn't possible."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
