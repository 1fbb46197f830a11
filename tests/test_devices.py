"""Layers on several devices, as transformers' `device_map` and accelerate put them.

There is one device with numbers here: "disk", from which accelerate brings each module's parameters
for its call, shows that every parameter is used within the call of its module; and "meta", on which
nothing is computed but shapes, shows that streams follow the layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import compute_module_sizes
from conftest import LAYERS, SIZES, VARIANTS, Convert, MakeDense, load, spec_text
from test_modeling import SCHEDULES, left_padded
from transformers import AutoModelForCausalLM

from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.config import converted_config
from ptconvert.spec.document import parse_spec
from ptconvert.verify.session import greedy_steps

OUTSIDE = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def placed(others: str, first: int) -> dict[str, str]:
    """Everything on the CPU but the layers from `first` on."""
    layers = {f"model.layers.{i}": "cpu" if i < first else others for i in range(LAYERS)}
    return {**dict.fromkeys(OUTSIDE, "cpu"), **layers}


@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("name", ["mixed", "track-2-rest", "tensor_parallel"])
def test_layers_brought_from_a_disk(
    name: str, variant: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    path = convert(make_dense(variant), 4, SCHEDULES[name])
    whole = load(path)
    model = load(path, device_map=placed("disk", 1), offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in model.parameters())
    ids_BS, keep_BS = left_padded()
    settings: dict[str, Any] = {"attention_mask": keep_BS, "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(ids_BS).logits, whole(ids_BS).logits)
    assert torch.equal(model.generate(ids_BS, **settings), whole.generate(ids_BS, **settings))


# Its m2|a3 runs tracks on one device beside a layer held dense on the other.
ACROSS = "a0! a2. m0! a1! m1! m2|a3! m3! a4! m4! a5! m5!"


@pytest.mark.parametrize("name", ["mixed", "track-2-rest", "track-1-overlap-3", "ladder", "across"])
def test_streams_follow_the_layers_from_device_to_device(
    name: str, make_dense: MakeDense, convert: Convert
) -> None:
    """With what is pending and in flight at the crossing, in prefill and in decode."""
    schedule = SCHEDULES.get(name, f'stages: "{ACROSS}"')
    model = load(convert(make_dense("llama-biases"), 4, schedule))
    places = {**placed("meta", 3), "model.norm": "meta", "lm_head": "meta"}
    for module, device in places.items():
        found = model.get_submodule(module).to(device)
        hook = AlignDevicesHook(device, skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(found, hook)
    ids_BS, _ = left_padded()
    with torch.no_grad():
        out = model(ids_BS, use_cache=True)
        assert out.logits.is_meta and out.logits.shape == (3, 12, 96)
        cached = [layer.keys.device.type for layer in out.past_key_values.layers]
        assert cached[:LAYERS] == ["cpu"] * 3 + ["meta"] * 3
        next_ids_B1 = ids_BS[:, :1]
        assert model(next_ids_B1, past_key_values=out.past_key_values).logits.is_meta


def on_meta(variant: str) -> Any:
    """A converted model of a variant, all of which is on that device."""
    family, settings = VARIANTS[variant]
    config = getattr(transformers, f"{family}ForCausalLM").config_class(**{**SIZES, **settings})
    spec = parse_spec(spec_text(2, "use: parallel_track, depth: 2"), "spec.yaml")
    own = converted_config(config.to_dict(), spec, spec.schedule(), "dense", Calibration(), {})
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**own)
        return AutoModelForCausalLM.from_config(config).eval()


# Of each kind that has code of its own in a forward pass, but mixtures: which experts tokens choose
# isn't known there.
KINDS = ["llama-biases", "mistral-window", "gemma2", "gemma4_text", "hyperclovax", "cohere2"]
KINDS += ["qwen3_5_text"]


@pytest.mark.parametrize("variant", KINDS)
def test_nothing_is_made_on_another_device(variant: str) -> None:
    """By a prefill and a cached step, as on a GPU; torch refuses sums over two devices."""
    model = on_meta(variant)
    ids_BS = torch.zeros(2, 5, dtype=torch.long, device="meta")
    for _, step in greedy_steps(model, ids_BS, 2):
        logits_BSV, tokens_B1 = step()
        assert logits_BSV.is_meta and tokens_B1.is_meta
    model.get_decoder().norm.weight = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(RuntimeError, match="device cpu"):
        next(greedy_steps(model, ids_BS, 1))[1]()


def test_a_layer_is_never_divided_between_devices(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("llama-biases"), 4, SCHEDULES["track-2-rest"]))
    half = compute_module_sizes(model)[""] // 2
    memory = {"cpu": half, "disk": 10 * half}
    places = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    layers = {n: d for n, d in places.items() if n.startswith("model.layers")}
    assert set(layers) == {f"model.layers.{i}" for i in range(LAYERS)}
    assert set(layers.values()) == {"cpu", "disk"}
