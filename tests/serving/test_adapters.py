"""What of a LoRA is a rank's, against the whole product cut as vLLM cuts weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  # settings
import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ptconvert.checkpoint.reader import Adapter
from ptconvert.engines.vllm import adapters
from ptconvert.engines.vllm.adapters import Factors, _added, joined
from ptconvert.errors import ConfigError

INPUTS, RANK = 12, 2


def linear_of(kind: type[LinearBase], sizes: Sequence[int], tp: int, rank: int, **more: Any) -> Any:
    """A linear of vLLM's as far as its sizes go."""
    linear: Any = object.__new__(kind)
    nn.Module.__init__(linear)
    of = {"output_partition_sizes": list(sizes), "input_size": INPUTS, "tp_size": tp}
    vars(linear).update(of | {"tp_rank": rank} | more)
    return linear


def factors(outputs: int, part: int | None, seed: int) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    a_RI, b_OR = (torch.randn(*size, generator=rng) for size in ((RANK, INPUTS), (outputs, RANK)))
    return Factors(part, a_RI, b_OR)


def product(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    a_RI, b_OR = found
    return b_OR @ a_RI


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(8, 4, 2), (8, 2, 4), (4, 1, 4), (4, 4, 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_of_queries_keys_and_values(heads: int, kv_heads: int, tp: int, fused: bool) -> None:
    size = 3  # of a head
    copies = max(1, tp // kv_heads)
    whole = [heads * size, kv_heads * size, kv_heads * size]
    sizes = [heads * size // tp, *[max(1, kv_heads // tp) * size] * 2]
    given = [factors(n, part, part) for part, n in reversed(list(enumerate(whole)))]  # in any order
    one = factors(sum(whole), None, 7)
    weights = [product((f.first, f.second)) for f in reversed(given)]
    if fused:
        given, weights = [one], list(torch.split(product((one.first, one.second)), whole))
    for rank in range(tp):
        linear = linear_of(QKVParallelLinear, sizes, tp, rank, num_kv_head_replicas=copies)
        firsts = [rank * sizes[0], *[rank // copies * sizes[1]] * 2]
        own = [w[first:][:n] for w, first, n in zip(weights, firsts, sizes, strict=True)]
        torch.testing.assert_close(product(joined(linear, "qkv", given)), torch.cat(own))


@pytest.mark.parametrize("parts", [[0], [1], [0, 1], [None]])
def test_of_gate_and_up(parts: list[int | None]) -> None:
    """Of which one may have none, and which may be one in the checkpoint."""
    neurons, tp = 8, 2
    given = [factors(neurons if part is not None else 2 * neurons, part, 3) for part in parts]
    whole = torch.zeros(2, neurons, INPUTS)
    for one in given:
        of = product((one.first, one.second))
        if one.part is None:
            whole = of.view(2, neurons, INPUTS)
        else:
            whole[one.part] = of
    for rank in range(tp):
        linear = linear_of(MergedColumnParallelLinear, [neurons // tp] * 2, tp, rank)
        own = whole[:, rank * neurons // tp :][:, : neurons // tp]
        torch.testing.assert_close(product(joined(linear, "up", given)), own.flatten(0, 1))


def test_of_outputs_ranks_have_sums_of_their_inputs() -> None:
    outputs, tp = 6, 3
    one = factors(outputs, None, 1)
    x_TI = torch.randn(5, INPUTS)
    total = torch.zeros(5, outputs)
    for rank, own_TI in enumerate(x_TI.chunk(tp, -1)):
        of = {"input_size_per_partition": INPUTS // tp}
        linear = linear_of(RowParallelLinear, [outputs], tp, rank, **of)
        a_RI, b_OR = joined(linear, "down", [one])
        seen = SimpleNamespace(adapter_a=a_RI, adapter_b=b_OR)
        zeros, bias = _added(seen, (own_TI,), (torch.zeros(5, outputs), None))
        assert bias is None and torch.equal(_added(seen, (own_TI,), zeros - zeros), zeros)
        total += zeros
    torch.testing.assert_close(total, x_TI @ product((one.first, one.second)).T)


def test_of_what_each_rank_has_whole() -> None:
    one = factors(6, None, 1)
    linear = linear_of(ReplicatedLinear, [6], 4, 2)
    found = joined(linear, "router", [one])
    torch.testing.assert_close(product(found), product((one.first, one.second)))


@pytest.mark.parametrize("outputs", [5, 8])
def test_other_sizes_are_refused(outputs: int) -> None:
    linear = linear_of(RowParallelLinear, [6], 2, 0, input_size_per_partition=INPUTS // 2)
    with pytest.raises(ConfigError, match=f"^down: the LoRA is of 12 inputs and {outputs} outputs"):
        joined(linear, "down", [factors(outputs, None, 0)])


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, str, Factors], None]:
    """Puts factors beside a model's module."""
    monkeypatch.setattr(adapters, "read_whole", lambda tensor: tensor)
    mapper, shape = SimpleNamespace(apply=list), SimpleNamespace(mtp=("mtp.",))

    def add(model: nn.Module, name: str, one: Factors) -> None:
        pair: Any = (one.first, one.second)
        given: Any = (mapper, range(1), shape, torch.float32)
        adapters.add_adapter(model, Adapter(2.0, {name: pair}), *given)

    return add


def test_beside_what_is_no_linear_is_refused(add: Callable[..., None]) -> None:
    model = nn.Module()
    model.norm = nn.LayerNorm(4)
    with pytest.raises(ConfigError, match=r"^norm: vLLM has no linear there for the LoRA"):
        add(model, "norm", factors(6, None, 0))


def test_weights_that_are_loaded_again_take_it_along(add: Callable[..., None]) -> None:
    """Where it lies, as captured graphs read it there, and once."""
    model = nn.Module()
    model.down = linear = linear_of(ReplicatedLinear, [6], 1, 0)
    linear.weight = nn.Parameter(torch.zeros(6, INPUTS))
    places = []
    for seed in (0, 1):
        one = factors(6, None, seed)
        add(model, "down", one)
        places.append((linear.adapter_a.data_ptr(), linear.adapter_b.data_ptr()))
        found = product((linear.adapter_a, linear.adapter_b))
        torch.testing.assert_close(found, 2 * product((one.first, one.second)))
    assert places[0] == places[1] and len(linear._forward_hooks) == 1
