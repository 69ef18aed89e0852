"""Means with intervals, paired comparisons, and curves over the number of samples."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over questions and its 95 % interval, by the bootstrap over questions. The interval
    has no width where all questions agree. None: no value, or some resample has none."""

    mean: float | None
    low: float | None
    high: float | None


@lru_cache(maxsize=1)
def resamples(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each question was drawn, divided by n. Always the same."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, RESAMPLES) / n


def estimates(values: np.ndarray) -> list[Estimate]:
    """An Estimate for each column of (questions, columns). NaN: that question has no value."""
    weights, present = resamples(len(values)), ~np.isnan(values)
    known = np.where(present, values, 0)
    with np.errstate(invalid="ignore"):  # 0 / 0: no value at all
        mean = known.sum(0) / present.sum(0)
        drawn = (weights @ known) / (weights @ present)
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Estimate(*(None if math.isnan(v) else float(v) for v in e)) for e in zip(mean, *ends)]


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
