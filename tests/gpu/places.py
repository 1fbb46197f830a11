"""Where the tests of this folder run: their bodies on the CPU in the ordinary suite, so that their
own faults are found there, and on GPUs in `make test-gpu` (one) and `make test-gpus` (several).

What isn't here skips a test by name.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


def on(gpus: int, *case: object) -> object:
    """A case of a parametrised test that so many GPUs run."""
    what = "a GPU" if gpus == 1 else f"{gpus} GPUs"
    there = pytest.mark.skipif(torch.cuda.device_count() < gpus, reason=f"needs {what}")
    return pytest.param(*case, marks=[pytest.mark.gpu if gpus == 1 else pytest.mark.gpus, there])
