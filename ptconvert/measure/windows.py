"""The user's texts, as windows of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import EvaluationError
from ptconvert.measure.opening import check_ids, open_tokenizer, vocabulary

DEFAULT_LENGTH = 1024
DEFAULT_WINDOWS = 64


def read_text(path: Path) -> str:
    """A text file's content. Raises EvaluationError where it isn't text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not a text in UTF-8") from error


@dataclass(frozen=True)
class Windows:
    """Pieces of a text: token ids (N, T + 1), whose T first tokens predict the T last ones."""

    ids: torch.Tensor
    step: int
    tokens: int  # of the whole text

    @property
    def length(self) -> int:
        return self.ids.shape[1] - 1

    @property
    def overlapping(self) -> bool:
        """Whether windows share tokens, which makes intervals over them too narrow."""
        return len(self.ids) > 1 and self.step < self.length


def token_ids(texts: Iterable[str], tokenizer: Any, vocabulary: int) -> Iterator[list[int]]:
    """Each text's tokens, after the beginning-of-sequence token (end-of-sequence where the
    tokenizer has none).

    Raises EvaluationError for an id beyond a `vocabulary` of so many.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = [] if first is None else [first]
    for text in texts:
        ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        check_ids(ids, tokenizer, vocabulary)
        yield ids


def windows_for(
    checkpoint: Checkpoint,
    texts: Sequence[Path],
    length: int | None,
    count: int | None,
    tokens: int | None = None,
) -> Windows:
    """Texts as windows for a checkpoint: `joined_ids`, cut by `windows_of`."""
    return windows_of(checkpoint, joined_ids(checkpoint, texts), length, count, tokens)


def joined_ids(checkpoint: Checkpoint, texts: Sequence[Path]) -> list[int]:
    """Texts as one row of token ids, tokenized one by one by a checkpoint's tokenizer. Raises
    PTConvertError for a text that is no text, and for ids that the model has no embedding of."""
    tokenizer = open_tokenizer(checkpoint)
    pieces = token_ids(map(read_text, texts), tokenizer, vocabulary(checkpoint))
    return list(itertools.chain.from_iterable(pieces))


def windows_of(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    length: int | None,
    count: int | None,
    tokens: int | None = None,
) -> Windows:
    """A row of token ids as windows for a checkpoint.

    `length` defaults to 1024 tokens, or less where the model or the text is shorter, `count` to as
    many windows as don't overlap, at most 64 or about `tokens` in all. Raises PTConvertError for a
    text that is too short.
    """
    longest = positions(checkpoint)
    if length is not None and length > longest:
        raise EvaluationError(f"--window {length}: the model has {longest} positions")
    if len(ids) < 2 or (length is not None and len(ids) < length + 1):
        wanted = f"--window {length} needs {length + 1}" if length else "at least 2 are needed"
        raise EvaluationError(f"the text has {len(ids)} tokens; {wanted}")
    length = min(DEFAULT_LENGTH, longest, len(ids) - 1) if length is None else length
    if count is None:
        most = DEFAULT_WINDOWS if tokens is None else tokens // length
        count = max(1, min(most, (len(ids) - 1) // length))
    return cut_windows(ids, length, count)


def cut_windows(ids: Sequence[int], length: int, count: int) -> Windows:
    """`count` windows of `length` tokens at even steps over the text, apart where so many fit.

    Of windows one after the other, the last id of one is the first of the next and predicted once:
    (len(ids) - 1) // length of them fit. Raises EvaluationError where not so many differ.
    """
    last = len(ids) - 1 - length  # where the last window may begin
    # Each begins its share of the places; where so they overlap, the last one begins at the last.
    step = max(last // count, min(length, last // (count - 1) if count > 1 else length))
    if step == 0:
        raise EvaluationError(
            f"--windows {count}: the text has {len(ids)} tokens, too few for so many windows of "
            f"{length}"
        )
    rows = [ids[start : start + length + 1] for start in range(0, step * count, step)]
    return Windows(torch.tensor(rows), step, len(ids))


def windows_between(windows: Windows, ids: Sequence[int], tokens: int) -> torch.Tensor:
    """Windows (N, T + 1) of about `tokens` in all, at even places over the text between those that
    were cut from it: no token is predicted in two of all these.

    They are as long where there is room, shorter down to a quarter where gaps are, and none where
    these are shorter still.
    """
    begins = range(0, windows.step * len(windows.ids), windows.step)
    length = min(windows.length, windows.step - windows.length)
    if 4 * length < windows.length or length < 1:
        length, begins = windows.length, range(0)
    ends = [*begins[1:], len(ids) - 1]  # of what lies between one and the next
    free = [
        start
        for begin, end in zip(begins, ends, strict=False)
        for start in range(begin + windows.length, end - length + 1, length)
    ]
    count = min(max(1, tokens // length), len(free))
    starts = [free[n * len(free) // count] for n in range(count)]
    rows = [list(ids[start : start + length + 1]) for start in starts]
    return torch.tensor(rows, dtype=torch.int64).view(count, length + 1)


def positions(checkpoint: Checkpoint) -> int:
    """How many positions a checkpoint's model has. Raises EvaluationError."""
    longest = checkpoint.language.get("max_position_embeddings")
    if not isinstance(longest, int):
        raise EvaluationError(f"{checkpoint.path}/config.json: max_position_embeddings is missing")
    return longest
