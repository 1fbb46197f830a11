"""What memory there is, and what a process takes before it does anything."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch

PROCESS_BYTES = 560 * 10**6  # an interpreter with torch and transformers' models and Trainer


def available_bytes(device: str) -> list[int]:
    """Memory that can be had on each GPU; or of this machine within its control group's limit."""
    if device == "cuda":
        return [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # pages of files that were read count as used, and are let go when memory is wanted
        free = min(free, limit - used + int(told.get("inactive_file", 0)))
    return [free]


def free_memory(device: str) -> int:
    """Bytes that can be had on one device, as torch names it; of what isn't a GPU of NVIDIA's or
    AMD's, those of this machine."""
    kind, _, index = device.partition(":")
    return available_bytes(kind)[int(index or 0) if kind == "cuda" else 0]
