"""A healing from beginning to end: measure, train, measure again, keep the best, write it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ptconvert import __version__
from ptconvert.checkpoint.atomic import check_apart, check_destination, nested
from ptconvert.checkpoint.card import healed_card
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import HealError
from ptconvert.heal.adapters import add, apart
from ptconvert.heal.answers import Answers, AnswerStore
from ptconvert.heal.arguments import check
from ptconvert.heal.blockwise import heal_blocks
from ptconvert.heal.card import healing_section
from ptconvert.heal.data import Data
from ptconvert.heal.distill import Judge, distill
from ptconvert.heal.models import (
    adaptable,
    changed_layers,
    check_pair,
    freeze_but,
    put,
    trainable,
)
from ptconvert.heal.mtp import heal_head, measured_head
from ptconvert.heal.report import Healed, Measured
from ptconvert.heal.settings import Settings
from ptconvert.heal.work import (
    Tensors,
    load_tensors,
    save_tensors,
    start_file,
    wait_for,
    work_folder,
)
from ptconvert.heal.write import rounded, rounded_head, write
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import cache_directory, content_digest
from ptconvert.measure.divergence import Reference
from ptconvert.measure.opening import open_model, section_of, vocabulary
from ptconvert.models.quantised import quantization_of
from ptconvert.models.wrappers import layer_of
from ptconvert.runtime.mtp import head_on_meta, open_head

_BLOCKS = "blocks.safetensors"  # what the blockwise stage made
_KL = "kl.safetensors"  # and the KL stage
_HEAD = "head.safetensors"  # and that of its head for further tokens


@dataclass(frozen=True)
class Case:
    """What is healed by what, on what, and how; `folder` keeps the state, `cache` the teacher's
    answers, and `progress` (step, done, of how many, a note) and `say` tell the user how far it
    is. `judge` scores a model where a task decides which is best."""

    student: Checkpoint
    teacher: Checkpoint
    teacher_name: str
    data: Data
    settings: Settings
    folder: Path
    progress: Callable[..., None]
    say: Callable[[str], None]
    cache: Path = field(default_factory=cache_directory)
    judge: Judge | None = None

    @property
    def tokens(self) -> int:
        """The tokens that each stage trains on."""
        return self.settings.tokens or self.data.train[:, 1:].numel()


def quantised_note(lora: int | None) -> str:
    """What is trained of a checkpoint with quantised weights."""
    beside = "" if lora is None else f" and a LoRA of rank {lora} beside them"
    return (
        f"quantised weights stay as they are: norms, biases and guesses are trained{beside}; to "
        "train all, heal a conversion of the unquantised checkpoint and quantise the result"
    )


def check_places(destination: Path, folder: Path, overwrite: bool) -> None:
    """Raises PTConvertError where the result can't be written, or would be gone with the work
    folder, which is removed at the end."""
    check_destination(destination, overwrite)
    if nested(destination, folder):
        raise HealError(f"--work {folder}: it may not lie in DST, nor DST in it")


def check_case(case: Case, destination: Path, overwrite: bool) -> None:
    """Raises PTConvertError where a healing can't begin, all of which is found before it does."""
    check_places(destination, case.folder, overwrite)
    for other in (case.student, case.teacher):
        check_apart(destination, other.path)
    check_pair(case.student, case.teacher)
    if case.student.adapter is not None and case.settings.lora is not None:
        raise HealError(
            f"--lora {case.settings.lora}: {case.student.path} has a LoRA beside its weights "
            "already; heal the conversion that it was healed from"
        )
    quantised = quantization_of(case.student.config) is not None
    if quantised and case.settings.lora is not None and not beside(case):
        raise HealError(
            f"--lora {case.settings.lora}: none of the layers that are trained has a quantised "
            "linear layer, which adapters could go beside; leave it out"
        )
    if case.settings.lora is not None and not quantised:
        _check_rank(case, case.settings.lora)
    if not (case.settings.blockwise or case.settings.kl or case.settings.mtp):
        raise HealError("nothing to do: neither block by block nor end to end")
    if case.settings.mtp:
        _check_head(case, quantised)
    if case.settings.train == "changed" and not changed_layers(section_of(case.student)):
        raise HealError("the schedule changes no layer, so there is nothing to heal")
    if (case.settings.top_k or 0) > (size := vocabulary(case.teacher)):
        raise HealError(f"--top-k {case.settings.top_k}: the vocabulary has {size} tokens")
    if case.judge is not None and "WORLD_SIZE" in os.environ:
        raise HealError(
            f"--stop-on {case.settings.stop_on}: a task is scored in one process only; kl works in "
            "several"
        )
    check(case.settings, len(case.data.order(case.settings.tokens, case.settings.seed)))


