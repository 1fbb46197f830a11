"""A server's steady state: requests that arrive at a rate, and share their steps.

Requests come at random times, r a second, each with a prompt of P tokens and N new ones. A step has
all requests that decode, with d tokens of which y are kept (1 and 1, or more with speculative
decoding), and beside them prompts in chunks, up to C tokens in all (Agrawal et al., Sarathi-Serve,
arXiv 2403.02310; vLLM's max_num_batched_tokens). Where x requests come, and go, in a mean step:

    n = x (N-1) / y            requests decode, as each does for (N-1)/y steps (Little, "A Proof for
                               the Queuing Formula L = lambda W", Operations Research 9(3), 1961)
    k = ceil(P / (C - n d))    steps that a prompt takes, with P/k tokens in each
    f = min(1, k x)            is the share of steps that have chunks, of max(1, k x) prompts
    s = f s(n, chunks) + (1-f) s(n, none)    seconds of a step, and of drafting for it
    r = x / s                  which rises with x, but falls where k does a step up

Each chunk reads the weights anew, in a step with the decoding requests, and attends to its prompt
so far. A token takes s / y. The first one comes after what is left of the step that runs, the
prompts before, its own chunks, and the engine's time for a request. The prompts before are a queue
of one server with the same service S for each, that of a prompt in steps of C tokens: of
rho S / (2 (1 - rho)) seconds, where rho = r S (Pollaczek and Khinchine). The server saturates where
a step has C tokens, n d + P x, or n + k x requests are as many as the engine runs at a time, or
their cache, each in the mean of P + N/2 tokens, fills the memory: beyond that rate there is no
steady state. Of several x with the same rate the least is meant, which a server that fills comes to
first.

Lengths are all alike, nothing is preempted, and the host has as much to do for a step as for one of
a static batch. Compared with published runs were only those with as many requests at a time as an
engine takes (examples/calibrate.py); of a server at a rate there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptconvert.estimate.advice import WORTH
from ptconvert.estimate.alternatives import Stages, group_sizes, named
from ptconvert.estimate.compare import Candidate, Row, Setting
from ptconvert.estimate.model import draft_seconds, serving, several_tracked, step
from ptconvert.estimate.roofline import Pass, rank_bytes

_HALVINGS = 40


@dataclass(frozen=True)
class Load:
    """How many requests come in a second, and how many tokens and requests a step has at most."""

    rate: float
    chunk: int
    requests: float = math.inf


@dataclass(frozen=True)
class Steady:
    """A server at a rate below saturation: how many requests decode at a time, seconds to a
    request's first token and per further token, and all that it generates in a second."""

    running: float
    ttft: float
    tpot: float
    tokens_per_second: float


@dataclass(frozen=True)
class Server:
    """A way to serve a load: its steady state, None where it has none; the requests that it serves
    in a second at most, and what there is no more of then."""

    name: str
    steady: Steady | None
    most: float
    limit: str
    converts: bool = False

    @property
    def tpot(self) -> float:
        """Seconds per further token; without end where there is no steady state."""
        return self.steady.tpot if self.steady else math.inf

    def to_json(self) -> dict[str, Any]:
        """In SI units."""
        steady = self.steady
        return {
            "name": self.name,
            "most_requests_per_second": self.most,
            "limited_by": self.limit,
            "running": steady.running if steady else None,
            "ttft_seconds": steady.ttft if steady else None,
            "tpot_seconds": steady.tpot if steady else None,
            "tokens_per_second": steady.tokens_per_second if steady else None,
        }


