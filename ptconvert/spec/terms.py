"""What a spec may say beside its schedule, and how much of it."""

from __future__ import annotations

from collections.abc import Callable

DEFERRED_RULES = ("sum", "mean")  # how partials are weighed that waited since an earlier stage
ASSIGNMENTS = ("contiguous", "affinity")  # which heads and neurons share a track
SCALES = ("even", "fitted")  # what tracks multiply the norm of their own partial by
VOCABULARIES = ("sharded", "replicated")  # how an engine's ranks hold it; no spec says that
MAX_GUESS_RANK = 4096
MAX_TRACKS = 1024


def wrong_ranks(
    what: str, tracks: int, ranks: int, also: Callable[[int], bool] = lambda _: True
) -> str | None:
    """Why `what`, such as the checkpoint, of so many tracks doesn't run on so many ranks, each with
    as many tracks as the others, and on how many it does; None if it runs on them. `also` says what
    else a number of ranks must do."""
    fits = [n for n in range(1, tracks + 1) if tracks % n == 0 and also(n)]
    if ranks in fits:
        return None
    word = "rank" if fits == [1] else "ranks"
    return f"{what} has {tracks} tracks, so it runs on {', '.join(map(str, fits))} {word}"
