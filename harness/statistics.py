"""Means with intervals, paired comparisons, and curves over the number of samples."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
Z = 1.959964  # 97.5 % of a normal distribution's values are below it


class Estimate(NamedTuple):
    """A mean over questions and its 95 % interval. None: no value, or some resample has none."""

    mean: float | None
    low: float | None
    high: float | None


@lru_cache(maxsize=1)
def resamples(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each question was drawn, divided by n. Always the same."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, RESAMPLES) / n


def bootstrap(values: np.ndarray) -> list[Estimate]:
    """An Estimate for each column of (questions, columns), by resampling questions. The interval
    has no width where all questions agree. NaN: that question has no value."""
    weights, present = resamples(len(values)), ~np.isnan(values)
    known = np.where(present, values, 0)
    with np.errstate(invalid="ignore"):  # 0 / 0: no value at all
        mean = known.sum(0) / present.sum(0)
        drawn = (weights @ known) / (weights @ present)
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Estimate(*(None if math.isnan(v) else float(v) for v in e)) for e in zip(mean, *ends)]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which right / n was seen: every p that a score test does not
    reject. Wilson 1927, J. Am. Stat. Assoc. 22:209. It has a width even if right is 0 or n."""
    center = (right + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(right * (n - right) / n + Z**2 / 4)
    return max(0.0, center - half), min(1.0, center + half)


def tango(fixed: int, broken: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a gain of which (fixed - broken) / n was seen: every gain that a score
    test for pairs does not reject. Tango 1998, Statistics in Medicine 17:891. For a gain of 0 the
    test is McNemar's. It has a width even if nothing is fixed or broken."""
    seen = (fixed - broken) / n

    def rejected(gain: float) -> bool:
        b = fixed + broken - (2 * n - fixed + broken) * gain
        root = math.sqrt(max(0.0, b * b + 8 * n * broken * gain * (1 - gain)))
        rate = (b + root) / (4 * n)  # of broken questions, the most likely one if `gain` is true
        return n * (seen - gain) ** 2 > Z**2 * (2 * rate + gain * (1 - gain))

    def end(outer: float) -> float:
        inner = seen
        for _ in range(50):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if rejected(middle) else (middle, outer)
        return inner
    return end(-1.0), end(1.0)


def binary(values: np.ndarray) -> bool:
    """Whether there are values and all of them are 0 or 1."""
    return values.size > 0 and bool(np.isin(values, (0, 1)).all())


def estimates(values: np.ndarray) -> list[Estimate]:
    """An Estimate for each column of (questions, columns): Wilson's interval where all values are 0
    or 1, where the bootstrap is far too narrow near 0 and 1; else the bootstrap's. NaN: that
    question has no value."""
    found = bootstrap(values)
    for i, column in enumerate(values.T):
        known = column[~np.isnan(column)]
        if binary(known):
            found[i] = Estimate(found[i].mean, *wilson(int(known.sum()), len(known)))
    return found


def gains(after: np.ndarray, before: np.ndarray) -> list[Estimate]:
    """An Estimate of the mean of after - before for each column of (questions, columns), which have
    the same questions: Tango's interval where all values are 0 or 1, else the bootstrap's. NaN:
    that question has no value; it counts only where both have one."""
    found = bootstrap(after - before)
    for i, pair in enumerate(zip(after.T, before.T)):
        new, old = np.array(pair)[:, ~np.isnan(pair).any(0)]
        if binary(new) and binary(old):
            fixed, broken = int((new > old).sum()), int((new < old).sum())
            found[i] = Estimate(found[i].mean, *tango(fixed, broken, len(new)))
    return found


def band(values: list[list[float]]) -> dict[str, list[float]]:
    """mean, low and high of every column of (questions, columns)."""
    return dict(zip(Estimate._fields, zip(*estimates(np.array(values, float)))))


def mcnemar(before: list[bool], after: list[bool]) -> tuple[int, int, float]:
    """Questions fixed and broken, and the exact two-sided p of such a split if both were equally
    likely (McNemar 1947, the binomial form)."""
    fixed = sum(b > a for a, b in zip(before, after))
    broken = sum(a > b for a, b in zip(before, after))
    n, fewer = fixed + broken, min(fixed, broken)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return fixed, broken, min(1.0, float(Fraction(2 * tail, 2**n)))


def majority_curve(forms: Sequence[Hashable], right: Sequence[bool],
                   order: list[int]) -> list[float]:
    """The share of subsets of k = 1..K samples whose most frequent answer is right. forms: what
    each sample answers, "" for nothing; right: whether that is correct.

    K subsets of each size: runs of k in the random `order` closed to a ring, so every sample counts
    k times. k = 1 is exactly the accuracy of a sample, k = K exactly maj@K."""
    K, ring = len(forms), [*order * 2]
    first = {form: forms.index(form) for form in forms}
    # Small numbers instead of forms are quick to count.
    ballot = [None if form == "" else first[form] for form in forms]

    def wins(start: int, k: int) -> bool:
        subset = sorted(ring[start:start + k])  # in the order given: the first of a tie wins
        votes = Counter(ballot[i] for i in subset if ballot[i] is not None)
        return bool(votes) and bool(right[max(votes, key=votes.get)])
    return [float(np.mean([wins(i, k) for i in range(K)])) for k in range(1, K + 1)]


def pass_at_k(right: Sequence[bool]) -> list[float]:
    """pass@k for k = 1..K: 1 - C(K - c, k) / C(K, k) for c right samples, the unbiased estimator of
    Chen et al. 2021, arXiv 2107.03374."""
    K, c = len(right), sum(right)
    return [1 - math.comb(K - c, k) / math.comb(K, k) for k in range(1, K + 1)]
