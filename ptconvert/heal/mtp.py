"""Healing a head for further tokens (MTP), after the model that it drafts for.

A conversion changes the last hidden states that the head reads, and the choices that it is to
foresee: it learns those of the healed model itself, KL(model's next || head's) at each token, and
the model stays as it is. Shapes: B windows, T tokens in each, D residual stream width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from ptconvert.runtime.mtp import MTPHead


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
        with self.accelerator.autocast():
            with torch.no_grad():
                given = self.teacher.get_decoder()(input_ids=ids_BS[:, :-1], use_cache=False)
            drafted_BTD, hidden_BTD, target_BT = _drafted(
                model, self.teacher, given.last_hidden_state, ids_BS
            )
            logits_BTV = self.head(drafted_BTD)
        return compare(logits_BTV, hidden_BTD, self.head, target_BT)


def _drafted(
    head: Any, model: Any, hidden_BTD: torch.Tensor, ids_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From a model's last hidden states of all tokens but the last, (B, T, D) and (B, T + 1): those
    that its head has for the tokens after the second, those that the model has for them, both
    (B, T - 1, D), and these tokens."""
    with torch.no_grad():
        next_BTD = model.get_input_embeddings()(ids_BS[:, 1:-1])
    return head(hidden_BTD[:, :-1], next_BTD), hidden_BTD[:, 1:], ids_BS[:, 2:]


def heal_head(
    head: MTPHead,
    model: Any,
    data: Data,
    settings: Settings,
    work: Path,
    progress: Report,
    say: Callable[[str], None],
) -> Tensors:
    """Trains all of a head's parameters, in fp32; returns those of the best state, none where the
    head as it came was best. Goes on from the last state that it finds in `work`. Raises
    HealError."""
    names = [name for name, _ in head.named_parameters()]
    own = settings.of_head
    return distill(head, model, names, data, own, work, progress, say, by=HeadDistillation)


@torch.inference_mode()
def measured_head(
    head: MTPHead,
    model: Any,
    ids_NS: torch.Tensor,
    batch: BatchSize,
    progress: Progress,
    name: str,
) -> Measured:
    """The head's loss of the text, and its KL from what the model says of the same tokens once it
    has come to them."""
    lm_head, found = Head(model), list[torch.Tensor]()
    decoder, device = model.get_decoder(), model.device
    for rows, given in outputs(decoder, device, ids_NS, batch, progress, f"head: {name}"):
        ids_BS = ids_NS[rows].to(device)
        drafted_BTD, hidden_BTD, target_BT = _drafted(head, model, given.last_hidden_state, ids_BS)
        pair = by_token(loss_and_kl, lm_head, hidden_BTD, lm_head, drafted_BTD, target_BT)
        found.append(torch.stack(pair).flatten(1).cpu().double())
    loss, kl = torch.cat(found, dim=1).mean(1).tolist()
    return Measured(name, loss, kl)
