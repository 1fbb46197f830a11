"""What a converted model would gain if its tracks saw more of what they lack.

    python examples/bench/oracle.py CONVERTED --source SOURCE --report FILE --report FILE

Until a partial is merged a track goes on with its own and its guess. Here it sees the sum of all
tracks' at once in some places: at the first tokens, in the channels where the source's residual
stream is largest, or in as many drawn at random. What that would take in all-reduces is left out,
so this is the most that any way of getting there could give: a small all-reduce of some channels, a
constant that stands for what the first token lacks. Prints tables in Markdown, as heal.py's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from heal import cell_of
from transformers.utils.logging import disable_progress_bar

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli.progress import step_progress
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import windows_for
from ptconvert.modeling.executor import PerTrack, Update

ALL = slice(None)
TOKENS, CHANNELS = (1, 16), (8, 64)


class Seen(list[torch.Tensor]):
    """What each track sees, with more than its own in it already."""


def main() -> None:
    """Measures the model as it is, and with each of the places seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converted", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, action="append")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    given = parser.parse_args()
    disable_progress_bar()  # of transformers; ours are shown
    batch, checkpoint = BatchSize(None, "cpu"), open_checkpoint(given.source)
    texts = [windows_for(checkpoint, [f], given.window, given.windows) for f in given.report]
    with step_progress() as progress:
        source: Any = open_model(checkpoint, "float32", "cpu")
        references = [divergence.reference(source, w, batch, progress) for w in texts]
        places = dict(places_of(source, texts[0].ids[:4]))
        del source
        model = open_model(open_checkpoint(given.converted), "float32", "cpu")
        rows = []
        for name, (tokens, channels) in places.items():
            with seen_at(tokens, channels):
                measured = [
                    cell_of(divergence.measure(model, reference, windows, batch, progress))
                    for reference, windows in zip(references, texts, strict=True)
                ]
            rows.append(f"| {name} | {' | '.join(map(str, measured))} |")
    print(f"\n| seen at once | {' | '.join(file.stem for file in given.report)} |")
    print("\n".join(["| --- |" + " --- |" * len(texts), *rows]))


@torch.inference_mode()
def places_of(source: Any, ids_NS: torch.Tensor) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What is seen, by name: tokens and channels."""
    # The first token's stream is so much larger that no other would count beside it.
    streams = source(ids_NS, output_hidden_states=True).hidden_states[1:-1]
    sizes_D = torch.stack([s[:, 1:].square().mean((0, 1)) for s in streams]).mean(0)
    largest = sizes_D.argsort(descending=True)
    drawn = torch.randperm(len(sizes_D), generator=torch.Generator().manual_seed(0))
    width = len(sizes_D)
    yield "nothing", (slice(0), ALL)
    for count in TOKENS:
        yield f"the first {count} of {ids_NS.shape[1] - 1} tokens", (slice(count), ALL)
    for count in CHANNELS:
        yield f"the {count} largest of {width} channels", (ALL, largest[:count])
        yield f"{count} channels drawn", (ALL, drawn[:count])


@contextmanager
def seen_at(tokens: slice, channels: Any) -> Iterator[None]:
    """Lets tracks see the sum of all partials there."""
    by_itself: Any = Update.seen

    def seen(self: Update) -> PerTrack:
        if isinstance(self.partials, Seen):  # of an all-reduce in flight, which it is read from
            return self.partials
        whole_BSD = torch.stack(self.partials).sum(0)
        if self.common is not None:
            whole_BSD = whole_BSD + self.common
        found = Seen(seen_BSD.clone() for seen_BSD in by_itself.fget(self))
        for seen_BSD in found:
            seen_BSD[:, tokens, channels] = whole_BSD[:, tokens, channels]
        return found

    with mock.patch.object(Update, "seen", property(seen)):
        yield


if __name__ == "__main__":
    main()
