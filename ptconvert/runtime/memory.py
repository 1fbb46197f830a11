"""What memory there is, and what a process takes before it does anything."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch

PROCESS_BYTES = 500 * 10**6  # an interpreter with torch and transformers


def available_bytes(device: str) -> list[int]:
    """Memory that can be had on each GPU; or of this machine within its control group's limit."""
    if device == "cuda":
        return [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return [free]


def free_bytes(device: str) -> int:
    """Memory that can be had on one device, as torch names it."""
    kind, _, index = device.partition(":")
    return available_bytes(kind)[int(index or 0)]
