"""Intervals and paired tests: against lm-eval's metrics, textbook values, and by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lm_eval.api import metrics
from scipy import stats

from ptconvert.evaluate import metrics as metrics_over
from ptconvert.measure import statistics


def simulated(seed: int, documents: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Two models' scores: documents differ far more than the models do."""
    rng = np.random.default_rng(seed)
    document = rng.normal(0, 1, documents)
    noise = rng.normal(0, 0.3, (2, documents))
    return document + noise[0], document + noise[1] + shift


def paired(a: Any, b: Any, aggregate: Any, seed: int = 0) -> Any:
    before, resamples = metrics_over.over_documents(a, aggregate)
    after, _ = metrics_over.over_documents(b, aggregate)
    return statistics.compare(before, after, len(a), resamples, seed)


@pytest.mark.parametrize(
    ("aggregate", "weighted"),
    [
        (metrics.mean, False),
        (metrics.nanmean, False),
        (metrics.perplexity, False),
        (metrics.median, False),
        (metrics.weighted_perplexity, True),
        (metrics.bits_per_byte, True),
    ],
)
def test_metrics_over_documents_are_lm_evals(aggregate: Any, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    values: list[Any] = list(-rng.random(12))
    if weighted:
        values = [(v * 40, int(w)) for v, w in zip(values, rng.integers(5, 60, 12), strict=True)]
    metric, resamples = metrics_over.over_documents(values, aggregate)
    rows = rng.integers(0, 12, (5, 12))
    expected = [aggregate([values[i] for i in row]) for row in rows]
    np.testing.assert_allclose(metric(rows), expected, rtol=1e-12)
    assert resamples == (999 if aggregate is metrics.median else 9999)


def test_values_that_are_lists_go_through_lm_evals_own_function() -> None:
    flat = lambda items: sum(map(sum, items)) / sum(map(len, items))  # noqa: E731  (as IFEval's)
    metric, _ = metrics_over.over_documents([[True, False], [True], [False]], flat)
    assert metric(np.arange(3)) == 0.5 and metric(np.array([1, 1, 1])) == 1.0


def test_interval_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 60)
    found = statistics.estimate(statistics.mean_over(list(values)), 60, statistics.RESAMPLES, 0)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(values.mean()) and found.interval is not None
    assert found.interval == pytest.approx(tuple(expected), abs=0.05)


def test_paired_test_sees_what_unpaired_errors_hide() -> None:
    a, b = simulated(0, 100, 0.2)
    unpaired = np.hypot(stats.sem(a), stats.sem(b))
    assert abs(b.mean() - a.mean()) < 1.96 * unpaired
    found = paired(list(a), list(b), metrics.mean)
    assert found.p_value < 0.01 and found.interval[0] > 0
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)


def test_a_model_and_itself_never_differ() -> None:
    for seed in range(5):
        a, _ = simulated(seed, 30, 0)
        found = paired(list(a), list(a), metrics.mean, seed)
        assert (found.value, found.p_value, found.interval) == (0.0, 1.0, (0.0, 0.0))


@pytest.mark.parametrize("documents", [6, 8, 24, 100])
@pytest.mark.parametrize("kind", ["mean", "perplexity", "McNemar"])
def test_false_positives_are_about_one_in_twenty(documents: int, kind: str) -> None:
    trials, found = 400, 0
    for seed in range(trials):
        a, b = simulated(seed, documents, 0)
        if kind == "McNemar":
            found += statistics.mcnemar(list(a > 0), list(b > 0)) < 0.05
            continue
        weights = np.random.default_rng([seed, 1]).integers(50, 500, documents)
        values: list[list[Any]] = [list(a), list(b)]
        if kind == "perplexity":
            values = [list(zip((x - 4) * weights, weights, strict=True)) for x in (a, b)]
        aggregate = metrics.weighted_perplexity if kind == "perplexity" else metrics.mean
        before, after = (metrics_over.over_documents(v, aggregate)[0] for v in values)
        p_value = statistics.compare(before, after, documents, 999, seed).p_value
        found += p_value is not None and p_value < 0.05
    # 400 trials at 5%: 20 are expected, more than 36 would come once in some thousand times.
    assert found <= 36
    if kind != "McNemar":  # its exact form is cautious, the bootstrap must not be
        assert found >= (6 if documents > 8 else 1)


def test_power_grows_with_the_difference() -> None:
    hits = [
        sum(paired(*simulated(s, 50, shift), metrics.mean, s).p_value < 0.05 for s in range(30))
        for shift in (0.05, 0.1, 0.3)
    ]  # fmt: skip
    assert hits[0] < hits[1] < hits[2] == 30


def test_a_perplexity_is_tested_as_its_logarithm_is() -> None:
    a, b = simulated(3, 40, 0.15)
    of_log = paired([-x * 8 for x in a], [-x * 8 for x in b], metrics.mean)
    of_exp = paired(list(a * 8), list(b * 8), metrics.perplexity)
    assert of_log.p_value == pytest.approx(of_exp.p_value, abs=0.01)


def test_mcnemar_is_the_exact_binomial() -> None:
    source = [1] * 10 + [0] * 2 + [1] * 50
    converted = [0] * 10 + [1] * 2 + [1] * 50
    assert statistics.mcnemar(source, converted) == pytest.approx(0.0385742, abs=1e-6)
    assert statistics.mcnemar(source, source) == 1.0


def test_groups_add_up_independent_tasks() -> None:
    first, second = simulated(0, 200, 0.1), simulated(1, 50, 0.1)
    parts = [paired(list(a), list(b), metrics.mean, n) for n, (a, b) in enumerate((first, second))]
    group = statistics.weighted_difference(parts, [0.8, 0.2])
    a, b = (np.concatenate(x) for x in zip(first, second, strict=True))
    whole = stats.ttest_rel(b, a)
    assert group.value == pytest.approx((b - a).mean())
    assert group.interval == pytest.approx(tuple(whole.confidence_interval(0.95)), abs=0.01)


@pytest.mark.parametrize("documents", [1, 2, 5])
def test_few_documents_have_no_interval(documents: int) -> None:
    found = paired([1.0] * documents, [2.0] * documents, metrics.mean)
    assert (found.value, found.interval, found.p_value) == (1.0, None, None)
    group = statistics.weighted_difference([found, found], [0.5, 0.5])
    assert (group.value, group.interval, group.p_value) == (1.0, None, None)
    enough = paired([1.0] * 6, [2.0] * 6, metrics.mean)
    assert enough.p_value == 2.0**-5


def test_a_function_of_a_users_own_is_not_taken_for_lm_evals() -> None:
    def mean(items: Any) -> float:
        return float(max(items))

    metric, resamples = metrics_over.over_documents([1.0, 5.0], mean)
    assert metric(np.arange(2)) == 5.0 and resamples == metrics_over.SLOW_RESAMPLES
    assert not metrics_over.is_accuracy([0, 1], mean)
    assert metrics_over.is_accuracy([0, 1], metrics.mean)
