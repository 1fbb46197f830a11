"""What a calibration holds that may be too much for memory, and lies on disk then."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from ptconvert.errors import EvaluationError

MEMORY_BYTES = 4 << 30  # of streams, or of affinities, in memory


def mapped(folder: Path | None, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on disk, in a file that is gone when the tensor is. Raises EvaluationError where the
    disk is full."""
    handle, name = tempfile.mkstemp(prefix=".ptconvert-stream-", dir=folder)
    try:
        os.posix_fallocate(handle, 0, tensor.nbytes)
        kept = torch.from_file(name, True, tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise EvaluationError(
            f"{name}: {error.strerror}: it is too much for memory and lies there meanwhile; give "
            "another DST (plan: --cache) with more room, or for a spec's guesses fewer --windows"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()
    return kept.view(tensor.shape).copy_(tensor)
