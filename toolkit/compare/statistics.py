"""Uncertainty: Student's interval over seeds, and whether a difference is more than the noise of test rows and seeds."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
RESAMPLES = 10_000


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of `values` (one for each seed) and the half width of its 95 % interval: t(0.975, n - 1) s / sqrt(n).

    One value has no interval: `half` is None. The interval only covers seeds, not other test rows. It assumes that scores
    are normally distributed over seeds.
    """
    number, mean = len(values), float(np.mean(values))
    if number < 2:
        return {"mean": mean, "half": None}
    t = float(stdtrit(number - 1, (1 + LEVEL) / 2))
    return {"mean": mean, "half": t * float(np.std(values, ddof=1)) / number**0.5}


def paired_bootstrap(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    groups: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, float | bool | str]:
    """Whether the mean of `ours` differs from that of `theirs` by more than noise; each is (seeds, test rows) of scores.

    Test rows (Koehn 2004, https://aclanthology.org/W04-3250): test sets are resampled from the rows with replacement, and
    both systems, averaged over their seeds, are scored on each. Rows of one group (the same text with several references)
    are drawn together, because their scores are not independent.

    Seeds: each draw also gets a random term for other seeds: Student's t, scaled by the standard error of both means over
    seeds, with Welch's degrees of freedom (1947, https://doi.org/10.1093/biomet/34.1-2.28). Resampling two or three seeds
    as well would give too narrow a spread: in a simulation of 400 pairs of equal methods (200 rows, a standard deviation of
    0.03 over seeds), 26, 14 and 11 % seemed different with 2, 3 and 5 seeds; with t, 3, 3 and 4 %. If a side has only one
    seed, the spread over seeds is unknown: then only test rows are covered, and `covers` says so.

    The interval runs from the 2.5th to the 97.5th percentile of the draws; p is two-sided, and at least 1 / (resamples + 1).

    Limits with 3 seeds: the spread over seeds is only known to a factor of about 2, so intervals are wide, and real
    differences of less than about 3 standard errors count as noise. Scores are assumed to be normally distributed over
    seeds. A seed's effect on single rows is counted twice, which widens the interval a little. There is no correction for
    the number of compared methods: of 20 equal methods, one is expected to seem different.
    """
    sides = [np.atleast_2d(np.asarray(side, dtype=float)) for side in (ours, theirs)]
    differences = sides[0].mean(0) - sides[1].mean(0)
    differences[np.abs(differences) < 1e-12] = 0.0  # equal scores whose means over seeds were rounded differently
    _, where = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(where, differences), np.bincount(where)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(sums))  # draws at once: 32 MB of indices
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(sums), (min(step, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    seeds = min(len(side) for side in sides)
    if seeds > 1:
        means += _seed_noise([side.mean(1) for side in sides], rng, resamples)
    low, high = (float(np.quantile(means, share)) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return {
        "mean": float(differences.mean()),
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (tail + 1) / (resamples + 1)),
        "more_than_noise": low > 0 or high < 0,
        "covers": "test rows and seeds" if seeds > 1 else "test rows",
    }


def _seed_noise(scores: Sequence[np.ndarray], rng: np.random.Generator, draws: int) -> np.ndarray:
    """`draws` random terms for other seeds, to add to the difference of two means; `scores` holds each side's mean per seed."""
    squares = np.array([np.var(side, ddof=1) / len(side) for side in scores])  # squared standard error of each mean
    if squares.sum() < 1e-24:
        return np.zeros(draws)  # all seeds agree
    freedom = squares.sum() ** 2 / sum(squares**2 / (np.array([len(side) for side in scores]) - 1))
    return rng.standard_t(freedom, draws) * squares.sum() ** 0.5
