"""Proves that intervals equal published ones and cover what they promise, also near 0 and 1."""

import math

import numpy as np
import pytest

from harness.statistics import band, bootstrap, estimates, gains, tango, wilson

SHARES = [  # right, n, Wilson's interval
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),  # Newcombe 1998, Stat. Med. 17:857
    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775),
]
PAIRS = [  # fixed, broken, n, Tango's interval
    (6, 16, 161, -0.1240, -0.0054),  # Fagerland, Lydersen, Laake 2017, Contingency Tables, ch. 8
    (1, 7, 21, -0.517, -0.026),  # the same 2014, Stat. Med. 33:2850
    (0, 0, 54, -0.0664, 0.0664),  # Newcombe 1998, Stat. Med. 17:2635, his method has the same
]


@pytest.mark.parametrize("right, n, low, high", SHARES)
def test_published_shares(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5.1e-5)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


@pytest.mark.parametrize("fixed, broken, n, low, high", PAIRS)
def test_published_gains(fixed, broken, n, low, high):
    digits = 5.1e-4 if n == 21 else 5.1e-5
    assert tango(fixed, broken, n) == pytest.approx((low, high), abs=digits)
    assert tango(broken, fixed, n) == pytest.approx((-high, -low), abs=digits)


def test_gains_where_pairs_agree_or_all_differ():
    """Closed forms: z^2 / (n + z^2) if nothing changed; twice Wilson's end - 1 if all are fixed."""
    for n in (1, 8, 60, 1319):
        edge = 1.959964**2 / (n + 1.959964**2)
        assert tango(0, 0, n) == pytest.approx((-edge, edge), abs=1e-9)
        assert tango(n, 0, n) == pytest.approx((2 * wilson(n, n)[0] - 1, 1), abs=1e-9)
        assert tango(0, n, n) == pytest.approx((-1, 1 - 2 * wilson(n, n)[0]), abs=1e-9)


def test_gains_agree_with_mcnemar():
    """0 is outside the interval if and only if McNemar's statistic exceeds z^2."""
    for fixed in range(12):
        for broken in range(12):
            low, high = tango(fixed, broken, 30)
            chi2 = (fixed - broken) ** 2 / max(1, fixed + broken)
            assert (not low <= 0 <= high) == (chi2 > 1.959964**2), (fixed, broken)
            assert low <= (fixed - broken) / 30 <= high


# ---- coverage, by enumeration of all outcomes

def table(right, wrong):
    """A column of 0 and 1."""
    return np.array([[1.0]] * right + [[0.0]] * wrong)


def share_coverage(interval, p, n):
    """The probability that the interval of n questions covers the true share p."""
    ends = (interval(k, n) for k in range(n + 1))
    return sum(math.comb(n, k) * p**k * (1 - p)**(n - k)
               for k, (low, high) in enumerate(ends) if low <= p <= high)


def test_shares_are_covered():
    """Where the bootstrap covers .64, and elsewhere."""
    def resampled(right, n):
        return bootstrap(table(right, n - right))[0][1:]

    def reported(right, n):
        return estimates(table(right, n - right))[0][1:]
    assert share_coverage(resampled, 0.983, 60) < 0.7
    coverage = {p: share_coverage(reported, p, 60)
                for p in (0.005, 0.017, 0.03, 0.1, 0.5, 0.9, 0.95, 0.97, 0.983, 0.99, 0.999)}
    assert min(coverage.values()) > 0.915, coverage
    assert np.mean([*coverage.values()]) > 0.945, coverage


@pytest.mark.parametrize("fixed, broken", [
    (0.017, 0.0), (0.0, 0.017), (0.017, 0.017), (0.03, 0.01), (0.1, 0.0), (0.1, 0.02), (0.3, 0.1),
    (0.95, 0.01), (0.002, 0.001)])
def test_gains_are_covered(fixed, broken):
    """For all splits of 60 questions into fixed, broken and unchanged."""
    n, total = 60, 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            same = n - i - j
            p = (math.comb(n, i) * math.comb(n - i, j)
                 * fixed**i * broken**j * (1 - fixed - broken)**same)
            if p > 1e-9:
                low, high = tango(i, j, n)
                total += p * (low <= fixed - broken <= high)
    assert total > 0.93


def test_the_bootstrap_would_not_cover_a_gain():
    """If 60 questions are as before, it says that the gain is exactly 0; it may be 1 / 60."""
    before, after = table(0, 60), table(0, 60)
    assert bootstrap(after - before)[0] == (0, 0, 0)
    [gain] = gains(after, before)
    assert gain.low < -0.017 and 0.017 < gain.high and gain.mean == 0


# ---- columns

def test_all_right_is_not_certain():
    """60 of 60, and 0 of 60."""
    [ones], [zeros] = estimates(table(60, 0)), estimates(table(0, 60))
    assert ones == pytest.approx((1, 0.9398, 1), abs=1e-4)
    assert zeros == pytest.approx((0, 0, 0.0602), abs=1e-4)
    assert band([[True, False]] * 60) == {
        "mean": (1, 0), "low": (ones.low, zeros.low), "high": (ones.high, zeros.high)}


def test_each_column_has_its_interval():
    """Only columns of 0 and 1 have the intervals of shares. A missing value is not counted."""
    missing = np.nan
    after = np.array([[1, 0.5, 1, missing]] * 6 + [[0, 0.25, missing, missing]] * 4)
    before = np.array([[0, 0, missing, 1]] * 2 + [[1, 1, 1, 1]] * 8)
    shares = estimates(after)
    assert shares[0][1:] == wilson(6, 10) and shares[2][1:] == wilson(6, 6)
    assert shares[1] == bootstrap(after)[1] and shares[3] == (None, None, None)
    changes = gains(after, before)
    assert changes[0] == pytest.approx((-0.2, *tango(2, 4, 10)))
    assert changes[1] == bootstrap(after - before)[1]
    assert changes[2] == (0, *tango(0, 0, 4)) and changes[3] == (None, None, None)


def test_a_difference_of_0_or_1_is_not_a_share():
    """Log-probs that differ by whole nats are no pairs of 0 and 1."""
    before = np.array([[-3.0], [-2.0], [-5.0]])
    assert gains(before + 1, before) == [(1, 1, 1)]
    assert gains(before + [[0], [1], [1]], before) == bootstrap(np.array([[0.0], [1.0], [1.0]]))
