"""One pruning ratio tried: compiled, timed, and judged.

Here: `Trial`, and `Tryout`, which makes them. Not here: which ratios to try (`prune_search`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..api import compile as compile_model
from ..architecture import Architecture, without_weights
from ..compiled import Compiled
from ..cost.budget import Budget, Verdict
from ..cost.latency import Latency
from ..errors import EdgepassError, UsageError
from ..evaluation.evaluation import Evaluation
from ..evaluation.report import CANNOT_TELL, EXCEEDS, MetricResult
from ..passes.base import Stage
from ..passes.ledger import LedgerRow
from ..pipelines import parse_recipe, with_ratio
from ..samples import Feed
from ..targets.registry import runs_on_host
from ..targets.target import Target
from .rows import limit_texts
from .trials import Progress

_JUDGES = 3
"""Without an evaluation, every third calibration sample is held out to judge on."""
_ORIGINAL = "default"
_NO_BOUND = 100.0
"""Of the outputs' variance: the evaluation's limits judge instead."""
_FEWEST = 6
"""Samples from which on some can be spared."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One ratio, compiled. `predicted` and `measured_ms`: a run on the target, and on this machine
    where it is one. `metrics`: of the evaluation. `sqnr_db`: of the worst output against the
    original's. `over`: what of the budget is missed; `lost`: which limits are not kept. `failed`:
    why there is nothing to judge.
    """

    ratio: float
    recipe: str
    parameters: int | None = None
    macs: int | None = None
    file_bytes: int | None = None
    predicted: Latency | None = None
    measured_ms: float | None = None
    metrics: Mapping[str, MetricResult] = dataclasses.field(default_factory=dict)
    sqnr_db: float | None = None
    over: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    failed: str = ""
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What came of it, in words."""
        if self.failed:
            return f"failed: {self.failed.splitlines()[0]}"
        return "; ".join([*self.lost, *self.over]) or "good"

    @property
    def good(self) -> bool:
        """Within budget and limits."""
        return not (self.failed or self.over or self.lost)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["predicted"] = None if self.predicted is None else self.predicted.as_dict()
        plain["metrics"] = {k: dataclasses.asdict(v) for k, v in self.metrics.items()}
        lists = {name: list(plain[name]) for name in ("over", "lost", "notes")}
        return {**plain, **lists, "verdict": self.verdict}


