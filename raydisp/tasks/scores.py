r"""What a benchmark's value owes to each of its items, and the standard errors that follow from it.

A value is the weighted mean m of its items' scores x_i, or, of a perplexity, exp(m) with scores in nats. What
item i moves it by is its influence,

    accuracy and other means   w_i (x_i - m) / W
    perplexity                 exp(m) w_i (x_i - m) / W        W = sum of all w_i

and the standard error over n items is sqrt(n / (n - 1) * sum of the squared influences): for equal weights
that of a mean, s / sqrt(n), and otherwise the delta method's. The difference of two models on the same items
has, item by item, the difference of their influences: what is hard for both drops out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CLOSE = 1e-6
"""Relative, between a value and what its items give: summed in another order, in float64."""


def influences(
    scores: ArrayLike, weights: ArrayLike, value: float, strata: ArrayLike | None = None
) -> Floats | None:
    """How much each item moves a value.

    Args:
        scores, weights: [n]; weights > 0.
        value: what the items came to; it tells whether it is their mean or exp of it.
        strata: [n], the task of each item where the value is that of a group of tasks, whose own means do not
            vary from sample to sample; None: all are of one.
    Returns:
        [n], summing to 0; None where the value is neither.
    """
    x, w = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if x.size == 0 or not (np.isfinite(x).all() and np.isfinite(w).all() and (w > 0).all()):
        return None
    total = w.sum()
    mean = float((w * x).sum() / total)
    if math.isclose(mean, value, rel_tol=_CLOSE, abs_tol=1e-12):
        slope = 1.0
    elif mean < 700 and math.isclose(math.exp(mean), value, rel_tol=_CLOSE):
        slope = value
    else:
        return None
    centre = np.full_like(x, mean)
    if strata is not None:
        _, of = np.unique(np.asarray(strata), return_inverse=True)
        centre = (np.bincount(of, w * x) / np.bincount(of, w))[of]
    return slope * w * (x - centre) / total


def standard_error(influence: ArrayLike) -> float | None:
    """Standard error over items of what they sum to; None below two items.

    Args:
        influence: [n], of one model, or a difference of two, item by item, or a mean of such over seeds.
    """
    each = np.asarray(influence, dtype=np.float64)
    if each.size < 2:
        return None
    # From their mean: the influences of one model sum to 0, and so do differences of them, up to rounding.
    return math.sqrt(each.size * float(each.var(ddof=1)))
