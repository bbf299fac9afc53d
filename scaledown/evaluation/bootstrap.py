"""95 % intervals by resampling (Efron and Tibshirani, 1993), the same for equal seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = (2.5, 97.5)
Z = 1.959964  # of the normal distribution, between which and its opposite 95 % lie


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Args:
        value: The value; None where it is not defined.
        low, high: Ends of the 95 % interval; None where there is none.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bootstrap:
    """Resamples questions.

    Two columns of one length are resampled alike, which makes their comparison a paired one.

    Args:
        resamples: How often.
        seed: Decides them.
    """

    resamples: int = 1000
    seed: int = 0

    def mean(self, values: Sequence[float], share: bool = False) -> Estimate:
        """Estimate a mean.

        Args:
            values: One value per question; NaN is left out.
            share: Whether values lie between 0 and 1. Where all are 0 or all are 1, resampling finds nothing else, and
                the interval is that of Wilson (1927).

        Returns:
            The mean with its interval.
        """
        column = np.asarray(values, dtype=np.float64)
        column = column[~np.isnan(column)]
        if len(column) == 0:
            return Estimate(None)
        found = _estimate(column.mean(), self._sums(column[:, None])[:, 0] / len(column), len(column))
        if share and len(column) > 1 and (column == column[0]).all() and column[0] in (0, 1):
            room = _wilson_room(len(column))
            return Estimate(found.value, max(found.value - room, 0.0), min(found.value + room, 1.0))
        return found

    def difference(self, values: Sequence[float], reference: Sequence[float], share: bool = False) -> Estimate:
        """Estimate how much higher a mean is than another.

        Args:
            values, reference: One value per question; questions where either is NaN are left out.
            share: Whether values lie between 0 and 1. Where no question differs, or each by 1, the interval has the
                width of `mean`'s.

        Returns:
            The difference of the means with its paired interval.
        """
        pairs = _pairs(values, reference)
        differences = pairs[:, 0] - pairs[:, 1]
        found = self.mean(differences)
        if share and len(differences) > 1 and (differences == differences[0]).all() and differences[0] in (-1, 0, 1):
            room = _wilson_room(len(differences))
            return Estimate(found.value, max(found.value - room, -1.0), min(found.value + room, 1.0))
        return found

    def ratio(
        self, values: Sequence[float], reference: Sequence[float], clusters: Sequence[int] | None = None
    ) -> Estimate:
        """Estimate how many times another mean a mean is.

        Args:
            values, reference: One value per question; questions where either is NaN are left out.
            clusters: What is resampled as a whole, such as batches that were timed; questions by default.

        Returns:
            The ratio of the means with its paired interval; no value where the other mean is 0, and no interval where
            it is 0 in so many resamples that there is no upper end.
        """
        pairs = _pairs(values, reference)
        totals = pairs.sum(axis=0)
        if len(pairs) == 0 or totals[1] == 0:
            return Estimate(None)
        pairs = pairs if clusters is None else _clustered(pairs, clusters)
        sums = self._sums(pairs)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _estimate(totals[0] / totals[1], sums[:, 0] / sums[:, 1], len(pairs))

    def clustered_mean(self, values: Sequence[float], clusters: Sequence[int]) -> Estimate:
        """Estimate a mean of values that belong together in groups.

        Args:
            values: One value per question.
            clusters: The group of each question, resampled as a whole.

        Returns:
            The mean with its interval.
        """
        return self.ratio(values, np.ones(len(values)), clusters)

    def _sums(self, columns: np.ndarray) -> np.ndarray:
        """Sums of resampled rows: (n, k) in, (resamples, k) out."""
        generator = np.random.default_rng(self.seed)
        n = len(columns)
        counts = (np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(self.resamples))
        return np.stack([count @ columns for count in counts])


def _wilson_room(n: int) -> float:
    """How far from 0, or from 1, a share may be that was found to be so in n of n questions."""
    return Z**2 / (n + Z**2)


def _pairs(values: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    pairs = np.stack([np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)], axis=1)
    return pairs[~np.isnan(pairs).any(axis=1)]


def _clustered(pairs: np.ndarray, clusters: Sequence[int]) -> np.ndarray:
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.zeros((groups.max() + 1, pairs.shape[1]))
    np.add.at(sums, groups, pairs)
    return sums


def _estimate(value: float, resampled: np.ndarray, n: int) -> Estimate:
    # Ratios to 0 have no upper end; left out, the interval would end where the other ones do.
    resampled = np.where(np.isfinite(resampled), resampled, np.inf)
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(resampled, LEVEL)
    if n < 2 or not np.isfinite(high):  # a single one says nothing about others
        return Estimate(float(value))
    return Estimate(float(value), float(low), float(high))
