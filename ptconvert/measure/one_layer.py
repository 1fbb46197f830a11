"""One layer of a model by itself, or of each kind that its layers are of, with random weights: how
long a window takes in it, and how much of it is kept for the way back. What a command is going to
take is worked out from that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
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
from ptconvert.models.families import Layer
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import language_config
from ptconvert.runtime.load import attention_of, compute_buffers
from ptconvert.runtime.memory import PROCESS_BYTES
from ptconvert.spec.document import parse_spec

PROCESS = Held("the process", PROCESS_BYTES, Place.MEMORY)
_REPEATS = 3  # after one to warm up, the fastest of which counts
_ENOUGH_SECONDS = 1.0  # after which nothing is repeated: what warming up takes is little of it


@dataclass(frozen=True)
class Step:
    """What a window of T tokens takes in a layer, in the mean over the model's: seconds forward,
    seconds forward and back, and bytes of activations that are kept for the way back, `kept` for
    each window and `fixed` for all of a batch together (weights as they are multiplied with, where
    they are held in another dtype).
    """

    forward: float
    both: float
    kept: int
    fixed: int


def one_layer(config: Mapping[str, object], tracks: int, device: str, dtype: str) -> Any:
    """A decoder of a dense model's config, held as so many tracks, or dense where that is one, in
    torch's dtype of that name. Of its layers one of each kind has memory; its `shares` say how many
    of the model's layers are such. There is nothing else in it: streams go in and come out."""
    ptconvert.register()
    config = language_config(config)
    kinds = ModelShape.from_config(config).kinds
    cut, first = _least(config, kinds)
    layers = 1 + max(first.values())
    stages = " ".join(f"a{i}! m{i}!" if tracks == 1 else f"a{i}. m{i}!" for i in range(layers))
    items = f"  - {{layers: 0-{layers - 1}, stages: {stages}}}\n"
    spec = parse_spec(f"format: 1\ntracks: {tracks}\nschedule:\n{items}", "one layer")
    converted = converted_config(cut, spec, spec.schedule(), "one layer", Calibration(), {})
    with torch.device("meta"):
        model = AutoModel.from_config(
            AutoConfig.for_model(**converted), attn_implementation=attention_of(converted)
        ).eval()
    compute_buffers(model, device)
    for index in first.values():
        layer = model.layers[index].to_empty(device=device)
        for weight in (*layer.parameters(), *layer.buffers()):
            if weight.is_floating_point():
                nn.init.normal_(weight, std=0.02)
        layer.to(getattr(torch, dtype))
    model.shares = {index: kinds.count(kind) / len(kinds) for kind, index in first.items()}
    return model.requires_grad_(False)


def _least(
    config: Mapping[str, object], kinds: Sequence[Layer]
) -> tuple[dict[str, object], dict[Layer, int]]:
    """A config with the fewest first layers that are of all kinds, and the first layer of each."""
    for layers in range(len(set(kinds)), len(kinds) + 1):
        cut: dict[str, object] = {**config, "num_hidden_layers": layers}
        if isinstance(types := config.get("layer_types"), list):
            cut["layer_types"] = types[:layers]
        if isinstance(own := config.get("per_layer_config"), Mapping):
            cut["per_layer_config"] = {k: v for k, v in own.items() if int(k) < layers}
        found = ModelShape.from_config(cut).kinds
        if set(found) == set(kinds) and found == tuple(kinds[:layers]):
            break
    return cut, {kind: found.index(kind) for kind in dict.fromkeys(found)}


def forward_seconds(model: Any, dtype: str, tokens: int) -> float:
    """Seconds of one window of so many tokens in a layer of `one_layer`'s, in the mean over the
    model's, by autocast where it is held in another dtype."""
    shares: Mapping[int, float] = model.shares
    return sum(share * _forward(model, index, dtype, tokens) for index, share in shares.items())


def step_of(model: Any, dtype: str, tokens: int) -> Step:
    """The whole step of a layer of `one_layer`'s, in the mean over the model's, with gradients of
    its input and of the weights that want them; by autocast where any of them is held in another
    dtype, as heal trains."""
    steps = [(share, _step(model, i, dtype, tokens)) for i, share in model.shares.items()]
    forward, both, kept, fixed = (
        sum(share * getattr(step, field.name) for share, step in steps) for field in fields(Step)
    )
    return Step(forward, both, int(kept), int(fixed))


def _forward(model: Any, index: int, dtype: str, tokens: int) -> float:
    stream_BTD = _stream(model, index, dtype, 1, tokens)

    def forward() -> None:
        with torch.inference_mode(), _autocast(model, index, stream_BTD):
            _run(model, index, stream_BTD)

    return _fastest(forward, stream_BTD.device)


def _step(model: Any, index: int, dtype: str, tokens: int) -> Step:
    weights = list(model.layers[index].parameters())
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
            _autocast(model, index, stream_BTD),
        ):
            inputs = stream_BTD.clone().requires_grad_()
            out_BTD = _run(model, index, inputs)
        torch.autograd.backward(out_BTD.sum())

    one_BTD, two_BTD = (_stream(model, index, dtype, windows, tokens) for windows in (1, 2))
    seconds = _fastest(lambda: both(one_BTD), one_BTD.device)
    one = sum(storage.nbytes() for storage in kept.values())
    both(two_BTD)
    each = sum(storage.nbytes() for storage in kept.values()) - one
    for weight in weights:
        weight.grad = None
    return Step(_forward(model, index, dtype, tokens), seconds, each, one - each)


def _run(model: Any, index: int, stream_BTD: torch.Tensor) -> torch.Tensor:
    stages = range(2 * index, 2 * index + 2)
    ended_BTD: torch.Tensor = model.run_stages(model.layers.schedule, stages, stream_BTD)
    return ended_BTD


def _autocast(model: Any, index: int, stream_BTD: torch.Tensor) -> torch.autocast:
    own = stream_BTD.dtype
    mixed = any(weight.dtype != own for weight in model.layers[index].parameters())
    return torch.autocast(stream_BTD.device.type, own, enabled=mixed)


def _stream(model: Any, index: int, dtype: str, windows: int, tokens: int) -> torch.Tensor:
    device = next(model.layers[index].parameters()).device
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
