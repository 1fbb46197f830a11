"""How many sequences go through a model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ptconvert.errors import EvaluationError

T = TypeVar("T")
# What `--batch-size auto` begins with; it halves when memory runs out. More than this gains
# little: on a CPU the cores are busy with less, and on a GPU the model's own layers are.
_FIRST_BATCH = {"cpu": 8}
_FIRST_BATCH_ELSEWHERE = 64


@contextmanager
def enough_memory(else_said: str) -> Iterator[None]:
    """Raises EvaluationError, with what is said then, where a device's memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise EvaluationError(else_said) from error


class BatchSize:
    """How many sequences go through the model at once: it halves when memory runs out."""

    def __init__(self, asked: int | None, device: str) -> None:
        """`asked` None means automatic."""
        automatic = _FIRST_BATCH.get(torch.device(device).type, _FIRST_BATCH_ELSEWHERE)
        self.size = automatic if asked is None else asked

    def fitting(self, run: Callable[[int], T]) -> T:
        """`run` of the first batch size, from this one down, that fits; later calls begin with it.

        Raises EvaluationError when a single sequence doesn't fit.
        """
        while True:
            try:
                return run(self.size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.size == 1:
                    raise EvaluationError(
                        "out of memory even with one sequence at a time; a smaller --dtype, a "
                        "shorter --window or another --device may fit"
                    ) from error
            self.size //= 2
            clear_device_cache(garbage_collection=True)