class Tryout:
    """A model on a target, tried at one ratio after another. `trials` is what was tried, `made`
    the compiled models that are worth keeping."""

    def __init__(
        self,
        graph: ir.Model,
        target: Target,
        recipe: str,
        *,
        budget: Budget | None,
        evaluation: Evaluation | None,
        feeds: Sequence[Feed] | None,
        dims: Mapping[str, int] | None,
        time_budget_s: float,
        force: bool,
        progress: Progress,
    ) -> None:
        self.graph, self.target, self.recipe = graph, target, recipe
        self.budget, self.evaluation, self.dims = budget, evaluation, dims
        self.feeds, self.teachers = feeds, feeds
        self.progress, self.notes = progress, list[str]()
        self.trials: dict[float, Trial] = {}
        self.errors: dict[float, EdgepassError] = {}
        self.original: Trial | None = None
        self.made: dict[float, Compiled] = {}
        self._seconds = time_budget_s if runs_on_host(target) else 0.0
        self._force = force
        self._net = Architecture(without_weights(graph))
        self._judged = evaluation
        if evaluation is None and feeds is not None:
            self._hold_out(feeds)
        self._price_original()

    def _hold_out(self, feeds: Sequence[Feed]) -> None:
        count = len(feeds)
        if count < _FEWEST:
            self._judged = Evaluation(data=list(feeds))
            self.notes.append(
                f"outputs are judged on the same {count} samples that weights were solved on: they "
                "look better than they are; give more calibration samples, or an evaluation"
            )
            return
        judges = range(_JUDGES - 1, count, _JUDGES)
        self._judged = Evaluation(data=[feeds[i] for i in judges])
        self.teachers = [feeds[i] for i in range(count) if i not in judges]
        self.notes.append(
            f"outputs are judged on {len(judges)} of {count} calibration samples, held out; give "
            "an evaluation to judge by a metric"
        )

    @property
    def timed(self) -> bool:
        """Whether trials are timed here."""
        return self._seconds > 0

    def removed(self, trial: Trial) -> str:
        """The shares of parameters and MACs that are gone, in words; '' where not known."""
        before = self.original
        if before is None or not before.parameters or trial.parameters is None:
            return ""
        text = f"{1 - trial.parameters / before.parameters:.1%} of the parameters"
        if before.macs and trial.macs is not None:
            text += f" and {1 - trial.macs / before.macs:.1%} of the MACs"
        return f"{text} removed"

    def _price_original(self) -> None:
        for row in self._net.estimate(self.target, [_ORIGINAL], dims=self.dims).rows:
            self.original = Trial(
                0.0,
                _ORIGINAL,
                parameters=row.parameters,
                macs=row.macs,
                file_bytes=row.file_bytes,
                predicted=row.latency,
            )

    def recipe_at(self, ratio: float) -> str:
        """The recipe at a ratio. Limits of an evaluation judge better than the pass's own bound."""
        limited = self.evaluation is not None and bool(self.evaluation.limits)
        return with_ratio(self.recipe, ratio, limit=_NO_BOUND if limited else None)

    def pruning_rows(self, ratio: float) -> list[LedgerRow]:
        """What the passes that prune say of the model made at a ratio."""
        names = {p.name for p in parse_recipe(self.recipe) if p.stage is Stage.PRUNE}
        rows = self.made[ratio].ledger.rows
        return [row for row in rows if row.name.partition("{")[0] in names]

    def held_back(self, ratio: float) -> str:
        """What the pass says where its own bound kept it from pruning so much; '' elsewhere."""
        if ratio not in self.made:
            return ""
        notes = [note for row in self.pruning_rows(ratio) for note in row.notes]
        return next((note for note in notes if "over the limit" in note), "")

    def predicted(self, ratio: float) -> tuple[Verdict, ...]:
        """The budget's verdicts on what the cost model says, before anything is compiled.

        Raises:
            UsageError: the recipe can't be priced.
        """
        assert self.budget is not None
        text = self.recipe_at(ratio)
        self.progress(len(self.trials), len(self.trials) + 1, f"pricing {text}")
        found = self._net.estimate(self.target, [text], dims=self.dims)
        if text in found.failed:
            raise UsageError(f"The recipe {text!r} can't be priced", why=found.failed[text])
        return self.budget.check(found[text])

    def trial(self, ratio: float) -> Trial:
        """The ratio compiled, timed where that can be, and judged; each once."""
        if ratio not in self.trials:
            self.trials[ratio] = self._make(ratio)
        return self.trials[ratio]

    def drop(self, ratio: float) -> None:
        """Forget a compiled model that will not be chosen."""
        self.made.pop(ratio, None)

    def _make(self, ratio: float) -> Trial:
        text = self.recipe_at(ratio)

        def tell(done: int, total: int, what: str) -> None:
            part = f" {done}/{total}" if total > 1 else ""
            self.progress(len(self.trials), len(self.trials) + 1, f"{text}: {what}{part}")

        tell(0, 1, "compiling")
        try:
            made = compile_model(
                self.graph,
                self.target,
                recipe=text,
                calibration=self.teachers,
                dims=self.dims,
                time_budget_s=self._seconds,
                budget=self.budget,
                force=self._force,
                progress=tell,
            )
        except EdgepassError as error:
            self.errors[ratio] = error
            return Trial(ratio, text, failed=str(error))
        self.made[ratio] = made
        cost = made.cost
        found = Trial(
            ratio,
            text,
            parameters=cost["parameters"],
            macs=cost["macs"],
            file_bytes=cost["file_bytes"],
            predicted=Latency(**cost["latency"]),
            measured_ms=None if made.speed is None else made.speed.candidate_ms,
            over=tuple(v.text for v in made.verdicts if v.gap is None or v.gap > 0),
            notes=tuple(made.notes),
        )
        return self._judge(found, made, tell)

    def _judge(self, trial: Trial, made: Compiled, tell: Progress) -> Trial:
        if self._judged is None:
            return trial
        report = self._judged.run(self.graph, {"pruned": made}, progress=tell)
        rung = report["pruned"]
        if self.original is not None:
            self.original = dataclasses.replace(
                self.original, metrics=dict(report.original.metrics)
            )
        lost = limit_texts(rung) if rung.verdict in (EXCEEDS, CANNOT_TELL) else ()
        errors = [part.sqnr_db for part in rung.divergence.values()]
        return dataclasses.replace(
            trial, metrics=dict(rung.metrics), sqnr_db=min(errors, default=None), lost=lost
        )
