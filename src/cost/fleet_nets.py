"""Networks that a fleet's devices have run: what some of their times say about the others'.

Here: `KnownNets`, typical devices' times of known networks, and matching a user's models with them.
It goes beyond rates: what all devices, or some of a kind, take more for one network than its
kernels explain. Not here: rates (`fleet_terms`), learning from a table with gaps and predicting
from near devices (`fleet_near`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .features import Features
from .fleet_near import TimesPrior
from .fleet_terms import Design, design
from .profile import Correction
from .whole_model import COORDINATES, SCALES, coordinates

Array = NDArray[np.float64]

ALIKE = 0.8
"""The similarity, of 1, from which on a model is taken for a known network."""
_RIDGE = 0.02  # on similarities, where the correction is solved for
_LARGEST = 0.5  # of a correction's logarithm


@dataclasses.dataclass(frozen=True, eq=False)
class KnownNets:
    """`points` [nets, coordinates] (`whole_model`), `amounts` [nets, columns] (`fleet_terms`),
    `times`: of typical devices, [devices, nets]; `misfit` [nets]: what all devices take more than
    rates explain, as a logarithm."""

    names: tuple[str, ...]
    points: Array
    amounts: Array
    times: TimesPrior
    misfit: Array

    @classmethod
    def learn(
        cls,
        logs: Array,
        models: Mapping[str, Sequence[Features]],
        misfit: Array,
        weights: Array,
    ) -> KnownNets:
        """From logarithms of times, [devices, models], NaN where there is none."""
        return cls(
            tuple(models),
            np.array([coordinates(kernels) for kernels in models.values()]),
            design(list(models.values())).amounts,
            TimesPrior.fit(logs, weights).condensed(),
            misfit,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KnownNets:
        """The inverse of `as_dict`.

        Raises:
            KeyError, ValueError: something is missing or of another size.
        """
        names = tuple(data["names"])
        size = len(names)
        covariance = np.zeros((size, size))
        covariance[np.tril_indices(size)] = data["covariance"]
        covariance += np.tril(covariance, -1).T
        points = np.asarray(data["points"], float).reshape(size, len(COORDINATES))
        amounts = design([()] * size).amounts
        for row, column, amount in data["amounts"]:
            amounts[int(row), int(column)] = amount
        logs = np.asarray(data["times"], float).reshape(-1, size)
        weights = np.asarray(data["weights"], float).reshape(len(logs))
        misfit = np.asarray(data["misfit"], float).reshape(size)
        return cls(names, points, amounts, TimesPrior(logs, weights, covariance), misfit)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: of the amounts those above 0 as [net, column, amount], of the covariance the
        lower triangle, by rows."""
        lower = self.times.covariance[np.tril_indices(len(self.names))]
        return {
            "names": list(self.names),
            "points": np.round(self.points, 4).tolist(),
            "amounts": [
                [int(row), int(column), float(self.amounts[row, column])]
                for row, column in np.argwhere(self.amounts)
            ],
            "times": np.round(self.times.logs, 3).tolist(),
            "weights": np.round(self.times.weights, 3).tolist(),
            "misfit": np.round(self.misfit, 4).tolist(),
            "covariance": np.round(lower, 5).tolist(),
        }

    @property
    def rows(self) -> Design:
        """The known networks as rows of amounts."""
        return Design(self.amounts, design([()]).uses)

    def find(self, models: Sequence[Sequence[Features]]) -> NDArray[np.intp]:
        """The position of the known network that each model is like, -1 where it is like none."""
        found = np.full(len(models), -1)
        if not len(self.names):
            return found
        for index, kernels in enumerate(models):
            similar = _similarity(coordinates(kernels)[None], self.points)[0]
            best = int(similar.argmax())
            found[index] = best if similar[best] >= ALIKE else -1
        return found

    def correction(self, apart: Array) -> Correction:
        """A factor on whole models: exp(`apart`) at the known networks, towards 1 elsewhere."""
        wanted = apart.clip(-_LARGEST, _LARGEST)
        similar = _similarity(self.points, self.points)
        weights = np.linalg.solve(similar + _RIDGE * np.eye(len(wanted)), wanted)
        return Correction(COORDINATES, SCALES, self.points, weights)


def _similarity(left: Array, right: Array) -> Array:
    squares = (((left[:, None] - right[None]) / SCALES) ** 2).sum(2)
    found: Array = np.exp(-0.5 * squares)
    return found
