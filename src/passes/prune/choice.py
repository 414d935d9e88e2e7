"""Which units leave: an order for each group, and how many of each.

Here: `choose`. Not here: scores (`importance`), the order that knows the repair (`selection`).
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from .groups import Group, Site
from .importance import Importance, score
from .rounding import round_width
from .selection import Elimination, Problem, by_scores, eliminate
from .statistics import Statistics

_LEAST_BLOCKS = 4
"""A width is rounded to a multiple that it holds at least as often as this."""


class Allocation(enum.StrEnum):
    """How many units each group loses: the same share of each, or by error for each parameter."""

    UNIFORM = "uniform"
    GLOBAL = "global"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choosing:
    """How to choose; `spread` is how far a group's share may be from `ratio`."""

    ratio: float
    importance: Importance
    allocation: Allocation = Allocation.UNIFORM
    multiple: int = 1
    spread: float = 0.25
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A group, its units in the order in which they leave, and the error after each."""

    group: Group
    order: np.ndarray
    errors: np.ndarray

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.group.rows.max(initial=0)) + 1

    @property
    def length(self) -> int:
        """Units in a row."""
        return self.group.size // self.rows

    def first(self, count: int) -> list[int]:
        """The units that leave when `count` leave each row."""
        return [int(unit) for unit in self.order[: count * self.rows]]

    def error(self, count: int) -> float:
        """The error when `count` leave each row."""
        return float(self.errors[min(count * self.rows, len(self.errors) - 1)])


def rank(
    groups: Sequence[Group],
    statistics: Mapping[Site, Statistics],
    importance: Importance,
    limit: float,
    seed: int = 0,
) -> list[Ranked]:
    """Order the units of each group, as far as that share of them."""
    return [_rank(group, statistics, importance, limit, seed) for group in groups]


def _rank(
    group: Group,
    statistics: Mapping[Site, Statistics],
    importance: Importance,
    limit: float,
    seed: int,
) -> Ranked:
    if importance is Importance.RECONSTRUCTION:
        readers = [site for site in group.consumers if site in statistics]
        problems: list[Problem] = []
        for site in readers:
            problems += statistics[site].problems(1.0 / len(readers))
        if problems:
            found = _eliminated(group, problems, limit)
            return Ranked(group, found.order, found.errors)
    scores = score(group, importance, statistics, seed)
    order = by_scores(scores, group.rows)
    errors = np.append(0.0, np.cumsum(scores[order])) / max(float(scores.sum()), 1e-30)
    return Ranked(group, order, errors)


def _eliminated(group: Group, problems: Sequence[Problem], limit: float) -> Elimination:
    rows = int(group.rows.max(initial=0)) + 1
    return eliminate(problems, group.rows, int(limit * group.size // rows) * rows)


def choose(ranked: Sequence[Ranked], how: Choosing) -> dict[Group, list[int]]:
    """The units of each group that leave.

    Rows of a cluster, in whichever groups, lose as many units each. Widths that stay are multiples
    of `how.multiple` or, where that is much of the width, of a half or quarter of it.
    """
    clusters: dict[int, list[Ranked]] = {}
    for item in ranked:
        clusters.setdefault(item.group.cluster, []).append(item)
    parts = [_Part(members, how) for members in clusters.values()]
    if how.allocation is Allocation.GLOBAL:
        _spread(parts, how)
    chosen: dict[Group, list[int]] = {}
    for part in parts:
        for item in part.members:
            units = item.first(part.count)
            if units:
                chosen[item.group] = units
    return chosen


class _Part:
    """A cluster: groups whose rows lose as many units each."""

    def __init__(self, members: Sequence[Ranked], how: Choosing) -> None:
        self.members = members
        self.length = min(item.length for item in members)
        multiple = how.multiple
        width = self.length * members[0].group.multiple
        while multiple > 1 and multiple * _LEAST_BLOCKS > width:
            multiple //= 2
        self.step = max(1, multiple // members[0].group.multiple)
        self.count = self._rounded(how.ratio)
        self.least = self._rounded(max(0.0, how.ratio - how.spread))
        self.most = self._rounded(min(0.9, how.ratio + how.spread))
        self.price = sum(item.group.parameters * item.rows for item in members)

    def _rounded(self, ratio: float) -> int:
        if self.length < 2 or ratio <= 0:
            return 0
        kept = round_width(self.length * (1.0 - ratio), self.step, self.length)
        return self.length - max(1, kept)

    def error(self, count: int) -> float:
        return sum(item.error(count) for item in self.members)

    def next(self, count: int) -> tuple[float, int] | None:
        """The least error for each parameter that leaves, and the count it is reached at."""
        found = None
        start = self.error(count)
        at = count
        while at < self.most:
            left = self.length - at
            at += left % self.step or self.step
            if at > self.most:
                break
            slope = (self.error(at) - start) / ((at - count) * max(1, self.price))
            if found is None or slope < found[0]:
                found = (slope, at)
        return found


def _spread(parts: Sequence[_Part], how: Choosing) -> None:
    """Take units where they cost least, until as many parameters leave as by equal shares."""
    goal = sum(part.length * part.price for part in parts) * how.ratio
    for part in parts:
        part.count = part.least
    gone = sum(part.count * part.price for part in parts)
    queue: list[tuple[float, int, int]] = []

    def push(index: int) -> None:
        step = parts[index].next(parts[index].count)
        if step is not None:
            heapq.heappush(queue, (step[0], index, step[1]))

    for index in range(len(parts)):
        push(index)
    while queue and gone < goal:
        _, index, count = heapq.heappop(queue)
        part = parts[index]
        gone += (count - part.count) * part.price
        part.count = count
        push(index)
