"""End-to-end distillation: KL(teacher || student) by transformers' Trainer.

The Trainer brings accelerate, and with it DDP, FSDP and DeepSpeed as users know them; here are only
the loss, what is trained, and which of the states reached is kept. Shapes: B windows, T tokens in
each, V vocabulary, D residual stream width, P tokens in a piece.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from ptconvert.errors import HealError, PTConvertError, first_line
from ptconvert.heal.adapters import linears, lora_config, put_beside, taken, wrapped
from ptconvert.heal.answers import Answers
from ptconvert.heal.arguments import sharded, training_arguments
from ptconvert.heal.data import Data
from ptconvert.heal.loss import Losses, compare, compare_likeliest
from ptconvert.heal.models import freeze_but, share
from ptconvert.heal.report import Score
from ptconvert.heal.settings import LORA_ALPHA, Settings
from ptconvert.heal.work import Tensors
from ptconvert.measure.head import Head

Judge = Callable[[Any], Score]  # what a model scores on a task
Report = Callable[..., None]  # the step, how much is done, of how much, and a note
_STATE = "trainer_state.json"


class _Rows(Dataset[Tensors]):
    """Windows (T + 1 tokens) in a given order, and what the teacher said of each, where it is
    kept."""

    def __init__(
        self, ids_NS: torch.Tensor, order: torch.Tensor, kept: Callable[[int], Tensors] | None
    ) -> None:
        self.ids_NS, self.order, self.kept = ids_NS, order, kept

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensors:
        window = int(self.order[index])
        taught = {} if self.kept is None else self.kept(window)
        return {"input_ids": self.ids_NS[window], **taught}


class Distillation(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is KL(teacher || model) per token, or the cross-entropy of the text.

    The teacher, None where its answers come with the windows, stays out of the Trainer's hands:
    never trained or saved. `head` is its output head.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: Any,
        head: Head,
        loss: str,
        judge: Callable[[], Score] | None,
        **options: Any,
    ) -> None:
        """`loss` is `kl`, or `nll` of the text. Which state is best `judge` says, or else the
        loss."""
        super().__init__(*arguments, **options)
        self.teacher, self.head, self.loss, self.judge = teacher, head, loss, judge
        self.compute_metrics = self._held_out
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
        loss_BT, kl_BT = self._compare(model, inputs, self.loss == "kl")
        return (kl_BT if self.loss == "kl" else loss_BT).mean()

    def prediction_step(
        self, model: nn.Module, inputs: Any, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss and KL of each window (B, 2), which `_held_out` averages."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            pair = self._compare(model, inputs, True)
        each_B2 = torch.stack([values_BT.mean(1) for values_BT in pair], dim=1)
        return each_B2[:, 1].mean(), each_B2, each_B2

    def _compare(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], with_kl: bool
    ) -> Losses:
        """The model's loss and its KL from the teacher at each token, both (B, T)."""
        ids_BS = inputs["input_ids"]
        logits_BTV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
        target_BT = ids_BS[:, 1:]
        if not with_kl:
            loss_P = functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), target_BT.flatten(), reduction="none"
            )
            return loss_P.view(target_BT.shape), torch.zeros_like(loss_P).view(target_BT.shape)
        if "others" in inputs:
            kept = inputs["ids"], inputs["logp"], inputs["others"]
            return compare_likeliest(logits_BTV, *kept, target_BT)
        if (hidden_BTD := inputs.get("hidden")) is None:
            with torch.no_grad(), self.accelerator.autocast():
                decoder = self.teacher.get_decoder()
                hidden_BTD = decoder(input_ids=ids_BS[:, :-1], use_cache=False).last_hidden_state
        return compare(logits_BTV, hidden_BTD, self.head, target_BT)

    def _held_out(self, prediction: Any) -> dict[str, float]:
        """Loss and KL over the held-out windows, from what prediction_step gives, the score where
        there is one, and the gain, which is higher the better."""
        nll, kl = map(float, prediction.predictions.astype("float64").mean(axis=0))
        means = {"nll": nll, "kl": kl}
        if self.judge is None:
            return {**means, "gain": -means[self.loss]}
        with self.compute_loss_context_manager():
            score = self.judge()
        return {**means, "score": score.value, "gain": score.gain}


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows how far it is; and makes the model as it came the first candidate to be kept."""

    def __init__(self, judged_by: str, progress: Report, say: Callable[[str], None]) -> None:
        self.judged_by, self.progress, self.say = judged_by, progress, say
        self.loss, self.held_out = math.nan, math.nan
        self.began = False

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.began = True
        self.progress("training", state.global_step, state.max_steps)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        known = {"loss": self.loss, f"held-out {self.judged_by}": self.held_out}
        note = ", ".join(f"{what} {n:.4f}" for what, n in known.items() if not math.isnan(n))
        self.progress("training", state.global_step, state.max_steps, note)

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any, **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def on_evaluate(self, _args: Any, state: Any, _control: Any, metrics: Any, **_: Any) -> None:
        self.held_out = metrics[f"eval_{self.judged_by}"]
        if state.global_step == 0:
            state.best_metric, state.best_global_step = metrics["eval_gain"], 0
        if state.is_world_process_zero:
            loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}, "
            score = f", score {self.held_out:.4f}" if self.judged_by == "score" else ""
            self.say(
                f"step {state.global_step} of {state.max_steps}: {loss}held out: "
                f"loss {metrics['eval_nll']:.4f}, KL {metrics['eval_kl']:.4f}{score}"
            )


def distill(
    student: Any,
    teacher: Any | Answers,
    names: list[str],
    data: Data,
    settings: Settings,
    work: Path,
    progress: Report,
    say: Callable[[str], None],
    judge: Judge | None = None,
    beside: Sequence[str] = (),
    by: type[Distillation] = Distillation,
) -> Tensors:
    """Trains the parameters `names` of the student towards the teacher, a model or its kept
    answers; returns those of the best state, none where the student as it came was best. Which that
    is, `judge` says, or else the objective on the held-out windows.

    With settings.lora adapters on the linear layers among `names` are trained in their place, and
    merged; where there are linear layers `beside` which adapters are to stay, `names` are trained
    themselves, and these adapters. `by` is the Trainer, whose loss it is.

    Frozen ones share the teacher's storage where they are the same. Goes on from the last state
    that it finds in `work`. Raises HealError.
    """
    order = data.order(settings.tokens, settings.seed)
    found = last_state(work)
    layers = list(student.get_decoder().layers.children())
    arguments = training_arguments(settings, len(order), work, found is not None, layers)
    if settings.fsdp and arguments.device.type == "cpu":
        # else accelerate quietly gives each process the whole model there
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    merges = settings.lora is not None and not beside
    freeze_but(student, () if merges else names)
    of = of_held_out = None
    if isinstance(teacher, Answers):
        of, of_held_out, head = teacher.of, teacher.of_held_out, teacher.held_out.head
        taught_by = None
        if not sharded(arguments):
            student.to(arguments.device)
    else:
        taught_by = _placed(teacher, student, settings, arguments, say, columns=merges)
        head = Head(taught_by)
    set_seed(settings.seed)
    model = student
    if settings.lora is not None and merges:
        model = _with_adapters(student, names, settings.lora)
    elif settings.lora is not None:
        adapters = put_beside(student, list(beside), settings.lora)
        names = [*wrapped(names, set(beside)), *adapters]
        freeze_but(student, names)
    held_out = data.held_out.ids
    loss = "kl" if settings.objective == "kl" else "nll"
    watch = _Watch(loss if judge is None else "score", progress, say)
    try:
        trainer = by(
            model,
            arguments,
            train_dataset=_Rows(data.train, order, of),
            eval_dataset=_Rows(held_out, torch.arange(len(held_out)), of_held_out),
            callbacks=[
                EarlyStoppingCallback(early_stopping_patience=settings.patience),
                watch,
            ],
            teacher=taught_by,
            head=head,
            loss=loss,
            judge=None if judge is None else functools.partial(judge, student),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    except (PTConvertError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, ArithmeticError, ImportError, OSError, RuntimeError) as error:
        # some show only when the optimizer, its schedule and the batches are made
        if not settings.options or watch.began:
            raise
        raise HealError(f"--set: {first_line(error)}") from error
    if not trainer.state.best_global_step:
        return {}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if arguments.process_index:
        return {}  # where the model is sharded, the first process alone is given all of it
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return _merged(state, names) if merges else taken(state, names)


def _placed(
    teacher: Any,
    student: Any,
    settings: Settings,
    arguments: Any,
    say: Callable[[str], None],
    columns: bool,
) -> Any:
    """The teacher where it runs, and what the student has of it where that is (`share`)."""
    teacher = teacher.eval().requires_grad_(False)
    if settings.fsdp:
        _shard(teacher, arguments.device)
    teacher = teacher.to(arguments.device)
    if not sharded(arguments):  # else each process holds a part of the student only
        shared = share(student, teacher, columns=columns)
        student.to(arguments.device)
        if shared and arguments.process_index == 0:
            say(f"student and teacher share {shared / 1e6:.1f} MB")
    return teacher


def _shard(teacher: Any, device: torch.device) -> None:
    """Spreads the teacher's layers over the processes."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in teacher.get_decoder().layers.children():
        # said, as each is a root of its own here, which would keep what it gathered
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def last_state(work: Path) -> Path | None:
    """The newest of the Trainer's states that was written to its end."""
    for path in sorted(work.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        state = path / _STATE  # the file that is written last
        if state.is_file() and state.read_text(encoding="utf-8").rstrip().endswith("}"):
            return path
    return None


def _with_adapters(student: Any, names: list[str], rank: int) -> Any:
    """The student with a LoRA adapter on each linear layer whose weight is among `names`."""
    from peft import get_peft_model

    return get_peft_model(student, lora_config(linears(student, names), rank))


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
