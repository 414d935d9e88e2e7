"""Which units leave: an order for each group, and how many of each.

Here: `choose`. Not here: scores (`importance`), the order that knows the repair (`selection`).
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from .groups import Group, Site
from .importance import Importance, score
from .price import Held
from .rounding import round_width
from .selection import Elimination, Problem, by_scores, eliminate
from .statistics import Statistics

_LEAST_BLOCKS, _MORE_BLOCKS = 4, 8
"""A width is rounded to a multiple that it holds at least as often as this; more often, where
groups lose different shares and large steps would leave no choice."""
_PADDED = 4
"""Multiples of this take no longer than the next multiple of a vector: the runtime pads them.
Others can: convolutions of 14 channels took 0.37 ms, of 16 0.29 (ONNX Runtime 1.32, AVX-512)."""
_EXACT = 1e-9
_NEXT = 6
MOST = 0.85
"""Of its units no group loses more, where groups lose different shares."""


class Allocation(enum.StrEnum):
    """How many units each group loses.

    `UNIFORM`: the same share of each. The others take as many units in all, and at least such a
    share of MACs and parameters, from where that does least harm: `SENSITIVITY` to the outputs,
    measured; `GLOBAL` to the layers behind, all alike. `COST` takes what gains most predicted time
    on the target for the harm to the outputs, until that share of the time has left, and no more.
    `AUTO`: sensitivity with calibration samples, uniform without.
    """

    AUTO = "auto"
    UNIFORM = "uniform"
    SENSITIVITY = "sensitivity"
    GLOBAL = "global"
    COST = "cost"

    @property
    def spreads(self) -> bool:
        """Whether groups lose different shares."""
        return self in (Allocation.SENSITIVITY, Allocation.GLOBAL, Allocation.COST)


class Costs(Protocol):
    """What is left of units, MACs and parameters, [3], as shares of what there was (`price`)."""

    def left(self, lost: np.ndarray) -> np.ndarray:
        """With these shares of the parts' units gone, [parts]."""

    def gain(self, part: int, share: float, lost: np.ndarray) -> np.ndarray:
        """What leaves when the part has lost this share in place of `lost[part]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choosing:
    """How to choose; `spread` is how far a group's share may be from `ratio`."""

    ratio: float
    importance: Importance
    allocation: Allocation = Allocation.UNIFORM
    multiple: int = 1
    spread: float = 0.5
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


def together(ranked: Sequence[Ranked]) -> list[list[Ranked]]:
    """Those that lose as many units of each row as each other: the parts of a choice."""
    clusters: dict[int, list[Ranked]] = {}
    for item in ranked:
        clusters.setdefault(item.group.cluster, []).append(item)
    return list(clusters.values())


def choose(
    ranked: Sequence[Ranked], how: Choosing, price: Costs | None = None
) -> dict[Group, list[int]]:
    """The units of each group that leave.

    Rows of a cluster, in whichever groups, lose as many units each. Widths that stay are multiples
    of `how.multiple` or, where that is much of the width, of a half, quarter or eighth of it.
    `price` is for the parts of `together(ranked)`; by default units cost the weights they hold.
    """
    return _chosen(_parts(ranked, how, price))


def foreseen(ranked: Sequence[Ranked], how: Choosing, price: Costs | None = None) -> float:
    """The sum of the errors of what `choose` would take."""
    return sum(part.error(part.count) for part in _parts(ranked, how, price))


def _parts(ranked: Sequence[Ranked], how: Choosing, price: Costs | None) -> list[_Part]:
    parts = [_Part(members, how) for members in together(ranked)]
    if how.allocation.spreads:
        groups = [[item.group for item in part.members] for part in parts]
        _spread(parts, price or Held(groups), how)
    return parts


