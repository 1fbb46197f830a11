"""Schedules side by side on one setting, against tensor parallelism: rows for people and machines.

Speed-up is tensor parallelism's time over the schedule's, on the same ranks and workload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ptconvert.errors import ConfigError
from ptconvert.estimate.hardware import Engine, Hardware, Link
from ptconvert.estimate.model import Estimate, Workload, estimate
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import tensor_parallel
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer
from ptconvert.spec.terms import wrong_ranks

BASELINE = tensor_parallel.__name__
UNCHECKED = "there are no published runs to check this hardware against"
# The tests compute the figures here from the published rows.
LIMITS = (
    "Without --rate a batch is static, its prefill one pass; with it all requests are as long, and "
    "no published run of a server at a rate was compared. How many drafted tokens are accepted is "
    "taken as said. Published throughput of servers with 256 requests at a time is 9% off on "
    "average, up to 31%, and with prompts of up to 2048 and 4096 new tokens Parallel Track gains "
    "nothing there where 4 to 7% are estimated.",
    "Sliding windows, quantised weights and mixtures of experts were not checked against published "
    "runs; a layer with a window is taken to keep no more cache than that. Prompts of 63,000 "
    "tokens under TensorRT-LLM take 80% of what is estimated.",
    "Overlap at batch 16 and beyond with peer-to-peer off is overestimated: ladder on 8 ranks "
    "gains 28 to 35% where 35 to 57% are estimated.",
    "Speed-ups on two nodes over InfiniBand are 2% off on average, most of them too low, by up to "
    "4%: the network's latencies are constants of NCCL's and not measured on such nodes.",
    "The host's times of vllm are what one-GPU runs of others leave; those of tensorrt-llm and "
    "vllm-parallel-track-paper are of the versions that the paper ran. The smaller they are, the "
    "more a schedule gains.",
    "Pipeline stages and replicas are the same roofline, and there are no published runs to check "
    "them against. In a pipeline prompts go through whole; cut into chunks they would be faster.",
    "Every rank is equally fast, and nothing else uses the links. The numbers of hardware other "
    "than H100 SXM are from data sheets and others' measurements, or assumed, as each answer says; "
    "--measure replaces them.",
)


@dataclass(frozen=True)
class Candidate:
    """A schedule to estimate, and the checkpoint that it runs on: its tracks, and the ranks of
    their guesses by sublayer. `about` says what it is, where its name doesn't, and `kl` what it
    costs in nats per token, where a plan has measured that. `unserved` says why the engine wouldn't
    serve it on the setting's ranks, as far as is known. `lora`: whether one lies beside its
    weights, which isn't counted."""

    name: str
    schedule: Schedule
    tracks: int
    guesses: Mapping[Sublayer, int] = field(default_factory=dict)
    about: str = ""
    kl: float | None = None
    unserved: tuple[str, ...] = ()
    lora: bool = False


@dataclass(frozen=True)
class Setting:
    """What everything is estimated for."""

    shape: ModelShape
    hardware: Hardware
    engine: Engine
    engine_name: str
    ranks: int
    workload: Workload


@dataclass(frozen=True)
class Row:
    """A candidate's estimate, and tensor parallelism's in the same setting."""

    candidate: Candidate
    estimate: Estimate
    baseline: Estimate

    @property
    def speed_up(self) -> float:
        """In tokens per second."""
        return self.estimate.tokens_per_second / self.baseline.tokens_per_second

    def to_json(self) -> dict[str, Any]:
        """Everything in SI units."""
        e, counts = self.estimate, self.candidate.schedule.counts
        return {
            "name": self.candidate.name,
            "schedule": str(self.candidate.schedule),
            "tracks": self.candidate.tracks,
            "guesses": {str(s): rank for s, rank in self.candidate.guesses.items()},
            "all_reduces": counts.all_reduces,
            "waited_for": counts.waited_for,
            "kl": self.candidate.kl,
            "unserved": list(self.candidate.unserved),
            "lora": self.candidate.lora,
            "ttft_seconds": e.ttft,
            "tpot_seconds": e.tpot,
            "tokens_per_second": e.tokens_per_second,
            "speed_up": {
                "tokens_per_second": self.speed_up,
                "ttft": self.baseline.ttft / e.ttft,
                "tpot": self.baseline.tpot / e.tpot,
            },
            "communication_share": {
                "prefill": e.prefill.communication,
                "decode": e.decode.communication,
            },
            "bytes_per_rank": e.memory,
        }


def accuracy(setting: Setting) -> str:
    """How far off estimates for the setting's hardware and engine were found to be."""
    said = (setting.hardware.accuracy or UNCHECKED, setting.engine.accuracy)
    return "; ".join(filter(None, said))


def most_memory(rows: Sequence[Row]) -> Row:
    """The row that needs the most memory on a rank."""
    return max(rows, key=lambda row: row.estimate.memory)


