"""Small converted models for serving engines, and what the single-process model answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import transformers
from conftest import LAYERS, random_model, spec_text
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section, source_config
from ptconvert.convert.transform import Plan, execute, plan_conversion
from ptconvert.engines.verify import Answers
from ptconvert.models.guesses import guess_tensors
from ptconvert.models.shape import HEAD, ModelShape
from ptconvert.spec.document import parse_spec
from ptconvert.verify.session import greedy_steps

Case = TypeVar("Case")
# Engines' attention on CPUs takes heads of 32 or more; long enough positions for chunks and blocks.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
WORDS = [f"w{i}" for i in range(94)]
CHAT_TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
MIXED = """  - {layers: 0-0, use: tensor_parallel}
  - {layers: 1-2, use: parallel_track, depth: 2, overlap: 1}
  - {layers: 3-3, stages: "a3|m3!"}
  - {layers: 4-5, use: ladder}
"""

# A dense layer before tracks, endings of every kind, and a stage of two sublayers; no more layers
# than that takes, as each costs time in an engine.
COMPILED = """  - {layers: 0-0, use: tensor_parallel}
  - {layers: 1-3, stages: "a1|m1! a2~2 m2^2 a3. m3!"}
"""
# Positions as published models have them: partial, long, by kind of layer, with scaled queries,
# by axes of pictures, which there are none of.
ROPE: dict[str, dict[str, Any]] = {
    "phi3": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "phi3-two-kv": {
        **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256},
        **{"short_factor": [1 + i / 16 for i in range(16)], "long_factor": [4.0] * 16},
    },
    "ministral3": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 32.0},
        **{"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        "original_max_position_embeddings": 16,
    },
    "qwen3_5_text": {
        **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
    "gemma3_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    },
    "deepseek_v3": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0},
        **{"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "original_max_position_embeddings": 64,
    },
    "hunyuan_v1_dense": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
}
UNTIED = {"tie_word_embeddings": False}  # or the last token answers, whatever the layers do


def quick(
    cases: Iterable[str],
    those: Collection[str],
    marks: Mapping[str, pytest.MarkDecorator] = MappingProxyType({}),
) -> list[Any]:
    """Names of cases as a test's parameter `name`: all but those are slow; some have marks."""
    found = []
    for name in cases:
        own = [] if name in those else [pytest.mark.slow]
        found.append(pytest.param(name, marks=[*own, *([marks[name]] if name in marks else [])]))
    return found


def asked_for(
    request: pytest.FixtureRequest,
    file: str,
    cases: Mapping[str, Case],
    others: Collection[str] = (),
) -> dict[str, Case]:
    """Those of a file's cases that its selected tests are about, as engines take seconds to start:
    by the tests' parameter `name`, and `others` for tests without."""
    names = set[str]()
    for item in request.session.items:
        if item.path == Path(file):
            given = getattr(item, "callspec", None)
            names |= {given.params["name"]} if given and "name" in given.params else set(others)
    return {name: case for name, case in cases.items() if name in names}


def with_rope(variant: str) -> dict[str, Any]:
    """A variant's positions, as keys of its config."""
    rope = ROPE.get(variant)
    if rope is None:
        return {}
    known = {k: v for k, v in rope.items() if k == "original_max_position_embeddings"}
    return {"rope_parameters": rope, **known}  # Phi-3's class reads it beside the others


def make_model(
    directory: Path,
    variant: str,
    tracks: int,
    schedule: str,
    top: str = "",
    layers: int = LAYERS,
    **sizes: Any,
) -> Path:
    """A random dense model of a variant; converted, unless `tracks` is 0. `top` is the spec's.

    What a spec wants to be computed from a text, an assignment and guesses, is random.
    """
    dense = directory / "dense"
    random_model(variant, **{**SIZES, **sizes}, num_hidden_layers=layers).save_pretrained(dense)
    add_head(dense)
    if tracks == 0:
        return dense
    known = calibration(dense, tracks, schedule, top)
    spec = parse_spec(spec_text(tracks, schedule, top), "spec.yaml")
    source = open_checkpoint(dense)
    plan = plan_conversion(source, spec, source_name="dense", calibration=known)
    execute(plan, directory / "converted")
    return directory / "converted"


