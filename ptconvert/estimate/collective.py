"""The time of one all-reduce, by message size and ranks.

With n ranks, a message of m bytes, s seconds per step and B bytes per second per rank:

    ring      2(n-1) s + 2(n-1)/n m/B      (Patarasuk and Yuan, JPDC 69(2), 2009)
    tree      2 ceil(log2 n) s + 2 m/B     (double binary trees, Sanders et al., 2009; NCCL 2.4)
    one-shot  (n-1) m/B                    (each rank reads all peers; TensorRT-LLM, vLLM)
    switch    m/B                          (the switch adds up; NVLink SHARP, NCCL's NVLS)

each plus a fixed time of its own. Like NCCL, whose cost model this follows (tuning.cc: base
latency + steps x hop latency + bytes / bandwidth, for each of its protocols, and the least of
them), the fastest is taken. Over two levels: reduce-scatter within the groups, an all-reduce of a
group's part between them, all-gather within (Thakur, Rabenseifner and Gropp, 2005); a ring's
reduce-scatter and all-gather together are its all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ptconvert.estimate.hardware import Link


def all_reduce_seconds(
    nbytes: float, ranks: int, links: Sequence[Link], *, one_shot: bool = False
) -> float:
    """Seconds of an all-reduce of `nbytes` over `ranks`, on links from the innermost outwards.

    0 for one rank. `ranks` must not exceed what the last link joins.
    """
    if ranks == 1:
        return 0.0
    inner = links[0]
    if ranks <= inner.ranks:
        return _within(nbytes, ranks, inner, one_shot)
    group = inner.ranks
    joined = [_joining(link, group) for link in links[1:]]
    outer = all_reduce_seconds(nbytes / group, math.ceil(ranks / group), joined)
    return outer if group == 1 else outer + _within(nbytes, group, inner, one_shot=False)


def _joining(link: Link, group: int) -> Link:
    """The link as it looks to whole groups of ranks, which it joins as if each were one."""
    return replace(link, ranks=math.ceil(link.ranks / group))


def _within(nbytes: float, ranks: int, link: Link, one_shot: bool) -> float:
    """Seconds over one link, by its fastest protocol and algorithm."""
    times = []
    for protocol in link.protocols:
        step, bandwidth = protocol.step_us * 1e-6, protocol.gb_s * 1e9
        if "ring" in link.algorithm:
            sent = 2 * (ranks - 1) / ranks * nbytes
            times.append(2 * (ranks - 1) * step + sent / bandwidth)
        if "tree" in link.algorithm:
            times.append(2 * math.ceil(math.log2(ranks)) * step + 2 * nbytes / bandwidth)
    if link.switch_gb_s:
        times.append(link.switch_us * 1e-6 + nbytes / (link.switch_gb_s * 1e9))
    best = link.base_us * 1e-6 + min(times)
    if one_shot and link.one_shot_us:
        widest = max(p.gb_s * 1e9 for p in link.protocols)
        best = min(best, link.one_shot_us * 1e-6 + (ranks - 1) * nbytes / widest)
    return best
