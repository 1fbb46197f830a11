"""What to heal on: windows of tokens to train on, and others held out to judge by.

Shapes: N windows of T + 1 tokens, whose T first tokens predict the T last ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.errors import HealError, first_line
from ptconvert.measure.opening import open_tokenizer, vocabulary
from ptconvert.measure.progress import Progress
from ptconvert.measure.windows import DEFAULT_LENGTH, Windows, positions, read_text, token_ids

HELD_OUT_TOKENS = 1 << 14  # to judge by, where no text is given for it; and at most a tenth of all
MAX_PASSES = 32  # over the same text; beyond it, a typing error is likelier than a wish
DATASET_TOKENS = 10_000_000  # of a dataset, where no number is given
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class DatasetSource:
    """A Hugging Face dataset, or a local file or directory that `datasets` reads."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"


@dataclass(frozen=True)
class Data:
    """Windows to train on (N, T + 1), and those held out, which are never trained on."""

    names: tuple[str, ...]
    train: torch.Tensor
    held_out: Windows

    @property
    def length(self) -> int:
        """T, the tokens that a window trains on."""
        return self.train.shape[1] - 1

    @property
    def digest(self) -> str:
        """SHA-256 of all windows."""
        digest = hashlib.sha256()
        for ids in (self.train, self.held_out.ids):
            digest.update(f"{tuple(ids.shape)}".encode())
            digest.update(ids.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def order(self, tokens: int | None, seed: int) -> torch.Tensor:
        """Which windows to train on, one after the other, for so many tokens or for one pass: each
        pass over the text in another order. Raises HealError for more than MAX_PASSES passes."""
        windows = len(self.train)
        count = windows if tokens is None else tokens // self.length
        if count < 1:
            raise HealError(f"--tokens {tokens} is less than one window of {self.length}")
        passes = -(-count // windows)
        if passes > MAX_PASSES:
            raise HealError(
                f"--tokens {tokens} is {passes} passes over the {windows * self.length} tokens "
                f"there are; at most {MAX_PASSES} are allowed: give more text"
            )
        shuffle = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(windows, generator=shuffle) for _ in range(passes)]
        return torch.cat(rows)[:count]


def read_data(
    checkpoint: Checkpoint,
    texts: Sequence[Path],
    dataset: DatasetSource | None,
    held_out: Sequence[Path],
    length: int | None,
    tokens: int | None,
    progress: Progress,
) -> Data:
    """Texts or a dataset, as windows of `length` tokens (1024, or less where the model is shorter).

    Of the text, all windows are read; of a dataset, as many as `tokens` need. Held out are the
    windows of `held_out`, or some of the others, evenly spread. Raises EvaluationError and
    HealError.
    """
    if both := {path.resolve() for path in texts} & {path.resolve() for path in held_out}:
        raise HealError(f"{min(both)}: given to train on and, as --held-out, to judge by")
    tokenizer, longest = open_tokenizer(checkpoint), positions(checkpoint)
    length = min(DEFAULT_LENGTH, longest) if length is None else length
    if length > longest:
        raise HealError(f"--window {length}: the model has {longest} positions")
    wanted = (tokens or DATASET_TOKENS) + HELD_OUT_TOKENS + length
    if dataset is not None:
        names: tuple[str, ...] = (dataset.name,)
        strings, most = _dataset_texts(dataset), wanted
    else:
        names = tuple(path.name for path in texts)
        strings, most = map(read_text, texts), None
    size = vocabulary(checkpoint)
    windows_NS = _windows(token_ids(strings, tokenizer, size), length, most, progress)
    if held_out:
        pieces = token_ids(map(read_text, held_out), tokenizer, size)
        held_NS = _windows(pieces, length, None, progress)
        if not len(held_NS):
            raise HealError(
                f"--held-out: less than one window of {length} tokens; give more text, or a "
                "smaller --window"
            )
        step = -(-len(held_NS) // max(1, HELD_OUT_TOKENS // length))
        train, held_NS = windows_NS, held_NS[::step]
    else:
        step = max(10, len(windows_NS) // max(1, HELD_OUT_TOKENS // length))
        held = torch.zeros(len(windows_NS), dtype=torch.bool)
        held[step // 2 :: step] = True
        train, held_NS = windows_NS[~held], windows_NS[held]
    if not len(train) or not len(held_NS):
        raise HealError(
            f"the text has {len(windows_NS)} windows of {length} tokens, too few to train on some "
            "and judge by others: give more text, or a smaller --window"
        )
    return Data(names, train, Windows(held_NS, length, held_NS.numel()))


def _windows(
    pieces: Iterable[list[int]], length: int, most: int | None, progress: Progress
) -> torch.Tensor:
    """Tokens joined and cut into windows that don't overlap, of the first `most` tokens."""
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        progress("tokens read", len(ids), most)
        if most is not None and len(ids) >= most:
            break
    count = len(ids) // (length + 1)
    return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)


def _dataset_texts(source: DatasetSource) -> Iterator[str]:
    """A dataset's texts, streamed. Raises HealError, one line, for whatever goes wrong."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source.name)
    try:
        if path.is_file():
            options: dict[str, Any] = {"data_files": str(path)}
            name = _LOADERS.get(path.suffix.lower())
            if name is None:
                raise HealError(f"--dataset {path}: its name must end in {', '.join(_LOADERS)}")
        else:
            options, name = {}, source.name
        rows = datasets.load_dataset(
            name, source.config, split=source.split, streaming=True, **options
        )
        for number, row in enumerate(rows):
            text = row.get(source.column)
            if not isinstance(text, str):
                raise HealError(
                    f"--dataset {source.name}: row {number} has no text in column "
                    f"{source.column!r}; --column can name one of {', '.join(row)}"
                )
            yield text
    except HealError:
        raise
    except Exception as error:  # whatever datasets, its readers and the network raise
        raise HealError(f"--dataset {source.name}: {first_line(error)}") from error
