"""The boundary between stages as CUDA runs it, with streams and graphs of the CPU in CUDA's place:
their work is done as late as it may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import engines  # noqa: F401  # settings
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from ptconvert.engines.base import ServedPass
from ptconvert.engines.in_flight import InFlight
from ptconvert.modeling.executor import Update
from ptconvert.runtime.counters import ALL_REDUCE, Profile
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind


@dataclass(eq=False)
class Stream:
    """Does its work when somebody waits for it."""

    device: Any = None
    priority: int = 0
    work: list[Callable[[], object]] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)

    def wait_stream(self, other: Any) -> None:
        self.before.append(other)

    def record_event(self) -> Any:
        return self, len(self.work)

    def wait_event(self, event: Any) -> None:
        stream, count = event
        for one in stream.work[:count]:
            one()
        stream.work[:count] = [lambda: None] * count


class TwoRanks:
    """In vLLM's NCCL communicator's place: another rank has the same."""

    disabled = False

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of

    def all_reduce(self, local: torch.Tensor, out: torch.Tensor, *, stream: Stream) -> None:
        stream.work.append(lambda: torch.add(local, local, out=out))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module with a communicator of its own, as two ranks with GPUs open it."""
    from ptconvert.engines.vllm import collectives

    group = SimpleNamespace(world_size=2, device=torch.device("cuda", 0), cpu_group="gloo's")
    current = Stream()
    monkeypatch.setattr(collectives, "get_tp_group", lambda: group)
    monkeypatch.setattr(collectives, "PyNcclCommunicator", TwoRanks)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    collectives.open_communicator()
    yield collectives
    collectives._own = None


def test_gpus_have_a_communicator_of_their_own_on_a_stream_of_high_priority(own: Any) -> None:
    assert own._own.stream.priority < 0
    assert own._own.communicator.made_of == ("gloo's", torch.device("cuda", 0))


