"""Settings for vLLM on two cores, and small models that its CPU kernels take.

These tests need vLLM, which wants an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conftest import random_model, spec_text

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.spec import parse_spec
from ptconvert.transform import execute, plan_conversion

CORES = sorted(os.sched_getaffinity(0))
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="|".join(str(CORES[rank % len(CORES)]) for rank in range(2)),
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)
# vLLM's attention on CPU takes heads of 32 or more; long enough positions for chunks and blocks.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
MIXED = """  - {layers: 0-0, use: tensor_parallel}
  - {layers: 1-2, use: parallel_track, depth: 2, overlap: 1}
  - {layers: 3-3, stages: "a3|m3!"}
  - {layers: 4-5, use: ladder}
"""


def make_model(directory: Path, variant: str, tracks: int, schedule: str, top: str = "") -> Path:
    """A random dense model of a variant; converted, unless `tracks` is 0. `top` is the spec's."""
    dense = directory / "dense"
    random_model(variant, **SIZES).save_pretrained(dense)
    if tracks == 0:
        return dense
    spec = parse_spec(spec_text(tracks, schedule, top), "spec.yaml")
    plan = plan_conversion(open_checkpoint(dense), spec, source_name="dense")
    execute(plan, directory / "converted")
    return directory / "converted"
