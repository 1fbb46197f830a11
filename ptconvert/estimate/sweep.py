"""All-reduces of the ranks at hand: how long each way takes by size, on each level of what joins
the ranks, whether its sums are right, and whether computation goes on beside it.

Ways are the process group's own (NCCL or gloo) and the kernels that serving engines bring. A level
is what joins some ranks more closely than others: GPUs by a bridge or a switch, a machine, a
network. What is returned is in JSON types, bytes and seconds.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import torch
import torch.distributed as dist

from ptconvert.runtime.launch import Rank

SIZES = [2**n for n in range(12, 27, 2)]  # bytes, 4 KiB to 64 MiB
P2P_OFF = "NCCL_P2P_DISABLE"
BESIDE = 2**22  # bytes of what is all-reduced beside products, and between pairs of ranks
CLOSER = 1.5  # how much faster ranks of an island are than others: PCIe's own ways differ by less
_REPEATS = 5
_TERMS = 61  # values of a term of the sums that are checked: all exact in any dtype's float32 sum


@dataclass(frozen=True)
class Own:
    """A serving engine's own all-reduce: its name, the sum over ranks of a tensor (None where it
    doesn't take such a one), and the largest message it takes, in bytes."""

    name: str
    reduce: Callable[[torch.Tensor], torch.Tensor | None]
    most: int


# Makes an engine's own all-reduce among the ranks of a gloo group; None where it can't work there.
Maker = Callable[[torch.device, Any], Own | None]


def peers_off() -> bool:
    """Whether the environment keeps GPUs from reading each other's memory."""
    return os.environ.get(P2P_OFF, "0") != "0"


def sweep(rank: Rank, makers: Sequence[Maker]) -> dict[str, Any]:
    """What one rank finds. Collective; ranks find the same levels, each its own times."""
    order, levels, machines = _levels(rank)
    found: dict[str, Any] = {"order": order, "levels": levels, "machines": machines}
    found |= {"samples": [], "wrong": {}}
    for ranks in sizes_of([ranks for ranks, _ in levels]):
        group = dist.new_group(order[:ranks])
        if rank.rank in order[:ranks]:
            _sample(found, rank, Own(rank.backend, _summing(group), SIZES[-1]), ranks, group)
            if ranks == rank.ranks:
                found["beside"] = _beside(rank, group)
        dist.destroy_process_group(group)
    closest = order[: levels[0][0]] if levels else []
    for make in makers if closest else ():
        group = dist.new_group(closest, backend="gloo")
        if rank.rank in closest:
            own = make(rank.device, group)
            if own is not None:
                _sample(found, rank, own, len(closest), group)
        dist.barrier()
    return found


def sizes_of(levels: Sequence[int]) -> list[int]:
    """How many ranks are measured together: of each level 2, 4, ... and all of the groups below."""
    found = []
    for below, ranks in pairwise([1, *levels]):
        found += [below * 2**n for n in range(1, 21) if below * 2**n < ranks] + [ranks]
    return found


def islands_of(seconds: Mapping[tuple[int, int], float]) -> list[list[int]]:
    """Groups of ranks of one size that are closer to each other than to the rest, by the time that
    each pair takes; all in one where there is no such division.

    Pairs are parted where neighbouring times are furthest apart, if that is CLOSER times at least.
    """
    ranks = sorted({rank for pair in seconds for rank in pair})
    times = sorted(seconds.values())
    gaps = [(b / a, a) for a, b in pairwise(times)]
    ratio, near = max(gaps, default=(1.0, 0.0))
    if ratio < CLOSER:
        return [ranks]
    islands: list[list[int]] = []
    for rank in ranks:
        home = next((i for i in islands if seconds[i[0], rank] <= near), None)
        if home is None:
            islands.append(home := [])
        home.append(rank)
    apart = {pair for island in islands for pair in combinations(island, 2)}
    whole = all((seconds[pair] <= near) == (pair in apart) for pair in seconds)
    return islands if whole and len({len(i) for i in islands}) == 1 else [ranks]


