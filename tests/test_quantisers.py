"""Quantisers that replace modules, on converted models with output biases: what they do to the
source they do to the conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, load
from safetensors.torch import load_file, save_file
from test_modeling import left_padded
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from ptconvert.schedule.schedule import Schedule

TRACKS = "a0! m0! a1. m1! a2~1 m2! a3^1 m3! a4. m4. a5. m5!"


def by_transformers(config: Callable[[], Any]) -> Callable[[Path], Any]:
    """Quantised while it is opened, as users do."""
    return lambda path: load(path, quantization_config=config(), device_map="cpu")


def dynamic(path: Path) -> Any:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    return quantise(load(path), {nn.Linear}, dtype=torch.qint8)


class _Rounded(nn.Module):
    """What a quantiser puts in a Linear's place: the same layer, bias and all, coarser weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round() * scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def by_isinstance(path: Path) -> Any:
    """As bitsandbytes and quanto find what to replace, without their kernels."""
    model = load(path)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _Rounded(module))
    return model


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTISERS: dict[str, Callable[[Path], Any]] = {
    "quanto": by_transformers(lambda: QuantoConfig(weights="int8")),
    "torchao": by_transformers(torchao_int8),
    "bitsandbytes": by_transformers(lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "quantize_dynamic": dynamic,
    "by isinstance": by_isinstance,
}


def _is_plain(linear: Any) -> bool:
    """Whether a quantiser has passed a Linear over: neither its class nor its weight changed."""
    return type(linear) is nn.Linear and type(linear.weight.data) is torch.Tensor


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output biases are as large as what they are added to."""
    import shutil

    path = tmp_path_factory.mktemp("biased") / "source"
    shutil.copytree(make_dense("llama-biases", hidden_size=64, intermediate_size=128), path)
    tensors = load_file(path / "model.safetensors")
    torch.manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            tensors[name] = torch.randn_like(tensor)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(left_padded()[0]).logits.float()
    return found


@pytest.mark.parametrize("name", QUANTISERS)
def test_does_to_the_conversion_what_it_does_to_the_source(
    name: str, source: Path, convert: Convert
) -> None:
    quantise = QUANTISERS[name]
    exact, quantised = logits(load(source)), logits(quantise(source))
    own_error = float((quantised - exact).abs().max())
    assert 1e-4 < own_error < 0.2 * float(exact.abs().max())
    dense = convert(source, 4, "use: tensor_parallel")
    assert float((logits(quantise(dense)) - quantised).abs().max()) < 1e-2 * own_error
    tracks = convert(source, 4, f'stages: "{TRACKS}"')
    assert Schedule.parse(TRACKS).track_layers == {1, 3, 4, 5}
    model = quantise(tracks)
    for layer in model.model.layers:  # it found what there is to quantise
        for owner in layer.tracks.values() if hasattr(layer, "tracks") else [layer]:
            assert not _is_plain(owner.mlp.down_proj), name
    error = float((logits(model) - logits(load(tracks))).abs().max())
    # a row of o_proj and down_proj is quantised track by track, and a schedule of its own passes
    # errors on in its own way: of the same size, not the same
    assert error < 3 * own_error


def test_control_a_bias_counted_twice_is_more_than_any_quantisers_error(source: Path) -> None:
    exact = load(source)
    own_error = max(
        float((logits(by_isinstance(source)) - logits(exact)).abs().max()),
        float((logits(dynamic(source)) - logits(exact)).abs().max()),
    )
    twice = copy.deepcopy(exact)
    with torch.no_grad():
        for name, parameter in twice.named_parameters():
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                parameter.mul_(2)
    assert float((logits(twice) - logits(exact)).abs().max()) > 3 * own_error
