"""Speculative decoding in transformers with a converted target: what is written doesn't depend on
drafts, whether they are taken or not; a track's keys and values are taken back as a layer's are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Convert, MakeDense, load
from transformers import AutoModelForCausalLM, DynamicCache

from ptconvert.evaluate.acceptance import Draft, accepted, from_choices, from_text

K, NEW = 3, 40
SCHEDULE = f"""  - {{layers: 0-1, use: parallel_track, depth: 2}}
  - {{layers: 2-{LAYERS - 1}, use: ladder}}
"""
# So few tokens that drafts are right by chance.
FEW: dict[str, Any] = {"vocab_size": 6, "tie_word_embeddings": False}
VARIANTS = ("llama-biases", "mistral-window", "gemma3_text", "glm4", "qwen3_moe", "deepseek_v3")
PROMPT = [5, 1, 3, 4, 2, 5, 1, 3, 1, 2, 4, 2, 5, 1]  # without padding, which generate leaves out
LOOKUP = {"prompt_lookup_num_tokens": K, "max_matching_ngram_size": 2}


@contextmanager
def recorded(model: Any) -> Iterator[list[int]]:
    """How many tokens a model's cache holds at the beginning of each forward pass: all known ones
    but the last."""
    held: list[int] = []

    def enter(_module: Any, _args: Any, given: Any) -> None:
        held.append(given["past_key_values"].get_seq_length())

    hook = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield held
    finally:
        hook.remove()


def write(model: Any, **drafts: Any) -> list[int]:
    """Its greedy text."""
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    text: list[int] = model.generate(ids, **options, **drafts)[0].tolist()
    return text


def assistant(model: Any) -> dict[str, Any]:
    """That model as the draft, which drafts K tokens each time, however sure it is of them."""
    model.generation_config.num_assistant_tokens = K
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.eos_token_id = None
    return {"assistant_model": model}


def choices(model: Any, ids: list[int]) -> Draft:
    """A model's drafts for a text, from one forward pass over it."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1]
    return from_choices(logits_TV.argmax(-1).tolist(), len(PROMPT), K)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_does_not_depend_on_drafts(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """And the counts of `ptconvert eval`, from that text alone, are those of the real steps."""
    path = make_dense(variant, **FEW)
    source = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = load(convert(path, 2, SCHEDULE))
    text, others = write(model), write(source)
    assert text[len(PROMPT) :] != others[len(PROMPT) :]
    found = []
    for drafts, draft in (
        (LOOKUP, from_text(text, K, 1, 2)),
        (assistant(source), choices(source, text)),
        (assistant(load(convert(path, 2, SCHEDULE))), choices(model, text)),
    ):
        with recorded(model) as held:
            assert write(model, **drafts) == text
        # its first pass verifies drafts, too, beside the prompt
        counts = accepted(text, len(PROMPT) - 1, K, draft)
        ends = [len(PROMPT) - 1, *held[1:]]
        seen = [later - before - 1 for before, later in itertools.pairwise(ends)]
        both = min(len(counts), len(seen))  # what the last pass took isn't seen
        # A model that drafts may read another text than it would by itself: what its window shut
        # out isn't there again where drafts are taken back.
        if drafts is LOOKUP or variant in ("llama-biases", "glm4"):
            assert len(counts) <= len(seen) + 1 and seen[:both] == counts[:both]
        found.append(counts)
    assert all(0 < sum(counts) < K * len(counts) for counts in found[:2])  # some, and not all
    assert found[2] == [K] * len(found[2])  # its own are all right


def test_a_tracks_keys_that_stay_are_seen(
    make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the caches that the tracks got beside the layers' left as they are."""
    model = load(convert(make_dense("llama-biases", **FEW), 2, SCHEDULE))
    text = write(model)

    def crop(cache: DynamicCache, length: int) -> None:
        for layer in cache.layers[:LAYERS]:
            layer.crop(length)

    monkeypatch.setattr(DynamicCache, "crop", crop)
    try:
        assert write(model, **LOOKUP) != text
    except RuntimeError as error:
        assert "size" in str(error)  # masks don't fit


def test_models_with_states_are_refused_as_their_sources(
    make_dense: MakeDense, convert: Convert
) -> None:
    path: Path = make_dense("qwen3_next")
    for model in (AutoModelForCausalLM.from_pretrained(path), load(convert(path, 2, SCHEDULE))):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            write(model, **LOOKUP)
