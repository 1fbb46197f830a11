"""Settings for vLLM on two cores; before its import.

These tests need vLLM, which wants an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import import_utils

# Qwen3.5's layers lie in a module that imports torchvision, which a torch for CPUs can't load, and
# transformers' processors of pictures and videos, which make these by PIL too, ask for it.
if find_spec("torchvision") is None:
    sys.path.append(str(Path(__file__).parents[1] / "serving_sglang" / "standins"))
    given = [os.environ.get("PYTHONPATH"), sys.path[-1]]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, given))
    import_utils.is_torchvision_available.cache_clear()
CORES = sorted(os.sched_getaffinity(0))
# vLLM gives its ranks cores and threads itself, and communicates in another way where this is set.
os.environ.pop("OMP_NUM_THREADS", None)
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="|".join(str(CORES[rank % len(CORES)]) for rank in range(2)),
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)
