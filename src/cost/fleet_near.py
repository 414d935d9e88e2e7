"""A device's times of models that others have run, from a few of its own: no graph is needed.

Here: `TimesPrior`, a table of other devices' times that is learned from once, and
`TimesPrior.predict`. Not here: models that no device has run (`fleet`).

What the new device took for some models is compared with what each known device took for them,
speed aside. Near devices count most, and give a mean and a covariance of the shape of a device's
times; the rest is the conditional mean of a Gaussian (Rasmussen and Williams 2006, appendix A.2).
The covariance of a few near devices is drawn towards that of all, which comes from expectation
maximization with times missing (Dempster, Laird and Rubin 1977) under Student's t (Liu and Rubin
1995). numpy alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError

Array = NDArray[np.float64]

NEAR = 0.8
"""How far a device may be to count, in distances of the `RANK`th nearest."""
RANK = 5
FLEET_WEIGHT = 10.0
"""Devices that the covariance of all counts for, beside the near ones."""
FLEET_SHARE = 0.25
"""Of the variance of all devices, what is left where near ones are known."""
NOISE = 0.03
PROTOTYPES = 40
"""Groups of devices that are told apart where single ones are not kept."""
LEAST_ALIKE = 3
"""Devices in such a group."""
_FREEDOM = 4.0
_SPEED = 1.5  # deviation of devices' speeds, in logarithms
_SHAPE = 0.1  # deviation of a model beside the speed, before anything is learned
_PRIOR_WEIGHT = 3.0
_LOOSE = 0.05  # deviation of a new device's speed from what its known models say


@dataclasses.dataclass(frozen=True, eq=False)
class TimesPrior:
    """Logarithms of times, [devices, models], without gaps, and the covariance between models."""

    logs: Array
    weights: Array
    covariance: Array

    @classmethod
    def fit(cls, logs: Array, weights: Array | None = None, rounds: int = 15) -> TimesPrior:
        """Learn from logarithms of times, [devices, models], NaN where there is none.

        `weights`: how much a device counts, for those that are in the table more than once.

        Raises:
            ProfileError: fewer than three devices, or a model that no device has run.
        """
        if len(logs) < 3:
            raise ProfileError("Three devices or more are needed to learn how devices differ")
        there = ~np.isnan(logs)
        if not there.any(0).all():
            raise ProfileError("A model has no time on any device", fix="leave the model out")
        share = np.ones(len(logs)) if weights is None else weights
        size = logs.shape[1]
        assumed = np.eye(size) * _SHAPE**2 + _SPEED**2
        shape = np.nanmedian(logs - np.nanmedian(logs, axis=1, keepdims=True), axis=0)
        mean = shape + np.median(np.nanmedian(logs - shape, axis=1))
        covariance = assumed
        filled = np.empty_like(logs)
        for _ in range(rounds):
            spread = np.zeros((size, size))
            trust = np.empty(len(logs))
            for n, seen in enumerate(there):
                apart = logs[n, seen] - mean[seen]
                gain = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[seen])
                filled[n] = mean + gain.T @ apart
                distance = apart @ np.linalg.solve(covariance[np.ix_(seen, seen)], apart)
                trust[n] = share[n] * (_FREEDOM + seen.sum()) / (_FREEDOM + distance)
                spread += share[n] * (covariance - covariance[:, seen] @ gain)
            mean = np.average(filled, axis=0, weights=trust)
            apart = filled - mean
            spread += (apart * trust[:, None]).T @ apart
            covariance = (spread + _PRIOR_WEIGHT * assumed) / (share.sum() + _PRIOR_WEIGHT)
        return cls(np.where(there, logs, filled), share, covariance)

    def condensed(self, most: int = PROTOTYPES, least: int = LEAST_ALIKE) -> TimesPrior:
        """The typical devices of at most `most` groups of `least` or more, in place of the devices.

        Groups are those of k-means on times beside a device's speed, from starts far apart.
        """
        shapes = self.logs - self.logs.mean(1, keepdims=True)
        centers = shapes[[int(self.weights.argmax())]]
        while len(centers) < min(most, len(shapes) // least):
            apart = _apart(shapes, centers).min(1)
            centers = np.vstack([centers, shapes[int(apart.argmax())]])
        for _ in range(20):
            nearest = _apart(shapes, centers).argmin(1)
            sizes = np.bincount(nearest, minlength=len(centers))
            if (sizes < least).any() and len(centers) > 1:  # the members go elsewhere
                centers = np.delete(centers, int(sizes.argmin()), axis=0)
                continue
            groups = [nearest == index for index in range(len(centers))]
            means = [np.average(shapes[g], axis=0, weights=self.weights[g]) for g in groups]
            centers = np.array(means)
        nearest = _apart(shapes, centers).argmin(1)
        count: Array = np.bincount(nearest, self.weights, len(centers)).astype(float)
        return TimesPrior(centers[count > 0], count[count > 0], self.covariance)

    def predict(self, known: NDArray[np.intp], logs: Array) -> Array:
        """Logarithms of a new device's times of all models, from those of `known`, [models].

        `known`: positions of its models among the table's. Outliers among `logs` count less.
        """
        others = self.logs[:, known]
        speeds = np.median(logs - others, axis=1)
        distance = np.abs(logs - others - speeds[:, None]).mean(1)
        reach = NEAR * max(float(np.sort(distance)[min(RANK, len(distance)) - 1]), 1e-6)
        weights = self.weights * np.exp(-0.5 * ((distance - distance.min()) / reach) ** 2)
        weights /= weights.sum()
        # the shape of a device: its times beside their mean over the known models
        shapes = self.logs - others.mean(1, keepdims=True)
        mean = weights @ shapes
        apart = shapes - mean
        near = (apart * weights[:, None]).T @ apart
        beside = np.eye(len(mean))
        beside[:, known] -= 1.0 / len(known)
        fleet = FLEET_SHARE * beside @ self.covariance @ beside.T
        count = 1.0 / float((weights**2).sum())
        covariance = (count * near + FLEET_WEIGHT * fleet) / (count + FLEET_WEIGHT) + _LOOSE**2
        residual = logs - logs.mean() - mean[known]
        noise = np.full(len(known), NOISE**2)
        for _ in range(3):
            inner = covariance[np.ix_(known, known)] + np.diag(noise)
            solved = np.linalg.solve(inner, residual)
            noise = NOISE**2 * (1.0 + (noise * solved / NOISE) ** 2 / 3.0)
        found: Array = mean + covariance[:, known] @ solved + logs.mean()
        return found


def _apart(shapes: Array, centers: Array) -> Array:
    """Mean absolute differences, [shapes, centers]."""
    found: Array = np.abs(shapes[:, None] - centers[None]).mean(2)
    return found
