"""lm-eval's language-model interface over our models: opened late, in batches that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from lm_eval.api.model import LM, CacheHook
from lm_eval.models.huggingface import HFLM

from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import check_ids
from ptconvert.measure.progress import Progress


class FittingHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's model for transformers, with batches that halve when memory runs out, and token
    ids that the model has: EvaluationError else, before it runs."""

    def __init__(self, model: Any, tokenizer: Any, batch: BatchSize) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch.size)
        self.batch = batch
        self.vocabulary = model.get_input_embeddings().num_embeddings

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = super().tok_encode(*args, **kwargs)
        check_ids(ids, self.tokenizer, self.vocabulary)
        return ids

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(*args, **kwargs)  # with padding, unlike the above
        check_ids([int(ids.max())], self.tokenizer, self.vocabulary)
        return ids, mask

    def _loglikelihood_tokens(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002  (the name is lm-eval's)
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for _, context, _ in requests:  # may be a first token that lm-eval puts there
            check_ids(context, self.tokenizer, self.vocabulary)

        def run(size: int) -> Any:
            self.batch_size_per_gpu = size
            return HFLM._loglikelihood_tokens(self, requests, True, override_bs)

        answers: list[tuple[float, bool]] = self.batch.fitting(run)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """A batch of requests per call of lm-eval's: it saves them when it is through with all."""
        answers: list[float] = []
        while len(answers) < len(requests):
            some = requests[len(answers) : len(answers) + self.batch.size]
            answers += super().loglikelihood_rolling(some, disable_tqdm)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        def run(size: int) -> Any:
            self.batch_size_per_gpu = size
            return HFLM.generate_until(self, requests, disable_tqdm)

        answers: list[str] = self.batch.fitting(run)
        return answers


class UnopenedLM(LM):  # type: ignore[misc]
    """A model that is opened when a request isn't in the cache, and not before."""

    def __init__(
        self, build: Callable[[Any], FittingHFLM], tokenizer: Any, label: str, progress: Progress
    ) -> None:
        super().__init__()
        self._build, self.tokenizer, self._label, self._progress = build, tokenizer, label, progress
        self._lm: FittingHFLM | None = None
        self._done = self._total = 0
        self.chat_template_args: dict[str, Any] = {}  # as HFLM's, which applies the template

    def _opened(self) -> FittingHFLM:
        if self._lm is None:
            self._progress(f"{self._label}: opening the model", 0, None)
            self._lm = self._build(self.tokenizer)
            self._lm.set_cache_hook(self)
        return self._lm

    def close(self) -> None:
        """Writes the answers so far to disk and lets go of the model, memory and all."""
        if getattr(self.cache_hook, "dbdict", None) is not None:
            self.cache_hook.dbdict.close()
        if self._lm is not None:
            self._lm.set_cache_hook(CacheHook(None))  # it points back here
            self._lm = None
            clear_device_cache(garbage_collection=True)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """lm-eval's call for each answer: it goes into the cache, and progress is told."""
        self.cache_hook.add_partial(kind, request, answer)
        self._done += 1
        self._progress(self._label, min(self._done, self._total), self._total)

    def _run(self, kind: str, requests: list[Any]) -> Any:
        lm = self._opened()
        self._done, self._total = 0, len(requests)
        self._progress(self._label, 0, self._total)
        return getattr(lm, kind)(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = self._run("loglikelihood", requests)
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        answers: list[float] = self._run("loglikelihood_rolling", requests)
        return answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers: list[str] = self._run("generate_until", requests)
        return answers

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """As HFLM's; it takes the tokenizer alone."""
        return str(HFLM.apply_chat_template(self, *args, **kwargs))

    @property
    def tokenizer_name(self) -> str:
        """As HFLM's."""
        return str(self.tokenizer.name_or_path.replace("/", "__"))