def compare(candidates: Sequence[Candidate], setting: Setting) -> list[Row]:
    """A row for tensor parallelism and one for each candidate.

    Raises ConfigError where the ranks don't divide the model or a candidate's tracks, and
    HardwareError where the hardware doesn't join so many.
    """
    ranks, shape = setting.ranks, setting.shape
    most = max(ranks, setting.hardware.ranks)
    if reason := shape.indivisible(ranks, most):
        raise ConfigError(f"--ranks {ranks}: {reason.replace('tracks', 'ranks')}")
    for candidate in candidates:
        if reason := wrong_ranks(candidate.name, candidate.tracks, ranks, most.__ge__):
            raise ConfigError(f"--ranks {ranks}: {reason}")
    return _rows(candidates, setting)


def _rows(candidates: Sequence[Candidate], setting: Setting) -> list[Row]:
    base = Candidate(BASELINE, setting.shape.dense, setting.ranks)
    s = setting
    estimates = [
        estimate(
            *(c.schedule, s.shape, s.hardware, s.engine, s.ranks, s.workload),
            tracks=c.tracks,
            guesses=c.guesses,
        )
        for c in (base, *candidates)
    ]
    pairs = zip((base, *candidates), estimates, strict=True)
    return [Row(candidate, e, estimates[0]) for candidate, e in pairs]


def several_tracks(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """Those whose ranks run several tracks of a layer one after another."""
    candidates = ((row, row.candidate) for row in rows)
    return [r for r, c in candidates if c.tracks > setting.ranks and c.schedule.track_layers]


def one_track_each(row: Row, setting: Setting) -> Row:
    """The row's schedule with as many tracks as ranks."""
    return _rows([replace(row.candidate, tracks=setting.ranks)], setting)[-1]


def quantised_by(setting: Setting) -> str:
    """What would all-reduce with fewer bits of each number here, where the engine doesn't."""
    inner = setting.hardware.links[:1] if setting.engine.quantised == "none" else ()
    return next((x.quantised_by for x in inner if 1 < setting.ranks <= x.ranks), "")


def quantised(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """The rows with blocking all-reduces that send fewer bits, which changes what is computed."""
    engine = replace(setting.engine, quantised="blocking")
    return _rows([row.candidate for row in rows[1:]], replace(setting, engine=engine))


def over_batches(candidates: Sequence[Candidate], setting: Setting) -> dict[int, list[Row]]:
    """Rows at batch 1, 2, 4, ... 256, as far as the device's memory holds weights and cache."""
    found = {}
    for batch in (2**n for n in range(9)):
        workload = replace(setting.workload, batch=batch)
        rows = _rows(candidates, replace(setting, workload=workload))
        if (
            batch > 1
            and most_memory(rows).estimate.memory > setting.hardware.device.memory_gb * 1e9
        ):
            break
        found[batch] = rows
    return found


def dividing(most: int, shape: ModelShape, candidates: Sequence[Candidate]) -> list[int]:
    """The numbers of ranks, up to one, that share the model and every candidate's tracks evenly."""
    fit = [n for n in range(1, most + 1) if not shape.indivisible(n)]
    return [n for n in fit if all(c.tracks % n == 0 for c in candidates)]


def over_ranks(candidates: Sequence[Candidate], setting: Setting) -> dict[int, list[Row]]:
    """Rows at every number of ranks that the hardware joins and every candidate's tracks allow."""
    fits = dividing(setting.hardware.ranks, setting.shape, candidates)
    return {n: _rows(candidates, replace(setting, ranks=n)) for n in fits}


def over_link_speed(candidates: Sequence[Candidate], setting: Setting) -> dict[float, list[Row]]:
    """Rows with links 1/16 to 16 times as fast, in bandwidth and in latency."""
    return {
        times: _rows(candidates, replace(setting, hardware=faster(setting.hardware, times)))
        for times in (2.0**n for n in range(-4, 5))
    }


def faster(hardware: Hardware, times: float) -> Hardware:
    """The hardware with every link's bandwidths multiplied and its times divided by `times`."""

    def scaled(link: Link) -> Link:
        return replace(
            link,
            base_us=link.base_us / times,
            one_shot_us=link.one_shot_us / times,
            one_shot_peer_us=link.one_shot_peer_us / times,
            one_shot_gb_s=link.one_shot_gb_s * times,
            two_shot_us=link.two_shot_us / times,
            two_shot_gb_s=link.two_shot_gb_s * times,
            switch_us=link.switch_us / times,
            switch_gb_s=link.switch_gb_s * times,
            quantised_us=link.quantised_us / times,
            quantised_gb_s=link.quantised_gb_s * times,
            protocols=tuple(
                replace(
                    p, step_us=p.step_us / times, gb_s=p.gb_s * times, more_us=p.more_us / times
                )
                for p in link.protocols
            ),
        )

    return replace(hardware, links=tuple(map(scaled, hardware.links)))
