"""What a model is computed in: what is stored, or what the device is faster in."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.models.shape import TORCH_NAMES, config_dtype
from ptconvert.runtime.load import opened
from ptconvert.runtime.memory import PROCESS_BYTES, free_memory

# How much faster float32 must be than the dtype stored to be taken instead, and what is multiplied
# to see it: enough for a device to show its speed, and little enough for a second.
_FASTER = 1.5
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # as torch calls these, of x86 and of ARM
_TIMED_TOKENS, _TIMED_PRODUCTS = 128, 1 << 29


def fastest_dtype(checkpoint: Checkpoint, device: str, say: Callable[[str], None]) -> str:
    """What to compute a checkpoint in: torch's name of the dtype that its config names, or float32
    where that is much faster on the device, as 16 bits are emulated on many CPUs, and fits there;
    which it says. Timed on a product of the size of the model's own. `auto`, which leaves it to
    transformers, where the config names none. Raises ConfigError."""
    own = config_dtype(checkpoint.config, str(checkpoint.path / "config.json"))
    stored = "auto" if own is None else TORCH_NAMES[own]
    if stored in ("auto", "float32"):
        return stored
    seconds = {d: _product_seconds(checkpoint, device, d) for d in (stored, "float32")}
    times = seconds[stored] / seconds["float32"]
    if times < _FASTER:
        return stored
    numbers = sum(entry.count for entry in opened(checkpoint).tensors.values())
    needed, slower = 4 * numbers + PROCESS_BYTES, f"is {times:.1f} times slower on {device}"
    if needed > (free := free_memory(device)):
        say(
            f"computing in {stored}, which is stored and {slower} than float32: in that the "
            f"weights would take {needed / 1e9:.1f} GB of {free / 1e9:.1f}"
        )
        return stored
    say(f"computing in float32: {stored}, which is stored, {slower}")
    return "float32"


def training_dtype(stored: str, device: str) -> str:
    """What to train in, by safetensors' name of the dtype stored: torch's name of it. On a CPU
    bfloat16 only where that has instructions for it, whatever it was timed at a moment ago: all
    processes of a training, and the command that goes on with it, must compute alike."""
    if device != "cpu":
        return "bfloat16" if stored in ("BF16", "F16") else "float32"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has = any(found.get(name) for name in _BFLOAT16)
    return "bfloat16" if stored == "BF16" and has else "float32"


def _product_seconds(checkpoint: Checkpoint, device: str, dtype: str) -> float:
    """The least time that tokens times a matrix of the model's width takes."""
    width = min(int(str(checkpoint.language.get("hidden_size", 1024))), 8192)
    outputs = min(4 * width, max(1, _TIMED_PRODUCTS // (_TIMED_TOKENS * width)))
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    x_TD, weight_OD = torch.ones(_TIMED_TOKENS, width, **kind), torch.ones(outputs, width, **kind)
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        float(torch.nn.functional.linear(x_TD, weight_OD)[0, 0])  # waits for it, on a GPU too
        taken.append(time.perf_counter() - started)
    return min(taken)
