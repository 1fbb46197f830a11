"""The executor and the model against the literal reference, and DESIGN's identities."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VARIANTS, Convert, MakeDense, load
from reference import reference_logits
from transformers import StaticCache
from transformers.distributed import DistributedConfig

TOLERANCE = 1e-4
REST = "  - {{layers: 0-{0}, use: tensor_parallel}}\n  - {{layers: {1}-5, {2}}}\n"

# Presets in all layers and in some, and schedules that no preset gives.
SCHEDULES = {
    "tensor_parallel": "use: tensor_parallel",
    "parallel_block": "use: parallel_block",
    "layer_parallel": "use: layer_parallel",
    "sync_point_drop": "use: sync_point_drop",
    "ladder": "use: ladder",
    "ladder-last": REST.format(2, 3, "use: ladder"),
    "delayed-1": "use: delayed, delay: 1",
    "delayed-3": "use: delayed, delay: 3",
    "desync-4": "use: desync, every: 4",
    "desync-3": "use: desync, every: 3",
    "track-1": "use: parallel_track, depth: 1",
    "track-4": "use: parallel_track, depth: 4",
    "track-2-rest": REST.format(0, 1, "use: parallel_track, depth: 2"),
    "track-2-overlap-1": "use: parallel_track, depth: 2, overlap: 1",
    "track-1-overlap-3": "use: parallel_track, depth: 1, overlap: 3",
    "track-then-ladder": (
        "  - {layers: 0-2, use: parallel_track, depth: 3}\n  - {layers: 3-5, use: ladder}\n"
    ),
    "mixed": ('  - {layers: 0-5, stages: "a0! m0^2 a1|a2~1 m1. m2~2 a3|m3^3 a4. m4! a5~9 m5^7"}\n'),
}
SAME_FOR_EVERY_N = ("tensor_parallel", "parallel_block", "layer_parallel", "ladder", "ladder-last")
DENSE_FOR_ONE_TRACK = ("sync_point_drop", "delayed-3", "desync-3", "track-4", "track-2-overlap-1")


def left_padded(batch: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (B, S) and their attention mask, padded on the left by 0, 3, 6, ... tokens."""
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, 96, (batch, length), generator=generator)
    keep_BS = torch.ones_like(ids_BS)
    for row in range(batch):
        keep_BS[row, : 3 * row] = 0
    return ids_BS * keep_BS, keep_BS


