"""lm-eval's metrics as functions of which documents they are taken over, for resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api import metrics

from ptconvert.measure.statistics import RESAMPLES, Floats, OverDocuments

SLOW_RESAMPLES = 999  # where the metric is a Python function of the whole list, as BLEU is
Aggregate = Callable[[Sequence[Any]], float]


def over_documents(values: Sequence[Any], aggregate: Aggregate) -> tuple[OverDocuments, int]:
    """A metric as a function of document indices, and how many resamples it is worth.

    `values` has one entry per document, `aggregate` is lm-eval's function over such a list. The
    means and the perplexities (exp of a ratio of sums, `lm_eval.api.metrics`) are computed for all
    resamples at once, any other function once for each.
    """
    if aggregate in (metrics.mean, metrics.nanmean, metrics.perplexity):
        x_N = np.asarray(values, dtype=np.float64)
        mean = np.nanmean if aggregate is metrics.nanmean else np.mean
        if aggregate is metrics.perplexity:
            return lambda idx: np.exp(-np.mean(x_N[idx], axis=-1)), RESAMPLES
        return lambda idx: np.asarray(mean(x_N[idx], axis=-1)), RESAMPLES
    if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
        x_N, weight_N = np.asarray(values, dtype=np.float64).T

        def ratio(idx: npt.NDArray[np.intp]) -> Floats:
            return np.asarray(-x_N[idx].sum(axis=-1) / weight_N[idx].sum(axis=-1))

        if aggregate is metrics.weighted_perplexity:
            return lambda idx: np.exp(ratio(idx)), RESAMPLES
        return lambda idx: ratio(idx) / math.log(2), RESAMPLES

    def one_by_one(idx: npt.NDArray[np.intp]) -> Floats:
        rows = idx.reshape(-1, idx.shape[-1])
        results = [aggregate([values[i] for i in row]) for row in rows]
        return np.asarray(results, dtype=np.float64).reshape(idx.shape[:-1])

    return one_by_one, SLOW_RESAMPLES


def is_accuracy(values: Sequence[Any], aggregate: Aggregate) -> bool:
    """Whether a metric is the share of documents that are right: a mean of values 0 and 1."""
    return aggregate is metrics.mean and all(
        isinstance(v, (int, float, np.number)) and v in (0, 1) for v in values
    )
