"""Layers with a window that have a cache of their own, in SGLang's attention of plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_context import get_attn_backend


@contextlib.contextmanager
def own_places(windowed: bool) -> Iterator[None]:
    """Lets it read a layer's cache where it has written it: it writes a `windowed` layer's at that
    cache's own places, and reads at those of the other layers' cache."""
    backend = get_attn_backend()
    own = isinstance(backend, TorchNativeAttnBackend) and backend.use_sliding_window_kv_pool
    if not (own and windowed):
        yield
        return
    pool = backend.req_to_token_pool
    places = backend.token_to_kv_pool.translate_loc_from_full_to_swa(pool.req_to_token)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=places)
    try:
        yield
    finally:
        backend.req_to_token_pool = pool
