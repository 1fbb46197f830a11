"""What verify checks of any serving engine: counted passes and answers, against the schedule."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ptconvert.models.shape import ModelShape
from ptconvert.runtime.by_layer import opened_by_layer
from ptconvert.runtime.counters import ALL_REDUCE
from ptconvert.schedule.schedule import Schedule
from ptconvert.shorten import counted
from ptconvert.verify.run import NOISE_FACTOR, Check, Settings
from ptconvert.verify.session import first_choices, furthest

TOLERANCE = 1e-3  # of a log-probability, in float32
Answers = list[tuple[list[int], list[float]]]  # of each prompt: tokens, log-probabilities
# Of each forward pass on a rank, in JSON types: its tokens, and its collectives as counters'.
Passes = list[dict[str, Any]]


def _single_process(
    path: Path, ids_BS: torch.Tensor, answers: Answers, dtype: torch.dtype
) -> Answers:
    """What the single-process model, a layer of it at a time, says after each prompt and the answer
    that the engine gave so far: its first choice, and the log-probability of the engine's."""
    answers_BN = torch.tensor([tokens for tokens, _ in answers])
    whole = torch.cat([ids_BS, answers_BN[:, :-1]], dim=1)
    model = opened_by_layer(path, dtype, "cpu")
    with torch.inference_mode():
        logits_BNV = model(whole).logits[:, ids_BS.shape[1] - 1 :]
    log_BNV = logits_BNV.float().log_softmax(-1)
    chosen_BN = log_BNV.gather(2, answers_BN[:, :, None])[:, :, 0]
    return list(zip(first_choices(log_BNV).tolist(), chosen_BN.tolist(), strict=True))


def count_checks(
    by_rank: list[Passes], schedule: Schedule, shape: ModelShape, new_tokens: int
) -> list[Check]:
    """Each pass's all-reduces on each rank, against the schedule of a model of this shape: one
    prefill, then decoding."""
    ranks = len(by_rank)
    overlapped = sum(step.overlapped for step in schedule.program)
    promised = {True: overlapped, False: schedule.counts.all_reduces - overlapped}
    carried = [shape.payloads(count) for count in schedule.carried if count]
    apart = [(streams,) if shape.norms_sums else () for streams in carried]
    checks = []
    for name, part in (("prefill", slice(0, 1)), ("decode", slice(1, None))):
        wrong = [
            f"rank {rank}, pass {number}: {departure}"
            for rank, passes in enumerate(by_rank)
            for number, one in enumerate(passes[part], 1)
            if (
                departure := _departure(
                    one, promised, [(*k, one["tokens"], shape.width) for k in apart], ranks
                )
            )
        ]
        seen = {len(passes[part]) for passes in by_rank}
        wanted = 1 if name == "prefill" else new_tokens - 1
        if seen != {wanted}:
            wrong.append(f"{sorted(seen)} passes, not {wanted}")
        said = (
            f"{promised[False]} blocking, {promised[True]} asynchronous; "
            f"{counted(wanted, 'pass', 'passes')}, {counted(ranks, 'rank')}"
        )
        checks.append(Check(f"all-reduces in {name}", not wrong, wrong[0] if wrong else said))
    return checks


def _departure(
    one: dict[str, Any], promised: dict[bool, int], sizes: list[tuple[int, ...]], ranks: int
) -> str | None:
    """How a pass's all-reduces part from those promised, and from their sizes; one rank alone sends
    nothing."""
    reduces = [c for c in one["collectives"] if c["op"] == ALL_REDUCE]
    for asynchronous, kind in ((False, "blocking"), (True, "asynchronous")):
        seen = sum(c["asynchronous"] is asynchronous for c in reduces)
        wanted = promised[asynchronous] if ranks > 1 else 0
        if seen != wanted:
            return f"{seen} {kind} all-reduces, the schedule has {wanted}"
    shapes = sorted(tuple(c["shape"]) for c in reduces)
    if ranks > 1 and shapes != sorted(sizes):
        return f"all-reduced {sorted({*shapes})}, the schedule {sorted({*sizes})}"
    return None


def answer_checks(
    path: Path, shape: ModelShape, ids_BS: torch.Tensor, answers: Answers, dtype: str
) -> list[Check]:
    """Greedy tokens and their log-probabilities against the single-process model's; in 16 bits
    log-probabilities alone, as rounding chooses other tokens where two are near each other."""
    if any(width.product for width in shape.widths.values()):
        return []  # activations are quantised, which the single-process model leaves as they are
    if shape.widths and dtype != "float32":
        return []  # kernels for quantised weights round more than 16 bits do
    reference = _single_process(path, ids_BS, answers, getattr(torch, dtype))
    # where tokens part, too: near 0 there, it was a tie that rounding decided
    largest = _apart(answers, reference)
    said, checks, allowed = f"largest difference {largest:.2g}, allowed ", [], TOLERANCE
    if dtype == "float32":
        said += f"{allowed:g}"
        pairs = zip(answers, reference, strict=True)
        same = sum(ours == theirs for (ours, _), (theirs, _) in pairs)
        seen = f"{same} of {len(reference)} prompts as the single-process model"
        checks.append(Check("greedy tokens", same == len(reference), seen))
    else:
        exact = _single_process(path, ids_BS, answers, torch.float32)
        allowed = NOISE_FACTOR * _apart(reference, exact)
        said += f"{allowed:.2g} ({NOISE_FACTOR:g} times what one process differs from fp32)"
    return [*checks, Check("their log-probabilities", largest <= allowed, said)]


def _apart(ours: Answers, theirs: Answers) -> float:
    """The largest difference between log-probabilities."""
    return furthest(*(torch.tensor([logs for _, logs in each]) for each in (ours, theirs)))


def figures_of(
    engine: str,
    mode: str,
    schedule: Schedule,
    settings: Settings,
    dtype: str,
    by_rank: list[Passes],
) -> dict[str, Any]:
    """What a report has beside its checks."""
    return {
        "engine": engine,
        "mode": mode,
        "schedule": str(schedule),
        "ranks": len(by_rank),
        "dtype": dtype,
        "batch": settings.batch,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "other_communication": other_collectives(by_rank[0]),
        "seen_by_rank": by_rank,
    }


def other_collectives(passes: Passes) -> dict[str, int]:
    """Collectives other than all-reduces, by name, on one rank: the gathering of logits."""
    names = (c["op"] for one in passes for c in one["collectives"])
    return dict(Counter(name for name in names if name != ALL_REDUCE))