@pytest.mark.parametrize("switched_off", [False, True])
def test_others_have_torchs(own: Any, switched_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs, and where vLLM's NCCL is switched off (VLLM_DISABLE_PYNCCL)."""
    if switched_off:
        monkeypatch.setattr(TwoRanks, "disabled", True)
    else:
        own.get_tp_group().device = torch.device("cpu")
    own.open_communicator()
    assert own._own is None


def test_a_sum_comes_where_it_is_read_without_a_copy_and_is_counted_once(
    own: Any, tmp_path: Path
) -> None:
    first, second = torch.ones(3, 4), torch.full((3, 4), 5.0)
    sums = [torch.full((3, 4), torch.nan) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        with record_function("step 1"):
            zeros = own.all_reduce_boundary(first, [torch.zeros(3, 4), sums[0]], [], 0, [])
            found = own.all_reduce_boundary(second, sums, [first], 1, [0])
            assert found.data_ptr() == sums[0].data_ptr() and found.tolist() == [[2.0] * 4] * 3
            assert (
                zeros.tolist() == [[0.0] * 4] * 3 and sums[1].tolist() != [[10.0] * 4] * 3
            )  # which is in flight still
            last = own.all_reduce_boundary(second, [sums[1]], [second], None, [1])
        assert last.data_ptr() == sums[1].data_ptr() and last.tolist() == [[10.0] * 4] * 3
    assert own._own.stream.before == [torch.cuda.current_stream()] * 2
    assert not own._in_flight.by_stage
    assert not {e.key for e in profiled.key_averages()} & {"aten::copy_", "aten::clone"}
    trace = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(trace))
    seen = Profile(trace).collectives()["1"]
    assert [(c.op, c.shape, c.asynchronous) for c in seen] == [(ALL_REDUCE, (3, 4), True)] * 2


def test_a_sum_that_was_copied_in_flight_is_an_error(own: Any) -> None:
    local, copied = torch.ones(3, 4), torch.empty(3, 4)
    own.all_reduce_boundary(local, [torch.zeros(3, 4), torch.empty(3, 4)], [], 0, [])
    with pytest.raises(RuntimeError, match="stage 0 was copied while in flight"):
        own.all_reduce_boundary(local, [copied], [local], None, [0])


class Graph:
    """A graph of operations on the CPU, in CUDA's place: what runs while it is captured, once more
    on the same tensors."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def capture_begin(self, **_: Any) -> None:
        graph = self

        class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, op: Any, _: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = op(*args, **(kwargs or {}))

                def again() -> None:
                    now = op(*args, **(kwargs or {}))
                    if isinstance(now, torch.Tensor):
                        result.copy_(now)

                graph.calls.append(again)
                return result

        mode: Any = Recording()  # type: ignore[no-untyped-call]
        self.mode = mode
        mode.__enter__()

    def capture_end(self) -> None:
        self.mode.__exit__(None, None, None)

    def replay(self) -> None:
        for call in self.calls:
            call()


def broken_capture() -> dict[str, Any]:
    """Captures a pass with an all-reduce in flight as vLLM does where it breaks captures, and
    replays it on another input. To be run with VLLM_USE_BREAKABLE_CUDAGRAPH=1."""
    from vllm.compilation import breakable_cudagraph

    from ptconvert.engines.vllm import collectives

    launched: list[float] = []

    def start(local: torch.Tensor, total: torch.Tensor) -> Callable[[], object]:
        assert not capture._capturing, "an all-reduce is captured, which ends in another graph"
        launched.append(float(local.sum()))
        return lambda: torch.mul(local, 2, out=total)

    def one_pass(x: torch.Tensor) -> torch.Tensor:
        local = x * 3
        total = torch.empty_like(local)
        zeros = collectives.all_reduce_boundary(local, [torch.zeros(2), total], [], 0, [])
        beside = x + 1 + zeros
        merged = collectives.all_reduce_boundary(beside, [total], [local], None, [0])
        return merged + beside

    collectives._in_flight = InFlight(start)
    given = torch.tensor([1.0, 2.0])
    with (
        mock.patch.object(torch.cuda, "CUDAGraph", Graph),
        # past torch's dispatcher, as a mode can't end within an operation that it sees
        mock.patch.object(
            *(torch.ops.ptconvert, "all_reduce_boundary", collectives._all_reduce_boundary)
        ),
        # a view of the memory, for which vLLM has an operation on GPUs alone
        mock.patch.object(breakable_cudagraph, "weak_ref_tensor", lambda given: given),
    ):
        capture = breakable_cudagraph.BreakableCUDAGraphCapture()
        with capture:
            out = one_pass(given)
        captured = out.tolist()
        given.copy_(torch.tensor([10.0, 20.0]))
        capture.replay()
    return {
        "captured": captured,
        "replayed": out.tolist(),
        "launched": launched,
        "segments": [capture.num_graphs, capture.num_eager_breaks],
    }


@pytest.mark.slow
def test_captures_that_vllm_breaks_are_broken_at_boundaries() -> None:
    code = "import json, test_collectives; print(json.dumps(test_collectives.broken_capture()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "captured": [8, 15],
        "replayed": [71, 141],
        "launched": [9, 90],
        "segments": [3, 2],
    }


class Linears(nn.Module):
    """A track, with a linear for its attention and its MLP, and a bias that all know."""

    scalar = None

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(16, 16, bias=False)
        self.bias = nn.Parameter(torch.randn(16))

    def norms(self, _: Kind) -> list[Any]:
        return [self.norm]

    def run(self, _: Any, __: Kind, normed: Any, *___: Any) -> Update:
        return Update([self.linear(normed[0])], self.bias)


@pytest.mark.parametrize("first", [True, False])
def test_blocking_all_reduces_are_followed_by_their_norm_alone(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With output biases, and where a sum in flight is merged at the same place: what vLLM 0.32
    fuses (AllReduceFusedAddRMSNormPattern, whose module CPUs can't import) is the norm of a
    residual and of an all-reduce that nobody else reads."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import communication_op
    from vllm.model_executor.layers.layernorm import RMSNorm

    from ptconvert.engines.vllm.layers import VLLMServing

    class Serving(VLLMServing):
        def __init__(self) -> None:
            self.first = first

    group = SimpleNamespace(all_reduce=lambda x: torch.ops.vllm.all_reduce(x, group_name="tp"))
    monkeypatch.setattr(communication_op, "get_tp_group", lambda: group)
    schedule = Schedule.parse("a0! m0! a1~1 m1! a2. m2! a3~1 m3!")
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        norm = RMSNorm(16, eps=1e-6)
        layers = nn.ModuleList(Linears(norm) for _ in range(schedule.layers))

        def decode(base: torch.Tensor) -> torch.Tensor:
            return ServedPass(Serving(), layers, None).decode(schedule.program, base, norm, 1.0)

        trace = make_fx(decode, tracing_mode="fake", _allow_non_fake_inputs=True)
        graph = trace(torch.randn(5, 16)).graph
    reduced = [n for n in graph.nodes if n.target is torch.ops.vllm.all_reduce.default]
    assert len(reduced) == 5  # the blocking ones
    for node in reduced:
        (norm_of,) = node.users
        assert norm_of.target.overloadpacket is torch.ops.vllm_ir.fused_add_rms_norm
        assert norm_of.args[0] is node
    added = [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(added) == (11 if first else 6)  # five biases are the first rank's alone
