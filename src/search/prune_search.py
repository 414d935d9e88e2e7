"""How much may be pruned: the ratio that meets a budget, or the largest that keeps the limits.

Here: `prune`, and `Pruned`, its answer. Not here: which groups lose how many units at a ratio (the
pass `prune`), tables (`prune_report`), all ratios side by side (`sweep`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compiled import Compiled
from ..cost.budget import Budget
from ..errors import UsageError
from ..evaluation.evaluation import Evaluation
from ..frontends import load_supported
from ..passes.spec import format_pass
from ..pipelines import pruning_pass
from ..samples import as_feeds
from ..targets.feed import input_specs
from ..targets.registry import get_target
from ..targets.target import Target
from .prune_scan import RATIO, prune_scan
from .prune_trial import Trial, Tryout
from .trials import Progress

SCHEMA, SCHEMA_VERSION = "edgepass.prune", 1
STEP, MOST = 0.05, 0.9
_CORRECTIONS = 3
"""Times that a ratio is sought again with what was measured in place of what was predicted."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The pruned model, and how it was found.

    `met`: it meets the budget and keeps the limits. Otherwise `compiled` is the one that keeps the
    limits and comes nearest, or None where pruning by any ratio breaks them; `blame` then names the
    group that does most harm. `reason` says all of it in words, `trials` is what was tried.
    """

    target: str
    met: bool
    reason: str
    original: Trial | None
    chosen: Trial | None
    trials: tuple[Trial, ...]
    compiled: Compiled | None = dataclasses.field(repr=False)
    blame: str = ""
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.met

    @property
    def ratio(self) -> float | None:
        """The ratio that was chosen."""
        return None if self.chosen is None else self.chosen.ratio

    @property
    def recipe(self) -> str | None:
        """What `compile` makes it with."""
        return None if self.chosen is None else self.chosen.recipe

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the artifact; see `Compiled.save`.

        Raises:
            UsageError: no ratio keeps the limits.
        """
        if self.compiled is None:
            raise UsageError("There is no pruned model to save", why=self.reason)
        return self.compiled.save(path, force=force)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; docs/pruning.md describes it."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "met": self.met,
            "ratio": self.ratio,
            "recipe": self.recipe,
            "reason": self.reason,
            "blame": self.blame,
            "original": None if self.original is None else self.original.as_dict(),
            "trials": [trial.as_dict() for trial in self.trials],
            "notes": list(self.notes),
        }

    def table(self) -> Any:
        """A rich renderable: a line a ratio that was tried."""
        from .prune_report import search_table

        return search_table(self)

    def __str__(self) -> str:
        from .prune_report import search_table, text_of

        return text_of(search_table(self))