def _check_rank(case: Case, rank: int) -> None:
    """Raises HealError where no matrix of the layers that are trained has so high a rank."""
    stored = case.student.tensors
    names = (n for n, entry in stored.items() if len(entry.shape) == 2 and layer_of(n) is not None)
    sides = [min(stored[n].shape) for n in trainable(names, case.student, case.settings.train)]
    if sides and rank > max(sides):
        raise HealError(
            f"--lora {rank}: the matrices that are trained have at most rank {max(sides)}; take a "
            "smaller one, or leave it out, which trains all of them"
        )


def _check_head(case: Case, quantised: bool) -> None:
    head_on_meta(case.student)
    if quantised:
        raise HealError("--mtp: quantised weights stay as they are, a head's too; leave it out")
    if "WORLD_SIZE" in os.environ:
        raise HealError(
            "--mtp: a head is trained in one process, after the rest; leave it out here"
        )


def heal(
    case: Case, destination: Path, command: str = "", overwrite: bool = False
) -> Healed | None:
    """Heals a converted checkpoint into `destination`, and returns the report.

    Of the checkpoint as it came and of what each stage made of it, the best is written: that with
    the smallest KL on the held-out windows, or the best score. `command` goes to its model card.
    Under a launcher (`accelerate launch`, torchrun) every process calls this; the first one
    measures and writes, the others return None. Raises PTConvertError.
    """
    check_case(case, destination, overwrite)
    key = _key(case)
    start = start_file(case.folder, key)
    if not _is_first():
        wait_for(start)
        if case.settings.kl:
            _distilled(case, key, load_tensors(start))
        return None
    with work_folder(case.folder, key):
        report, healed = _stages(case, key, start)
        head = Tensors()
        if case.settings.mtp:
            before_and_after, head = _headed(case, healed)
            report = replace(report, head=before_and_after)
        card = healed_card(case.student.path, destination.name, healing_section(report, command))
        case.progress(f"writing {destination.name}", 0, None)
        write(case.student, healed, head, card, destination, overwrite)
    shutil.rmtree(case.folder.resolve(), ignore_errors=True)  # it may be a link
    return report


def _stages(case: Case, key: Mapping[str, object], start: Path) -> tuple[Healed, Tensors]:
    """Trains, measuring before and after each stage; the report, and the best tensors. What the KL
    stage begins with goes to the file `start`."""
    case.say(f"computing in {case.settings.dtype} on {case.settings.device}")
    reference = _reference(case, key)
    source, before = _measured(case, reference, "before", {})
    for path, loss in ((case.teacher.path, source.loss), (case.student.path, before.loss)):
        if not math.isfinite(loss):
            raise HealError(
                f"{path}: its outputs are not all finite in {case.settings.dtype}, and there is "
                "nothing to learn from that; where it is float16 or bfloat16, --dtype float32 may "
                "be enough"
            )
    rows, best, healed = [before], before, Tensors()
    if quantization_of(case.student.config) is not None:
        case.say(quantised_note(case.settings.lora))
    score = "" if before.score is None else f", {before.score.metric} {before.score.value:.4f}"
    case.say(f"held out, before: loss {before.loss:.4f}, KL {before.kl:.4f}{score}")
    if case.settings.blockwise:
        blocks = _blocks(case)
        rows.append(_measured(case, reference, "blockwise", blocks)[1])
        if rows[-1].gain > best.gain:
            best, healed = rows[-1], blocks
    save_tensors(start, healed)
    if case.settings.kl and (moved := _distilled(case, key, healed)):
        rows.append(_measured(case, reference, "KL", healed | moved)[1])
        if rows[-1].gain > best.gain:
            best, healed = rows[-1], healed | moved
    return (
        Healed(
            teacher=case.teacher_name,
            data=case.data.names,
            data_digest=case.data.digest,
            held_out_tokens=case.data.held_out.ids[:, 1:].numel(),
            tokens=case.tokens * (case.settings.blockwise + case.settings.kl + case.settings.mtp),
            settings=case.settings,
            rows=(source, *rows),
            kept=best.name,
            quantised=quantization_of(case.student.config) is not None,
        ),
        healed,
    )


def _reference(case: Case, key: Mapping[str, object]) -> Reference:
    """The teacher's predictions on the held-out windows."""
    settings = case.settings
    if settings.top_k is not None:
        return _store(case, key).held_out(case.data.held_out)
    case.progress("opening the teacher", 0, None)
    model = open_model(case.teacher, settings.dtype, settings.device)
    batch = BatchSize(None, settings.device)
    return divergence.reference(model, case.data.held_out, batch, case.progress)


