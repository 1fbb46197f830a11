"""End-to-end distillation: KL(teacher || student) by transformers' Trainer.

The Trainer brings accelerate, and with it DDP, FSDP and DeepSpeed as users know them; here are only
the loss, what is trained, and which of the states reached is kept. Shapes: B windows, T tokens in
each, V vocabulary, D residual stream width, P tokens in a piece.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.state import DistributedType, PartialState
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ptconvert.errors import HealError, first_line
from ptconvert.heal.data import Data
from ptconvert.heal.models import freeze_but, share
from ptconvert.heal.settings import LORA_ALPHA, Settings
from ptconvert.heal.work import Tensors
from ptconvert.measure.divergence import by_token, loss_and_kl

Report = Callable[..., None]  # the step, how much is done, of how much, and a note
_STATE = "trainer_state.json"
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
    "greater_is_better": False,
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,
    "eval_strategy": "steps",
    "save_strategy": "steps",
}
_BY_STAGE = ("metric_for_best_model", "eval_on_start")  # fixed too, by the objective and the state


class _Rows(Dataset[dict[str, torch.Tensor]]):
    """Windows (T + 1 tokens) in a given order."""

    def __init__(self, ids_NS: torch.Tensor, order: torch.Tensor) -> None:
        self.ids_NS, self.order = ids_NS, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids_NS[self.order[index]]}


class Distillation(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is KL(teacher || model) per token, or the cross-entropy of the text.

    The teacher stays out of the Trainer's hands: never trained or saved.
    """

    def __init__(self, *arguments: Any, teacher: Any, objective: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.teacher, self.objective = teacher, objective
        self.model_accepts_loss_kwargs = False  # the loss is a mean over one batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> Any:
        """The mean over a batch's tokens, in nats."""
        assert not return_outputs, num_items_in_batch
        loss_BT, kl_BT = self._compare(model, inputs["input_ids"], self.objective == "kl")
        return (kl_BT if self.objective == "kl" else loss_BT).mean()

    def prediction_step(
        self, model: nn.Module, inputs: Any, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss and KL of each window (B, 2), which `held_out_means` averages."""
        ids = self._prepare_inputs(inputs)["input_ids"]
        with torch.no_grad(), self.compute_loss_context_manager():
            pair = self._compare(model, ids, True)
        each_B2 = torch.stack([values_BT.mean(1) for values_BT in pair], dim=1)
        return each_B2[:, 1].mean(), each_B2, each_B2

    def _compare(
        self, model: nn.Module, ids_BS: torch.Tensor, with_kl: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's loss and its KL from the teacher at each token, both (B, T)."""
        logits_BTV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
        target_BT = ids_BS[:, 1:]
        if not with_kl:
            loss_P = functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), target_BT.flatten(), reduction="none"
            )
            return loss_P.view(target_BT.shape), torch.zeros_like(loss_P).view(target_BT.shape)
        with torch.no_grad(), self.accelerator.autocast():
            decoder = self.teacher.get_decoder()
            hidden_BTD = decoder(input_ids=ids_BS[:, :-1], use_cache=False).last_hidden_state
        head = self.teacher.get_output_embeddings()
        hidden_BTD = hidden_BTD.to(head.weight.dtype)
        loss_BT, kl_BT = by_token(
            loss_and_kl, head, hidden_BTD, nn.Identity(), logits_BTV, target_BT
        )
        return loss_BT, kl_BT


