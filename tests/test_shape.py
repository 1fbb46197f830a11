"""Config.json as a ModelShape: what is refused and why, and how tracks divide tensors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ptconvert.checkpoint.files import read_config
from ptconvert.errors import ConfigError
from ptconvert.models.families import FAMILIES
from ptconvert.models.shape import ModelShape

BASE: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}


HYBRID: dict[str, object] = {
    **BASE,
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_type": "deepseek_v2"}, "deepseek_v2 can't be converted: its attention goes"),
        ({"model_type": "deepseek_v4"}, "its residual stream is several, mixed anew"),
        ({"model_type": "glm5_next"}, "hyper-connections"),
        ({"model_type": "gemma3n"}, "its layers have inputs of their own"),
        ({"model_type": "olmo3"}, "it norms the queries and keys of all heads together"),
        ({"model_type": "qwen2_moe"}, "its mixture of experts is none"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": None}, "must name a family"),
        ({"num_experts": 8}, "with experts can't be converted"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "runs its own code"),
        ({"ptconvert": {}}, "converted already"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype is \\['bfloat16'\\]; the weights must be"),
        ({"torch_dtype": "int8"}, "the weights must be bfloat16"),
        ({"num_key_value_heads": 3}, "don't share 3 KV heads evenly"),
    ],
)
def test_refused_by_name_with_the_reason(changed: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        ModelShape.from_config({**BASE, **changed})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"full_attention_interval": None}, "full_attention_interval is None"),
        ({"full_attention_interval": "4"}, "full_attention_interval is '4'"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; it must say of each"),
        ({"layer_types": [["x"], "full_attention"]}, "it must say of each of 2 layers that it is"),
        ({"layer_types": ["full_attention"]}, "of each of 2 layers that it is full_attention or"),
        (
            {"linear_num_value_heads": 6, "linear_num_key_heads": 4},
            "6 value heads .* don't share 4",
        ),
        ({"architectures": ["Qwen3_5Model"]}, "only Qwen3_5ForCausalLM can be converted"),
    ],
)
def test_kinds_of_layers_that_are_wrong(changed: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelShape.from_config({**HYBRID, **changed})


def test_kinds_of_layers() -> None:
    every = ModelShape.from_config({**HYBRID, "num_hidden_layers": 8})
    assert [i for i in range(8) if not every.is_linear(i)] == [3, 7]
    third = {"num_hidden_layers": 6, "full_attention_interval": 3}
    assert [
        i for i in range(6) if not ModelShape.from_config({**HYBRID, **third}).is_linear(i)
    ] == [
        2,
        5,
    ]
    given = ["full_attention", "linear_attention"]
    shape = ModelShape.from_config({**HYBRID, "layer_types": given})
    assert shape.kinds == tuple(frozenset([kind]) for kind in given)
    assert {r.name.split(".")[0] for r in shape.rules_of(0)} >= {"self_attn", "mlp"}
    assert {r.name.split(".")[0] for r in shape.rules_of(1)} >= {"linear_attn", "mlp"}
    assert [every.attention_units(i) for i in (0, 3)] == [16, 2]
    base = ModelShape.from_config({**HYBRID, "architectures": ["Qwen3_5TextModel"]})
    assert (reason := base.indivisible(32)) and "16 heads of linear attention" in reason


@pytest.mark.parametrize(("tracks", "fits"), [(1, True), (2, True), (4, True), (3, False)])
def test_divisibility(tracks: int, fits: bool) -> None:
    assert (ModelShape.from_config(BASE).indivisible(tracks) is None) == fits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tracks", [1, 2, 4, 8])
def test_spans_tile_each_tensor_or_repeat_it(family: str, tracks: int) -> None:
    config = {**BASE, "model_type": family, "architectures": None, "attention_bias": True}
    config |= dict.fromkeys(FAMILIES[family].refused, 0)  # which some have by default
    if not FAMILIES[family].causal_lm:
        config = {"model_type": "qwen3_vl", "text_config": config}
    shape = ModelShape.from_config(config)
    for rule in shape.rules_of(0):
        spans = sorted({span for t in range(tracks) for span in shape.spans(rule, t, tracks)})
        size = shape.size(rule)
        assert spans[0][0] == 0 and spans[-1][1] == (size[rule.axis] if size else 1)
        assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_query_heads_stay_with_their_kv_head() -> None:
    shape = ModelShape.from_config(BASE)
    rules = {r.name: r for r in shape.rules_of(0)}
    for tracks in (2, 4, 8):
        for t in range(tracks):
            (queries,) = shape.spans(rules["self_attn.q_proj.weight"], t, tracks)
            (keys,) = shape.spans(rules["self_attn.k_proj.weight"], t, tracks)
            group = shape.heads * shape.head_size // shape.kv_heads
            wanted = queries[0] // group, (queries[1] - 1) // group
            assert (keys[0] // shape.head_size, (keys[1] - 1) // shape.head_size) == wanted


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": ' * 20_000])
def test_unreadable_configs(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="is missing"):
        read_config(tmp_path / "other.json")
