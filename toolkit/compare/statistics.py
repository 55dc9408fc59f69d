"""How sure a figure is: Student's interval over seeds, and the paired bootstrap over test rows."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
RESAMPLES = 10_000


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of `values` (one a seed) and the half width of its 95 % interval: t(0.975, n - 1) s / sqrt(n).

    One value has no interval: `half` is None. The interval is over seeds alone: it assumes that runs differ normally, and says nothing
    of other test rows.
    """
    number, mean = len(values), float(np.mean(values))
    if number < 2:
        return {"mean": mean, "half": None}
    t = float(stdtrit(number - 1, (1 + LEVEL) / 2))
    return {"mean": mean, "half": t * float(np.std(values, ddof=1)) / number**0.5}


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], groups: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, float | bool]:
    """Whether the mean of `ours` differs from that of `theirs` (a score for each test row) by more than test-set noise.

    Koehn 2004 (https://aclanthology.org/W04-3250): test sets are drawn anew from the rows, with replacement, and both
    systems are scored on each. Rows of one group (the same text with several references) are drawn together, since
    their scores are not independent. The differences' 2.5 and 97.5 percentiles are the interval; p is two-sided, and
    never below 1 / (resamples + 1). What another seed would have given is not in it: see the interval over seeds.
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    differences[np.abs(differences) < 1e-12] = 0.0  # equal scores whose means over seeds were rounded differently
    _, where = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(where, differences), np.bincount(where)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(sums))  # draws at once: 32 MB of indices
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(sums), (min(step, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = (float(np.quantile(means, share)) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return {
        "mean": float(differences.mean()),
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (tail + 1) / (resamples + 1)),
        "more_than_noise": low > 0 or high < 0,
    }