def step_logits(model: Any, ids_BS: torch.Tensor, keep_BS: torch.Tensor, prefill: int) -> Any:
    """Logits from a prefill and then cached steps of one token, as (B, S, vocabulary)."""
    positions = (keep_BS.cumsum(-1) - 1).clamp(min=0)
    cache, found = None, []
    for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, ids_BS.shape[1]))]:
        with torch.no_grad():
            out = model(
                input_ids=ids_BS[:, start:stop],
                attention_mask=keep_BS[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def difference(a: torch.Tensor, b: torch.Tensor, keep_BS: torch.Tensor) -> float:
    return float((a - b).abs()[keep_BS.bool()].max())


@pytest.mark.parametrize("tracks", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_matches_the_reference_in_prefill_and_decode(
    name: str, tracks: int, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("llama")
    model = load(convert(source, tracks, SCHEDULES[name]))
    ids_BS, keep_BS = left_padded()
    text = str(model.model.layers.schedule)
    expected = reference_logits(load(source), text, tracks, ids_BS, keep_BS)
    assert difference(step_logits(model, ids_BS, keep_BS, 12), expected, keep_BS) < TOLERANCE
    assert difference(step_logits(model, ids_BS, keep_BS, 7), expected, keep_BS) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["mixed", "track-2-rest"])
def test_every_family_matches_the_reference(
    variant: str, name: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant)
    model = load(convert(source, 4, SCHEDULES[name]))
    ids_BS, keep_BS = left_padded()
    expected = reference_logits(load(source), str(model.model.layers.schedule), 4, ids_BS, keep_BS)
    assert difference(step_logits(model, ids_BS, keep_BS, 8), expected, keep_BS) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_is_the_source_model(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant)
    dense, model = load(source), load(convert(source, 4, "use: tensor_parallel"))
    ids_BS, keep_BS = left_padded()
    with torch.no_grad():
        a = model(input_ids=ids_BS, attention_mask=keep_BS).logits
        b = dense(input_ids=ids_BS, attention_mask=keep_BS).logits
    assert difference(a, b, keep_BS) < TOLERANCE
    settings = {"attention_mask": keep_BS, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids_BS, **settings), dense.generate(ids_BS, **settings))


@pytest.mark.parametrize(("variant", "way"), [("gemma3_text", True), ("gemma4_text", "all")])
def test_tokens_see_later_ones_where_the_source_says_so(
    variant: str, way: object, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant, use_bidirectional_attention=way)
    dense, converted = load(source), load(convert(source, 2, "use: tensor_parallel"))
    ids_BS = torch.randint(1, 60, (2, 24))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :7] = 0
    seen = mask_BS.bool()
    with torch.no_grad():
        wanted, found = (m(ids_BS, attention_mask=mask_BS).logits for m in (dense, converted))
        torch.testing.assert_close(found[seen], wanted[seen])
        ids_BS[:, -1] = 61  # a control: the first of the tokens depend on the last
        assert not torch.allclose(converted(ids_BS).logits[1, 0], found[1, 0])


@pytest.mark.parametrize("deferred", ["sum", "mean"])
def test_deferred_rule(deferred: str, make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("llama-biases")
    converted = convert(source, 4, SCHEDULES["desync-3"], top=f"deferred: {deferred}\n")
    model = load(converted)
    ids_BS, keep_BS = left_padded()
    text, dense = str(model.model.layers.schedule), load(source)
    found = step_logits(model, ids_BS, keep_BS, 8)
    expected = reference_logits(dense, text, 4, ids_BS, keep_BS, deferred)
    assert difference(found, expected, keep_BS) < TOLERANCE
    other = "mean" if deferred == "sum" else "sum"
    control = reference_logits(dense, text, 4, ids_BS, keep_BS, other)
    assert difference(found, control, keep_BS) > 100 * TOLERANCE


@pytest.mark.parametrize("name", SAME_FOR_EVERY_N)
def test_same_function_for_every_number_of_tracks(
    name: str, make_dense: MakeDense, convert: Convert
) -> None:
    ids_BS, keep_BS = left_padded()
    found = [
        step_logits(load(convert(make_dense("llama"), n, SCHEDULES[name])), ids_BS, keep_BS, 12)
        for n in (1, 2, 4)
    ]
    assert difference(found[0], found[1], keep_BS) < TOLERANCE
    assert difference(found[0], found[2], keep_BS) < TOLERANCE


@pytest.mark.parametrize("name", DENSE_FOR_ONE_TRACK)
def test_one_track_is_the_dense_model(name: str, make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("llama")
    ids_BS, keep_BS = left_padded()
    one = step_logits(load(convert(source, 1, SCHEDULES[name])), ids_BS, keep_BS, 12)
    dense = step_logits(load(source), ids_BS, keep_BS, 12)
    assert difference(one, dense, keep_BS) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "was", "becomes"),
    [
        ("track-4", "m3!", "m3."),
        ("sync_point_drop", "m2!", "m2."),
        ("ladder", "m2~1", "m2~2"),
        ("delayed-3", "a1^3", "a1^2"),
        ("track-2-overlap-1", "m1^1", "m1~1"),
        ("tensor_parallel", "a4!", "a4~1"),
        ("parallel_block", "a3|m3!", "a3! m3!"),
    ],
)
def test_negative_control_a_changed_schedule_differs(
    name: str, was: str, becomes: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("llama")
    model = load(convert(source, 4, SCHEDULES[name]))
    ids_BS, keep_BS = left_padded()
    text = str(model.model.layers.schedule)
    changed = " ".join(f" {text} ".replace(f" {was} ", f" {becomes} ").split())
    assert changed != text
    control = reference_logits(load(source), changed, 4, ids_BS, keep_BS)
    assert difference(step_logits(model, ids_BS, keep_BS, 12), control, keep_BS) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["tensor_parallel", "track-4"])
def test_negative_control_a_bias_counted_twice_differs(
    name: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("llama-biases")
    model = load(convert(source, 4, SCHEDULES[name]))
    ids_BS, keep_BS = left_padded()
    text = str(model.model.layers.schedule)
    found = step_logits(model, ids_BS, keep_BS, 12)
    once = reference_logits(load(source), text, 4, ids_BS, keep_BS)
    twice = reference_logits(load(source), text, 4, ids_BS, keep_BS, common_weight=2.0)
    assert difference(found, once, keep_BS) < TOLERANCE
    assert difference(found, twice, keep_BS) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["track-2-rest", "ladder", "mixed"])
def test_generate_equals_greedy_reference(
    name: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("qwen3")
    model, dense = load(convert(source, 4, SCHEDULES[name])), load(source)
    ids_BS, keep_BS = left_padded()
    new = model.generate(
        ids_BS, attention_mask=keep_BS, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    text = str(model.model.layers.schedule)
    for _ in range(6):
        logits = reference_logits(dense, text, 4, ids_BS, keep_BS)
        ids_BS = torch.cat([ids_BS, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        keep_BS = torch.cat([keep_BS, keep_BS[:, -1:]], dim=1)
    assert torch.equal(new, ids_BS)


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("cache", [None, "static", "beams", "own"])
def test_generate_with_every_cache(
    cache: str | None, variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    model = load(convert(make_dense(variant), 4, SCHEDULES["mixed"]))
    ids_BS, keep_BS = left_padded()
    settings: dict[str, Any] = {"attention_mask": keep_BS, "max_new_tokens": 8, "do_sample": False}
    if cache == "beams":
        settings["num_beams"] = 3
    expected = model.generate(ids_BS, use_cache=False, **settings)
    if cache == "static":
        settings["cache_implementation"] = "static"
    if cache == "own":
        settings["past_key_values"] = StaticCache(config=model.config, max_cache_len=100)
    assert torch.equal(model.generate(ids_BS, **settings), expected)


def test_keys_that_a_family_does_not_know_change_nothing(
    make_dense: MakeDense, convert: Convert
) -> None:
    stray = {"sliding_window": 4, "layer_types": ["sliding_attention"] * 6}
    source = make_dense("llama", **stray)
    ids_BS, keep_BS = left_padded()
    found = step_logits(load(convert(source, 4, "use: ladder")), ids_BS, keep_BS, 12)
    expected = step_logits(
        load(convert(make_dense("llama"), 4, "use: ladder")), ids_BS, keep_BS, 12
    )
    assert difference(found, expected, keep_BS) < TOLERANCE


@pytest.mark.slow
def test_compiles(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("llama-biases"), 4, SCHEDULES["mixed"]))
    ids_BS, _ = left_padded()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids_BS).logits, model(ids_BS).logits)


def test_gradients_reach_every_parameter_and_match_with_checkpointing(
    make_dense: MakeDense, convert: Convert
) -> None:
    model = load(convert(make_dense("llama-biases"), 4, SCHEDULES["mixed"])).train()
    ids_BS, keep_BS = left_padded()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids_BS, attention_mask=keep_BS, labels=ids_BS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    assert all(g.abs().sum() > 0 for g in plain.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], msg=name)


def test_one_training_step_moves_tracks_apart(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("llama"), 4, SCHEDULES["track-4"])).train()
    ids_BS, keep_BS = left_padded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids_BS, attention_mask=keep_BS, labels=ids_BS).loss.backward()
    optimizer.step()
    norms = [t.input_layernorm.weight for t in model.model.layers[1].tracks.values()]
    assert not torch.equal(norms[0], norms[1])


