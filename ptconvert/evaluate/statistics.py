"""Intervals and paired tests over documents.

Both models answer the same documents, so what differs between documents cancels in the difference:
documents are resampled, and the same ones for both models (the paired bootstrap; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 16). Where every document is
right or wrong, the p-value is McNemar's exact test. Shapes: N documents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
SLOW_RESAMPLES = 999  # where the metric is a Python function of the whole list, as BLEU is
_ELEMENTS = 4_000_000  # of one batch of resamples: 32 MB of indices

Floats = npt.NDArray[np.float64]
Aggregate = Callable[[Sequence[Any]], float]
Seed = int | tuple[int, ...]
# The metric over documents given by their indices: (..., N) -> (...).
OverDocuments = Callable[[npt.NDArray[np.intp]], Floats]


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95% interval; the interval is None where there is a single document."""

    value: float
    interval: tuple[float, float] | None
    distribution: Floats = field(
        repr=False
    )  # of the bootstrap, (R,): groups of tasks add up theirs


@dataclass(frozen=True)
class Difference(Estimate):
    """Converted less source: the difference, its 95% interval, and how likely chance makes it."""

    p_value: float | None
    test: str


def over_documents(values: Sequence[Any], aggregate: Aggregate) -> tuple[OverDocuments, int]:
    """A metric as a function of document indices, and how many resamples it is worth.

    `values` has one entry per document, `aggregate` is lm-eval's function over such a list. The
    means and the perplexities (exp of a ratio of sums, `lm_eval.api.metrics`) are computed for all
    resamples at once, any other function once for each.
    """
    name = getattr(aggregate, "__name__", "")
    if name in ("mean", "nanmean", "perplexity"):
        x_N = np.asarray(values, dtype=np.float64)
        mean = np.nanmean if name == "nanmean" else np.mean
        if name == "perplexity":
            return lambda idx: np.exp(-np.mean(x_N[idx], axis=-1)), RESAMPLES
        return lambda idx: np.asarray(mean(x_N[idx], axis=-1)), RESAMPLES
    if name in ("weighted_perplexity", "bits_per_byte"):
        x_N, weight_N = np.asarray(values, dtype=np.float64).T

        def ratio(idx: npt.NDArray[np.intp]) -> Floats:
            return np.asarray(-x_N[idx].sum(axis=-1) / weight_N[idx].sum(axis=-1))

        if name == "weighted_perplexity":
            return lambda idx: np.exp(ratio(idx)), RESAMPLES
        return lambda idx: ratio(idx) / math.log(2), RESAMPLES

    def one_by_one(idx: npt.NDArray[np.intp]) -> Floats:
        rows = idx.reshape(-1, idx.shape[-1])
        results = [aggregate([values[i] for i in row]) for row in rows]
        return np.asarray(results, dtype=np.float64).reshape(idx.shape[:-1])

    return one_by_one, SLOW_RESAMPLES


def mean_over(values: Sequence[float]) -> OverDocuments:
    """The mean over documents, as a function of document indices."""
    x_N = np.asarray(values, dtype=np.float64)
    return lambda idx: np.asarray(x_N[idx].mean(axis=-1))


def resample(metric: OverDocuments, documents: int, resamples: int, seed: Seed) -> Floats:
    """The metric's bootstrap distribution over documents: (R,).

    Each resample draws N - 1 of the N documents, with replacement: then the variance of a mean is
    the unbiased one, which matters where documents are few (Rao and Wu, JASA 83, 1988; a library's
    bootstrap draws N).
    """
    if documents < 2:
        return np.full(resamples, metric(np.arange(documents)))
    rng = np.random.default_rng(seed)
    at_once = max(1, _ELEMENTS // documents)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    drawn = [metric(rng.integers(0, documents, (size, documents - 1))) for size in sizes]
    return np.concatenate(drawn)


def _interval(distribution: Floats, documents: int) -> tuple[float, float] | None:
    if documents < 2 or not np.isfinite(distribution).all():
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(distribution, [tail, 1 - tail])
    return float(low), float(high)


def estimate(metric: OverDocuments, documents: int, resamples: int, seed: Seed) -> Estimate:
    """A metric over N documents with its interval."""
    value = float(metric(np.arange(documents)))
    distribution = resample(metric, documents, resamples, seed)
    return Estimate(value, _interval(distribution, documents), distribution)


def compare(
    source: OverDocuments, converted: OverDocuments, documents: int, resamples: int, seed: Seed
) -> Difference:
    """Converted less source on the same N documents, by the paired bootstrap."""
    apart = estimate(
        lambda idx: np.asarray(converted(idx) - source(idx)), documents, resamples, seed
    )
    return _tested(apart)


def _tested(apart: Estimate) -> Difference:
    """A difference with the p-value of its bootstrap distribution.

    That is twice the share of resamples on the far side of zero, the sample itself counted as
    one: below 5% just where the 95% interval leaves zero out, and the same for a perplexity as for
    its logarithm (Efron and Tibshirani, chapter 15.4, by the percentile interval).
    """
    p_value = None
    if apart.interval is not None:
        drawn = apart.distribution
        beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
        p_value = min(1.0, 2 * float(1 + beyond) / (1 + len(drawn)))
    return Difference(apart.value, apart.interval, apart.distribution, p_value, "paired bootstrap")


def weighted_sum(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A sum of independent metrics, such as a group's mean over its tasks: distributions add up."""
    resamples = min(len(part.distribution) for part in parts)
    value = sum(w * part.value for w, part in zip(weights, parts, strict=True))
    distribution = np.zeros(resamples)
    for weight, part in zip(weights, parts, strict=True):
        distribution += weight * part.distribution[:resamples]
    return Estimate(value, _interval(distribution, 2), distribution)


def weighted_difference(parts: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """The same for differences."""
    return _tested(weighted_sum(parts, weights))


def mcnemar(source: Sequence[float], converted: Sequence[float]) -> float:
    """The exact p-value of McNemar's test over documents that are each right (1) or wrong (0).

    Only documents on which the models differ count: under the null hypothesis each is as likely
    to go one way as the other (McNemar, Psychometrika 12, 1947; the binomial form).
    """
    a_N, b_N = np.asarray(source, dtype=bool), np.asarray(converted, dtype=bool)
    lost, won = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    if lost + won == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + won, 0.5).pvalue)


def is_right_or_wrong(values: Sequence[Any]) -> bool:
    """Whether each document's value is 0 or 1, as accuracies are."""
    return all(isinstance(v, (int, float, np.number)) and v in (0, 1) for v in values)
