"""Other ways to serve the unconverted model on the same devices: pipeline stages, and replicas, of
one device each or of groups that are tensor parallel within.

With R ranks in D = R/g groups of g, and n requests at once, m = ceil(n/D) requests go together, in
k = ceil(n/m) crowds. Of one group that holds the whole model, T(m) is a pass's time for m requests,
of which H(m) are the embeddings, lm_head and the host.

    replicas   each crowd has a group of its own, with the whole model. Its TTFT and TPOT are that
               group's; the tokens per second are those of all n.
    pipeline   group i holds the i-th of D shares of the L layers, the last one lm_head too:
               pass     P = T(m) + the stream's transfers to the D-1 next groups, m x tokens x
                        width numbers each, and the chosen tokens' way back, 4 bytes a request
               slowest  S = max(ceil(L/D) (T-H)/L, floor(L/D) (T-H)/L + H)
               TTFT     = P + (k-1) S in a prefill, and the engine's time per request
               TPOT     = max(P, k S) in a decode step: a crowd's next token waits for its last one;
                        over the tokens that a step gives, with speculative decoding, where the
                        last group drafts, too
               tokens/s = n x new / (TTFT + (new-1) TPOT)

A transfer takes a fixed time, one step and its bytes over the bandwidth (`point_to_point`), from
each rank to its like. Prompts go through whole: an engine that cuts them into chunks has a shorter
TTFT in a pipeline. Nobody's published runs were compared with either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ptconvert.estimate.collective import point_to_point
from ptconvert.estimate.compare import Setting, dividing
from ptconvert.estimate.hardware import Engine
from ptconvert.estimate.model import (
    Estimate,
    draft_seconds,
    estimate,
    serving,
    step,
    vocabulary_seconds,
)
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


def group_sizes(setting: Setting) -> list[int]:
    """How many ranks a group may have, so that there are several alike: tensor parallel groups of a
    size that divides the model, none of which lies across what joins others."""
    ranks, joined = setting.ranks, [link.ranks for link in setting.hardware.links]
    return [
        g
        for g in dividing(ranks - 1, setting.shape, ())
        if ranks % g == 0 and all(n % g == 0 or g % n == 0 for n in joined)
    ]


def replicas(setting: Setting, group: int = 1) -> Served:
    """The whole model on each group of ranks, the requests shared out."""
    s, together = setting, _together(setting, group)
    workload = replace(s.workload, batch=together)
    one = Served.of(estimate(s.shape.dense, s.shape, s.hardware, s.engine, group, workload))
    whole = one.tokens_per_second * s.workload.batch / together
    return replace(one, tokens_per_second=whole)


def pipeline(setting: Setting, group: int = 1) -> Served:
    """A share of the layers on each group of ranks, which the requests go through one after
    another."""
    s, together, stages = setting, _together(setting, group), Stages(setting, group)
    workload, crowds = replace(s.workload, batch=together), math.ceil(s.workload.batch / together)
    first, first_slowest = stages.through(workload.prefill)
    token, token_slowest = stages.through(workload.decode, drafts=True)
    ttft = first + (crowds - 1) * first_slowest + s.engine.arrival(workload.prompt)
    tpot = max(token, crowds * token_slowest) / workload.tokens_per_step
    whole = ttft + (workload.new - 1) * tpot
    held = stages.nbytes(s.workload.decode)
    return Served(ttft, tpot, s.workload.batch * workload.new / whole, held)


ALTERNATIVES: dict[str, Callable[[Setting, int], Served]] = {
    f.__name__: f for f in (pipeline, replicas)
}


def named(kind: str, group: int, ranks: int) -> str:
    """An alternative's name: with groups of several ranks, how many there are of how many."""
    return kind if group == 1 else f"{kind} {ranks // group}x{group}"


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline, one on each group of so many ranks."""

    setting: Setting
    group: int = 1

    @property
    def count(self) -> int:
        """How many there are."""
        return self.setting.ranks // self.group

    @property
    def engine(self) -> Engine:
        """The setting's, as it serves the model in a pipeline."""
        s = self.setting
        # vLLM: fused norms are broken with pipelines
        return replace(serving(s.engine, s.shape.dense, s.shape), fused_norm="none")

    def through(self, one: Pass, drafts: bool = False) -> tuple[float, float]:
        """Seconds of a pass through all stages, and those that its slowest stage computes, where
        the last one also drafts what a decode step verifies, if so."""
        s, layers, engine = self.setting, self.setting.shape.layers, self.engine
        on = (s.shape, s.hardware, engine, self.group, one)
        whole = step(s.shape.dense, *on).seconds
        head = head_seconds(s.shape, s.hardware.device, engine, self.group, one)
        head += vocabulary_seconds(*on)
        more = draft_seconds(*on, s.workload.speculation) if drafts else 0.0
        layer = (whole - head) / layers
        most, least = math.ceil(layers / self.count), layers // self.count
        slowest = max(most * layer, least * layer + head + more)
        stream, links = one.total * s.shape.bytes_per_token, s.hardware.links
        places = range(0, s.ranks, self.group)
        sent = sum(point_to_point(stream, i, i + self.group, links).seconds for i in places[:-1])
        back = point_to_point(4 * one.sequences, places[-1], 0, links).seconds
        return whole + more + sent + back, slowest

    def nbytes(self, one: Pass) -> float:
        """Bytes of weights and KV cache that a rank of the fullest stage holds."""
        s = self.setting
        # Of embeddings and lm_head a stage holds one: what a model holds that ties them.
        kinds, count = s.shape.kinds, math.ceil(s.shape.layers / self.count)
        stages = {kinds[i : i + count] for i in range(0, len(kinds), count)}
        return max(
            rank_bytes(
                *(replace(s.shape, kinds=stage, tied=True), self.engine, self.group, one),
                drafting=s.workload.speculation.layer,
            )
            for stage in stages
        )


def _together(setting: Setting, group: int) -> int:
    return math.ceil(setting.workload.batch * group / setting.ranks)
