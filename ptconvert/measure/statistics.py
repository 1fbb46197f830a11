"""Intervals and paired tests over documents.

Both models answer the same documents, so what differs between documents cancels in the difference:
documents are resampled, and the same ones for both models (the paired bootstrap; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 16). Where every document is
right or wrong, the p-value is McNemar's exact test. Shapes: N documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special  # not scipy.stats, which takes three times as long to import

CONFIDENCE = 0.95
SIGNIFICANT = 1 - CONFIDENCE
MIN_DOCUMENTS = 6  # with fewer, no outcome would be unlikelier by chance than 5%
RESAMPLES = 9_999
_ELEMENTS = 4_000_000  # of one batch of resamples: 32 MB of indices

Floats = npt.NDArray[np.float64]
Seed = int | tuple[int, ...]
# The metric over documents given by their indices: (..., N) -> (...).
OverDocuments = Callable[[npt.NDArray[np.intp]], Floats]


@dataclass(frozen=True)
class Estimate:
    """A metric over documents and its 95% interval, which is None where they are too few."""

    value: float
    interval: tuple[float, float] | None
    documents: int
    distribution: Floats = field(
        repr=False
    )  # of the bootstrap, (R,): groups of tasks add up theirs


@dataclass(frozen=True)
class Difference(Estimate):
    """Converted less source: the difference, its 95% interval, and how likely chance makes it."""

    p_value: float | None
    test: str


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
    """The expanded percentile interval (Hesterberg, The American Statistician 69(4), 2015): at the
    quantiles where Student's t has 2.5%, not the normal distribution; wider where N is small."""
    if documents < MIN_DOCUMENTS or not np.isfinite(distribution).all():
        return None
    tail = special.ndtr(special.stdtrit(documents - 1, (1 - CONFIDENCE) / 2))
    low, high = np.quantile(distribution, [tail, 1 - tail])
    return float(low), float(high)


def estimate(metric: OverDocuments, documents: int, resamples: int, seed: Seed) -> Estimate:
    """A metric over N documents with its interval."""
    value = float(metric(np.arange(documents)))
    distribution = resample(metric, documents, resamples, seed)
    return Estimate(value, _interval(distribution, documents), documents, distribution)


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

    That comes from the share of resamples on the far side of zero, the sample itself counted as
    one, as the interval does: below 5% where the interval leaves zero out, and the same for a
    perplexity as for its logarithm. It is never below 2 / 2^N, the chance that N documents that
    are as likely to go either way all go the same way.
    """
    p_value = None
    if apart.interval is not None:
        drawn = apart.distribution
        beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
        share = min(0.5, float(1 + beyond) / (1 + len(drawn)))
        p_value = 2 * float(special.stdtr(apart.documents - 1, special.ndtri(share)))
        p_value = max(p_value, 2.0 ** (1 - apart.documents))
    return Difference(
        apart.value,
        apart.interval,
        apart.documents,
        apart.distribution,
        p_value,
        "paired bootstrap",
    )


def weighted_sum(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A sum of independent metrics, such as a group's mean over its tasks: distributions add up."""
    resamples = min(len(part.distribution) for part in parts)
    value = sum(w * part.value for w, part in zip(weights, parts, strict=True))
    distribution = np.zeros(resamples)
    for weight, part in zip(weights, parts, strict=True):
        distribution += weight * part.distribution[:resamples]
    documents = sum(part.documents for part in parts)
    known = all(part.interval is not None for part in parts)
    interval = _interval(distribution, documents) if known else None
    return Estimate(value, interval, documents, distribution)


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
    return min(1.0, 2 * float(special.bdtr(min(lost, won), lost + won, 0.5)))