def prune(
    model: Any,
    target: str | Target = "host",
    *,
    ratio: float | None = None,
    budget: Budget | None = None,
    evaluation: Evaluation | None = None,
    calibration: Any = None,
    recipe: str = "prune",
    step: float = STEP,
    most: float = MOST,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    time_budget_s: float = 0.5,
    force: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Prune by a ratio, or by the one that a budget or an evaluation's limits ask for.

    With `budget`, the smallest ratio that meets it: sought by predictions, and where the target is
    this machine, corrected by what was measured. With an `evaluation` that has limits, no model is
    returned that breaks them: where the ratio wished for does, the largest one that keeps them is
    sought, by halving the interval, as if more pruning never did less harm. With such an evaluation
    alone, that ratio is the answer. Limits take the place of the pass's own bound, its `limit`.

    Args:
        model, target, example_inputs, dynamic_shapes, input_shapes, dims, time_budget_s, force: see
            `compile`.
        ratio: the share to prune; less where limits ask for it.
        budget: in place of a ratio.
        evaluation: data, metrics and limits. Without one, the outputs' error on a third of the
            calibration samples, held out, is reported.
        calibration: representative inputs.
        recipe: `prune` with its options, and what else is to be done: "prune{heads=whole},int8".
            The ratio in it is what is sought.
        step, most: ratios that are tried are multiples of `step`, up to `most`.
        progress: called with (done, total, what).

    Raises:
        UsageError: there is neither ratio, nor budget, nor limits.
        EdgepassError: see `compile`, `Evaluation.run`; what is raised at every ratio.
    """
    limited = evaluation is not None and bool(evaluation.limits)
    if ratio is None and budget is None and not limited:
        raise UsageError(
            "There is nothing that says how much to prune",
            fix="give ratio=0.3, budget=Budget(latency_ms=...), or an Evaluation with limits",
        )
    if ratio is not None and budget is not None:
        raise UsageError("A ratio and a budget contradict each other", fix="give one of them")
    if not 0 < step <= most < 1 or (ratio is not None and not 0 < ratio < 1):
        raise UsageError(
            "ratio, step and most must be between 0 and 1, and step at most most",
            why=f"they are {ratio}, {step}, {most}",
        )
    pruning_pass(recipe)
    graph = load_supported(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
        weights_required=True,
    )
    tryout = Tryout(
        graph,
        get_target(target),
        recipe,
        budget=budget,
        evaluation=evaluation,
        feeds=None if calibration is None else as_feeds(calibration, input_specs(graph)),
        dims=dims,
        time_budget_s=time_budget_s,
        force=force,
        progress=progress or _silent,
    )
    grid = [round(step * i, 4) for i in range(1, math.floor(most / step + 1e-9) + 1)]
    if budget is not None:
        return _for_budget(tryout, grid, limited)
    if ratio is not None:
        grid = [r for r in grid if r < ratio - 1e-9] + [ratio]
    return _for_limits(tryout, grid, limited)


# --- the two questions ---------------------------------------------------------------------------


def _for_limits(tryout: Tryout, grid: list[float], limited: bool) -> Pruned:
    """The largest ratio of the grid that keeps the limits; without limits, the largest."""
    wished = tryout.trial(grid[-1])
    if not limited:
        _require(tryout, wished)
        text = f"{_percent(wished.ratio)} of each group asked for"
        return _answer(tryout, True, text, wished.ratio)
    if wished.good:
        return _answer(tryout, True, f"{_percent(wished.ratio)} keeps the limits", wished.ratio)
    best = _largest(tryout, grid[:-1])
    if best is None:
        return _nothing_keeps(tryout, grid[0])
    text = f"{_percent(best)} is the most that keeps the limits{_beyond(tryout, best)}"
    return _answer(tryout, True, text, best)


def _for_budget(tryout: Tryout, grid: list[float], limited: bool) -> Pruned:
    """The smallest ratio that meets the budget; less where the limits ask for it."""
    _seek(tryout, grid)
    tried = tryout.trials
    met = min((r for r, trial in tried.items() if not (trial.failed or trial.over)), default=None)
    wanted = max(tried) if met is None else met
    _require(tryout, tried[wanted])
    over = "; ".join(tried[wanted].over)
    if limited and tried[wanted].lost:
        best = _largest(tryout, [r for r in grid if r < wanted - 1e-9])
        if best is None:
            return _nothing_keeps(tryout, grid[0])
        asks = "would still miss" if met is None else "would meet"
        text = (
            f"{_percent(best)} is the most that keeps the limits{_beyond(tryout, best)}; "
            f"{_percent(wanted)} {asks} the budget. {'; '.join(tried[best].over)}"
        )
        return _answer(tryout, tried[best].good, text, best)
    if met is None:
        held = tryout.held_back(wanted)
        text = f"not even {_percent(wanted)} meets the budget: {over}"
        return _answer(tryout, False, f"{text}; {held}" if held else text, wanted)
    how = "measured here" if tryout.timed else "by prediction"
    text = f"{_percent(met)} is the least of those tried that meets the budget, {how}"
    return _answer(tryout, True, text, met)


def _seek(tryout: Tryout, grid: list[float]) -> None:
    """Try ratios around the smallest that meets the budget: by prediction, then by what was
    measured over what was predicted; at last upwards until one meets it."""
    scale = 1.0
    for _ in range(_CORRECTIONS):
        ratio = _meeting(tryout, grid, scale)
        if ratio in tryout.trials:
            break
        trial = tryout.trial(ratio)
        predicted = None if trial.predicted is None else trial.predicted.ms
        if trial.failed or trial.measured_ms is None or not predicted:
            break
        scale = trial.measured_ms / predicted
    for ratio in grid:
        largest = max(tryout.trials)
        if not all(trial.failed or trial.over for trial in tryout.trials.values()):
            return
        if tryout.held_back(largest):
            return  # more is refused as well
        if ratio > largest + 1e-9:
            tryout.trial(ratio)


def _meeting(tryout: Tryout, grid: list[float], scale: float) -> float:
    """The smallest ratio that is predicted to meet the budget, times multiplied by `scale`; the
    largest where none is."""

    def meets(ratio: float) -> bool:
        for verdict in tryout.predicted(ratio):
            if verdict.value is None:
                raise UsageError(
                    f"The {verdict.name} can't be predicted, so no ratio can be sought for it",
                    why=verdict.text,
                    fix="give `dims`, a target with a profile, or a ratio",
                )
            if verdict.value * (scale if verdict.name == "latency" else 1.0) > verdict.limit:
                return False
        return True

    low, high = -1, len(grid) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(grid[middle]) else (middle, high)
    return grid[high]


def _largest(tryout: Tryout, grid: list[float]) -> float | None:
    """The largest ratio that keeps the limits, as if harm grew with the ratio."""
    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        trial = tryout.trial(grid[middle])
        if trial.lost or trial.failed:
            high = middle
            tryout.drop(grid[middle])
        else:
            if low >= 0:
                tryout.drop(grid[low])
            low = middle
    return grid[low] if low >= 0 else None


# --- answers -------------------------------------------------------------------------------------


def _answer(tryout: Tryout, met: bool, reason: str, ratio: float) -> Pruned:
    removed = tryout.removed(tryout.trials[ratio])
    done = [
        f"{row.name.partition('{')[0]}: {note}"
        for row in tryout.pruning_rows(ratio)
        for note in row.notes
    ]
    return Pruned(
        target=tryout.target.name,
        met=met,
        reason=f"{reason}: {removed}" if removed else reason,
        original=tryout.original,
        chosen=tryout.trials[ratio],
        trials=_sorted(tryout),
        compiled=tryout.made[ratio],
        notes=tuple(dict.fromkeys((*done, *tryout.notes, *tryout.trials[ratio].notes))),
    )


def _nothing_keeps(tryout: Tryout, smallest: float) -> Pruned:
    """No ratio keeps the limits: the fault of the rest of the recipe, or of a group."""
    nothing = tryout.trial(0.0)
    _require(tryout, nothing)
    first = tryout.trials[smallest]
    why = first.failed or "; ".join(first.lost)
    blame = ""
    if nothing.lost:
        reason = f"the limits are broken before anything is pruned: {'; '.join(nothing.lost)}"
    else:
        reason = f"even {_percent(smallest)} breaks the limits: {why}"
        blame = _blame(tryout)
    return Pruned(
        target=tryout.target.name,
        met=False,
        reason=". ".join(part for part in (reason, blame) if part),
        original=tryout.original,
        chosen=None,
        trials=_sorted(tryout),
        compiled=None,
        blame=blame,
        notes=tuple(tryout.notes),
    )


def _blame(tryout: Tryout) -> str:
    """The group that does most harm alone, by a scan."""
    found = prune_scan(
        tryout.graph,
        tryout.target,
        recipe=format_pass(pruning_pass(tryout.recipe)),
        ratio=RATIO,
        calibration=tryout.evaluation if tryout.feeds is None else tryout.feeds,
        dims=tryout.dims,
        progress=tryout.progress,
    )
    worst = found.worst
    if worst is None:
        return ""
    return (
        f"{worst.name!r} ({worst.kind}) does most harm: alone, {found.ratio:.0%} less of it leaves "
        f"{worst.sqnr_db:.1f} dB of signal to error; exclude it from pruning"
    )


def _beyond(tryout: Tryout, ratio: float) -> str:
    """What breaks at the next ratio that was tried."""
    larger = [r for r, trial in tryout.trials.items() if r > ratio and (trial.lost or trial.failed)]
    if not larger:
        return ""
    trial = tryout.trials[min(larger)]
    return f" (at {_percent(trial.ratio)}: {trial.failed or '; '.join(trial.lost)})"


def _sorted(tryout: Tryout) -> tuple[Trial, ...]:
    return tuple(tryout.trials[ratio] for ratio in sorted(tryout.trials))


def _require(tryout: Tryout, trial: Trial) -> None:
    if trial.ratio in tryout.errors:
        raise tryout.errors[trial.ratio]


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""
