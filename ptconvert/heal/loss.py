"""How far a model is from its teacher at each token, in fp32.

Piece by piece, and computed again in the backward pass, so that no second set of logits is ever in
memory. Shapes: B windows, T tokens in each, V vocabulary, D residual stream width, P tokens in a
piece, K likeliest tokens, J = K + 1 outcomes: these, and that it is any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ptconvert.measure.divergence import by_token, in_pieces, loss_and_kl

_NEVER = -1e4  # a logit in place of those left out: finite, so that 0 times it is 0
Losses = tuple[torch.Tensor, torch.Tensor]  # the model's loss and its KL from the teacher, (B, T)


def compare(
    logits_BTV: torch.Tensor,
    hidden_BTD: torch.Tensor,
    head: Any,
    target_BT: torch.Tensor,
) -> Losses:
    """The loss of a model's logits, and KL(teacher || model), at each token.

    The teacher comes as its final hidden states and output head.
    """

    loss_BT, kl_BT = by_token(
        loss_and_kl, head, hidden_BTD.to(head.weight.dtype), nn.Identity(), logits_BTV, target_BT
    )
    return loss_BT, kl_BT


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

    given = logits_BTV, target_BT, ids_BTK, logp_BTK, others_BT
    loss_BT, kl_BT = in_pieces(piece, logits_BTV.shape[-1], *given)
    return loss_BT, kl_BT


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