def add_head(dense: Path) -> None:
    """Gives a dense checkpoint the head for further tokens (MTP) that published ones of its family
    have, if they have one: its last layer with attention once more, and the model's own last norm
    and lm_head. It reads most of all the last hidden state, and so foresees that a token comes once
    more."""
    config = read_config(dense)
    shape = ModelShape.from_config(config)
    if not shape.mtp:
        return
    file, (begins,) = dense / "model.safetensors", shape.mtp
    found = load_file(file)
    layers = [shape.layer(index) for index in range(shape.layers)]
    last = next(b for b in reversed(layers) if f"{b}self_attn.o_proj.weight" in found)
    apart = begins == "mtp."
    inner = f"{begins}layers.0." if apart else begins
    own = {inner + n.removeprefix(last): t for n, t in found.items() if n.startswith(last)}
    own = {n: t / 20 if "o_proj" in n or "down_proj" in n else t for n, t in own.items()}
    norm, embedding = found["model.norm.weight"], found[shape.embedding]
    eye = torch.eye(shape.width)
    join = torch.cat([eye.roll(1, 0), 4 * eye], dim=1)
    names = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    if not apart:
        names = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
        own[f"{begins}embed_tokens.weight"] = embedding
        own[f"{begins}shared_head.head.weight"] = found.get(HEAD, embedding)
    own |= dict(zip((f"{begins}{n}.weight" for n in names), (join, *[norm] * 3), strict=True))
    save_file(found | {n: t.to(norm.dtype).clone() for n, t in own.items()}, file, {"format": "pt"})
    if not apart:
        config["num_nextn_predict_layers"] = 1
        (dense / "config.json").write_text(json.dumps(config))


def calibration(dense: Path, tracks: int, schedule: str, top: str) -> Calibration | None:
    """What the conversion of a dense model has instead of what its spec wants from a text."""
    spec = parse_spec(spec_text(tracks, schedule, top), "spec.yaml")
    plan = plan_conversion(open_checkpoint(dense), spec, source_name="dense")
    return None if plan.complete else random_calibration(plan)


def greedy(path: Path, prompts: list[list[int]], new_tokens: int) -> Answers:
    """What the transformers model, all tracks in this process, answers in fp32 to each prompt by
    itself: tokens and their log-probabilities."""
    # eager, for sdpa leaves out Gemma 2's soft cap
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
    return [answer(model, prompt, new_tokens) for prompt in prompts]


def answer(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The same of a model that is open, to one prompt."""
    tokens, log_probabilities = [], []
    for _, step in greedy_steps(model, torch.tensor([prompt]), new_tokens):
        logits, chosen_11 = step()
        tokens.append(int(chosen_11))
        log_probabilities.append(float(logits[0, -1].log_softmax(-1)[tokens[-1]]))
    return tokens, log_probabilities


def random_calibration(plan: Plan) -> Calibration:
    """Units in random order, and guesses of about the size of what they stand for."""
    random, shape = np.random.default_rng(0), plan.shape
    orders = {
        layer: Assignment(
            random.permutation(shape.kv_heads).astype(np.int32),
            random.permutation(shape.neurons).astype(np.int32),
        )
        for layer in plan.schedule.track_layers
    }
    ranks = plan.compensations.get("guess", {})
    tensors = {
        name: random.normal(scale=0.1, size=size).astype(np.float32).view(np.uint8)
        for _, name, size in guess_tensors(shape, ranks, plan.tracks)
    }
    return Calibration(orders, {"guess": ranks}, tensors)


def shape_of(path: Path) -> ModelShape:
    """The shape of a conversion's source."""
    config = read_config(path)
    return ModelShape.from_config(source_config(config, read_section(config)))


def prompts() -> list[list[int]]:
    """8 prompts of different lengths; the last two begin with the same 64 tokens."""
    random = Random(0)
    found = [[random.randrange(3, 96) for _ in range(n)] for n in (3, 5, 9, 17, 33, 40, 90)]
    return [*found, found[-1][:64] + found[4]]


def apart(answers: Any, reference: Answers) -> float:
    """The largest difference of log-probabilities; infinite where tokens differ."""
    if [tokens for tokens, _ in answers] != [tokens for tokens, _ in reference]:
        return float("inf")
    pairs = zip(answers, reference, strict=True)
    return float(max(abs(x - y) for a, b in pairs for x, y in zip(a[1], b[1], strict=True)))


def with_words(path: Path) -> Path:
    """A model, with a tokenizer of words beside it so that text can go in and out."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", *WORDS])}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level, bos_token="<s>", eos_token="<s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def check_chat(server: str, path: Path) -> None:
    """An OpenAI-compatible server streams what the single-process model says."""
    import openai

    words = "w5 w17 w3 w60 w42"
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=10)
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": words}],
        temperature=0,
        max_tokens=6,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer(f"<s> {words} ", add_special_tokens=False).input_ids
    ((tokens, _),) = greedy(path, [ids], 6)
    assert "".join(pieces).split() == tokenizer.decode(tokens).split()
    assert sum(bool(piece) for piece in pieces) > 1  # it came in pieces
