"""Statistics of runs over seeds and images: means, and intervals of the difference of two arms.

Every run of both arms is tested on the same images, and a hard image is hard for all of them: so
images are drawn once for all runs. Seeds are drawn for each arm separately: two arms with the same
seed share initial weights and views by accident of the random numbers, so they are no pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

DRAWS = 10_000
_UPPER = 0.975
"""Upper end of the 95 % intervals, as a probability."""


def estimate(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean over the seeds of an arm, of the finite values of a measure.

    Returns:
        {"mean", "sd": standard deviation between seeds (n - 1 in the denominator), None for one
        seed, "n"}; None without a finite value.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else None
    return {"mean": float(np.mean(finite)), "sd": sd, "n": len(finite)}


def interval(found: dict[str, Any]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of an `estimate`; None for a single seed."""
    if found["sd"] is None:
        return None
    half = float(stdtrit(found["n"] - 1, _UPPER)) * found["sd"] / math.sqrt(found["n"])
    return found["mean"] - half, found["mean"] + half


def difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], *, draws: int = DRAWS
) -> dict[str, Any]:
    """Accuracy of `first` minus that of `second`, with a bootstrap interval over seeds and images.

    Every draw takes as many images as there are, with replacement and the same for all runs, and as
    many seeds of each arm as it has. Each image enters by its mean over the seeds, the seeds by the
    deviations of their accuracies from their arm's. A bootstrap of n values has (n - 1) / n of the
    variance that it should have and normal percentiles where Student's are due. The deviations are
    therefore widened by sqrt(n / (n - 1)) and by the ratio of Student's quantile, of n_1 + n_2 - 2
    degrees of freedom, to the normal one (the expanded percentile interval of Hesterberg, "What
    teachers should know about the bootstrap", arXiv 1411.5279, for two samples and the part of the
    seeds). With one seed in either arm, only images are drawn.

    Args:
        first: (S1, N) bool, the images that each of S1 runs got right.
        second: (S2, N) bool, the same of another arm on the same images in the same order.
        draws: number of bootstrap draws, the same every time.

    Returns:
        {"value", "low", "high": difference and 95 % interval, shares; "seeds": numbers of seeds of
        the arms; "images"; "over_seeds": True if the interval covers the spread between seeds;
        "verdict" on "the first arm is better": "shown", "not shown" or "the other way"}.
    """
    (n1, images), n2 = first.shape, len(second)
    rng = np.random.default_rng(0)
    # An image is right in a of n1 and b of n2 runs. Few values n2 a - n1 b occur, so N draws of
    # images are one multinomial draw of these values.
    gains = n2 * first.sum(0, dtype=np.int64) - n1 * second.sum(0, dtype=np.int64)
    kinds, counts = np.unique(gains, return_counts=True)
    drawn = rng.multinomial(images, counts / images, size=draws) @ kinds / (n1 * n2 * images)
    over_seeds = min(n1, n2) > 1
    if over_seeds:
        student = stdtrit(n1 + n2 - 2, _UPPER) / ndtri(_UPPER)
        drawn = drawn + student * (_deviations(first, draws, rng) - _deviations(second, draws, rng))
    low, high = np.quantile(drawn, [1 - _UPPER, _UPPER]).tolist()
    verdict = "shown" if low > 0 else "the other way" if high < 0 else "not shown"
    return {
        "value": int(gains.sum()) / (n1 * n2 * images),
        "low": low,
        "high": high,
        "seeds": [n1, n2],
        "images": images,
        "over_seeds": over_seeds,
        "verdict": verdict,
    }


def _deviations(
    arm: NDArray[np.bool_], draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(draws,) mean deviation of resampled seeds, with the variance of a mean of n values."""
    accuracy = arm.mean(1)
    n = len(accuracy)
    chosen = rng.integers(0, n, (draws, n))
    deviations: NDArray[np.float64] = (accuracy - accuracy.mean())[chosen].mean(1)
    return math.sqrt(n / (n - 1)) * deviations
