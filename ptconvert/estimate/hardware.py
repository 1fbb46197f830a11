"""Hardware and serving engines as data: YAML files read strictly into frozen rows.

A hardware file describes one device and the links that join devices, innermost first:

    format: 1
    name: 8x H100 SXM over NVLink
    engine: vllm                  # what it is estimated with unless --engine says otherwise
    device:
      matmul_tflops: 989          # see Device for every field and its unit
      ...
    links:
      - name: NVLink 4
        ranks: 8                  # devices that this level joins, lower levels included
        ...
    sources:                      # where each number comes from, by its kind and path (sources.py)
      data_sheet:
        device.matmul_tflops: NVIDIA H100 data sheet

Fields, units and limits are those of the dataclasses here, from which the files are read and
written. Every fault is a line `file:line: what, and what would be right`, all at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any

from ptconvert.errors import HardwareError
from ptconvert.estimate.sources import Sources
from ptconvert.spec.reader import FORMAT, Found, choice, number, read
from ptconvert.spec.terms import VOCABULARIES

NCCL_PROTOCOLS = ("LL", "LL128", "Simple")
ACROSS = "across nodes"  # the algorithm of a link whose all-reduces are NCCL's between nodes
_ENDINGS = ("none", "blocking", "overlapped", "all")
# What an answer calls numbers where it says which of them are measured.
_FLOPS, _MEMORY, _REACH = "FLOP/s", "memory", "bandwidth that kernels reach"
_KERNEL, _OVERLAP = "time of a kernel", "cost of overlap"
_LATENCY, _BANDWIDTH = "link latency", "link bandwidth"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or one rank's share of a CPU.

    `matmul_tflops` (1e12 FLOP/s, in `matmul_dtype`) and `memory_gb_s` (1e9 B/s) are the data
    sheet's; with a `matmul_rate` that is reached, large products were timed, and an engine's share
    of the data sheet's isn't taken. `fp8_tflops`, `int8_tflops` and `fp4_tflops` are of products of
    weights and activations that are both quantised so, 0 where the device multiplies them in
    `matmul_dtype`. `memory_reach` is the share of the memory rate that kernels attain in reading
    weights, and `batched_reach` what is left of it with more than one token. `memory_gb` is 1e9 B.
    `kernel_us` is the fixed time of one kernel beyond its roofline (launch, ramp up, tail). An
    all-reduce takes a part of its time from the computation beside it, as its kernel holds
    processors (on a CPU, cores) and memory: `overlap_share` of its fixed time, and
    `bulk_overlap_share` of the time that its bytes take. `reduces_at_once` all-reduces progress
    side by side: 1 on NCCL's stream, 2 on gloo's two threads.
    """

    matmul_tflops: float = number(1e-6, about=_FLOPS)
    memory_gb_s: float = number(1e-6, about=_MEMORY)
    memory_reach: float = number(1e-3, 1.0, about=_REACH)
    memory_gb: float = number(1e-3, about=_MEMORY)
    kernel_us: float = number(about=_KERNEL)
    overlap_share: float = number(0.0, 0.99, about=_OVERLAP)
    bulk_overlap_share: float = number(0.0, 0.99, about=_OVERLAP)
    batched_reach: float = number(1e-3, 1.0, 1.0, about=_REACH)
    reduces_at_once: int = number(1, 64, 1, about=_OVERLAP)
    matmul_dtype: str = choice("bfloat16", "float32", default="bfloat16")
    matmul_rate: str = choice("data sheet", "reached", default="data sheet")
    fp8_tflops: float = number(default=0.0, about=_FLOPS)
    int8_tflops: float = number(default=0.0, about=_FLOPS)
    fp4_tflops: float = number(default=0.0, about=_FLOPS)

    def tflops(self, product: str | None) -> float:
        """1e12 FLOP/s of what is multiplied in one of `models.quantised.PRODUCTS`, or in the
        model's dtype."""
        quantised = {"fp8": self.fp8_tflops, "int8": self.int8_tflops, "fp4": self.fp4_tflops}
        return quantised.get(product or "") or self.matmul_tflops


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of moving a message over a link: `step_us` per hop, `gb_s` (1e9 B/s) per rank, and
    `more_us` of fixed time beyond the link's. It may have a `name`, such as NCCL's."""

    name: str = ""
    step_us: float = number(about=_LATENCY)
    gb_s: float = number(1e-6, about=_BANDWIDTH)
    more_us: float = number(default=0.0, about=_LATENCY)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins `ranks` devices, groups of the level below included.

    `base_us` is the fixed time of one all-reduce. Ring all-reduces take 2(n-1) steps, trees 2
    ceil(log2 n); where this link joins nodes by NCCL (`across nodes`), both run over all ranks of
    all nodes in one protocol, and this link and the one before it have NCCL's three, LL, LL128 and
    Simple. `one_shot_us` is the fixed time of a kernel that reads all peers' buffers at once, and
    `one_shot_peer_us` what each peer but the first adds to it, at `one_shot_gb_s` (1e9 B/s per
    rank; 0 where that is the fastest protocol's), among `one_shot_ranks` at most (0 where it serves
    all), and `two_shot_us` and `two_shot_gb_s` are of one that reads each peer's part, and then the
    sums; 0 where peers can't be read. `switch_us` and `switch_gb_s` (1e9 bytes of the message per
    second) are of a reduction in the switch, 0 where there is none. The fastest way is taken at
    each message size.

    `fused_norm_mb` (1e6 B) is up to which message there are kernels that all-reduce, add the sum to
    the stream and normalise it, 0 where there are none. `quantised_us` and `quantised_gb_s` (1e9
    B/s, of the numbers as they are) are of a two-shot kernel that sends fewer bits of each, which
    changes what a model computes; `quantised_by` says which it is, and how it is turned on.
    """

    name: str
    ranks: int = number(1, 2**20)
    base_us: float = number(about=_LATENCY)
    algorithm: str = choice("ring", "tree", "ring or tree", ACROSS)
    one_shot_us: float = number(default=0.0, about=_LATENCY)
    one_shot_peer_us: float = number(default=0.0, about=_LATENCY)
    one_shot_gb_s: float = number(default=0.0, about=_BANDWIDTH)
    one_shot_ranks: int = number(0, 2**20, 0)
    two_shot_us: float = number(default=0.0, about=_LATENCY)
    two_shot_gb_s: float = number(default=0.0, about=_BANDWIDTH)
    switch_us: float = number(default=0.0, about=_LATENCY)
    switch_gb_s: float = number(default=0.0, about=_BANDWIDTH)
    fused_norm_mb: float = number(default=0.0)
    quantised_us: float = number(default=0.0, about=_LATENCY)
    quantised_gb_s: float = number(default=0.0, about=_BANDWIDTH)
    quantised_by: str = ""
    protocols: tuple[Protocol, ...]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A row: a device, its links from the innermost outwards, and each number's source.

    `accuracy` says how far off estimates for it are on published runs, where there are any.
    """

    name: str
    engine: str
    accuracy: str = ""
    device: Device
    links: tuple[Link, ...] = ()
    sources: Sources = field(default_factory=Sources)

    @staticmethod
    def faults(found: Found) -> Iterator[tuple[int, str]]:
        """Where links aren't given from the innermost outwards, or there is no such engine."""
        links = [link for link in found.values.get("links", ()) if link and "ranks" in link.values]
        for lower, upper in pairwise(links):
            if lower.values["ranks"] >= upper.values["ranks"]:
                yield upper.lines["ranks"], "a link must join more ranks than the one before it"
        joined = [link for link in found.values.get("links", ()) if link]
        for lower, upper in zip([None, *joined], joined, strict=False):
            if upper.values.get("algorithm") == ACROSS:
                held = [len(x.values.get("protocols", ())) if x else 0 for x in (lower, upper)]
                if held != [len(NCCL_PROTOCOLS)] * 2:
                    names = ", ".join(NCCL_PROTOCOLS)
                    yield (
                        upper.lines["algorithm"],
                        (
                            f"algorithm is {ACROSS}; this link and the one before it must have the "
                            f"protocols {names}, in this order"
                        ),
                    )
        engine = found.values.get("engine", "")
        if engine and engine not in engine_names():
            what = f"engine is {engine}; it must be one of {', '.join(engine_names())}"
            yield found.lines["engine"], what

    @property
    def ranks(self) -> int:
        """The most ranks that the links join; 1 where there is no link."""
        return self.links[-1].ranks if self.links else 1

    def whole(self) -> int:
        """The ranks of the whole box. Raises HardwareError where no link joins any."""
        if self.ranks == 1:
            raise HardwareError(
                [f"{self.name} has no link that joins ranks: add one to it, or say --ranks 1"]
            )
        return self.ranks

    def check_ranks(self, ranks: int) -> None:
        """Raises HardwareError where the links don't join so many ranks."""
        if ranks > self.ranks:
            raise HardwareError(
                [f"{self.name} joins at most {self.ranks} ranks, not {ranks}; add a link to it"]
            )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a serving engine runs a model: what it fixes per kernel, step and request.

    - `version`, `date`: of the engine that the numbers are of; `accuracy`: how far they were
      checked, where the hardware's doesn't say it.
    - `attention_kernels`, `mlp_kernels`: of one sublayer, its norm and the addition to the
      residual stream included; `head_kernels`: of embeddings, final norm and lm_head;
      `guess_kernels`: of one track's guess after a sublayer.
      `batched_kernels`: how many more a sublayer has when there is more than one token.
    - `step_us`, `sequence_us`: host time per pass, and per sequence in it; `request_us`,
      `prompt_token_us`: per request, and per token of its prompt, until its first token, which a
      server has beside the steps of other requests; `prefill_launch_us`: what a prefill's kernel
      takes longer to launch than one in a graph.
    - `matmul_reach`: the share of the device's FLOP/s that it attains in a prefill;
      `attention_reach`: that of attention's scores and values, 0 where it is the same.
    - `kv_reach`: the share of the bandwidth reached that reading the KV cache attains;
      `kv_head_reach`: what of it a decode step attains for each KV head of each sequence, where
      there are too few of them; `kv_reads`: how often it is read.
    - `score_passes`: times that a prefill's attention scores travel to or from memory; 0 where
      kernels are fused.
    - `cache`: whether attention reads the tokens so far or the whole allocated cache; `logits`: of
      which positions; `vocabulary`: whether ranks share embedding and lm_head; `embedding`: whether
      they share that, where it differs;
      `converted_embedding`, `converted_lm_head`: those of a conversion, where that differs.
    - `one_shot`, `in_switch`: the endings whose all-reduces may be kernels that read peers'
      buffers, in one shot or two, up to `shot_mb` (1e6 B), and reductions in the switch: an
      engine's blocking all-reduces and its overlapped ones are often different libraries'.
      `fused_norm`: those whose kernels add and normalise, too, where a link has such kernels and a
      norm follows; `quantised`: those that may send fewer bits, where a link has that.
    """

    version: str = ""
    date: str = ""
    accuracy: str = ""
    attention_kernels: float = number(1)
    mlp_kernels: float = number(1)
    head_kernels: float = number(1)
    guess_kernels: float = number(1, default=4.0)
    batched_kernels: float = number(default=0.0)
    step_us: float = number()
    sequence_us: float = number(default=0.0)
    request_us: float = number()
    prompt_token_us: float = number(default=0.0)
    prefill_launch_us: float = number()
    matmul_reach: float = number(1e-3, 1.0)
    attention_reach: float = number(0.0, 1.0, 0.0)
    kv_reach: float = number(1e-3, 1.0)
    kv_head_reach: float = number(1e-3, 1.0, 1.0)
    kv_reads: str = choice("per KV head", "per query head")
    score_passes: float = number()
    cache: str = choice("so far", "allocated")
    logits: str = choice("last", "all")
    vocabulary: str = choice(*VOCABULARIES)
    embedding: str = choice(*VOCABULARIES, default="")
    converted_embedding: str = choice(*VOCABULARIES, default="")
    converted_lm_head: str = choice(*VOCABULARIES, default="")
    one_shot: str = choice(*_ENDINGS)
    shot_mb: float = number(default=1e9)
    in_switch: str = choice(*_ENDINGS)
    fused_norm: str = choice("none", "blocking", default="none")
    quantised: str = choice(*_ENDINGS, default="none")
    sources: Sources = field(default_factory=Sources)

    def reach(self, device: Device, attends: bool = False) -> float:
        """The share of a device's FLOP/s that it attains in a prefill, or in its attention."""
        if device.matmul_rate == "reached":
            return 1.0
        return (self.attention_reach if attends else 0.0) or self.matmul_reach

    def serving(self, converted: bool) -> Engine:
        """As it serves conversions, or models as they are."""
        return self if converted else replace(self, converted_embedding="", converted_lm_head="")

    def alike(self) -> Engine:
        """With models as they are held as conversions are, so that schedules alone differ."""
        return replace(
            self,
            vocabulary=self.converted_lm_head or self.vocabulary,
            embedding=self.converted_embedding or self.embedding or self.vocabulary,
            converted_embedding="",
            converted_lm_head="",
        )

    @property
    def cuts_embedding(self) -> bool:
        """Whether each rank holds a share of the embedding, so that they all-reduce it."""
        return (self.converted_embedding or self.embedding or self.vocabulary) == "sharded"

    @property
    def cuts_lm_head(self) -> bool:
        """Whether each rank holds a share of lm_head, so that they gather the logits."""
        return (self.converted_lm_head or self.vocabulary) == "sharded"

    def arrival(self, prompt: int) -> float:
        """Seconds of host time that a request with so many tokens takes beside its passes."""
        return (self.request_us + self.prompt_token_us * prompt) * 1e-6

    @property
    def edition(self) -> str:
        """What its numbers are of: version and date, as far as the file says."""
        return ", ".join(filter(None, (self.version, self.date)))