def held_out_means(prediction: Any) -> dict[str, float]:
    """Loss and KL over the held-out windows, from what prediction_step gives."""
    loss, kl = prediction.predictions.astype("float64").mean(axis=0)
    return {"nll": float(loss), "kl": float(kl)}


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows how far it is; and makes the model as it came the first candidate to be kept."""

    def __init__(self, metric: str, progress: Report, say: Callable[[str], None]) -> None:
        self.metric, self.progress, self.say = metric, progress, say
        self.loss, self.held_out = math.nan, math.nan

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.progress("training", state.global_step, state.max_steps)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        note = f"held-out {self.metric} {self.held_out:.4f}"
        if not math.isnan(self.loss):
            note = f"loss {self.loss:.4f}, {note}"
        self.progress("training", state.global_step, state.max_steps, note)

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any, **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def on_evaluate(self, _args: Any, state: Any, _control: Any, metrics: Any, **_: Any) -> None:
        self.held_out = metrics[f"eval_{self.metric}"]
        if state.global_step == 0:
            state.best_metric, state.best_global_step = self.held_out, 0
        if state.is_world_process_zero:
            loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}, "
            self.say(
                f"step {state.global_step} of {state.max_steps}: {loss}held out: "
                f"loss {metrics['eval_nll']:.4f}, KL {metrics['eval_kl']:.4f}"
            )


def distill(
    student: Any,
    teacher: Any,
    names: list[str],
    data: Data,
    settings: Settings,
    work: Path,
    progress: Report,
    say: Callable[[str], None],
) -> Tensors:
    """Trains the parameters `names` of the student; returns those of the best state by the held-out
    windows, none where the student as it came was best.

    Frozen ones share the teacher's storage where they are the same. Goes on from the last state
    that it finds in `work`. Raises HealError.
    """
    order = data.order(settings.tokens, settings.seed)
    metric = "kl" if settings.objective == "kl" else "nll"
    found = last_state(work)
    layers = student.get_decoder().layers
    arguments = training_arguments(settings, len(order), work, metric, found is not None, layers)
    teacher = teacher.eval().requires_grad_(False)
    if settings.fsdp:
        _shard(teacher, arguments.device)
    teacher = teacher.to(arguments.device)
    freeze_but(student, names if settings.lora is None else ())
    if not _sharded(arguments):  # else each process holds a part of the student only
        shared = share(student, teacher)
        student.to(arguments.device)
        if arguments.process_index == 0:
            say(f"student and teacher share {shared / 1e6:.1f} MB")
    set_seed(settings.seed)
    model = student if settings.lora is None else _with_adapters(student, names, settings.lora)
    try:
        trainer = Distillation(
            model,
            arguments,
            train_dataset=_Rows(data.train, order),
            eval_dataset=_Rows(data.held_out.ids, torch.arange(len(data.held_out.ids))),
            compute_metrics=held_out_means,
            callbacks=[
                EarlyStoppingCallback(early_stopping_patience=settings.patience),
                _Watch(metric, progress, say),
            ],
            teacher=teacher,
            objective=settings.objective,
        )
    except (TypeError, ValueError, ImportError) as error:
        if not settings.options:
            raise
        raise HealError(f"--set: {first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if not trainer.state.best_global_step:
        return {}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if arguments.process_index:
        return {}  # where the model is sharded, the first process alone is given all of it
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return _merged(state, names) if settings.lora else {name: state[name] for name in names}


def _shard(teacher: Any, device: torch.device) -> None:
    """Spreads the teacher's layers over the processes; and has accelerate do the same with the
    student on CPUs too, where it would quietly give each process the whole model."""
    if device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in teacher.get_decoder().layers:
        # said, as each is a root of its own here, which would keep what it gathered
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _sharded(arguments: Any) -> bool:
    """Whether FSDP or DeepSpeed is to cut the student, by the arguments or by the launcher."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    launched = any(os.environ.get(name, "").lower() in ("1", "true") for name in names)
    return launched or bool(arguments.fsdp or arguments.deepspeed)


def last_state(work: Path) -> Path | None:
    """The newest of the Trainer's states that was written to its end."""
    for path in sorted(work.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        state = path / _STATE  # the file that is written last
        if state.is_file() and state.read_text(encoding="utf-8").rstrip().endswith("}"):
            return path
    return None


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
        if key in _FIXED or key in _BY_STAGE:
            raise HealError(f"--set {key}: keeping the best state depends on it; leave it out")
        keys.append(key)
    parsed = _Parser(TrainingArguments).parse_args([f"--{pair}" for pair in pairs])
    return {key: getattr(parsed, key) for key in keys}


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
    together = settings.batch_size * settings.accumulation * processes
    if windows < together:
        raise HealError(
            f"{windows} windows to train on are less than the {together} of one step; a smaller "
            "--batch-size, or more --tokens"
        )


def training_arguments(
    settings: Settings,
    windows: int,
    work: Path,
    metric: str,
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
        "metric_for_best_model": metric,
        "eval_on_start": not resumed,
        **settings.options,
    }
    try:
        arguments = TrainingArguments(**options)
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs by a launcher, never DataParallel
    except (TypeError, ValueError, ImportError) as error:
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


def _with_adapters(student: Any, names: list[str], rank: int) -> Any:
    """The student with a LoRA adapter on each linear layer whose weight is among `names`."""
    from peft import get_peft_model

    linear = {n for n, module in student.named_modules() if isinstance(module, nn.Linear)}
    targets = [owner for owner in (n.removesuffix(".weight") for n in names) if owner in linear]
    return get_peft_model(student, lora_config(targets, rank))


def lora_config(targets: list[str], rank: int) -> Any:
    """peft's config of adapters on these modules."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA * rank, target_modules=targets, task_type="CAUSAL_LM"
    )


def _merged(state: Tensors, names: list[str]) -> Tensors:
    """Weights with their adapters added: W + alpha/r B A, as peft's merge does (LoRA, arXiv
    2106.09685)."""
    merged = {}
    for name in names:
        owner = f"base_model.model.{name.removesuffix('.weight')}"
        if (a_RI := state.get(f"{owner}.lora_A.default.weight")) is not None:
            b_OR = state[f"{owner}.lora_B.default.weight"]
            base_OI = state[f"{owner}.base_layer.weight"].float()
            merged[name] = base_OI + LORA_ALPHA * (b_OR.float() @ a_RI.float())
    return merged
