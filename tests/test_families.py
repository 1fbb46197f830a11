"""The table of families against transformers' classes, and what must fail where it is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
import transformers
from conftest import VARIANTS, Convert, MakeDense, load
from reference import reference_logits
from test_modeling import TOLERANCE, difference, left_padded

import ptconvert.modeling.layers as layers_module
import ptconvert.models.shape as shape_module
from ptconvert.modeling.layers import TrackConfig, layer_class
from ptconvert.modeling.model import BASE_MODELS, CAUSAL_LMS
from ptconvert.models import families
from ptconvert.models.families import KV, D, Q
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.stages import Kind, Sublayer

OF_A_FAMILY = {name: VARIANTS[name] for name in VARIANTS if name in CAUSAL_LMS}


def config_of(variant: str, **changed: Any) -> Any:
    family, settings = VARIANTS[variant]
    sizes = {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16},
    }
    config_class = getattr(transformers, f"{family}ForCausalLM").config_class
    return config_class(**{**settings, **sizes, "pad_token_id": 0, **changed})


def shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def test_every_family_is_tested() -> None:
    assert set(OF_A_FAMILY) == set(families.FAMILIES)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_cuts_what_the_classes_do(variant: str, tracks: int, kv_heads: int) -> None:
    """A dense layer and a track's layer differ where the table cuts, by as much, nowhere else."""
    config = config_of(variant, num_key_value_heads=kv_heads)
    shape = ModelShape.from_config(config.to_dict())
    for layer in range(shape.layers):
        with torch.device("meta"):
            dense = layer_class(config)(config, layer)
            track = layer_class(config)(TrackConfig(config, tracks), layer)
        rules = {rule.name: rule for rule in shape.rules_of(layer)}
        assert shapes(dense) == {name: shape.size(rule) for name, rule in rules.items()}
        assert shapes(track) == {name: shape.share(rule, tracks) for name, rule in rules.items()}
        for kind in Kind:  # its input is divided, so that what it gives is a partial
            block = shape.block(Sublayer(layer, kind))
            output = rules[f"{block.name}.{block.output}.weight"]
            assert output.axis == 1
            assert math.prod(shape.share(output, tracks)) * tracks == math.prod(shape.size(output))


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_what_generate_and_the_trainer_ask_a_forward(variant: str) -> None:
    for ours in (BASE_MODELS[variant], CAUSAL_LMS[variant]):
        theirs = getattr(transformers, ours.__name__.removeprefix("PTConvert"))
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_one_track_is_the_source_and_ladder_is_the_same_for_every_n(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """Without output biases, which no track sees before the merge."""
    rules = families.FAMILIES[variant].layer
    common = {rule.when: False for rule in rules if rule.common and rule.when}
    source, (ids_BS, keep_BS) = make_dense(variant, **common), left_padded()

    def logits(tracks: int, schedule: str) -> torch.Tensor:
        model = load(convert(source, tracks, schedule))
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids_BS, attention_mask=keep_BS).logits
        return found

    with torch.no_grad():
        dense = load(source)(input_ids=ids_BS, attention_mask=keep_BS).logits
    track, ladder = "use: parallel_track, depth: 2, overlap: 1", "use: ladder"
    assert difference(logits(1, track), dense, keep_BS) < TOLERANCE
    assert difference(logits(2, track), dense, keep_BS) > 100 * TOLERANCE
    assert difference(logits(2, ladder), logits(1, ladder), keep_BS) < TOLERANCE
    assert difference(logits(1, ladder), dense, keep_BS) > 100 * TOLERANCE


def dense_then_tracks() -> str:
    return "a0! m0! " + " ".join(f"a{i}. m{i}!" for i in range(1, 6))


def changed(family: str, name: str, **rule: Any) -> families.Family:
    """A family whose table is wrong about one tensor."""
    own = families.FAMILIES[family]
    rules = tuple(dataclasses.replace(r, **rule) if r.name == name else r for r in own.layer)
    assert rules != own.layer
    return dataclasses.replace(own, layer=rules)


WRONG = {
    "segments in another order": changed(
        "phi3", "self_attn.qkv_proj.weight", axes=((KV, KV, Q), D)
    ),
    "a bias on every track": changed("starcoder2", "mlp.c_proj.bias", common=False),
    "a bias that is no track's": changed("seed_oss", "mlp.up_proj.bias", common=True),
    "no multiplier": dataclasses.replace(families.FAMILIES["granite"], multiplier=None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_table_that_is_wrong_is_not_the_reference(
    wrong: str, make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = WRONG[wrong]
    source, (ids_BS, keep_BS) = make_dense(family.model_type), left_padded()
    expected = reference_logits(load(source), dense_then_tracks(), 2, ids_BS, keep_BS)

    def off() -> float:
        model = load(convert(source, 2, f"stages: '{dense_then_tracks()}'"))
        with torch.no_grad():
            found = model(input_ids=ids_BS, attention_mask=keep_BS).logits
        return difference(found, expected, keep_BS)

    assert off() < TOLERANCE
    for module in (shape_module, layers_module):
        monkeypatch.setattr(module, "FAMILIES", {**families.FAMILIES, family.model_type: family})
    assert not off() < 100 * TOLERANCE  # or nothing at all, where a tensor is missing
