"""How long steps say how far they have come."""

from __future__ import annotations

from collections.abc import Callable

# Told how far a long step has come: the step, how much is done, and of how much (None: unknown).
Progress = Callable[[str, int, int | None], None]