@dataclass(frozen=True)
class Served:
    """What all of the ways do under a load."""

    load: Load
    servers: Sequence[Server]

    @property
    def fits(self) -> list[Server]:
        """Those that hold a request."""
        return [server for server in self.servers if server.most]

    @property
    def header(self) -> list[str]:
        """Of a table of them."""
        return ["server", "at most /s", "running", "TTFT ms", "TPOT ms", "tokens/s"]

    @property
    def body(self) -> list[list[str]]:
        """And its lines."""
        return [
            [
                *(server.name, f"{server.most:,.2f}"),
                *(
                    (f"{s.running:,.1f}", f"{s.ttft * 1e3:,.0f}", f"{s.tpot * 1e3:,.2f}")
                    if (s := server.steady)
                    else "---"
                ),
                f"{s.tokens_per_second:,.0f}" if s else "-",
            ]
            for server in self.fits
        ]

    @property
    def notes(self) -> list[str]:
        """Which have no steady state, in a line."""
        over = [server for server in self.fits if server.steady is None]
        said = (f"{x.name}, at most {x.most:,.2f} ({x.limit})" for x in over)
        if not self.fits:
            return ["No server here holds the weights and one request's cache."]
        if not over:
            return []
        return [
            f"At {self.load.rate:g} requests a second these saturate, and have no steady state: "
            f"{'; '.join(said)}."
        ]

    @property
    def title(self) -> str:
        """What the load is."""
        most = f"{self.load.chunk:,} tokens"
        if self.load.requests < math.inf:
            most += f" and {self.load.requests:,.0f} requests"
        return f"{self.load.rate:g} requests a second, {most} in a step at most"

    @property
    def verdict(self) -> str:
        """Convert for this load, or don't, in a sentence; nothing where no schedule, or nothing
        else, holds a request.

        A schedule is worth it by a token's time at this rate, or by what it serves at most where a
        token doesn't take as much longer, each against the best that leaves the model as it is.
        """
        ours, others = ([x for x in self.fits if x.converts is c] for c in (True, False))
        if not ours or not others:
            return ""
        most = max(others, key=lambda x: x.most)
        quick = min(others, key=lambda x: x.tpot)

        def sooner(x: Server) -> float:
            return 0.0 if x.tpot == quick.tpot else quick.tpot / x.tpot - 1

        def worth(x: Server) -> bool:
            more = x.most / most.most - 1
            return sooner(x) >= WORTH or (more >= WORTH and sooner(x) > -WORTH)

        best = max(ours, key=lambda x: (worth(x), sooner(x), x.most))
        found = (
            f"{best.name} serves {best.most:,.2f} requests a second at most, {most.name} "
            f"{most.most:,.2f}"
        )
        if best.steady and quick.steady:
            found += f"; a token takes {best.tpot * 1e3:,.2f} ms, with {quick.name} "
            found += f"{quick.tpot * 1e3:,.2f}"
        elif best.steady:
            found += ", and all that leaves the model as it is saturates"
        elif quick.steady:
            found += f"; {best.name} saturates, {quick.name} doesn't"
        say = "convert" if worth(best) else "don't convert"
        return f"As a server: {say}: {found}."

    def to_json(self) -> dict[str, Any]:
        """In SI units."""
        return {
            "requests_per_second": self.load.rate,
            "tokens_in_a_step": self.load.chunk,
            "requests_in_a_step": self.load.requests if self.load.requests < math.inf else None,
            "notes": self.notes,
            "verdict": self.verdict,
            "ways": [server.to_json() for server in self.servers],
        }


@dataclass(frozen=True)
class Machine:
    """What a server runs: the seconds of a pass, with what drafts for it, and the bytes on a rank
    for its weights and cache."""

    name: str
    seconds: Callable[[Pass], float]
    nbytes: Callable[[Pass], float]


def scheduled(candidate: Candidate, setting: Setting) -> Machine:
    """A candidate on all ranks of a setting."""
    s, c = setting, candidate
    engine = serving(s.engine, c.schedule, s.shape)
    tracked = several_tracked(c.schedule, s.ranks, c.tracks)

    def seconds(one: Pass) -> float:
        on = (s.shape, s.hardware, engine, s.ranks, one)
        ran = step(c.schedule, *on, tracks=c.tracks, guesses=c.guesses)
        return ran.seconds + draft_seconds(*on, s.workload.speculation)

    def nbytes(one: Pass) -> float:
        return rank_bytes(
            *(s.shape, engine, s.ranks, one, c.tracks, tracked, c.guesses),
            drafting=s.workload.speculation.layer,
        )

    return Machine(c.name, seconds, nbytes)


def piped(setting: Setting, group: int) -> Machine:
    """One of the crowds of a pipeline, of which each stage has another in hand."""
    stages = Stages(setting, group)

    def seconds(one: Pass) -> float:
        whole, slowest = stages.through(one, drafts=True)
        return max(whole, stages.count * slowest)

    def nbytes(one: Pass) -> float:
        return stages.nbytes(replace(one, sequences=stages.count * one.sequences))

    return Machine(named("pipeline", group, setting.ranks), seconds, nbytes)


def replica(setting: Setting, group: int) -> Machine:
    """One group of ranks with the whole model."""
    dense = Candidate(named("replicas", group, setting.ranks), setting.shape.dense, group)
    return scheduled(dense, replace(setting, ranks=group))


