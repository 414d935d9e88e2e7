"""Which units to remove so that what is left can make up for the loss: the optimal brain surgeon.

Here: `Problem`, what one consumer of a group says of its units, and `eliminate`, which orders the
units of a group by what their loss costs all consumers together *after* their weights have been
solved again. Not here: the scores that look at one unit at a time (`importance`), how many units
each group loses (`allocation`), solving the weights (`repair`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

DAMPING = 1e-2
"""Added to the diagonal of a gram matrix, in units of its mean: inputs that are all but copies of
each other on the samples need not be on others."""
_STEPS = 48
"""About how many times the inverses are updated: between two updates, units are chosen one after
the other among the cheapest ones."""


class Problem:
    """A product X W whose columns of X belong to units: the error |X W - X' W'|^2 of a removal.

    `gram` is X'X [n, n], best centred (then the mean goes to the bias), `weight` is [n, m], `units`
    says which unit each of the n inputs belongs to (-1: none, it stays). Errors are in units of
    |X W|^2, times `share`.
    """

    def __init__(
        self, gram: np.ndarray, weight: np.ndarray, units: np.ndarray, share: float = 1.0
    ) -> None:
        gram = np.asarray(gram, np.float64)
        self.weight = np.array(weight, np.float64)
        self.units = np.asarray(units)
        power = float(np.einsum("io,io->", self.weight, gram @ self.weight))
        self.factor = share / power if power > 0 else 0.0
        size = len(gram)
        damping = DAMPING * np.trace(gram) / max(1, size) + 1e-30
        self.inverse = np.linalg.inv(gram + damping * np.eye(size))

    @classmethod
    def _part(cls, whole: Problem, where: np.ndarray) -> Problem:
        """The same with fewer candidates: all that is known of the others is in the inverse."""
        part = cls.__new__(cls)
        part.weight, part.units = whole.weight[where], whole.units[where]
        part.factor = whole.factor
        part.inverse = whole.inverse[np.ix_(where, where)]
        return part

    def among(self, units: np.ndarray) -> Problem:
        """The problem of those units only, everything else staying."""
        return self._part(self, np.flatnonzero(np.isin(self.units, units)))

    def costs(self, size: int) -> np.ndarray:
        """What removing each unit alone adds to the error, [size]."""
        found = np.zeros(size)
        order = np.argsort(self.units, kind="stable")
        order = order[np.searchsorted(self.units[order], 0) :]
        units, starts, counts = np.unique(self.units[order], return_index=True, return_counts=True)
        for count in np.unique(counts):
            chosen = counts == count
            places = order[starts[chosen][:, None] + np.arange(count)]
            rows = self.weight[places]
            if count == 1:
                place = places[:, 0]
                cost = np.einsum("uio,uio->u", rows, rows) / self.inverse[place, place]
            else:
                blocks = self.inverse[places[:, :, None], places[:, None, :]]
                cost = np.einsum("uio,uio->u", rows, np.linalg.solve(blocks, rows))
            found[units[chosen]] = cost
        return np.maximum(found, 0.0) * self.factor

    def remove(self, units: np.ndarray) -> None:
        """Solve the weights of the others again, and forget the units."""
        gone = np.isin(self.units, units)
        if not gone.any():
            return
        left, right = np.flatnonzero(~gone), np.flatnonzero(gone)
        across = self.inverse[np.ix_(left, right)]
        gain = np.linalg.solve(self.inverse[np.ix_(right, right)], across.T).T
        self.weight = self.weight[left] - gain @ self.weight[right]
        self.inverse = self.inverse[np.ix_(left, left)] - gain @ across.T
        self.units = self.units[left]


@dataclasses.dataclass(frozen=True)
class Elimination:
    """The units of a group in the order in which they can best be spared.

    `errors[k]` is the error after the first k are gone: the mean over consumers of the squared
    error of the result by the squared result.
    """

    order: np.ndarray
    errors: np.ndarray


def eliminate(
    problems: Sequence[Problem], rows: np.ndarray, count: int, steps: int = _STEPS
) -> Elimination:
    """Remove `count` units, always the one that costs least after repair. Changes the problems.

    Kurtic et al. 2023, "ZipLM", arXiv:2302.04089, after Hassibi and Stork 1993, "Optimal brain
    surgeon": removing inputs S and solving the other weights again costs
    tr(W_S' (H^-1_SS)^-1 W_S) for H = X'X. Here with several consumers, and with units that lie in
    rows (heads, groups): no row loses a second unit before each has lost its first.
    """
    lost = np.zeros(int(rows.max(initial=0)) + 1, int)
    open_ = np.ones(len(rows), bool)
    order: list[int] = []
    errors = [0.0]
    while len(order) < count and open_.any():
        costs = _costs(problems, len(rows))
        batch = min(count - len(order), max(1, int(open_.sum()) // steps))
        candidates = _cheapest(costs, rows, open_, lost, 2 * batch)
        parts = [problem.among(candidates) for problem in problems]
        taken: list[int] = []
        while len(taken) < batch and open_[candidates].any():
            costs = _costs(parts, len(rows))
            level = lost[rows[candidates]]
            free = candidates[open_[candidates] & (level == lost[_live(rows, open_)].min())]
            if not len(free):
                break
            unit = int(free[np.argmin(costs[free])])
            taken.append(unit)
            errors.append(errors[-1] + float(costs[unit]))
            open_[unit] = False
            lost[rows[unit]] += 1
            for part in parts:
                part.remove(np.array([unit]))
        for problem in problems:
            problem.remove(np.array(taken))
        order += taken
    return Elimination(np.array(order, int), np.array(errors))


def _costs(problems: Sequence[Problem], size: int) -> np.ndarray:
    total = np.zeros(size)
    for problem in problems:
        total += problem.costs(size)
    return total


def _live(rows: np.ndarray, open_: np.ndarray) -> np.ndarray:
    """The rows that have units left."""
    found: np.ndarray = np.unique(rows[open_])
    return found


def _cheapest(
    costs: np.ndarray, rows: np.ndarray, open_: np.ndarray, lost: np.ndarray, number: int
) -> np.ndarray:
    """The cheapest units, as many of each row as there may be need for."""
    live = _live(rows, open_)
    each = -(-number // len(live))
    found = []
    for row in live:
        units = np.flatnonzero(open_ & (rows == row))
        found.append(units[np.argsort(costs[units], kind="stable")[:each]])
    return np.concatenate(found)


def by_scores(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The order of elimination by a score of each unit: the lowest first, row by row in turn."""
    order = np.argsort(scores, kind="stable")
    turn = np.zeros(len(scores), int)
    for row in np.unique(rows):
        own = order[rows[order] == row]
        turn[own] = np.arange(len(own))
    found: np.ndarray = order[np.argsort(turn[order], kind="stable")]
    return found
