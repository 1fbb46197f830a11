"""All-reduces that come late, beside what follows: nothing reads a sum before it is waited for, and
what is summed stays as it is until then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, load
from places import on
from test_modeling import SCHEDULES

cuda: Any = torch.cuda  # of which parts have no types
CYCLES = 20_000_000  # of a GPU's clock, about 10 ms: longer than a pass of these takes


@dataclass
class Late:
    """All tracks are in this process, so a sum over ranks is what is given. It is there as late as
    may be: on a GPU on a stream of its own that sleeps first, on a CPU when it is waited for.

    `waits` False is the fault that is looked for.
    """

    waits: bool = True
    stream: Any = None

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        return self.start_all_reduce(partial_BSD)()

    def start_all_reduce(self, partial_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
        late_BSD = torch.full_like(partial_BSD, torch.nan)
        if partial_BSD.is_cuda:
            self.stream = self.stream or cuda.Stream()
            self.stream.wait_stream(cuda.current_stream())
            with cuda.stream(self.stream):
                cuda._sleep(CYCLES)
                late_BSD.copy_(partial_BSD)
            for tensor in (partial_BSD, late_BSD):
                tensor.record_stream(self.stream)

        def wait() -> torch.Tensor:
            if self.waits and partial_BSD.is_cuda:
                cuda.current_stream().wait_stream(self.stream)
            elif self.waits:
                late_BSD.copy_(partial_BSD)
            return late_BSD

        return wait


@pytest.mark.parametrize("name", ["mixed", "ladder", "delayed-3", "track-1-overlap-3"])
@pytest.mark.parametrize("device", ["cpu", on(1, "cuda")])
def test_sums_are_waited_for(
    device: str, name: str, make_dense: MakeDense, convert: Convert
) -> None:
    model = load(convert(make_dense("llama-biases"), 4, SCHEDULES[name])).to(device)
    ids_BS = torch.arange(24, device=device).view(2, 12) + 3
    layers = model.get_decoder().layers
    found = []
    with torch.no_grad():
        expected_BSV = model(ids_BS).logits.cpu()
        for communicator in (Late(), Late(waits=False)):
            layers.communicator = communicator
            found.append(model(ids_BS).logits.cpu())
    assert torch.equal(found[0], expected_BSV)
    assert not torch.equal(found[1], expected_BSV)
