"""How many drafted tokens of speculative decoding a model takes, before and after its conversion.

Under greedy decoding a drafted token is taken where it is the model's own next choice, and each
step gives one more token than it takes (Leviathan et al., arXiv 2211.17192, algorithm 1 at
temperature 0). So what is written doesn't depend on the draft, and a draft that is right so far
reads what was written: the model's greedy text says all. It is written once, without a draft, and
walked through in steps, each of which begins after what the one before it gave. That is exact for
any draft. (Their formula for the mean, a(1 - a^K)/(1 - a) of K where each is right with chance a,
takes these chances for independent, which they aren't.)

Shapes: N windows, B of them at once, S tokens of a prompt, G new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import EvaluationError
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.divergence import in_pieces, outputs
from ptconvert.measure.head import Head
from ptconvert.measure.opening import check_ids, open_model, open_tokenizer, vocabulary
from ptconvert.measure.progress import Progress
from ptconvert.measure.statistics import (
    RESAMPLES,
    Difference,
    Estimate,
    OverDocuments,
    compare,
    estimate,
)
from ptconvert.runtime.mtp import head_on_meta, open_head

NEW_TOKENS = 128  # after each window's prompt, or half of a window that is shorter than two of it
NGRAM, LAYER = "ngram", "layer"
# Of the tokens so far the last so many are looked for: vLLM's prompt_lookup_min and _max.
SHORTEST, LONGEST = 2, 5

Ids = Sequence[int]
# The tokens that are drafted where so many are known.
Draft = Callable[[int], Ids]


@dataclass(frozen=True)
class Drafts:
    """What is asked for: so many tokens for each step, drafted from the text so far (NGRAM), by
    each model's own head for further tokens (LAYER), or by a model, which the report calls
    `name`."""

    drafted: int
    name: str = NGRAM
    model: Checkpoint | None = None

    @property
    def by_head(self) -> bool:
        """Whether each model's own head drafts."""
        return self.model is None and self.name == LAYER


@dataclass(frozen=True)
class Accepted:
    """One model's steps: how many drafted tokens are right in each, on average, and in what share
    of steps the first 1, 2, ... of them all are. The average is the sum of these shares."""

    accepted: Estimate
    right: tuple[float, ...]
    steps: int


@dataclass(frozen=True)
class Speculation:
    """Both models on the same prompts, of `prompt` tokens, with up to `new` after each."""

    drafted: int
    draft: str
    windows: int
    prompt: int
    new: int
    source: Accepted
    converted: Accepted
    difference: Difference


