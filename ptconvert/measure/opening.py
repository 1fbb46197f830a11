"""The models to be scored, and their tokenizers, opened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer

import ptconvert
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import SECTION, Section, read_section
from ptconvert.errors import CheckpointError, ConfigError, EvaluationError, first_line
from ptconvert.modeling.model import CAUSAL_LMS
from ptconvert.models.families import CARRIED_BUFFERS
from ptconvert.models.quantised import quantization_of
from ptconvert.models.wrappers import opened_by
from ptconvert.runtime.load import attention_of, open_dequantised, shape_of
from ptconvert.shorten import few

# What transformers raises about files that it can't make sense of.
_WRONG = (OSError, ValueError, KeyError, ImportError, RuntimeError, StrictDataclassError)
# How files of tokenizers are called, of whatever kind.
_TOKENIZERS = "*token*", "*.model", "vocab*", "merges*", "tekken*"


def section_of(checkpoint: Checkpoint) -> Section:
    """What a checkpoint's forward pass does, converted or not. Raises ConfigError."""
    return read_section(checkpoint.config, str(checkpoint.path / "config.json"))


def is_dense(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a dense model's, with nothing of ptconvert or Ladder in it."""
    section = section_of(checkpoint)
    return SECTION not in checkpoint.config and section.schedule == section.dense


def auto_class(checkpoint: Checkpoint) -> Any:
    """Which of transformers' Auto classes opens a checkpoint."""
    return getattr(transformers, opened_by(checkpoint.config.get("model_type")))


def open_model(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """A checkpoint's model, ready to score: on its device, in evaluation mode.

    `dtype` is torch's name of one, or `auto` for the one stored. A converted checkpoint and one
    whose config.json has others' key for one open with their schedule, any other as transformers
    opens it. On the CPU quantised weights are dequantised, as few quantisers have kernels for it;
    elsewhere they are their own quantiser's. Raises CheckpointError.
    """
    ptconvert.register()
    opened = auto_class(checkpoint)
    if not is_dense(checkpoint) and SECTION not in checkpoint.config:
        opened = CAUSAL_LMS[str(checkpoint.config["model_type"])]
    if device == "cpu" and quantization_of(checkpoint.config) is not None:
        return open_dequantised(checkpoint, None if dtype == "auto" else getattr(torch, dtype))
    try:
        model, loading = opened.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            attn_implementation=attention_of(checkpoint.config),
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"{checkpoint.path}: {checkpoint.nbytes / 1e9:.1f} GB of weights don't fit on {device}"
        ) from error
    except _WRONG as error:
        _check_config(checkpoint)
        asked = f"config.json asks for {error}, which transformers doesn't have"
        why = asked if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"{checkpoint.path}: {why}") from error
    # transformers fills what is missing with random numbers.
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(
            str(name if isinstance(name, str) else name[0])
            for name in loading[f"{what}_keys"]
            if not str(name).endswith(CARRIED_BUFFERS)
        )
        if names and what == "unexpected":
            names = [name for name in names if not name.startswith(_mtp(checkpoint))]
        if names:
            raise CheckpointError(f"{checkpoint.path}: {what} tensor {few(names, 1)}")
    return model


def _mtp(checkpoint: Checkpoint) -> tuple[str, ...]:
    """How names of a head for further tokens begin; none of a family that isn't converted."""
    try:
        return shape_of(checkpoint).mtp
    except ConfigError:
        return ()


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer beside a model. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except (*_WRONG, TypeError, AttributeError) as error:
        _check_config(checkpoint)
        why = first_line(error)
        if not any(any(checkpoint.path.glob(name)) for name in _TOKENIZERS):
            why = "there is no file of one (tokenizer.json and others); put the source's there"
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer can be opened, which scoring needs: {why}"
        ) from error


def _check_config(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where transformers can't read config.json, which tokenizers ask for
    their class, too."""
    try:
        AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except (*_WRONG, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: {first_line(error)}") from error


def vocabulary(checkpoint: Checkpoint) -> int:
    """How many token ids a checkpoint's model has an embedding of. Raises EvaluationError."""
    size = checkpoint.language.get("vocab_size")
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
