"""The time of one all-reduce, by message size and ranks.

With n ranks, a message of m bytes, s seconds per step and B bytes per second per rank:

    ring      2(n-1) s + 2(n-1)/n m/B      (Patarasuk and Yuan, JPDC 69(2), 2009)
    tree      2 ceil(log2 n) s + 2 m/B     (double binary trees, Sanders et al., 2009; NCCL 2.4)
    one-shot  (n-1) m/B                    (each rank reads all peers; TensorRT-LLM, vLLM)
    two-shot  2(n-1)/n m/B                 (each reads its part of all peers, then their sums)
    switch    m/B                          (the switch adds up; NVLink SHARP, NCCL's NVLS)
    quantised 2(n-1)/n m/B                 (two shots of fewer bits; QuickReduce, vLLM on ROCm)

each plus a fixed time of its own, where m is of what is added up, not of the bits that travel. Like
NCCL, whose cost model this follows (tuning.cc: base
latency + steps x hop latency + bytes / bandwidth, for each of its protocols, and the least of
them), the fastest is taken.

Over two levels: reduce-scatter within the groups, an all-reduce of a group's part between them,
all-gather within (Thakur, Rabenseifner and Gropp, 2005); within, a ring is taken where there is
one, or the switch, whose all-reduces are made of those two halves. NCCL doesn't: over G nodes of g
ranks it runs one ring or tree in one protocol, with steps of s seconds within a node and t between
nodes, or a tree of the nodes' switches, of v seconds:

    ring      2(n-G) s + 2(G-1) t + 2(n-1)/n m/B
    tree      2((g-1) s + ceil(log2 G) t) + 2 m/(f B)
    NVLSTree  v + 2 ceil(log2 G) t + m/B

B is that of all adapters of a node or that within it, whichever is less. Which protocol is the
fastest changes with the size: LL has little latency and, between nodes, little bandwidth. f is what
NCCL corrects its trees by, from measurements (treeCorrectionFactor in tuning.cc), between its sizes
on a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptconvert.estimate.hardware import ACROSS, NCCL_PROTOCOLS, Link

# NCCL 2.28 tuning.cc, treeCorrectionFactor: of messages of 64 B, 128 B, 256 B ... 512 MB.
_TREES = {
    "LL": "1 1 1 1 .9 .8 .7 .7 .7 .7 .6 .5 .4 .4 .5 .6 .7 .8 .9 1 1 1 1 1",
    "LL128": "1 1 1 1 1 .9 .8 .8 .8 .7 .6 .6 .6 .6 .6 .6 .8 .9 .9 .9 .9 1 1 1",
    "Simple": ".9 .9 .9 .9 .9 .9 .9 .8 .7 .6 .6 .5 .5 .5 .5 .6 .7 .8 .7 .7 .8 .9 .9 .9",
}


@dataclass(frozen=True)
class Transfer:
    """One all-reduce, in seconds: `fixed` whatever its size, and `moving` its bytes; and the `way`
    that it goes."""

    fixed: float = 0.0
    moving: float = 0.0
    way: str = ""

    @property
    def seconds(self) -> float:
        return self.fixed + self.moving

    def __add__(self, other: Transfer) -> Transfer:
        ways = ", ".join(filter(None, dict.fromkeys((self.way, other.way))))
        return Transfer(self.fixed + other.fixed, self.moving + other.moving, ways)


@dataclass(frozen=True)
class Reduction:
    """One all-reduce of a pass, as a blocking ending's and as an overlapped one's; `fused` where
    the kernel of a blocking one also adds its sum to the stream and normalises it."""

    blocking: Transfer
    overlapped: Transfer
    fused: bool = False

    @property
    def way(self) -> str:
        """How a blocking one goes."""
        return self.blocking.way + ", fused with the norm" * self.fused


def all_reduce(
    nbytes: float,
    ranks: int,
    links: Sequence[Link],
    *,
    one_shot: bool = False,
    in_switch: bool = True,
    quantised: bool = False,
) -> Transfer:
    """An all-reduce of `nbytes` over `ranks`, on links from the innermost outwards.

    Nothing for one rank. `ranks` must not exceed what the last link joins. `one_shot` (kernels that
    read peers' buffers, in two shots too), `in_switch` and `quantised` (fewer bits of each number
    on the wire) say whether those ways are open to it, where a link has them.
    """
    if not in_switch:
        links = [replace(link, switch_gb_s=0.0) for link in links]
    if not quantised:
        links = [replace(link, quantised_gb_s=0.0) for link in links]
    if ranks == 1:
        return Transfer()
    inner = links[0]
    if ranks <= inner.ranks:
        return _within(nbytes, ranks, inner, one_shot)
    group = inner.ranks
    if links[1].algorithm == ACROSS and ranks <= links[1].ranks:
        return _across(nbytes, ranks, inner, links[1])
    joined = [_joining(link, group) for link in links[1:]]
    outer = all_reduce(nbytes / group, math.ceil(ranks / group), joined)
    if group == 1:
        return outer
    halves = replace(inner, algorithm="ring") if "ring" in inner.algorithm else inner
    return outer + _within(nbytes, group, halves, one_shot=False)


def all_gather(nbytes: float, ranks: int, links: Sequence[Link]) -> Transfer:
    """All ranks' parts of `nbytes` to all of them: half of a ring's all-reduce."""
    rings = [replace(link, algorithm="ring", switch_gb_s=0.0) for link in links]
    whole = all_reduce(nbytes, ranks, rings)
    return Transfer(whole.fixed / 2, whole.moving / 2)


def point_to_point(nbytes: float, sender: int, receiver: int, links: Sequence[Link]) -> Transfer:
    """`nbytes` from one rank to another: a fixed time, one step, and the bytes over the bandwidth.

    Over the innermost link that joins the two, by its fastest protocol. Ranks are numbered group
    by group, and some link must join these.
    """
    link = next(x for x in links if sender // x.ranks == receiver // x.ranks)
    ways = [
        Transfer((link.base_us + p.more_us + p.step_us) * 1e-6, nbytes / (p.gb_s * 1e9))
        for p in link.protocols
    ]
    return min(ways, key=lambda way: way.seconds)


def _joining(link: Link, group: int) -> Link:
    """The link as it looks to whole groups of ranks, which it joins as if each were one."""
    return replace(link, ranks=math.ceil(link.ranks / group))


def _within(nbytes: float, ranks: int, link: Link, one_shot: bool) -> Transfer:
    """Over one link, by its fastest protocol and algorithm."""
    base, sent, ways = link.base_us * 1e-6, 2 * (ranks - 1) / ranks * nbytes, list[Transfer]()
    for protocol in link.protocols:
        step, bandwidth = protocol.step_us * 1e-6, protocol.gb_s * 1e9
        fixed = base + protocol.more_us * 1e-6
        if link.algorithm in ("ring", "ring or tree", ACROSS):
            way = _named("ring", protocol.name)
            ways.append(Transfer(fixed + 2 * (ranks - 1) * step, sent / bandwidth, way))
        if link.algorithm in ("tree", "ring or tree", ACROSS):
            steps = 2 * math.ceil(math.log2(ranks))
            way = _named("tree", protocol.name)
            ways.append(Transfer(fixed + steps * step, 2 * nbytes / bandwidth, way))
    others = [("in the switch", base + link.switch_us * 1e-6, nbytes, link.switch_gb_s)]
    if one_shot and link.one_shot_us and ranks <= (link.one_shot_ranks or ranks):
        read = link.one_shot_gb_s or max(p.gb_s for p in link.protocols)
        meeting = link.one_shot_us + (ranks - 2) * link.one_shot_peer_us
        others.append(("one-shot kernel", meeting * 1e-6, (ranks - 1) * nbytes, read))
    if one_shot:
        others.append(("two-shot kernel", link.two_shot_us * 1e-6, sent, link.two_shot_gb_s))
    quantised = f"quantised by {link.quantised_by}"
    others.append((quantised, link.quantised_us * 1e-6, sent, link.quantised_gb_s))
    ways += [
        Transfer(fixed, moved / (rate * 1e9), way) for way, fixed, moved, rate in others if rate
    ]
    return min(ways, key=lambda way: way.seconds)


def _named(algorithm: str, protocol: str) -> str:
    return f"{algorithm}, {protocol}" if protocol else algorithm


def _across(nbytes: float, ranks: int, inner: Link, outer: Link) -> Transfer:
    """NCCL's over several nodes: the fastest of ring and tree in each protocol, and of NVLSTree."""
    group, nodes = inner.ranks, math.ceil(ranks / inner.ranks)
    once, deep, crossing = 2 * (ranks - 1), 2 * math.ceil(math.log2(nodes)), 2 * (nodes - 1)
    ways = []
    for name, near, far in zip(NCCL_PROTOCOLS, inner.protocols, outer.protocols, strict=True):
        bandwidth = min(near.gb_s, group * far.gb_s) * 1e9
        base = inner.base_us + outer.base_us + near.more_us + far.more_us
        ring = base + (once - crossing) * near.step_us + crossing * far.step_us
        moving = once / ranks * nbytes / bandwidth
        ways.append(Transfer(ring * 1e-6, moving, _named("ring across nodes", name)))
        tree = base + 2 * (group - 1) * near.step_us + deep * far.step_us
        reached = bandwidth * _correction(name, nbytes)
        moving = 2 * nbytes / reached
        ways.append(Transfer(tree * 1e-6, moving, _named("tree across nodes", name)))
    if inner.switch_gb_s:
        near, far = inner.protocols[-1], outer.protocols[-1]  # NVLSTree has Simple only
        bandwidth = min(inner.switch_gb_s, group * far.gb_s) * 1e9
        base = inner.base_us + outer.base_us + near.more_us + far.more_us
        fixed = base + inner.switch_us + deep * far.step_us
        ways.append(Transfer(fixed * 1e-6, nbytes / bandwidth, "tree of the nodes' switches"))
    return min(ways, key=lambda way: way.seconds)


def _correction(protocol: str, nbytes: float) -> float:
    """The share of its bandwidth that a tree of NCCL's reaches with a message, between the table's
    sizes on a line over the logarithm of the size."""
    table = [float(share) for share in _TREES[protocol].split()]
    place = min(max(math.log2(max(nbytes, 1) / 64), 0.0), len(table) - 1.0)
    low = min(int(place), len(table) - 2)
    return table[low] + (place - low) * (table[low + 1] - table[low])
