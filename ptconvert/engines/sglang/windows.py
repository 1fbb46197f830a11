"""Layers with a window that have a cache of their own, in SGLang's attention of plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_context import get_attn_backend


@contextlib.contextmanager
def own_places() -> Iterator[None]:
    """Lets it read a windowed layer's cache where it has written it: it writes at that cache's own
    places, and reads at those of the other layers' cache."""
    backend = get_attn_backend()
    if not (isinstance(backend, TorchNativeAttnBackend) and backend.use_sliding_window_kv_pool):
        yield
        return
    pool = backend.req_to_token_pool
    backend.req_to_token_pool = SimpleNamespace(
        req_to_token=_OwnPlaces(pool.req_to_token, backend.token_to_kv_pool)
    )
    try:
        yield
    finally:
        backend.req_to_token_pool = pool


class _OwnPlaces:
    """A table of places in the other layers' cache, told as those in this one where it is read:
    the table has those of all requests, as long as any may be."""

    def __init__(self, table: torch.Tensor, pool: Any) -> None:
        self._table, self._pool = table, pool

    def __getitem__(self, some: Any) -> torch.Tensor:
        places: torch.Tensor = self._pool.translate_loc_from_full_to_swa(self._table[some])
        return places
