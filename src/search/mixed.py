"""The fewest layers to keep float so that limits hold, or so many that a budget is used best.

Here: `Mixed`, the answer, and `MixedSearch`. Not here: measuring a subset (`trials`), what each
layer does alone (`sensitivity`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from .trials import Outcome, Trials, loss

_PUT_BACK = 24
"""Layers of the choice that are tried in 8 bits again, the least harmful first."""
_REPAIRS = 4
"""Times that further layers are added where the written model misses what the switches promised."""
_EQUAL = 1.1
"""Errors within this factor count as equal where fewer layers do."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many layers, and which share of all multiply-accumulates, may be kept float."""

    layers: int | None = None
    macs: float | None = None


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Layers to keep float, and what that does.

    `names`, in the order of the model; `recipe` compiles it. `outcome` was measured on the model as
    it is written, not on the simulation that found it. `macs`: the share of multiply-accumulates
    that stay float. `met`: the limits hold (without limits: it is better than all in 8 bits).
    `tried`: subsets that were measured.
    """

    names: tuple[str, ...]
    recipe: str
    met: bool
    outcome: Outcome
    reason: str
    macs: float
    tried: int

    def __bool__(self) -> bool:
        return self.met

    def __str__(self) -> str:
        return f"{self.recipe}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "met": self.met,
            "names": list(self.names),
            "recipe": self.recipe,
            "outcome": self.outcome.as_dict(),
            "reason": self.reason,
            "float_share_of_macs": self.macs,
            "tried": self.tried,
        }


@dataclasses.dataclass(frozen=True)
class Trial:
    """A set of layers that stays float, measured. `held`: within the limits."""

    kept: tuple[int, ...]
    outcome: Outcome
    held: bool
    missed: str


class MixedSearch:
    """Looks for a set by heads of rankings.

    Layers are ranked by harm, and the shortest head of a ranking is taken that meets the limits
    (partial quantization: Wu et al., "Integer Quantization for Deep Learning Inference", 2020,
    arXiv 2004.09602, section 6.1). Several rankings are tried, since harm alone and harm with all
    the others differ; then layers are put back into 8 bits one by one where the limits still hold.
    """

    def __init__(
        self,
        trials: Trials,
        rankings: Sequence[Sequence[int]],
        shares: Sequence[float],
        limits: Mapping[str, float | str] | None,
        budget: Budget,
        progress: Callable[[int, int, str], None],
    ) -> None:
        self.trials, self.shares, self.limits, self.budget = trials, shares, limits, budget
        self.rankings = [self._within_budget(ranking) for ranking in rankings]
        self.tried: dict[tuple[int, ...], Trial] = {}
        self._progress = progress

    def run(self) -> Trial:
        """The set to keep float; where none meets the limits, the one with the least loss."""
        if self.limits is None:
            return self._best_use()
        heads = [trial for ranking in self.rankings if (trial := self._shortest(ranking))]
        if not heads:
            return self._least(self.tried.values())
        best = min(heads, key=lambda t: (len(t.kept), self._loss(t)))
        return self._put_back(best)

    def repairs(self, trial: Trial) -> Iterator[Trial]:
        """The set with a few layers more, again and again."""
        kept = list(trial.kept)
        for _ in range(_REPAIRS):
            more = next(
                (i for i in self.rankings[0] if i not in kept and self._fits([*kept, i])), None
            )
            if more is None:
                return
            kept.append(more)
            yield self.measure(kept)

    def measure(self, kept: Sequence[int]) -> Trial:
        """A set, measured by the switches; once."""
        key = tuple(sorted(kept))
        if key not in self.tried:
            self._progress(len(self.tried), len(self.tried) + 1, f"{len(key)} layers kept float")
            mask = self.trials.switched.every()
            mask[list(key)] = False
            self.tried[key] = Trial(key, *self.judged(self.trials.runner(mask)))
        return self.tried[key]

    def judged(self, runner: Any) -> tuple[Outcome, bool, str]:
        """A model held against the limits; without any, everything holds."""
        if self.limits is not None:
            return self.trials.judge(runner, self.limits)
        if self.trials.evaluation is None:
            return self.trials.judge(runner, {"sqnr_db": float("-inf")})
        return self.trials.judge(runner, {})

    # --- steps -----------------------------------------------------------------------------------

    def _shortest(self, ranking: Sequence[int]) -> Trial | None:
        """The shortest head that holds: sizes grow until one does, then halves between."""
        fails, sizes = -1, heads(len(ranking))
        for size in sizes:
            if self.measure(ranking[:size]).held:
                holds = size
                break
            fails = size
        else:
            return None
        while holds - fails > 1:
            middle = (holds + fails) // 2
            if self.measure(ranking[:middle]).held:
                holds = middle
            else:
                fails = middle
        return self.measure(ranking[:holds])

    def _put_back(self, trial: Trial) -> Trial:
        """Without the layers that the limits do not need."""
        order = [i for i in reversed(self.rankings[0]) if i in trial.kept]
        for i in order[:_PUT_BACK]:
            smaller = self.measure([k for k in trial.kept if k != i])
            if smaller.held:
                trial = smaller
        return trial

    def _best_use(self) -> Trial:
        """Within the budget alone: the least loss, by the fewest layers that come near to it."""
        for ranking in self.rankings:
            for size in heads(len(ranking)):
                self.measure(ranking[:size])
        found = list(self.tried.values())
        least = self._least(found)
        same = [
            t
            for t in found
            if self._loss(t)[0] <= self._loss(least)[0]
            and t.outcome.error <= _EQUAL * least.outcome.error
        ]
        return min(same or [least], key=lambda t: len(t.kept))

    def _least(self, trials: Any) -> Trial:
        found: Trial = min(trials, key=lambda t: (self._loss(t), len(t.kept)))
        return found

    def _loss(self, trial: Trial) -> tuple[float, float]:
        return loss(trial.outcome, self.trials.higher)

    def _within_budget(self, ranking: Sequence[int]) -> list[int]:
        kept: list[int] = []
        for i in ranking:
            if self._fits([*kept, i]):
                kept.append(i)
        return kept

    def _fits(self, kept: Sequence[int]) -> bool:
        if self.budget.layers is not None and len(kept) > self.budget.layers:
            return False
        total = float(np.sum([self.shares[i] for i in kept]))
        return self.budget.macs is None or total <= self.budget.macs + 1e-9


def heads(most: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 9, ... up to the most."""
    found, size = [0], 1
    while size < most:
        found.append(size)
        size = max(size + 1, int(size * 1.5))
    return [*found, most] if most else found


def check_budget(at_most: int | None, macs: float | None) -> Budget:
    """The budget, checked.

    Raises:
        UsageError: a negative count, or a share outside 0 to 1.
    """
    if at_most is not None and at_most < 0:
        raise UsageError(f"at_most must be at least 0, it is {at_most}")
    if macs is not None and not 0 <= macs <= 1:
        raise UsageError(
            f"macs must be a share from 0 to 1, it is {macs}",
            fix="macs=0.1 keeps at most a tenth of the multiply-accumulates in float",
        )
    return Budget(at_most, macs)
