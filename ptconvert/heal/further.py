"""Healing a head for further tokens (MTP), after the model that it drafts for.

A conversion changes the last hidden states that the head reads, and the choices that it is to
foresee: it learns those of the healed model itself, KL(model's next || head's) at each token, and
the model stays as it is. Shapes: B windows, T tokens in each, D residual stream width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptconvert.heal.data import Data
from ptconvert.heal.distill import Distillation, Report, distill
from ptconvert.heal.loss import Losses, compare
from ptconvert.heal.report import Measured
from ptconvert.heal.settings import Settings
from ptconvert.heal.work import Tensors
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.divergence import by_token, loss_and_kl, outputs
from ptconvert.measure.head import Head
from ptconvert.measure.progress import Progress
from ptconvert.runtime.further_tokens import FurtherTokens


class HeadDistillation(Distillation):
    """A Trainer of a head, whose teacher is the model that it drafts for."""

    def _compare(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        with_kl: bool,  # noqa: ARG002
    ) -> Losses:
        """The head's loss and its KL from the model's next choice, both (B, T - 1)."""
        ids_BS = inputs["input_ids"]
        with torch.no_grad(), self.accelerator.autocast():
            decoder, embed = self.teacher.get_decoder(), self.teacher.get_input_embeddings()
            hidden_BTD = decoder(input_ids=ids_BS[:, :-1], use_cache=False).last_hidden_state
            next_BTD = embed(ids_BS[:, 1:-1])
        own_BTD = model(hidden_BTD[:, :-1], next_BTD)
        return compare(self.head(own_BTD), hidden_BTD[:, 1:], self.head, ids_BS[:, 2:])


def heal_head(
    head: FurtherTokens,
    model: Any,
    data: Data,
    settings: Settings,
    work: Path,
    progress: Report,
    say: Any,
) -> Tensors:
    """Trains all of a head's parameters, in fp32; returns those of the best state, none where the
    head as it came was best. Goes on from the last state that it finds in `work`. Raises
    HealError."""
    own = replace(settings, lora=None, top_k=None, gradient_checkpointing=False, stop_on="kl")
    names = [name for name, _ in head.named_parameters()]
    return distill(head, model, names, data, own, work, progress, say, by=HeadDistillation)


@torch.inference_mode()
def measured_head(
    head: FurtherTokens,
    model: Any,
    ids_NS: torch.Tensor,
    batch: BatchSize,
    progress: Progress,
    name: str,
) -> Measured:
    """The head's loss of the text, and its KL from what the model says of the same tokens once it
    has come to them."""
    lm_head, embed, found = Head(model), model.get_input_embeddings(), list[torch.Tensor]()
    decoder, device = model.get_decoder(), model.device
    for rows, given in outputs(decoder, device, ids_NS, batch, progress, f"head: {name}"):
        hidden_BTD, ids_BS = given.last_hidden_state, ids_NS[rows].to(device)
        own_BTD = head(hidden_BTD[:, :-1], embed(ids_BS[:, 1:-1]))
        pair = by_token(loss_and_kl, lm_head, hidden_BTD[:, 1:], lm_head, own_BTD, ids_BS[:, 2:])
        found.append(torch.stack(pair).flatten(1).cpu().double())
    loss, kl = torch.cat(found, dim=1).mean(1).tolist()
    return Measured(name, loss, kl)