@dataclass(frozen=True)
class _Steps:
    """The steps of a server, by how many requests come in one."""

    machine: Machine
    setting: Setting
    chunk: int

    def decoding(self, x: float) -> float:
        """Requests that decode."""
        workload = self.setting.workload
        return x * (workload.new - 1) / workload.tokens_per_step

    def free(self, x: float) -> float:
        """Tokens that a step has for prompts."""
        return self.chunk - self.decoding(x) * self.setting.workload.decode.tokens

    def chunks(self, x: float) -> int:
        """Steps that a prompt takes."""
        return math.ceil(self.setting.workload.prompt / self.free(x))

    def jumps(self, below: float) -> list[float]:
        """The x below another after which a prompt takes a step more: free(x) = prompt / k."""
        workload = self.setting.workload
        each = self.decoding(1.0) * workload.decode.tokens
        if not each:
            return []
        counts = range(self.chunks(0.0), self.chunks(below))
        return [(self.chunk - workload.prompt / k) / each * (1 - 1e-12) for k in counts]

    def prefilling(self, x: float) -> float:
        """Prompts that have chunks in a mean step."""
        return self.chunks(x) * x

    def seconds(self, x: float, prompts: float) -> float:
        """Of a step with chunks of so many prompts, beside at least one request that decodes."""
        workload = self.setting.workload
        tokens, own = workload.prompt / self.chunks(x), max(1.0, self.decoding(x))
        before = (workload.prompt - tokens) / 2  # in the mean over a prompt's chunks
        chunk = Pass(prompts, tokens, before, workload.decode.allocated)
        one = replace(workload.decode, sequences=own, beside=chunk if prompts else None)
        return self.machine.seconds(one)

    def mean(self, x: float) -> float:
        """Seconds of a mean step."""
        prompts = self.prefilling(x)
        share = min(1.0, prompts)
        with_chunks = share * self.seconds(x, max(1.0, prompts))
        return with_chunks + ((1 - share) * self.seconds(x, 0) if share < 1 else 0.0)

    def steady(self, x: float) -> Steady:
        """The state in which so many requests come in a step."""
        s, workload = self.setting, self.setting.workload
        mean, prompts, chunks = self.mean(x), self.prefilling(x), self.chunks(x)
        rate, running = x / mean, self.decoding(x)
        full = self.free(x) * chunks / workload.prompt  # prompts in a step of as much as it takes
        service = workload.prompt / self.free(x) * self.seconds(x, full)
        load = rate * service
        waited = min(1.0, running + prompts) * mean / 2 + load * service / (2 * (1 - load))
        own = chunks * self.seconds(x, max(1.0, prompts))
        ttft = waited + own + s.engine.arrival(workload.prompt)
        tpot = mean / workload.tokens_per_step
        return Steady(running, ttft, tpot, rate * workload.new)


def servers(rows: Sequence[Row], setting: Setting, load: Load) -> list[Server]:
    """What each row's server does under a load, and pipelines and replicas that share it: of the
    sizes that their groups may have the one that serves most, and that with the quickest tokens. A
    pipeline is one engine, which shares its requests among the crowds; each replica has its own.
    """
    found = [
        replace(
            serve(scheduled(row.candidate, setting), setting, load), converts=row is not rows[0]
        )
        for row in rows
    ]
    for way, one_engine in ((piped, True), (replica, False)):
        tried = []
        for group in group_sizes(setting):
            count = setting.ranks // group
            limited = replace(load, requests=load.requests / count) if one_engine else load
            tried.append(_together(way(setting, group), setting, limited, count))
        if tried:
            best = max(tried, key=lambda x: x.most), min(tried, key=lambda x: (x.tpot, -x.most))
            found += dict.fromkeys(best)
    return found


def _together(machine: Machine, setting: Setting, load: Load, count: int) -> Server:
    """So many of a server that share a load."""
    one = serve(machine, setting, replace(load, rate=load.rate / count))
    steady = one.steady and replace(
        one.steady,
        running=one.steady.running * count,
        tokens_per_second=one.steady.tokens_per_second * count,
    )
    return replace(one, steady=steady, most=one.most * count)


def serve(machine: Machine, setting: Setting, load: Load) -> Server:
    """What one server does under a load."""
    steps, workload = _Steps(machine, setting, load.chunk), setting.workload
    mean_cache = replace(workload.decode, allocated=workload.prompt + workload.new // 2)

    def held(requests: float) -> float:
        return machine.nbytes(replace(mean_cache, sequences=requests))

    weights, memory = held(0), setting.hardware.device.memory_gb * 1e9
    room = (memory - weights) / (held(1) - weights)  # requests

    def in_step(x: float) -> bool:
        return steps.free(x) > workload.prompt * x

    def in_memory(x: float) -> bool:
        return steps.decoding(x) + steps.prefilling(x) <= room

    def in_engine(x: float) -> bool:
        return steps.decoding(x) + steps.prefilling(x) <= load.requests

    most, limit = _largest(in_step, load.chunk / workload.prompt), "full steps"
    for holds, fuller in ((in_memory, "full memory"), (in_engine, "requests at a time")):
        if (fewer := _largest(holds, most)) < most:
            most, limit = fewer, fuller
    most = most if room >= 1 else 0.0
    if not most:
        return Server(machine.name, None, 0.0, limit)
    ends = [*steps.jumps(most), most]
    top = max(x / steps.mean(x) for x in ends)
    if load.rate >= top:
        return Server(machine.name, None, top, limit)
    end = next(x for x in ends if x / steps.mean(x) > load.rate)
    # below this end the rate is reached once, as it falls only after the ends before
    x = _largest(lambda x: x / steps.mean(x) <= load.rate, end)
    return Server(machine.name, steps.steady(x), top, limit)


def _largest(holds: Callable[[float], bool], below: float) -> float:
    """The largest number below another up to which a condition holds, 0 where it does for none; it
    must hold for no number above one for which it doesn't."""
    if holds(below):
        return below
    least, most = 0.0, below
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return least
