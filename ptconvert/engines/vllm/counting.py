"""A vLLM worker extension that counts the collectives of each forward pass.

vLLM mixes the class into its workers (`worker_extension_cls`) and `LLM.collective_rpc` calls its
methods by name. It sees what torch's profiler sees, below Python and below torch.compile: the
operations that vLLM's all-reduces end in, which wrappers in Python would miss under compilation.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ptconvert.runtime.counters import Collective, Profile

EXTENSION = "ptconvert.engines.vllm.counting.Counting"


@dataclass(frozen=True)
class Pass:
    """One forward pass of a worker: its tokens, and the collectives until the next one began."""

    tokens: int
    collectives: tuple[Collective, ...]


class Counting:
    """Methods that a vLLM worker gets; `model_runner` is the worker's."""

    model_runner: Any

    def ptconvert_start_counting(self) -> None:
        """Begins to profile; each forward pass is marked with its number and tokens."""
        entered: list[Any] = []
        self._ptconvert_tokens: list[int] = []
        tokens = self._ptconvert_tokens

        def enter(_module: Any, _args: Any, kwargs: Any) -> None:
            # whose last axis they are, also where ids aren't given, as beside pictures
            tokens.append(kwargs["positions"].shape[-1])
            entered.append(record_function(f"step {len(tokens)}"))
            entered[-1].__enter__()

        def leave(*_: Any) -> None:
            entered.pop().__exit__(None, None, None)

        model = self.model_runner.get_model()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._ptconvert_hooks = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(leave),
        ]
        self._ptconvert_profile = profile(activities=activities, record_shapes=True)
        self._ptconvert_profile.start()

    def ptconvert_stop_counting(self) -> list[dict[str, Any]]:
        """Ends it; returns each pass as `Pass`, in JSON types, in order."""
        self._ptconvert_profile.stop()
        for hook in self._ptconvert_hooks:
            hook.remove()
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory) / "trace.json"
            self._ptconvert_profile.export_chrome_trace(str(trace))
            steps = Profile(trace).collectives()
        return [
            asdict(Pass(tokens, tuple(steps.get(str(number), ()))))
            for number, tokens in enumerate(self._ptconvert_tokens, 1)
        ]