def new_tokens(length: int) -> int:
    """How many tokens are written after the first ones of a window of `length`, in its place."""
    return min(NEW_TOKENS, length // 2)


@torch.inference_mode()
def greedy_texts(
    model: Any, ids_NS: torch.Tensor, new: int, batch: BatchSize, progress: Progress, step: str
) -> list[list[int]]:
    """Prompts (N, S) and what a model writes after each by its first choices: `new` tokens, or
    fewer where it ends."""
    ends = model.generation_config.eos_token_id
    stops = set(ends) if isinstance(ends, list) else {ends}
    texts: list[list[int]] = []

    def run(size: int) -> torch.Tensor:
        given_BS = ids_NS[len(texts) : len(texts) + size].to(model.device)
        written, cache, next_BX = [given_BS], None, given_BS
        for _ in range(new):
            out = model(input_ids=next_BX, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, next_BX = out.past_key_values, out.logits[:, -1:].argmax(-1)
            written.append(next_BX)
        return torch.cat(written, dim=1).cpu()

    while len(texts) < len(ids_NS):
        progress(step, len(texts), len(ids_NS))
        for ids in batch.fitting(run).tolist():
            begin = ids_NS.shape[1]
            stop = next((i for i in range(begin, len(ids)) if ids[i] in stops), len(ids))
            texts.append(ids[: stop + 1])
    progress(step, len(texts), len(ids_NS))
    return texts


def from_text(ids: Ids, drafted: int, shortest: int = SHORTEST, longest: int = LONGEST) -> Draft:
    """Drafts from the text so far (prompt lookup, as vLLM's `ngram`): what followed the first place
    where its last `longest` tokens stood before, or as many fewer as stood there, `shortest` at
    least; none where these didn't."""
    ends: dict[tuple[int, ...], int] = {}
    for count in range(shortest, longest + 1):
        for end in range(count, len(ids)):
            ends.setdefault(tuple(ids[end - count : end]), end)

    def draft(known: int) -> Ids:
        for count in range(longest, shortest - 1, -1):
            end = ends.get(tuple(ids[max(0, known - count) : known]), known)
            if end < known:
                return ids[end : min(end + drafted, known)]
        return ()

    return draft


def from_choices(choices: Ids, begin: int, drafted: int) -> Draft:
    """Drafts of a model whose first choices for the tokens of a text from `begin` on are known,
    each after the text before it."""
    return lambda known: choices[known - begin : known - begin + drafted]


def accepted(ids: Ids, begin: int, drafted: int, draft: Draft) -> list[int]:
    """How many drafted tokens are right in each step that writes a text after its first `begin`
    tokens, up to where the text is too short to tell."""
    counts, known = list[int](), begin + 1  # a prefill gives the first
    while known + drafted <= len(ids):
        pairs = list(zip(draft(known), ids[known : known + drafted], strict=False))
        right = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
        counts.append(right)
        known += right + 1
    return counts


def speculation(
    texts: Sequence[Sequence[list[int]]],
    prompt: int,
    new: int,
    drafts: Drafts,
    choices: Sequence[Sequence[Ids]] | None,
    seed: int,
) -> Speculation:
    """What of the drafts the source and the converted model take in their own `texts`; `choices`
    are the draft model's for these, where one drafts.

    Raises EvaluationError where no text is long enough for a step.
    """
    found, means = list[Accepted](), list[OverDocuments]()
    for number, of_model in enumerate(texts):
        counts = []
        for window, ids in enumerate(of_model):
            draft = from_text(ids, drafts.drafted)
            if choices is not None:
                draft = from_choices(choices[number][window], prompt, drafts.drafted)
            counts.append(accepted(ids, prompt, drafts.drafted, draft))
        every = [count for each in counts for count in each]
        if not every:
            raise EvaluationError(
                f"--speculate {drafts.drafted}: a model writes fewer than {drafts.drafted + 1} "
                f"tokens after each prompt, of {new} at most; a longer --window, or other text, "
                "gives more"
            )
        means.append(_per_step(counts))
        found.append(
            Accepted(
                estimate(means[-1], len(counts), RESAMPLES, seed),
                tuple(
                    sum(count >= place for count in every) / len(every)
                    for place in range(1, drafts.drafted + 1)
                ),
                len(every),
            )
        )
    return Speculation(
        drafted=drafts.drafted,
        draft=drafts.name,
        windows=len(texts[0]),
        prompt=prompt,
        new=new,
        source=found[0],
        converted=found[1],
        difference=compare(means[0], means[1], len(texts[0]), RESAMPLES, seed),
    )


def _per_step(counts: Sequence[Sequence[int]]) -> OverDocuments:
    """The mean over all steps of some windows; over all windows, where these have no step."""
    right_N = np.array([sum(each) for each in counts], dtype=np.float64)
    steps_N = np.array([len(each) for each in counts], dtype=np.float64)
    whole = right_N.sum() / steps_N.sum()

    def mean(idx: Any) -> Any:
        right, steps = right_N[idx].sum(axis=-1), steps_N[idx].sum(axis=-1)
        return np.where(steps > 0, right / np.maximum(steps, 1), whole)

    return mean


def check_length(drafts: Drafts, window: int) -> None:
    """Raises EvaluationError where no text in windows of that length is long enough for a step."""
    if new_tokens(window) <= drafts.drafted:
        raise EvaluationError(
            f"--speculate {drafts.drafted}: {new_tokens(window)} tokens are written in windows of "
            f"{window}, and a step takes {drafts.drafted + 1}; give a longer --window"
        )


def check_heads(drafts: Drafts, models: Iterable[Checkpoint]) -> None:
    """Raises PTConvertError where these models have no heads of their own to draft by, or more is
    asked of such than the token after the next."""
    for model in models:
        head_on_meta(model)
    if drafts.drafted > 1:
        raise EvaluationError(
            f"--speculate {drafts.drafted}: a model's own head was trained for one token, and is "
            "measured with it; give --speculate 1"
        )


def check_draft(draft: Checkpoint, source: Checkpoint) -> None:
    """Raises EvaluationError where a draft model writes other tokens than the source."""
    theirs, ours = open_tokenizer(draft), open_tokenizer(source)
    if theirs.get_vocab() != ours.get_vocab():
        raise EvaluationError(
            f"{draft.path}: its tokens aren't the source's; a draft model must have the same "
            "vocabulary"
        )


@torch.inference_mode()
def choices_of(
    draft: Checkpoint,
    texts: Sequence[Sequence[list[int]]],
    prompt: int,
    dtype: str,
    device: str,
    batch: BatchSize,
    progress: Progress,
) -> list[list[list[int]]]:
    """A draft model's first choice for each token of some texts after their prompts, each from the
    text before it."""
    model, tokenizer = open_model(draft, dtype, device), open_tokenizer(draft)
    found = []
    for of_model in texts:
        check_ids((i for ids in of_model for i in ids), tokenizer, vocabulary(draft))
        found.append(_choices(model, of_model, prompt - 1, batch, progress, "drafts: windows"))
    return found


@torch.inference_mode()
def choices_of_head(
    model: Any,
    checkpoint: Checkpoint,
    texts: Sequence[list[int]],
    prompt: int,
    batch: BatchSize,
    progress: Progress,
) -> list[list[int]]:
    """The same of the head for further tokens that a model has in its checkpoint, each from the
    model's own last hidden states and the embedding of the token before. Raises CheckpointError."""
    head = open_head(checkpoint, model.dtype, model.device)
    embed = model.get_input_embeddings()

    def drafted(hidden_BSD: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
        out_BSD: torch.Tensor = head(hidden_BSD, embed(ids_BS[:, 1:].to(model.device)))
        return out_BSD

    step = "drafts of its own head: windows"
    return _choices(model, texts, prompt - 2, batch, progress, step, drafted)


def _choices(
    model: Any,
    texts: Sequence[list[int]],
    first: int,
    batch: BatchSize,
    progress: Progress,
    step: str,
    drafted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[list[int]]:
    """First choices of a model's lm_head at each position from the `first` on, by its last hidden
    states, or by those `drafted` from these (B, S, D) and the ids (B, S + 1)."""
    head, chosen = Head(model), list[list[int]]()
    length = max(map(len, texts))
    padded = torch.tensor([ids + [0] * (length - len(ids)) for ids in texts])
    for rows, given in outputs(model.get_decoder(), model.device, padded, batch, progress, step):
        hidden_BSD = given.last_hidden_state
        if drafted is not None:
            hidden_BSD = drafted(hidden_BSD, padded[rows])
        (ids_BG,) = in_pieces(
            lambda hidden_PD: (head(hidden_PD).argmax(-1),), len(head.weight), hidden_BSD[:, first:]
        )
        chosen += ids_BG.tolist()
    return chosen