def _packaged(directory: str) -> Mapping[str, Traversable]:
    files = resources.files("ptconvert").joinpath("estimate", "rows", directory).iterdir()
    named = {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}
    return dict(sorted(named.items()))


def hardware_names() -> list[str]:
    """The rows that come with the package."""
    return list(_packaged("hardware"))


def engine_names() -> list[str]:
    """The engines that come with the package."""
    return list(_packaged("engines"))


def read_hardware(name: str) -> Hardware:
    """A row by its name in the package, or a file. Raises HardwareError with all faults."""
    text, where = _find(name, "hardware")
    return read(Hardware, text, where, "a hardware file", HardwareError)


def read_engine(name: str, vocabulary: str | None = None) -> Engine:
    """An engine by its name in the package, or a file; with lm_head of conversions held as
    `vocabulary` says, and not as the engine has it. Raises HardwareError with all faults."""
    text, where = _find(name, "engines")
    engine = read(Engine, text, where, "an engine file", HardwareError)
    return engine if vocabulary is None else replace(engine, converted_lm_head=vocabulary)


def _find(name: str, directory: str) -> tuple[str, str]:
    """The text of a packaged file or of one on disk, and its name for errors."""
    packaged = _packaged(directory)
    if name in packaged:
        return packaged[name].read_text(encoding="utf-8"), f"{name}.yaml"
    path = Path(name)
    if not path.is_file():
        known = ", ".join(packaged)
        raise HardwareError([f"{name} is neither a file nor one of {known}"])
    try:
        return path.read_bytes()[: 2**20].decode("utf-8"), name
    except (OSError, UnicodeDecodeError) as error:
        raise HardwareError([f"{name}: can't be read as UTF-8 text: {error}"]) from None


def to_yaml(row: Hardware) -> str:
    """The row as a file that reads back to it."""
    import yaml

    fields = {"format": FORMAT, **{f.name: getattr(row, f.name) for f in dataclasses.fields(row)}}
    fields["device"] = dataclasses.asdict(row.device)
    fields["links"] = [
        {**_said(link), "protocols": [_said(protocol) for protocol in link.protocols]}
        for link in row.links
    ]
    fields["sources"] = row.sources.by_kind()
    if not row.accuracy:
        del fields["accuracy"]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)


def _said(row: Link | Protocol) -> dict[str, Any]:
    """Its fields, less texts that are empty."""
    return {name: value for name, value in dataclasses.asdict(row).items() if value != ""}
