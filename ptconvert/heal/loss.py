"""How far a model is from its teacher at each token, in fp32.

Piece by piece, and computed again in the backward pass, so that no second set of logits is ever in
memory. Shapes: B windows, T tokens in each, V vocabulary, D residual stream width, P tokens in a
piece, K likeliest tokens, J = K + 1 outcomes: these, and that it is any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ptconvert.measure.divergence import LOGITS_AT_ONCE

_NEVER = -1e4  # a logit in place of those left out: finite, so that 0 times it is 0
Losses = tuple[torch.Tensor, torch.Tensor]  # the model's loss and its KL from the teacher, (B, T)


def compare(
    logits_BTV: torch.Tensor,
    hidden_BTD: torch.Tensor,
    head: nn.Module,
    target_BT: torch.Tensor,
) -> Losses:
    """The loss of a model's logits, and KL(teacher || model), at each token.

    The teacher comes as its final hidden states and output head.
    """

    def piece(logits_PV: torch.Tensor, target_P: torch.Tensor, hidden_PD: torch.Tensor) -> Losses:
        with torch.no_grad():
            weight_VD: Any = head.weight
            logp_PV = functional.linear(hidden_PD.to(weight_VD.dtype), weight_VD).float()
            logp_PV = logp_PV.log_softmax(-1)
        logq_PV = logits_PV.float().log_softmax(-1)
        kl_P = functional.kl_div(logq_PV, logp_PV, reduction="none", log_target=True).sum(-1)
        return functional.nll_loss(logq_PV, target_P, reduction="none"), kl_P

    return _by_piece(piece, logits_BTV, target_BT, hidden_BTD)


def compare_likeliest(
    logits_BTV: torch.Tensor,
    ids_BTK: torch.Tensor,
    logp_BTK: torch.Tensor,
    others_BT: torch.Tensor,
    target_BT: torch.Tensor,
) -> Losses:
    """The loss of a model's logits, and KL(teacher || model) over K + 1 outcomes, at each token.

    The outcomes are the teacher's K likeliest tokens, with their log-probabilities, and that it is
    any other token, with the log of what is left. Lumping the others together can't make two
    distributions differ more (the data-processing inequality), so this is at most the whole KL; it
    is the whole where K is the vocabulary. The model's share of the others is summed, not what its
    K leave of 1, and the teacher's K + 1, rounded where they were kept, are made to sum to 1 again.
    """

    def piece(
        logits_PV: torch.Tensor,
        target_P: torch.Tensor,
        ids_PK: torch.Tensor,
        logp_PK: torch.Tensor,
        others_P: torch.Tensor,
    ) -> Losses:
        with torch.no_grad():
            logp_PJ = torch.cat([logp_PK.float(), others_P[:, None].float()], 1).log_softmax(-1)
        logits_PV = logits_PV.float()
        whole_P1 = logits_PV.logsumexp(-1, keepdim=True)
        rest_P1 = logits_PV.scatter(-1, ids_PK, _NEVER).logsumexp(-1, keepdim=True)
        logq_PJ = torch.cat([logits_PV.gather(-1, ids_PK), rest_P1], 1) - whole_P1
        kl_P = functional.kl_div(logq_PJ, logp_PJ, reduction="none", log_target=True).sum(-1)
        return (whole_P1 - logits_PV.gather(-1, target_P[:, None])).squeeze(-1), kl_P

    return _by_piece(piece, logits_BTV, target_BT, ids_BTK, logp_BTK, others_BT)


def likeliest(
    logits_PV: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids of the likeliest tokens and their log-probabilities, both (P, K), and the log of what all
    others have together, (P,); _NEVER or so where there are none."""
    logits_PV = logits_PV.float()
    whole_P1 = logits_PV.logsumexp(-1, keepdim=True)
    top_PK, ids_PK = logits_PV.topk(count)
    others_P = logits_PV.scatter(-1, ids_PK, _NEVER).logsumexp(-1)
    return ids_PK, top_PK - whole_P1, others_P - whole_P1.squeeze(-1)


def _by_piece(
    piece: Callable[..., Losses],
    logits_BTV: torch.Tensor,
    target_BT: torch.Tensor,
    *taught: torch.Tensor,
) -> Losses:
    at_once = max(1, LOGITS_AT_ONCE // logits_BTV.shape[-1])
    parts = (torch.split(t.flatten(0, 1), at_once) for t in (logits_BTV, target_BT, *taught))
    found = [checkpoint(piece, *part, use_reentrant=False) for part in zip(*parts, strict=True)]
    loss_P, kl_P = (torch.cat(values) for values in zip(*found, strict=True))
    return loss_P.view(target_BT.shape), kl_P.view(target_BT.shape)