def _levels(rank: Rank) -> tuple[list[int], list[tuple[int, str]], int]:
    """All ranks in an order in which those of an island are neighbours; how many ranks each level
    joins, with its name, from the innermost outwards; and how many machines there are."""
    # torchrun says which of its agents, one for a machine, started a rank
    place = (socket.gethostname(), os.environ.get("GROUP_RANK"))
    places: list[Any] = [None] * rank.ranks
    dist.all_gather_object(places, place)
    machines = [[r for r in range(rank.ranks) if places[r] == p] for p in dict.fromkeys(places)]
    sizes = {len(machine) for machine in machines}
    if len(sizes) > 1:  # no division that the formulas know
        return list(range(rank.ranks)), [(rank.ranks, "between machines")], len(machines)
    first = machines[0]
    islands = [first]
    if rank.device.type == "cuda" and len(first) > 2:
        islands = islands_of(pairs_of(rank, first))
    order = [r for island in islands for r in island] + [r for m in machines[1:] for r in m]
    names = {rank.ranks: "between machines", len(first): "a machine"}
    if len(islands) > 1:
        names[len(islands[0])] = "an island of GPUs"
    levels = sorted((ranks, name) for ranks, name in names.items() if ranks > 1)
    return order, levels, len(machines)


def pairs_of(rank: Rank, ranks: list[int]) -> dict[tuple[int, int], float]:
    """Seconds of an all-reduce of BESIDE bytes between each two of some ranks, on every rank."""
    found: dict[tuple[int, int], float] = {}
    for pair in combinations(ranks, 2):
        group = dist.new_group(list(pair))
        seconds = [0.0]
        if rank.rank in pair:
            x = torch.zeros(BESIDE // 4, device=rank.device)
            seconds = [chained(rank, partial(_summing(group), x), 4, group)]
        dist.broadcast_object_list(seconds, src=pair[0])
        found[pair] = seconds[0]
        dist.destroy_process_group(group)
    return found


def _summing(group: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def reduce(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=group)
        return x

    return reduce


def _sample(found: dict[str, Any], rank: Rank, way: Own, ranks: int, group: Any) -> None:
    """Adds a way's time at each size among some ranks, and the sizes with wrong sums."""
    place = dist.get_rank(group)
    for nbytes in (size for size in SIZES if size <= way.most):
        x = torch.zeros(nbytes // 4, device=rank.device)
        if way.reduce(x.clone()) is None:
            continue
        if not sums_right(way, nbytes // 4, place, ranks, rank.device):
            found["wrong"].setdefault(way.name, []).append(nbytes)
        calls = max(1, min(20, 2**22 // nbytes))
        seconds = chained(rank, partial(way.reduce, x), calls, group)
        found["samples"].append((way.name, ranks, nbytes, seconds))


def sums_right(way: Own, count: int, place: int, ranks: int, device: torch.device) -> bool:
    """Whether the sum of terms that differ by place and rank is what it must be, bit for bit."""
    places_N = torch.arange(count, device=device)
    terms = ((places_N * (rank + 1)) % _TERMS for rank in range(ranks))
    wanted_N = torch.zeros(count, device=device)
    for rank, term_N in enumerate(terms):
        wanted_N += term_N
        if rank == place:
            own_N = term_N.float()
    return torch.equal(way.reduce(own_N), wanted_N)  # type: ignore[arg-type]


def chained(rank: Rank, work: Callable[[], object], calls: int, group: Any = None) -> float:
    """Seconds of one of some calls in a row that all ranks of a group begin together, in the
    fastest repeat: what disturbs a measurement only ever adds to it."""
    work()
    found = []
    for _ in range(_REPEATS):
        dist.barrier(group)
        settle(rank)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        settle(rank)
        found.append((time.perf_counter() - started) / calls)
    return min(found)


def settle(rank: Rank) -> None:
    """Waits for the device."""
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)


def _beside(rank: Rank, group: Any) -> dict[str, float]:
    """Seconds of an all-reduce of BESIDE bytes, of products that take at least as long, and of both
    at once."""
    x = torch.zeros(BESIDE // 4, device=rank.device)
    size, dtype = (4096, torch.bfloat16) if rank.device.type == "cuda" else (256, torch.float32)
    a = torch.randn(size, size, device=rank.device, dtype=dtype)
    reduce = chained(rank, lambda: dist.all_reduce(x, group=group), 2, group)
    once = chained(rank, lambda: a @ a, 4, group)
    longest = torch.tensor([reduce / once], device=rank.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group)  # the same work on each
    times = 1 + int(1.5 * longest.item())

    def products() -> None:
        for _ in range(times):
            a @ a

    def both() -> None:
        work = dist.all_reduce(x, group=group, async_op=True)
        products()
        assert work is not None
        work.wait()

    return {
        "reduce": reduce,
        "products": chained(rank, products, 1, group),
        "both": chained(rank, both, 1, group),
    }
