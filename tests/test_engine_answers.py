"""What verify says of any engine's answers: here a model's that stands for an engine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Convert, MakeDense, load
from test_modeling import SCHEDULES

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.engines.verify import Answers, answer_checks
from ptconvert.runtime.load import shape_of
from ptconvert.verify.run import Check

NEW_TOKENS = 8
PROMPTS_BS = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def answers_of(path: Path, dtype: str) -> Answers:
    """Greedy tokens and their log-probabilities, by another attention than verify's model has."""
    model = load(path, dtype=getattr(torch, dtype), attn_implementation="eager")
    said = model.generate(
        PROMPTS_BS,
        attention_mask=torch.ones_like(PROMPTS_BS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens_BN = said.sequences[:, PROMPTS_BS.shape[1] :]
    log_BNV = torch.stack(said.logits, dim=1).float().log_softmax(-1)
    log_BN = log_BNV.gather(2, tokens_BN[:, :, None])[:, :, 0]
    return list(zip(tokens_BN.tolist(), log_BN.tolist(), strict=True))


def checked(path: Path, answers: Answers, dtype: str) -> list[Check]:
    return answer_checks(path, shape_of(open_checkpoint(path)), PROMPTS_BS, answers, dtype)


@pytest.mark.parametrize("variant", ["llama-biases", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_models_own_answers_hold(
    dtype: str, variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense(variant), 4, SCHEDULES["mixed"])
    checks = checked(path, answers_of(path, dtype), dtype)
    assert all(check.ok for check in checks), checks
    told = ["greedy tokens", "their log-probabilities"]
    assert [check.name for check in checks] == (told if dtype == "float32" else told[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_answers_without_a_merge_do_not(
    dtype: str, make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense("llama-biases"), 4, SCHEDULES["mixed"])
    other = convert(make_dense("llama-biases"), 4, SCHEDULES["track-4"])
    assert not checked(path, answers_of(other, dtype), dtype)[-1].ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_does_not(
    wrong: float, dtype: str, make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense("llama-biases"), 4, SCHEDULES["mixed"])
    answers = answers_of(path, dtype)
    answers[1][1][3] = wrong
    assert not checked(path, answers, dtype)[-1].ok
