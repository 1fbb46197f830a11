"""What trainers and compilers wrap layers in, around those of a converted model."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Convert, MakeDense, load, spec_text
from test_modeling import SCHEDULES, TOLERANCE, left_padded
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForSequenceClassification

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.modeling.layers import new_guess
from ptconvert.models.families import guesses_of
from ptconvert.schedule.stages import BLOCKS, Sublayer
from ptconvert.spec.document import parse_spec

NAMES = ("mixed", "track-2-rest")  # layers held dense and layers of tracks, biases in both


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_by_fsdp1(layer: Any) -> Any:
    return FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": lambda layer: torch.compile(layer, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "FSDP1": sharded_by_fsdp1,
    "FSDP2": fully_shard,
}


@pytest.fixture(scope="module")
def converted(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:

    source, found = open_checkpoint(make_dense("llama-biases")), {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp("converted") / name
        spec = parse_spec(spec_text(4, SCHEDULES[name]), "s")
        execute(plan_conversion(source, spec, source_name="x"), found[name])
    return found


def trained(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradients of all parameters."""
    ids_BS, keep_BS = left_padded()
    out = model(input_ids=ids_BS, attention_mask=keep_BS, labels=ids_BS, use_cache=False)
    out.loss.backward()
    gradients = [p.grad for p in model.parameters()]
    full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return out.logits.detach(), full


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_layers_give_the_same(wrapper: str, name: str, converted: dict[str, Path]) -> None:
    check_wrapped(wrapper, converted[name])


def check_wrapped(wrapper: str, path: Path) -> None:
    """Compares a model whose layers are wrapped with the plain one: logits and gradients."""
    plain, model = load(path).train(), load(path).train()
    expected, gradients = trained(plain)
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)
    with process_group(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*returned a view tensor")
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = WRAPPERS[wrapper](layer)
        found, theirs = trained(model)
    assert float((found - expected).abs().max()) < TOLERANCE
    if wrapper != "FSDP1":  # it flattens parameters
        for a, b in zip(gradients, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("schedule", ["use: ladder", "use: parallel_track, depth: 2"])
@pytest.mark.parametrize("variant", ["llama-biases", "gpt_oss", "qwen3_next"])
def test_no_layer_returns_a_view(
    variant: str, schedule: str, make_dense: MakeDense, convert: Convert
) -> None:
    """FSDP warns of these. Views are what linear layers with a bias give, mixtures, and guesses."""
    model, calls = load(convert(make_dense(variant), 2, schedule)), 0
    for layer in model.model.layers:
        for track in getattr(layer, "tracks", nn.ModuleDict()).values():
            for kind in BLOCKS:
                like = next(track.parameters())
                new_guess(track, guesses_of(kind), model.config.hidden_size, 2, like)

    def look(_: nn.Module, __: Any, outputs: tuple[torch.Tensor | None, ...]) -> None:
        nonlocal calls
        calls += 1
        assert all(out is None or out._base is None for out in outputs)

    for layer in model.model.layers:
        layer.register_forward_hook(look)
    model(input_ids=left_padded()[0], use_cache=False)
    assert calls == 2 * len(model.model.layers)


def test_a_compiled_layer_knows_its_mlp_from_its_attention(converted: dict[str, Path]) -> None:
    model = load(converted["track-2-rest"])
    x_BSD = torch.randn(1, 3, 32)
    run = model.model.runner(x_BSD)
    for layer in (0, 1):
        calls = [(k, run(Sublayer(layer, k), [x_BSD], False).partials) for k in BLOCKS]
        model.model.layers[layer].compile(backend="eager")
        for kind, expected in calls:
            found = run(Sublayer(layer, kind), [x_BSD], False).partials
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), kind


@pytest.mark.parametrize("auto", [None, AutoModelForSequenceClassification])
def test_pickles_and_copies(auto: Any, converted: dict[str, Path]) -> None:
    path = converted["track-2-rest"]
    model = load(path) if auto is None else auto.from_pretrained(path).eval()
    ids_BS, _ = left_padded()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert type(again) is type(model) is type(copy.deepcopy(model))
    assert type(again.model.layers[0]) is type(model.model.layers[0])
    with torch.no_grad():
        assert torch.equal(again(ids_BS[:1]).logits, model(ids_BS[:1]).logits)
        assert torch.equal(copy.deepcopy(model)(ids_BS[:1]).logits, model(ids_BS[:1]).logits)
