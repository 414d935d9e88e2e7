"""Which residual blocks to leave out: one after the other, each time the one that matters least.

Here: `choose` and the policies. Not here: what is measured (`depth_harm`), the pass (`depth`).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ..quantize.capture import Progress
from .blocks import Block, Found

_LEAST = 1e-9
"""A rise in error power below this is as good as none."""


class Policy(enum.StrEnum):
    """How the next block is found: by the harm to the outputs without it, by how little it turns
    what passes it, by its place (the last ones, but the very last layer), or at random."""

    HARM = "harm"
    INFLUENCE = "influence"
    LAST = "last"
    RANDOM = "random"


class Unit(enum.StrEnum):
    """What goes at a time: one branch, or a layer (an attention and the products behind it)."""

    BRANCH = "branch"
    LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class Goal:
    """How much is to go: a number of units, or a share of what blocks compute; and `limit`, the
    most error power over signal power that the outputs may have."""

    units: int = 0
    ratio: float = 0.0
    limit: float = np.inf


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Blocks to leave out, in order of choice, the divergence after each (NaN: not measured), and
    why there are not more, or nothing."""

    blocks: tuple[tuple[Block, ...], ...]
    harms: tuple[float, ...]
    stopped: str = ""


def units_of(found: Found, unit: Unit) -> list[tuple[Block, ...]]:
    """What may go at a time, in graph order."""
    if unit is Unit.BRANCH:
        return [(block,) for block in found.blocks]
    grouped = itertools.groupby(found.blocks, key=lambda block: block.layer)
    return [tuple(group) for _, group in grouped]


def by_place(units: Sequence[tuple[Block, ...]]) -> list[int]:
    """From the last but one layer to the first, then the last. Gromov et al. 2024, "The
    Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887: deep layers can go, but
    for the very last. Blocks that hold others come after all others."""
    last = units[-1][0].layer if units else 0
    inner = _holding_none(units)
    order = range(len(units) - 1, -1, -1)
    return sorted(order, key=lambda i: (i not in inner, units[i][0].layer == last))


def at_random(units: Sequence[tuple[Block, ...]], seed: int) -> list[int]:
    """Any order, blocks that hold others last."""
    inner = _holding_none(units)
    order: list[int] = np.random.default_rng(seed).permutation(len(units)).tolist()
    return sorted(order, key=lambda i: i not in inner)


def choose(
    found: Found,
    units: Sequence[tuple[Block, ...]],
    goal: Goal,
    *,
    order: Sequence[int] | None = None,
    ranked: Sequence[int] = (),
    tried: int = 0,
    harm: Callable[[np.ndarray], float] | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Chosen:
    """Leave out units until the goal is reached.

    `harm` is the divergence of the outputs for a mask of blocks that are present. Without an
    `order` each step tries the units that are left (`tried` of them, 0: all; those that did least
    harm the last time first, at the start those of `ranked`) and takes the one of least harm, or,
    with a ratio as the goal, of least harm for what it saves. With an order the next one is taken.
    Where the harm passes the goal's limit, the step is not made.
    """
    state = _State(found, units, goal)
    harms: list[float] = []
    latest = {i: float(place) for place, i in enumerate(ranked or range(len(units)))}
    before = 0.0
    while True:
        left = state.candidates()
        if not left:
            return state.chosen(harms, state.why_none())
        if order is not None:
            best = next(i for i in order if i in left)
            after = float("nan") if harm is None else harm(state.mask(best))
        else:
            assert harm is not None
            trial = sorted(left, key=lambda i: (latest[i], i))[: tried or None]
            for done, i in enumerate(trial):
                progress(done, len(trial), "leaving out blocks one by one")
                latest[i] = harm(state.mask(i))
            best = min(trial, key=lambda i: state.price(i, latest[i] - before, goal))
            within = [i for i in trial if latest[i] <= goal.limit]
            if within:
                best = min(within, key=lambda i: state.price(i, latest[i] - before, goal))
            after = latest[best]
        if after > goal.limit:
            return state.chosen(harms, state.why_harmful(best, after, goal.limit))
        state.take(best)
        harms.append(after)
        before = after


class _State:
    """What is gone so far."""

    def __init__(self, found: Found, units: Sequence[tuple[Block, ...]], goal: Goal) -> None:
        self.found, self.units, self.goal = found, units, goal
        self.index = {block: i for i, block in enumerate(found.blocks)}
        self.taken: list[int] = []
        self.total = self.weight(range(len(units)))

    def weight(self, units: Sequence[int]) -> float:
        """What some units save together: MACs, or their number where those are not known."""
        saved = self.found.saved(block for i in units for block in self.units[i])
        return float(len(units)) if saved is None else float(saved)

    def mask(self, more: int) -> np.ndarray:
        present = np.ones(len(self.found.blocks), bool)
        for i in (*self.taken, more):
            present[[self.index[block] for block in self.units[i]]] = False
        return present

    def candidates(self) -> list[int]:
        """Units of which something is left, and that do not lead away from the goal."""
        if self.goal.units and len(self.taken) >= self.goal.units:
            return []
        gone = {n for i in self.taken for block in self.units[i] for n in block.nodes}
        left = [
            i
            for i, unit in enumerate(self.units)
            if i not in self.taken and any(not gone.issuperset(block.nodes) for block in unit)
        ]
        if self.goal.units:
            return left
        target, now = self.goal.ratio * self.total, self.weight(self.taken)
        return [
            i for i in left if abs(self.weight([*self.taken, i]) - target) < abs(target - now) - 0.5
        ]

    def price(self, unit: int, rise: float, goal: Goal) -> float:
        if goal.units:
            return rise
        more = self.weight([*self.taken, unit]) - self.weight(self.taken)
        return max(rise, _LEAST) / max(more, 1.0)

    def take(self, unit: int) -> None:
        self.taken.append(unit)

    def why_none(self) -> str:
        if self.goal.units and len(self.taken) < self.goal.units:
            return "there are no more blocks"
        return ""

    def why_harmful(self, unit: int, harm: float, limit: float) -> str:
        names = ", ".join(block.name for block in self.units[unit])
        return f"without {names} as well {db(harm)} would be left, and {db(limit)} must be"

    def chosen(self, harms: Sequence[float], stopped: str) -> Chosen:
        return Chosen(tuple(self.units[i] for i in self.taken), tuple(harms), stopped)


def _holding_none(units: Sequence[tuple[Block, ...]]) -> set[int]:
    """Units within which no other unit lies."""
    sums = {unit[-1].add: i for i, unit in enumerate(units)}
    return {
        i
        for i, unit in enumerate(units)
        if not any(
            (j := sums.get(node)) is not None and j != i for block in unit for node in block.nodes
        )
    }


def db(error: float) -> str:
    """Error power over signal power as a signal-to-error ratio."""
    if error <= 0:
        return "no error"
    return "nothing finite" if np.isinf(error) else f"{-10 * np.log10(error):.1f} dB"
