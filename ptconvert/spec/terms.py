"""What a spec may say beside its schedule, and how much of it."""

from __future__ import annotations

DEFERRED_RULES = ("sum", "mean")  # how partials are weighed that waited since an earlier stage
ASSIGNMENTS = ("contiguous", "affinity")  # which heads and neurons share a track
MAX_GUESS_RANK = 4096
MAX_TRACKS = 1024
