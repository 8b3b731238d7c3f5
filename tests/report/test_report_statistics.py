"""Every formula against SciPy's, against brute force, or against what it promises."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strata import ConfigError
from trainer.report import statistics

unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
samples = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)


def spread(values):
    return max(values) > min(values)


@unhurried
@given(samples)
def test_mean_sd_and_interval_are_scipys(values):
    found = statistics.summarise(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if spread(values):
        low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


@unhurried
@given(samples, st.floats(0, 5))
def test_the_paired_t_test_is_scipys_in_all_three_directions(values, margin):
    if not spread(values):
        return
    found, zeros = statistics.paired_t(values, margin), np.zeros(len(values))
    assert found.statistic == pytest.approx(scipy.stats.ttest_rel(values, zeros).statistic, rel=1e-8, abs=1e-9)
    greater = scipy.stats.ttest_rel(values, zeros + margin, alternative="greater").pvalue
    less = scipy.stats.ttest_rel(values, zeros, alternative="less").pvalue
    assert found.greater == pytest.approx(greater, rel=1e-7, abs=1e-12)
    assert found.less == pytest.approx(less, rel=1e-7, abs=1e-12)
    if margin == 0:
        assert found.two_sided == pytest.approx(scipy.stats.ttest_rel(values, zeros).pvalue, rel=1e-7, abs=1e-12)


def test_differences_without_spread_are_certain_in_a_t_test_as_in_scipy():
    assert statistics.paired_t([0.5, 0.5, 0.5]).two_sided == 0.0
    assert statistics.paired_t([0.0, 0.0, 0.0]).two_sided == 1.0


@unhurried
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9))
def test_the_sign_flip_test_is_scipys_exact_permutation_test(values):
    found = statistics.sign_flip([float(x) for x in values])
    for alternative, mine in (("greater", found.greater), ("less", found.less), ("two-sided", found.two_sided)):
        theirs = scipy.stats.permutation_test(
            (np.array(values, float),), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative
        )
        assert mine == pytest.approx(theirs.pvalue, abs=1e-12)
    assert found.exact and found.least == 2 / 2 ** len(values)


def test_five_pairs_cannot_reject_by_sign_flips_at_five_percent_and_six_can():
    assert statistics.sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]).two_sided == 0.0625
    assert statistics.sign_flip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).two_sided == pytest.approx(2 / 64)


def test_many_pairs_are_flipped_at_random_and_say_so():
    values = list(np.random.default_rng(1).normal(0.3, 1, 25))
    found = statistics.sign_flip(values)
    exact = statistics.paired_t(values)
    assert not found.exact and found.two_sided == pytest.approx(exact.two_sided, abs=0.02)
    assert statistics.sign_flip(values) == found


@unhurried
@given(st.lists(st.integers(-30, 30), min_size=6, max_size=9, unique=True), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_sign_flip_interval_holds_the_shifts_that_the_test_does_not_reject(values, level):
    low, high = statistics.sign_flip_interval(values, level)
    for shift in (low - 0.01, low + 0.01, high - 0.01, high + 0.01):
        if math.isfinite(shift):
            kept = statistics.sign_flip([x - shift for x in values]).two_sided > 1 - level + 1e-12
            assert kept == (low < shift < high)


def test_holm_is_the_published_example_and_never_below_the_raw_values():
    # Step by step: 4 x 0.005, then at least 3 x 0.01, at least 2 x 0.03, at least 1 x 0.04.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


@unhurried
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_adjusted_values_reject_what_stepping_down_by_hand_rejects(values):
    order, rejected = sorted(range(len(values)), key=lambda i: values[i]), set()
    for rank, index in enumerate(order):
        if values[index] > 0.05 / (len(values) - rank):
            break
        rejected.add(index)
    adjusted, levels = statistics.holm(values), statistics.holm_levels(values, 0.05)
    for index, value in enumerate(values):
        if abs(adjusted[index] - 0.05) > 1e-12:
            assert (adjusted[index] <= 0.05) == (index in rejected) == (value <= levels[index])


@pytest.mark.parametrize(("n", "effect", "alpha"), [(5, 1.0, 0.05), (3, 2.0, 0.05), (10, 0.7, 0.01), (20, 0.6, 0.025)])
def test_power_is_the_share_of_simulated_experiments_that_find_the_effect(n, effect, alpha):
    drawn = np.random.default_rng(n).normal(effect, 1, (40_000, n))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(n))
    share = np.mean(t > scipy.stats.t.ppf(1 - alpha / 2, n - 1))
    assert statistics.power(n, effect, 1.0, alpha) == pytest.approx(share, abs=4 * math.sqrt(0.25 / 40_000))


def test_the_smallest_effect_is_found_with_the_power_asked_for_and_scales_with_the_spread():
    for n in (2, 3, 5, 10):
        effect = statistics.smallest_effect(n, 0.3, 0.05, 0.8)
        assert statistics.power(n, effect, 0.3, 0.05) == pytest.approx(0.8, abs=1e-6)
        assert statistics.smallest_effect(n, 0.6, 0.05, 0.8) == pytest.approx(2 * effect)
    # G*Power and textbooks: five pairs find 1.68 standard deviations.
    assert statistics.smallest_effect(5, 1.0) == pytest.approx(1.68, abs=0.01)
    assert statistics.smallest_effect(1, 1.0) == math.inf


def test_pairs_needed_is_the_first_n_with_that_power():
    for effect in (0.5, 1.0, 2.0):
        n = statistics.pairs_needed(effect, 1.0)
        assert statistics.power(n, effect, 1.0) >= 0.8 > statistics.power(n - 1, effect, 1.0)
    assert statistics.pairs_needed(0.001, 1.0) is None


def test_hedges_g_estimates_the_true_standardised_effect_without_bias():
    drawn = np.random.default_rng(0).normal(0.8, 1, (20_000, 5))
    raw = np.mean(drawn.mean(1) / drawn.std(1, ddof=1))
    corrected = np.mean([statistics.standardised(row) for row in drawn[:8000]])
    assert raw > 0.95 and corrected == pytest.approx(0.8, abs=0.03)
    assert math.isnan(statistics.standardised([1.0, 2.0]))


@unhurried
@given(samples, samples)
def test_welch_is_scipys(one, two):
    if not (spread(one) and spread(two)):
        return
    difference, low, high, p = statistics.welch(one, two)
    theirs = scipy.stats.ttest_ind(one, two, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-8)
    assert difference == pytest.approx(np.mean(one) - np.mean(two), abs=1e-9)


def test_losses_whose_squares_no_float_holds_are_described_as_any_others_are():
    one, two, scale = [1.0, 3.0, 2.0, 1.5], [1.0, 2.0, 2.5, 1.1], 1e200
    large, larger = [x * scale for x in one], [x * scale for x in two]
    found, same = statistics.summarise(large), statistics.summarise(one)
    assert (found.sd / scale, found.low / scale, found.high / scale) == pytest.approx((same.sd, same.low, same.high))
    assert statistics.welch(large, larger)[3] == pytest.approx(statistics.welch(one, two)[3])
    assert statistics.paired_t(large).two_sided == pytest.approx(statistics.paired_t(one).two_sided)


def test_a_missing_scipy_is_said_in_one_sentence(monkeypatch):
    import importlib

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'strata-lm\[report\]'"):
        statistics.scipy("special")
