"""How sure a score is: confidence intervals of one run, and tests between two runs that answered the same questions.

Wilson 1927 (interval of a share), Efron 1979 (bootstrap), McNemar 1947 (two shares, paired; here the exact test)."""

import math

import numpy as np

Z = 1.959963984540054          # 95 % of a normal distribution lie within Z standard deviations
DRAWS = 1000                   # resamples of a bootstrap; their seed is fixed, so that a score has one interval


def wilson(right, n):
    """95 % interval of a share -> low, high. right: how many of n scores are 1"""
    share, z2 = right / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(*strata):
    """95 % percentile interval of the sum of the means of several lists of scores -> low, high. Each list is resampled
    by itself. One list: the interval of its mean."""
    rng = np.random.default_rng(0)
    sums = np.zeros(DRAWS)
    for scores in map(np.asarray, strata):
        sums += [scores[rng.integers(len(scores), size=len(scores))].mean() for _ in range(DRAWS)]
    return tuple(float(x) for x in np.percentile(sums, (2.5, 97.5)))


def interval(scores):
    """95 % interval of a mean score -> low, high: Wilson's if every score is 0 or 1, else by bootstrap"""
    if set(scores) <= {0, 1}:
        return wilson(sum(scores), len(scores))
    return bootstrap(scores)


def mcnemar(only_first, only_second):
    """Exact two-sided test of two runs -> p. The arguments count the questions that only one of the runs has right. If
    the runs were equally good, either of them would have each of these questions right with probability 1/2."""
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_bootstrap(differences):
    """Two-sided test of two runs with scores other than 0 and 1 -> p: how often a resample of the differences, moved
    to the mean 0, has a mean as far from 0 as the differences themselves. The least p is 1 / (DRAWS + 1)."""
    d, rng = np.asarray(differences, float), np.random.default_rng(0)
    centred, mean = d - d.mean(), abs(d.mean())
    far = sum(abs(centred[rng.integers(len(d), size=len(d))].mean()) >= mean for _ in range(DRAWS))
    return (far + 1) / (DRAWS + 1)


def paired(first, second):
    """Compare the scores of two runs on the same questions -> dict: both means, their difference and its 95 % interval,
    the test and its p. McNemar's exact test if every score is 0 or 1, else a paired bootstrap."""
    d = [a - b for a, b in zip(first, second, strict=True)]
    wins, losses = sum(x > 0 for x in d), sum(x < 0 for x in d)
    binary = {*first, *second} <= {0, 1}
    return {"accuracy": sum(second) / len(d), "difference": sum(d) / len(d), "ci95": list(bootstrap(d)),
            "better": wins, "worse": losses, "test": "McNemar, exact" if binary else "paired bootstrap",
            "p": mcnemar(wins, losses) if binary else paired_bootstrap(d)}
