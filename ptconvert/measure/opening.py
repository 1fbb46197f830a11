"""The models to be scored: opening them, naming their content, and batches that fit in memory."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptconvert
from ptconvert.checkpoint.files import small_files
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import SECTION, read_section
from ptconvert.errors import CheckpointError, EvaluationError, first_line
from ptconvert.modeling.model import PTConvertLlamaForCausalLM
from ptconvert.models.families import CARRIED_BUFFERS
from ptconvert.models.shape import TORCH_NAMES, config_dtype
from ptconvert.runtime.memory import PROCESS_BYTES, free_memory
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.shorten import few

T = TypeVar("T")
# Told how far a long step has come: the step, how much is done, and of how much (None: unknown).
Progress = Callable[[str, int, int | None], None]

# How much faster float32 must be than the dtype stored to be taken instead, and what is multiplied
# to see it: enough for a device to show its speed, and little enough for a second.
_FASTER = 1.5
_TIMED_TOKENS, _TIMED_PRODUCTS = 128, 1 << 29

# What `--batch-size auto` begins with; it halves when memory runs out. More than this gains
# little: on a CPU the cores are busy with less, and on a GPU the model's own layers are.
_FIRST_BATCH = {"cpu": 8}
_FIRST_BATCH_ELSEWHERE = 64


def cache_directory() -> Path:
    """Where answers and measurements are kept: `ptconvert` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptconvert"


def schedule_of(checkpoint: Checkpoint) -> Schedule:
    """What a checkpoint's forward pass does, converted or not. Raises ConfigError."""
    return read_section(checkpoint.config, str(checkpoint.path / "config.json")).schedule


def is_dense(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a dense model's, with nothing of ptconvert or Ladder in it."""
    schedule = schedule_of(checkpoint)
    return SECTION not in checkpoint.config and schedule == dense_schedule(schedule.layers)


def open_model(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """A checkpoint's model, ready to score: on its device, in evaluation mode.

    `dtype` is torch's name of one, or `auto` for the one stored. A converted checkpoint and one
    with the Ladder authors' `ladder_layers` open with their schedule, any other as transformers
    opens it. Raises CheckpointError.
    """
    ptconvert.register()
    opened: Any = AutoModelForCausalLM
    if not is_dense(checkpoint) and SECTION not in checkpoint.config:
        opened = PTConvertLlamaForCausalLM
    try:
        model, loading = opened.from_pretrained(
            checkpoint.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"{checkpoint.path}: {checkpoint.nbytes / 1e9:.1f} GB of weights don't fit on {device}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        raise CheckpointError(f"{checkpoint.path}: {first_line(error)}") from error
    # transformers fills what is missing with random numbers.
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(
            str(name if isinstance(name, str) else name[0])
            for name in loading[f"{what}_keys"]
            if not str(name).endswith(CARRIED_BUFFERS)
        )
        if names:
            raise CheckpointError(f"{checkpoint.path}: {what} tensor {few(names, 1)}")
    return model


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
    numbers = sum(entry.count for entry in checkpoint.tensors.values())
    needed, slower = 4 * numbers + PROCESS_BYTES, f"is {times:.1f} times slower on {device}"
    if needed > (free := free_memory(device)):
        say(
            f"computing in {stored}, which is stored and {slower} than float32: in that the "
            f"weights would take {needed / 1e9:.1f} GB of {free / 1e9:.1f}"
        )
        return stored
    say(f"computing in float32: {stored}, which is stored, {slower}")
    return "float32"


def _product_seconds(checkpoint: Checkpoint, device: str, dtype: str) -> float:
    """The least time that tokens times a matrix of the model's width takes."""
    width = min(int(str(checkpoint.config.get("hidden_size", 1024))), 8192)
    outputs = min(4 * width, max(1, _TIMED_PRODUCTS // (_TIMED_TOKENS * width)))
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    x_TD, weight_OD = torch.ones(_TIMED_TOKENS, width, **kind), torch.ones(outputs, width, **kind)
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        float(torch.nn.functional.linear(x_TD, weight_OD)[0, 0])  # waits for it, on a GPU too
        taken.append(time.perf_counter() - started)
    return min(taken)


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer beside a model. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer can be opened, which scoring needs: "
            f"{first_line(error)}"
        ) from error


def vocabulary(checkpoint: Checkpoint) -> int:
    """How many token ids a checkpoint's model has an embedding of. Raises EvaluationError."""
    size = checkpoint.config.get("vocab_size")
    if not isinstance(size, int):
        raise EvaluationError(f"{checkpoint.path}/config.json: vocab_size is missing")
    return size


def check_ids(ids: Iterable[int], tokenizer: Any, vocabulary: int) -> None:
    """Raises EvaluationError where a tokenizer gave an id that the model has no embedding of.

    A tokenizer may have such tokens, for padding in training say; only those in use matter.
    """
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise EvaluationError(
            f"{tokenizer.name_or_path}: the tokenizer gives {tokenizer.decode([largest])!r} the id "
            f"{largest}, and the model's embedding has {vocabulary} rows; resize it "
            "(resize_token_embeddings) before converting, or put the model's own tokenizer there"
        )


def content_digest(checkpoint: Checkpoint, progress: Progress) -> str:
    """SHA-256 over everything that decides a model's answers: its weights, config and tokenizer.

    Two directories with the same content have the same digest, wherever they lie.
    """
    path = checkpoint.path
    files = {t.file for t in checkpoint.tensors.values()} | set(small_files(path))
    sizes = {file: file.stat().st_size for file in sorted(files)}
    total, done, digest = sum(sizes.values()), 0, hashlib.sha256()
    label = f"reading {path.name}, MB"
    progress(label, 0, total // 10**6)
    with ThreadPoolExecutor(2) as pool:
        for (file, size), found in zip(sizes.items(), pool.map(_file_digest, sizes), strict=True):
            digest.update(f"{file.relative_to(path)}\0{found}\0".encode())
            done += size
            progress(label, done // 10**6, total // 10**6)
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