def test_save_and_reload(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    model = load(convert(make_dense("llama-biases"), 4, SCHEDULES["mixed"]))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = load(tmp_path / "again")
    ids_BS, keep_BS = left_padded()
    a, b = (step_logits(m, ids_BS, keep_BS, 12) for m in (model, again))
    assert torch.equal(a, b)
    assert (tmp_path / "again" / "modeling_ptconvert.py").is_file()


def test_attention_implementation_reaches_the_tracks(
    make_dense: MakeDense, convert: Convert
) -> None:
    model = load(convert(make_dense("llama"), 4, SCHEDULES["track-4"]))
    ids_BS, keep_BS = left_padded()
    eager = step_logits(model, ids_BS, keep_BS, 7)
    model.set_attn_implementation("sdpa")
    track = model.model.layers[0].tracks["0"].self_attn
    assert track.config._attn_implementation == "sdpa"
    assert difference(step_logits(model, ids_BS, keep_BS, 7), eager, keep_BS) < TOLERANCE
    assert copy.deepcopy(track).config.num_attention_heads == 2


def test_what_tracks_have_no_answer_to_is_refused(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("llama"), 4, SCHEDULES["track-4"]))
    ids_BS, _ = left_padded()
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(input_ids=ids_BS, output_hidden_states=True)
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize(
    "asked",
    [
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"distributed_config": DistributedConfig(tp_size=2)},
        {"distributed_config": DistributedConfig(pp_size=2)},
        {"distributed_config": {"tp_size": 2}},
    ],
)
def test_transformers_own_cuts_are_refused(
    asked: dict[str, Any], make_dense: MakeDense, convert: Convert
) -> None:
    """By its plan each rank would compute all tracks."""
    path = convert(make_dense("llama"), 2, "use: ladder")
    with pytest.raises(ValueError, match=r"_(plan|size): transformers would cut layers, but each"):
        load(path, **asked)
    assert not load(path).supports_tp_plan


def test_continuous_batching_is_refused(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("llama"), 2, "use: ladder"))
    with pytest.raises(ValueError, match="continuous batching: transformers' paged cache has an"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)


def test_ladder_authors_checkpoint_opens_as_ladder(make_dense: MakeDense, convert: Convert) -> None:
    from ptconvert.modeling.model import CAUSAL_LMS

    theirs = make_dense("llama", ladder_layers=3)
    model = CAUSAL_LMS["llama"].from_pretrained(theirs).eval()
    assert str(model.model.layers.schedule).endswith("m2~1 a3~1 m3~1 a4~1 m4~1 a5~1 m5!")
    ours = load(convert(make_dense("llama"), 4, SCHEDULES["ladder-last"]))
    ids_BS, keep_BS = left_padded()
    a, b = (step_logits(m, ids_BS, keep_BS, 12) for m in (model, ours))
    assert difference(a, b, keep_BS) < TOLERANCE