def _chosen(parts: Sequence[_Part]) -> dict[Group, list[int]]:
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
        while how.allocation.spreads and multiple > _PADDED and multiple * _MORE_BLOCKS > width:
            multiple //= 2
        while multiple > 1 and multiple * _LEAST_BLOCKS > width:
            multiple //= 2
        self.step = max(1, multiple // members[0].group.multiple)
        # units beyond these have no place in the order
        self.known = min((len(item.errors) - 1) // item.rows for item in members)
        self.count = self._rounded(how.ratio)
        self.least = self._rounded(max(0.0, how.ratio - how.spread))
        self.most = self._rounded(min(MOST, how.ratio + how.spread))

    def _rounded(self, ratio: float) -> int:
        if self.length < 2 or ratio <= 0:
            return 0
        kept = round_width(self.length * (1.0 - ratio), self.step, self.length)
        return min(self.length - max(1, kept), self.known)

    def error(self, count: int) -> float:
        """What goes wrong when so many leave each row."""
        return sum(item.error(count) for item in self.members)

    def after(self, count: int) -> Iterator[int]:
        """Larger counts whose widths are multiples: the next ones, and some up to the last."""
        found = range(
            count + ((self.length - count) % self.step or self.step), self.most + 1, self.step
        )
        yield from found[:_NEXT]
        yield from found[_NEXT :: max(1, len(found) // _NEXT)]


def _spread(parts: Sequence[_Part], price: Costs, how: Choosing) -> None:
    """Take units where they do least harm, until enough of everything (or of time) has left."""
    lengths = np.array([max(1, part.length) for part in parts], float)
    equal = [part.count for part in parts]
    goals = np.maximum(price.left(np.array(equal) / lengths), 1.0 - how.ratio)
    timed = how.allocation is Allocation.COST
    if timed:
        goals[[0, 2]] = 1.0
    found = [_way(parts, price, goals, equal)]
    for weights in _TIME if timed else _WEIGHTS:
        counts = _greedy(parts, price, goals, np.array(weights))
        found.append(_way(parts, price, goals, _given_back(parts, price, goals, counts)))
    # where the bounds let none of them get there, the one that gets closest
    best = min(found, key=lambda way: (way.short, way.error))
    for part, count in zip(parts, best.counts, strict=True):
        part.count = count


_WEIGHTS = ((1, 0, 0), (2, 1, 0), (1, 1, 0), (1, 2, 0), (0, 1, 0), (2, 1, 1), (1, 0, 1), (0, 1, 1))
"""Of units, MACs and parameters in what a step is worth: several, as it is not known which of the
goals will be met last."""
_TIME = ((0, 1, 0),)


@dataclasses.dataclass(frozen=True)
class _Way:
    """Units of each row that leave, by part; what that does; how far from the goals it is."""

    counts: list[int]
    error: float
    short: float


def _way(parts: Sequence[_Part], price: Costs, goals: np.ndarray, counts: list[int]) -> _Way:
    lost = np.array(counts) / [max(1, part.length) for part in parts]
    error = sum(part.error(count) for part, count in zip(parts, counts, strict=True))
    return _Way(counts, error, float(np.maximum(price.left(lost) - goals - _EXACT, 0.0).max()))


def _given_back(
    parts: Sequence[_Part], price: Costs, goals: np.ndarray, counts: list[int]
) -> list[int]:
    """The counts less what more has left than had to, from where that helps most."""
    counts = list(counts)
    lost = np.array(counts) / [max(1, part.length) for part in parts]
    room = goals + _EXACT - price.left(lost)
    while (room > 0).all():
        found: tuple[float, int, int] | None = None
        for i, part in enumerate(parts):
            count = max(part.least, counts[i] - part.step)
            if count >= counts[i] or (price.gain(i, count / part.length, lost) < -room).any():
                continue
            saved = part.error(counts[i]) - part.error(count)
            if found is None or saved > found[0]:
                found = (saved, i, count)
        if found is None:
            break
        _, i, counts[i] = found
        lost[i] = counts[i] / parts[i].length
        room = goals + _EXACT - price.left(lost)
    return counts


def _greedy(
    parts: Sequence[_Part], price: Costs, goals: np.ndarray, weights: np.ndarray
) -> list[int]:
    """Step by step the least error for what leaves, weighted."""
    counts = [min(part.least, part.most) for part in parts]
    lengths = [max(1, part.length) for part in parts]
    lost = np.array(counts) / lengths

    def best(index: int) -> tuple[float, int] | None:
        part, found = parts[index], None
        start = part.error(counts[index])
        for count in part.after(counts[index]):
            gain = float(weights @ price.gain(index, count / lengths[index], lost))
            slope = (part.error(count) - start) / gain if gain > 0 else np.inf
            if found is None or slope < found[0]:
                found = (slope, count)
        return found

    queue = [(step[0], index) for index in range(len(parts)) if (step := best(index)) is not None]
    heapq.heapify(queue)
    while queue and (price.left(lost) > goals + _EXACT).any():
        _, index = heapq.heappop(queue)
        step = best(index)
        if step is None:
            continue
        # what others have lost since makes units of this part worth less, never more
        if queue and step[0] > queue[0][0]:
            heapq.heappush(queue, (step[0], index))
            continue
        counts[index] = step[1]
        lost[index] = step[1] / lengths[index]
        step = best(index)
        if step is not None:
            heapq.heappush(queue, (step[0], index))
    return counts
