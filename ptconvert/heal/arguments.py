"""transformers' TrainingArguments: which of their fields are ours, and which the user's."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ptconvert.errors import HealError, first_line
from ptconvert.heal.settings import Settings

_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainingArguments))
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # its new name and its old
# Fields that the other options decide, and those on which keeping the best state depends.
_BY_OPTION = {
    "output_dir": "--work",
    "learning_rate": "--learning-rate",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    **dict.fromkeys(_CHECKPOINTING, "--gradient-checkpointing"),
    "max_steps": "--tokens",
    "num_train_epochs": "--tokens",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "eval_steps": "--evaluations",
    "save_steps": "--evaluations",
    "seed": "--seed",
    "use_cpu": "--device",
    "bf16": "--dtype",
    "fp16": "--dtype",
    **dict.fromkeys(("fsdp", "fsdp_config"), "--fsdp"),
}
_FIXED: dict[str, object] = {
    "train_sampling_strategy": "sequential",  # the order is made already
    "remove_unused_columns": False,
    "label_names": [],
    "metric_for_best_model": "gain",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,
    "eval_strategy": "steps",
    "save_strategy": "steps",
}
_BY_STATE = "eval_on_start"  # fixed too
# Of a loss that isn't the one trained on, and of how metrics are computed.
_OWN = (
    *("label_smoothing_factor", "include_for_metrics", "prediction_loss_only"),
    *("batch_eval_metrics", "eval_do_concat_batches"),
)


# What transformers raises about values that it doesn't take, or has no library for.
_REFUSES = (TypeError, ValueError, ImportError, AttributeError, RuntimeError)


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """transformers' parser of its own command lines, whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise HealError(f"--set: {message.removeprefix('argument --')}")


def read_options(pairs: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE pairs as fields of TrainingArguments, read as transformers' own scripts read them.
    Raises HealError."""
    keys = []
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        if not equals:
            raise HealError(f"--set {pair}: it must be KEY=VALUE, such as weight_decay=0.01")
        if key not in _FIELDS:
            raise HealError(f"--set {key}: transformers' TrainingArguments has no such field")
        if key in _BY_OPTION:
            raise HealError(f"--set {key}: use {_BY_OPTION[key]}")
        if key in _FIXED or key == _BY_STATE:
            raise HealError(f"--set {key}: keeping the best state depends on it; leave it out")
        if key.startswith(("push_to_hub", "hub_")):
            raise HealError(f"--set {key}: push the result instead (hf upload), once it is there")
        if key in _OWN:
            raise HealError(f"--set {key}: loss and judging are heal's own; leave it out")
        keys.append(key)
    parsed = _Parser(TrainingArguments).parse_args([f"--{pair}" for pair in pairs])
    values = {key: getattr(parsed, key) for key in keys}
    for key, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            raise HealError(f"--set {key}: it must be a number")
    return values


def check(settings: Settings, windows: int) -> None:
    """Raises HealError for too few windows, or processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.fsdp and "deepspeed" in settings.options:
        raise HealError("--fsdp and --set deepspeed both shard the model; choose one")
    if settings.fsdp and processes == 1:
        raise HealError(
            "--fsdp: there is one process; torchrun --nproc-per-node GPUS -m ptconvert heal ... "
            "starts several"
        )
    if settings.options:
        _check_taken(settings)
    together = settings.batch_size * settings.accumulation * processes
    if windows < together:
        raise HealError(
            f"{windows} windows to train on are less than the {together} of one step; a smaller "
            "--batch-size, or more --tokens"
        )


def _check_taken(settings: Settings) -> None:
    """Raises HealError for values that transformers would refuse once all is loaded: of its
    arguments, of an optimizer and of its schedule."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, 1, Path(folder), resumed=False)
    if sharded(arguments):
        return  # the optimizer is the launcher's, too
    try:
        make, named = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = make([nn.Parameter(torch.zeros(1, 1))], **named)
        kind, more = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
        get_scheduler(kind, optimizer, 1, 2, scheduler_specific_kwargs=more)
        for reporting in get_reporting_integration_callbacks(arguments.report_to):
            reporting()
    except _REFUSES as error:
        raise HealError(f"--set: {first_line(error)}") from error


def training_arguments(
    settings: Settings,
    windows: int,
    work: Path,
    resumed: bool,
    layers: Iterable[nn.Module] = (),
) -> Any:
    """transformers' TrainingArguments; `layers` are what is sharded one by one with `--fsdp`.
    Raises HealError for values that it doesn't take."""
    checkpointing = next(name for name in _CHECKPOINTING if name in _FIELDS)
    options = {
        **_options(settings),
        **(_sharding(layers) if settings.fsdp else {}),
        checkpointing: settings.gradient_checkpointing,
        "output_dir": str(work),
        _BY_STATE: not resumed,
        **settings.options,
    }
    try:
        arguments = TrainingArguments(**options)
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs by a launcher, never DataParallel
    except _REFUSES as error:
        raise HealError(f"--set: {first_line(error)}") from error
    together = arguments.train_batch_size * arguments.gradient_accumulation_steps
    steps = max(1, windows // (together * arguments.world_size))
    every = math.ceil(steps / settings.evaluations)
    warm = math.ceil(settings.warmup * steps)
    derived = {"max_steps": steps, "eval_steps": every, "save_steps": every, "warmup_steps": warm}
    for name, value in derived.items():
        if name not in settings.options:
            setattr(arguments, name, value)
    return arguments


def _sharding(layers: Iterable[nn.Module]) -> dict[str, object]:
    """Weights, gradients and optimizer over the processes, layer by layer; whole where a state is
    kept. Classes that the model hasn't, as of tracks where all layers are dense, are no classes to
    accelerate."""
    classes = sorted({type(layer).__name__ for layer in layers})
    config = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": {**config, "transformer_layer_cls_to_wrap": classes}}


def _options(settings: Settings) -> dict[str, object]:
    """The fields of TrainingArguments that don't depend on the data or the state."""
    on_cpu = torch.device(settings.device).type == "cpu"
    return {
        **_FIXED,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        "ddp_find_unused_parameters": False,
        # the models are mixed then: what is trained is fp32, what is frozen has 16 bits
        "bf16": settings.dtype == "bfloat16",
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "seed": settings.seed,
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "log_level": "error",
    }


def sharded(arguments: Any) -> bool:
    """Whether FSDP or DeepSpeed is to cut the student, by the arguments or by the launcher."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    launched = any(os.environ.get(name, "").lower() in ("1", "true") for name in names)
    return launched or bool(arguments.fsdp or arguments.deepspeed)
