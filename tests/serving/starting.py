"""How the ranks of these tests start an engine for a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lockstep

SETTINGS = {
    "dtype": "float32",
    "block_size": 32,  # tokens; whole blocks are what prefix caching reuses
    "max_num_batched_tokens": 64,  # less than the longest prompt, so that it comes in chunks
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "max_num_seqs": 8,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**26,
    "gpu_memory_utilization": 0.3,  # that much must be free, and others' engines may be here
}


def started(case: dict[str, Any], rank: int, ranks: int, rendezvous: Path, **settings: Any) -> Any:
    """This rank's part of it; a case's own arguments come before `settings`."""
    return lockstep.engine(
        Path(case["path"].format(rank=rank)),
        rank,
        ranks,
        rendezvous,
        enforce_eager=case["eager"],
        **(SETTINGS | settings | case["arguments"]),
    )
