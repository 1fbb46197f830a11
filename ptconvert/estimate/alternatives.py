"""Other ways to serve the unconverted model on the same devices: pipeline stages, and replicas.

With R ranks and n requests at once, m = ceil(n/R) requests go together, in k = ceil(n/m) groups. Of
one device that holds the whole model, T(m) is a pass's time for m requests, of which H(m) are the
embeddings, lm_head and the host.

    replicas   each group has a device of its own, with the whole model. Its TTFT and TPOT are that
               device's; the tokens per second are those of all n.
    pipeline   device i holds the i-th of R shares of the L layers, the last one lm_head too:
               pass     P = T(m) + the stream's transfers to the R-1 next devices, m x tokens x
                        width numbers each, and the chosen tokens' way back, 4 bytes a request
               slowest  S = max(ceil(L/R) (T-H)/L, floor(L/R) (T-H)/L + H)
               TTFT     = P + (k-1) S in a prefill, and the engine's time per request
               TPOT     = max(P, k S) in a decode step: a group's next token waits for its last one;
                        over the tokens that a step gives, with speculative decoding, where the
                        last device drafts, too
               tokens/s = n x new / (TTFT + (new-1) TPOT)

A transfer takes a fixed time, one step and its bytes over the bandwidth (`point_to_point`). Prompts
go through whole: an engine that cuts them into chunks has a shorter TTFT in a pipeline. Nobody's
published runs were compared with either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ptconvert.estimate.collective import point_to_point
from ptconvert.estimate.compare import Setting
from ptconvert.estimate.model import Estimate, draft_seconds, estimate, step
from ptconvert.estimate.roofline import Pass, head_seconds, rank_bytes


@dataclass(frozen=True)
class Served:
    """A workload's times in seconds, its tokens per second, and the bytes that a rank holds."""

    ttft: float
    tpot: float
    tokens_per_second: float
    memory: float

    @staticmethod
    def of(found: Estimate) -> Served:
        """What a schedule's estimate says."""
        return Served(found.ttft, found.tpot, found.tokens_per_second, found.memory)


def replicas(setting: Setting) -> Served:
    """The whole model on each rank, the requests shared out."""
    s, together = setting, _together(setting)
    workload = replace(s.workload, batch=together)
    one = Served.of(estimate(s.shape.dense, s.shape, s.hardware, s.engine, 1, workload))
    whole = one.tokens_per_second * s.workload.batch / together
    return replace(one, tokens_per_second=whole)


def pipeline(setting: Setting) -> Served:
    """A share of the layers on each rank, which the requests go through one after another."""
    s, together = setting, _together(setting)
    workload, groups = replace(s.workload, batch=together), math.ceil(s.workload.batch / together)
    drafting = draft_seconds(
        *(s.shape, s.hardware, s.engine, 1, workload.decode, workload.speculation)
    )
    first, first_slowest = _through(setting, workload.prefill)
    token, token_slowest = _through(setting, workload.decode, drafting)
    ttft = first + (groups - 1) * first_slowest + s.engine.arrival(workload.prompt)
    tpot = max(token, groups * token_slowest) / workload.tokens_per_step
    whole = ttft + (workload.new - 1) * tpot
    # Of embeddings and lm_head a stage holds one: what a model holds that ties them.
    kinds, count = s.shape.kinds, math.ceil(s.shape.layers / s.ranks)
    stages = {kinds[i : i + count] for i in range(0, len(kinds), count)}
    held = max(
        rank_bytes(
            *(replace(s.shape, kinds=stage, tied=True), s.engine, 1, s.workload.decode),
            drafting=s.workload.speculation.layer,
        )
        for stage in stages
    )
    return Served(ttft, tpot, s.workload.batch * workload.new / whole, held)


ALTERNATIVES: dict[str, Callable[[Setting], Served]] = {f.__name__: f for f in (pipeline, replicas)}


def _together(setting: Setting) -> int:
    return math.ceil(setting.workload.batch / setting.ranks)


def _through(setting: Setting, one: Pass, more: float = 0.0) -> tuple[float, float]:
    """Seconds of a pass through all stages, and those that its slowest stage computes, where the
    last one has so many `more`."""
    s, layers = setting, setting.shape.layers
    whole = step(s.shape.dense, s.shape, s.hardware, s.engine, 1, one).seconds
    head = head_seconds(s.shape, s.hardware.device, s.engine, 1, one)
    layer = (whole - head) / layers
    slowest = max(math.ceil(layers / s.ranks) * layer, layers // s.ranks * layer + head + more)
    stream, links = one.total * s.shape.bytes_per_token, s.hardware.links
    sent = sum(point_to_point(stream, i, i + 1, links).seconds for i in range(s.ranks - 1))
    back = point_to_point(4 * one.sequences, s.ranks - 1, 0, links).seconds
    return whole + more + sent + back, slowest
