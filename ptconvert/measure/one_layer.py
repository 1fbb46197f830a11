"""One layer of a model by itself, with random weights: how long a window takes in it, and how much
of it is kept for the way back. What a command is going to take is worked out from that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel

import ptconvert
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.config import converted_config
from ptconvert.measure.divergence import loss_and_kl
from ptconvert.measure.needs import Held, Place
from ptconvert.models.families import FAMILIES
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import language_config
from ptconvert.runtime.load import compute_buffers
from ptconvert.runtime.memory import PROCESS_BYTES
from ptconvert.spec.document import parse_spec

PROCESS = Held("the process", PROCESS_BYTES, Place.MEMORY)
_REPEATS = 3  # after one to warm up, the fastest of which counts
_ENOUGH_SECONDS = 1.0  # after which nothing is repeated: what warming up takes is little of it


@dataclass(frozen=True)
class Step:
    """What a window of T tokens takes in a layer: seconds forward, seconds forward and back, and
    bytes of activations that are kept for the way back, `kept` for each window and `fixed` for all
    of a batch together (weights as they are multiplied with, where they are held in another dtype).
    """

    forward: float
    both: float
    kept: int
    fixed: int


def one_layer(config: Mapping[str, object], tracks: int, device: str, dtype: str) -> Any:
    """A decoder of the first layer alone of a dense model's config, held as so many tracks, or
    dense where that is one, in torch's dtype of that name. There is nothing else in it: streams go
    in and come out."""
    ptconvert.register()
    stages = "a0! m0!" if tracks == 1 else "a0. m0!"
    text = f"format: 1\ntracks: {tracks}\nschedule:\n  - {{layers: 0-0, stages: {stages}}}\n"
    spec = parse_spec(text, "one layer")
    config = language_config(config)
    cut: dict[str, object] = {**config, "num_hidden_layers": 1}
    if isinstance(kinds := config.get("layer_types"), list):
        cut["layer_types"] = kinds[:1]
    # where layers differ, one of those with experts, which most are and which take longer
    mixture = {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": []}
    cut |= {key: mixture[key] for key in FAMILIES[str(config["model_type"])].dense}
    converted = converted_config(cut, spec, spec.schedule(), "one layer", Calibration(), {})
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**converted)).eval()
    compute_buffers(model, device)
    model.layers.to_empty(device=device)
    for weight in (*model.layers.parameters(), *model.layers.buffers()):
        if weight.is_floating_point():
            nn.init.normal_(weight, std=0.02)
    model.layers.to(getattr(torch, dtype))
    return model.requires_grad_(False)


def forward_seconds(model: Any, dtype: str, tokens: int) -> float:
    """Seconds of one window of so many tokens in `one_layer`'s layer, by autocast where it is held
    in another dtype."""
    stream_BTD = _stream(model, dtype, 1, tokens)

    def forward() -> None:
        with torch.inference_mode(), _autocast(model, stream_BTD):
            _run(model, stream_BTD)

    return _fastest(forward, stream_BTD.device)


def step_of(model: Any, dtype: str, tokens: int) -> Step:
    """The whole step of `one_layer`'s layer, with gradients of its input and of the weights that
    want them; by autocast where any of them is held in another dtype, as heal trains."""
    weights = list(model.layers.parameters())
    known = {p.untyped_storage()._cdata for p in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    def both(stream_BTD: torch.Tensor) -> None:
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            _autocast(model, stream_BTD),
        ):
            inputs = stream_BTD.clone().requires_grad_()
            out_BTD = _run(model, inputs)
        torch.autograd.backward(out_BTD.sum())

    one_BTD, two_BTD = (_stream(model, dtype, windows, tokens) for windows in (1, 2))
    seconds = _fastest(lambda: both(one_BTD), one_BTD.device)
    one = sum(storage.nbytes() for storage in kept.values())
    both(two_BTD)
    each = sum(storage.nbytes() for storage in kept.values()) - one
    for weight in weights:
        weight.grad = None
    return Step(forward_seconds(model, dtype, tokens), seconds, each, one - each)


def _run(model: Any, stream_BTD: torch.Tensor) -> torch.Tensor:
    schedule = model.layers.schedule
    stages = range(len(schedule.program))
    ended_BTD: torch.Tensor = model.run_stages(schedule, stages, stream_BTD)
    return ended_BTD


def _autocast(model: Any, stream_BTD: torch.Tensor) -> torch.autocast:
    own = stream_BTD.dtype
    mixed = any(weight.dtype != own for weight in model.layers.parameters())
    return torch.autocast(stream_BTD.device.type, own, enabled=mixed)


def _stream(model: Any, dtype: str, windows: int, tokens: int) -> torch.Tensor:
    device = next(model.layers.parameters()).device
    size = windows, tokens, model.config.hidden_size
    return torch.randn(size, device=device, dtype=getattr(torch, dtype))


def in_a_layer(shape: ModelShape, tracks: int, length: int, number: int) -> int:
    """Bytes of one window while a layer runs with all tracks in this process: what is merged, what
    each track waits with, reads and gives; and in one track its norm in fp32 and its neurons."""
    streams = (3 * tracks + 3) * number + 2 * 4
    neurons = max(map(shape.passed_neurons, range(shape.layers)))
    return length * (streams * shape.width + 3 * number * neurons // tracks)


def head_seconds(vocabulary: int, width: int, dtype: str, device: str, tokens: int) -> float:
    """In which two output heads predict so many tokens, and their predictions are compared."""
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    weight_VD = torch.randn(vocabulary, width, **kind)
    hidden_PD = torch.randn(min(tokens, 256), width, **kind)
    target_P = torch.zeros(len(hidden_PD), dtype=torch.long, device=device)

    @torch.inference_mode()
    def compared() -> None:
        ours, theirs = (
            functional.linear(hidden_PD, weight_VD).float().log_softmax(-1) for _ in range(2)
        )
        loss_and_kl(theirs, ours, target_P)

    return _fastest(compared, weight_VD.device) * tokens / len(hidden_PD)


def _fastest(run: Callable[[], None], device: torch.device) -> float:
    taken = list[float]()
    while len(taken) <= _REPEATS and sum(taken) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:] or taken)
