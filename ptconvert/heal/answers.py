"""What the teacher says of windows, kept on disk, so that it needn't run again.

Of windows to train on these are each position's K likeliest tokens (see `loss.compare_likeliest`),
in files of some windows each; of those held out the final hidden states, from which the KL is
whole. A file is named by its windows' tokens, in a folder named by all else that decides what is in
it: so another healing of the same source finds it, a killed one goes on, and several processes
make some each.

Log-probabilities are kept as float16: as large as bfloat16 and eight times finer, and none that
matters is beyond its range. Shapes: N windows, T tokens in each, K likeliest tokens, D residual
stream width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import HealError, first_line
from ptconvert.heal.loss import likeliest
from ptconvert.heal.settings import Settings
from ptconvert.heal.work import Tensors, load_tensors, save_tensors, wait_for
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import named_by
from ptconvert.measure.divergence import Reference, outputs, reference, tokens_at_once
from ptconvert.measure.head import Head
from ptconvert.measure.opening import open_model
from ptconvert.measure.progress import Progress
from ptconvert.measure.windows import Windows
from ptconvert.models.shape import HEAD, ModelShape
from ptconvert.runtime.load import on_meta, read_named

TOKENS_A_FILE = 1 << 16
_SMALL_VOCABULARY = 1 << 16  # whose ids fit in 16 bits


def answer_bytes(count: int, vocabulary: int) -> int:
    """What the answers at one position take: ids and float16, and the others' share in float32."""
    return count * ((2 if vocabulary <= _SMALL_VOCABULARY else 4) + 2) + 4


@dataclass(frozen=True)
class Answers:
    """A teacher's answers to windows to train on, and to those held out, whose hidden states come
    with its output head."""

    chunks: Sequence[Tensors]
    windows: torch.Tensor  # which they are, in order
    held_out: Reference

    def of(self, window: int) -> Tensors:
        """`ids` and `logp` (T, K) and `others` (T,) of one of the windows."""
        place = int(torch.searchsorted(self.windows, window))
        assert self.windows[place] == window
        chunk, row = divmod(place, len(self.chunks[0]["others"]))
        found = {name: tensor[row] for name, tensor in self.chunks[chunk].items()}
        return {**found, "ids": found["ids"].long()}

    def of_held_out(self, window: int) -> Tensors:
        """`hidden` (T, D) of one of the windows held out."""
        return {"hidden": self.held_out.hidden[window]}


@dataclass(frozen=True)
class AnswerStore:
    """The answers of one teacher, whose content has this `digest`, run as the settings say."""

    teacher: Checkpoint
    digest: str
    settings: Settings
    cache: Path
    progress: Progress

    @property
    def count(self) -> int:
        assert self.settings.top_k is not None
        return self.settings.top_k

    @property
    def device(self) -> str:
        """This process's, of several that a launcher started."""
        several = "WORLD_SIZE" in os.environ and self.settings.device == "cuda"
        return f"cuda:{os.environ['LOCAL_RANK']}" if several else self.settings.device

    @property
    def folder(self) -> Path:
        """Named by everything but the windows that decides the answers."""
        settings = self.settings
        told = [self.digest, settings.device, settings.dtype, self.count]
        return self.cache / "teachers" / named_by(told)

    def file(self, kind: str, ids_NS: torch.Tensor) -> Path:
        """The file of some windows' answers."""
        digest = hashlib.sha256(f"{tuple(ids_NS.shape)}".encode())
        digest.update(ids_NS.contiguous().numpy().tobytes())
        return self.folder / f"{kind}-{digest.hexdigest()[:32]}.safetensors"

    def held_out(self, windows: Windows) -> Reference:
        """The teacher's predictions on the windows held out, made now or by an earlier run."""
        file = self.file("held-out", windows.ids)
        if not file.is_file():
            found = reference(self._opened(), windows, self._batch(), self.progress)
            self._save(file, {"hidden": found.hidden})
        return Reference(_loaded(file)["hidden"], self._head())

    def answers(self, ids_NS: torch.Tensor, used: torch.Tensor, held_out: Windows) -> Answers:
        """Of the windows `used`, in order, made now or by an earlier run; each of several processes
        makes some of them and waits for the others', all in one folder that all of them see."""
        each = max(1, TOKENS_A_FILE // (ids_NS.shape[1] - 1))
        rows = [ids_NS[some] for some in torch.split(used, each)]
        files = [self.file("train", some) for some in rows]
        rank, ranks = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        own = [i for i in range(rank, len(files), ranks) if not files[i].is_file()]
        if own:
            model, batch = self._opened(), self._batch()
            for number, i in enumerate(own):
                step = f"the teacher's answers, {number + 1} of {len(own)}: windows"
                found = _answered(model, rows[i], self.count, batch, self.progress, step)
                self._save(files[i], found)
            del model
        for file in files:
            wait_for(file)
        return Answers([_loaded(file) for file in files], used, self.held_out(held_out))

    def _opened(self) -> Any:
        self.progress("opening the teacher", 0, None)
        return open_model(self.teacher, self.settings.dtype, self.device)

    def _batch(self) -> BatchSize:
        return BatchSize(None, self.device)

    def _head(self) -> Head:
        """The teacher's output head alone."""
        shape = ModelShape.from_config(self.teacher.config)
        name = shape.embedding if shape.tied else HEAD
        weight_VD = read_named(self.teacher, shape, name)
        weight_VD = weight_VD.to(self.device, getattr(torch, self.settings.dtype))
        model = on_meta(self.teacher, weight_VD.dtype)
        model.get_output_embeddings().weight = nn.Parameter(weight_VD, requires_grad=False)
        return Head(model)

    def _save(self, file: Path, tensors: Tensors) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, tensors)


def _loaded(file: Path) -> Tensors:
    try:
        return load_tensors(file)
    except SafetensorError as error:
        raise HealError(f"{file} is damaged ({first_line(error)}); delete it") from error


@torch.inference_mode()
def _answered(
    model: Any,
    ids_NS: torch.Tensor,
    count: int,
    batch: BatchSize,
    progress: Progress,
    step: str,
) -> Tensors:
    """A teacher's answers to windows: `ids` and `logp` (N, T, K), `others` (N, T)."""
    head, found = Head(model), list[tuple[torch.Tensor, ...]]()
    narrow = torch.uint16 if len(head.weight) <= _SMALL_VOCABULARY else torch.int32
    at_once = tokens_at_once(len(head.weight))
    for _, given in outputs(model.get_decoder(), model.device, ids_NS, batch, progress, step):
        for hidden_PD in torch.split(given.last_hidden_state.flatten(0, 1), at_once):
            ids_PK, logp_PK, others_P = likeliest(head(hidden_PD), count)
            found.append((ids_PK.to(narrow).cpu(), logp_PK.half().cpu(), others_P.cpu()))
    size = ids_NS.shape[0], ids_NS.shape[1] - 1, -1
    ids, logp, others = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {"ids": ids.view(size), "logp": logp.view(size), "others": others.view(size[:2])}
