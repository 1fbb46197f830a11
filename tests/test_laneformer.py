"""Laneformer's delayed lanes as a preset, against a literal reference of their definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Convert, MakeDense, load
from reference import ended, layer_inputs, sublayer_partials
from test_modeling import TOLERANCE, difference, left_padded, step_logits
from test_transform import back, same, tensors

from ptconvert.schedule.presets import PRESETS
from ptconvert.schedule.schedule import Schedule


@torch.no_grad()
def laneformer_logits(
    model: object, lanes: int, delay: int, early_comm: bool = True, theirs: bool = False
) -> torch.Tensor:
    """The equations of LaneformerDecoderLayer (kogai/laneformer-2b-it) on a dense model's layers,
    each lane with its own heads and neurons. With p_t a sublayer's partial in lane t, of layer i:

        i < delay:   x_t += sum of all p_u (PRESENT), or without early_comm sqrt(n) p_t (NO_REDUCE)
        else:        x_t += p_t + the p_u of layer i - delay for all u other than t (PAST)

    and at the end the mean over lanes of what the final norm gives each, which is as well the mean
    of the head's. That is `theirs`. The preset leaves out what no schedule says: what was summed at
    once doesn't arrive again, and at the end all that is under way does, so that lanes agree.
    """
    ids_BS, keep_BS = left_padded()
    positions = (keep_BS.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids_BS, "attention_mask": keep_BS, "position_ids": positions}
    base_BSD, contexts, _ = layer_inputs(model, given)
    x_TBSD = base_BSD.expand(lanes, *base_BSD.shape)
    past: dict[str, torch.Tensor] = {}
    for i, context in enumerate(contexts):
        for kind in "am":
            p_TBSD, _ = sublayer_partials(model, f"{kind}{i}", x_TBSD, context)
            if theirs or i >= delay:
                past[f"{kind}{i}"] = p_TBSD
            if i >= delay:
                x_TBSD = x_TBSD + p_TBSD
            else:
                x_TBSD = x_TBSD + (p_TBSD.sum(0) if early_comm else lanes**0.5 * p_TBSD)
            if (arrived_TBSD := past.pop(f"{kind}{i - delay}", None)) is not None:
                x_TBSD = x_TBSD + arrived_TBSD.sum(0) - arrived_TBSD
    if theirs:
        return torch.stack([ended(model, x_BSD) for x_BSD in x_TBSD]).mean(0)
    for p_TBSD in past.values():
        x_TBSD = x_TBSD + p_TBSD.sum(0) - p_TBSD
    assert float((x_TBSD - x_TBSD[0]).abs().max()) < TOLERANCE
    return ended(model, x_TBSD[0])


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("delay", [1, 2, 4])
def test_it_is_as_defined(
    lanes: int, delay: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """In a prefill and in cached steps; the source is got back bit for bit."""
    source, (ids_BS, keep_BS) = make_dense("llama"), left_padded()
    path = convert(source, lanes, f"use: laneformer, delay: {delay}")
    model, expected = load(path), laneformer_logits(load(source), lanes, delay)
    for prefill in (12, 7):
        found = step_logits(model, ids_BS, keep_BS, prefill)
        assert difference(found, expected, keep_BS) < TOLERANCE
    assert same(tensors(back(path, tmp_path / "back")), tensors(source))


@pytest.mark.parametrize(
    ("changed", "to"), [("a3^4", "a3^3"), ("m2^4", "m2^5"), ("a2^4", "a2~4"), ("m1!", "m1^4")]
)
def test_negative_controls(changed: str, to: str, make_dense: MakeDense, convert: Convert) -> None:
    source, (ids_BS, keep_BS) = make_dense("llama"), left_padded()
    text = str(Schedule(PRESETS["laneformer"](range(6), delay=2)))
    assert text == "a0! m0! a1! m1! a2^4 m2^4 a3^4 m3^4 a4^3 m4^2 a5^1 m5!"
    other = load(convert(source, 2, f"stages: '{text.replace(changed, to)}'"))
    expected = laneformer_logits(load(source), 2, 2)
    found = step_logits(other, ids_BS, keep_BS, 12)
    assert difference(found, expected, keep_BS) > 20 * TOLERANCE


def test_one_lane_is_the_dense_model(make_dense: MakeDense, convert: Convert) -> None:
    source, (ids_BS, keep_BS) = make_dense("llama"), left_padded()
    one, dense = load(convert(source, 1, "use: laneformer, delay: 2")), load(source)
    a, b = (step_logits(model, ids_BS, keep_BS, 12) for model in (one, dense))
    assert difference(a, b, keep_BS) < TOLERANCE


@pytest.mark.parametrize("early_comm", [True, False])
def test_theirs_is_another_model(early_comm: bool, make_dense: MakeDense, convert: Convert) -> None:
    """So their checkpoints are refused; with one lane it is the dense model."""
    source, (ids_BS, keep_BS) = make_dense("llama"), left_padded()
    dense = load(source)
    one, two = (laneformer_logits(dense, n, 2, early_comm, theirs=True) for n in (1, 2))
    found = step_logits(dense, ids_BS, keep_BS, 12)
    assert difference(found, one, keep_BS) < TOLERANCE
    found = step_logits(load(convert(source, 2, "use: laneformer, delay: 2")), ids_BS, keep_BS, 12)
    assert difference(found, two, keep_BS) > 20 * TOLERANCE


def test_more_delay_than_layers_is_tensor_parallel() -> None:
    assert PRESETS["laneformer"](range(3), delay=3) == PRESETS["tensor_parallel"](range(3))