def _measured(
    case: Case, reference: Reference, name: str, healed: Tensors
) -> tuple[Measured, Measured]:
    """The source and the model with these tensors, as they would be written, on held-out text."""
    settings = case.settings
    case.progress(f"opening the model to measure: {name}", 0, None)
    model = _opened(case, healed)
    tokens = divergence.measure(
        model,
        reference,
        case.data.held_out,
        BatchSize(None, settings.device),
        case.progress,
        name,
    )
    source = Measured("source", float(tokens.source_loss.mean()), 0.0)
    loss, kl = float(tokens.converted_loss.mean()), float(tokens.kl.mean())
    return source, Measured(name, loss, kl, None if case.judge is None else case.judge(model))


def _headed(case: Case, healed: Tensors) -> tuple[tuple[Measured, Measured], Tensors]:
    """The head for further tokens of the model with these tensors, before and after, and what of it
    moved; that is made now or by an earlier run."""
    settings, ids_NS = case.settings, case.data.held_out.ids
    case.progress("opening the model and its head", 0, None)
    model = _opened(case, healed).requires_grad_(False)
    head = open_head(case.student, model.dtype, model.device)
    given = ids_NS, BatchSize(None, settings.device), case.progress
    before = after = measured_head(head, model, *given, "before")
    file = case.folder / _HEAD
    if not file.is_file():
        folder, data = case.folder / "head", case.data
        moved = heal_head(head, model, data, settings, folder, case.progress, case.say)
        save_tensors(file, moved)
    if moved := load_tensors(file):
        head = open_head(case.student, model.dtype, model.device)  # was trained in fp32
        put(head, rounded_head(case.student, moved))
        after = measured_head(head, model, *given, "after")
    case.say(f"its head for further tokens: KL {before.kl:.4f} → {after.kl:.4f} on held-out text")
    return (before, after), moved


def _opened(case: Case, healed: Tensors) -> Any:
    """The model with these tensors, as they would be written, where it is measured."""
    # as it is trained: dequantised, wherever
    quantised = quantization_of(case.student.config) is not None
    where = "cpu" if quantised else case.settings.device
    model = open_model(case.student, case.settings.dtype, where).to(case.settings.device)
    own, adapters = apart(healed)
    put(model, rounded(case.student, own))
    add(model, adapters)
    return model


def _blocks(case: Case) -> Tensors:
    """The tensors of the blockwise stage, made now or by an earlier run."""
    file = case.folder / _BLOCKS
    if not file.is_file():
        healed = heal_blocks(
            case.student,
            case.teacher,
            case.data,
            case.settings,
            case.folder,
            case.progress,
            case.say,
        )
        save_tensors(file, healed)
    return load_tensors(file)


def _store(case: Case, key: Mapping[str, object]) -> AnswerStore:
    """Where the teacher's answers are kept, by the digest that a healing's key has of it."""
    return AnswerStore(case.teacher, str(key["teacher"]), case.settings, case.cache, case.progress)


def _distilled(case: Case, key: Mapping[str, object], start: Tensors) -> Tensors:
    """The tensors of the KL stage, which begins with `start`, made now or by an earlier run."""
    if (case.folder / _KL).is_file():
        return load_tensors(case.folder / _KL)
    dtype, data = case.settings.dtype, case.data
    teacher: Any | Answers
    if case.settings.top_k is None:
        case.progress("opening the teacher to train", 0, None)
        teacher = open_model(case.teacher, dtype, "cpu")
    else:
        used = torch.unique(data.order(case.settings.tokens, case.settings.seed))
        teacher = _store(case, key).answers(data.train, used, data.held_out)
    case.progress("opening the model to train", 0, None)
    student = open_model(case.student, dtype, "cpu")
    names = trainable(
        [name for name, _ in student.named_parameters()],
        case.student,
        case.settings.train,
    )
    adapted = beside(case)
    freeze_but(student, names if case.settings.lora is None or adapted else ())
    put(student, start.items())
    moved = distill(
        student,
        teacher,
        names,
        data,
        case.settings,
        case.folder / "kl",
        case.progress,
        case.say,
        case.judge,
        adapted,
    )
    if _is_first():
        save_tensors(case.folder / _KL, moved)
    return moved


def beside(case: Case) -> list[str]:
    """The linear layers beside which adapters stay; none where they are merged, or not there."""
    if case.settings.lora is None or quantization_of(case.student.config) is None:
        return []
    return adaptable(case.student, case.settings.train)


def _is_first() -> bool:
    """Whether this is the only process, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _key(case: Case) -> dict[str, object]:
    """Everything that decides the result: what a state must agree in to be gone on from."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    return {
        "checkpoint": content_digest(case.student, case.progress),
        "teacher": content_digest(case.teacher, case.progress),
        "text": case.data.digest,
        **asdict(case.settings),
        "tokens": case.tokens,
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "ptconvert": __version__,
        **versions,
    }
