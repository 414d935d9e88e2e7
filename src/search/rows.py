"""One recipe of a sweep: what it costs, what it did to the model, and whether that is allowed.

Here: `Row` and its parts as plain data, and the axes that rows are compared on. Not here: how the
numbers come about (`sweep`), comparing (`pareto`, `choice`), showing (`report`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cost.budget import Answer, Verdict
from ..cost.latency import Latency
from ..cost.report import CostReport
from ..evaluation.report import CANNOT_TELL, EXCEEDS, NO_LIMITS, WITHIN, MetricResult, Rung
from .timing import Timing

ORIGINAL = "original"
FAILED = "failed"
NOT_EVALUATED = "not evaluated"
SAME_DB = 20.0
"""Signal to noise of the outputs below which, without metrics, a candidate counts as ruined: noise
of a tenth of the signal. An accepted rule of thumb for weights and activations in 8 bits."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe's results; what is not known is None.

    `name`, `recipe` (as given) and `passes` (in full), `why` it was tried. `failed`: why there is
    no artifact, or it could not be run; '' otherwise. `file_bytes`: of the model files as written.
    `cost`: the prediction. `timing`: measured here. `rung`: the evaluation. `budget`: a verdict on
    each of its limits. `front`: on the Pareto front. `same_as`: the first row with the very same
    artifact. `lossless`: all its passes are. `artifact`: its folder. `reused`: it was in the cache.
    """

    name: str
    recipe: str
    why: str = ""
    passes: str = ""
    failed: str = ""
    file_bytes: int | None = None
    cost: CostReport | None = None
    timing: Timing | None = None
    rung: Rung | None = None
    budget: tuple[Verdict, ...] = ()
    front: bool = False
    same_as: str = ""
    lossless: bool = False
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    reused: bool = False
    artifact: Path | None = None

    @property
    def predicted(self) -> Latency | None:
        """The predicted latency with its label and interval."""
        return None if self.cost is None else self.cost.latency

    @property
    def verdict(self) -> str:
        """`within`, `exceeds`, `cannot tell`, `failed`, `not evaluated`, or `no limits`.

        Of the evaluation's limits; `over budget` follows where a limit of the budget is missed.
        """
        if self.failed:
            return FAILED
        words = NOT_EVALUATED if self.rung is None else self.rung.verdict
        if any(verdict.answer is Answer.MISSED for verdict in self.budget):
            words += ", over budget"
        return words

    @property
    def first_metric(self) -> tuple[str, MetricResult] | None:
        """The metric that rows are compared by."""
        if self.rung is None:
            return None
        return next(iter(self.rung.metrics.items()), None)

    @property
    def loss(self) -> float | None:
        """What grows as the model gets worse: the first metric, turned that way; without metrics
        the noise of the worst output against the original's, in dB."""
        first = self.first_metric
        if first is not None:
            value = first[1].value.value
            return -value if first[1].higher_is_better else value
        if self.rung is None or not self.rung.divergence:
            return None
        return -min(part.sqnr_db for part in self.rung.divergence.values())

    def latency_on(self, measured: bool) -> float | None:
        """Milliseconds, comparable with those of other rows.

        Measured ones as a share of the original in the same turns, so that rows timed on different
        days compare.
        """
        if measured:
            return None if self.timing is None else self.timing.share
        return None if self.predicted is None else self.predicted.ms

    @property
    def objections(self) -> tuple[str, ...]:
        """Why the row may not be chosen, in words; empty where it may."""
        if self.failed:
            return (self.failed.splitlines()[0],)
        found = [v.text for v in self.budget if v.answer is not Answer.MET]
        if self.rung is None:
            return (*found, "it was not evaluated")
        if self.rung.verdict == NO_LIMITS:
            return (*found, *_harms(self.rung))
        return (*found, *limit_texts(self.rung))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        from ..evaluation.report import Report

        rung = None
        if self.rung is not None:
            rung = Report((self.rung,), 0, 0).as_dict()["rungs"][0]
        plain_ = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("cost", "timing", "rung", "budget", "notes", "artifact")
        }
        return {
            **plain_,
            "verdict": self.verdict,
            "objections": list(self.objections),
            "predicted": None if self.predicted is None else self.predicted.as_dict(),
            "peak_activation_bytes": None if self.cost is None else self.cost.peak_activation_bytes,
            "macs": None if self.cost is None else self.cost.macs,
            "measured": None if self.timing is None else self.timing.as_dict(),
            "evaluation": rung,
            "budget": [verdict.as_dict() for verdict in self.budget],
            "notes": list(self.notes),
        }


def limit_texts(rung: Rung) -> tuple[str, ...]:
    """Each limit that is not kept, in words."""
    texts = []
    for item in rung.limits:
        if item.verdict == WITHIN:
            continue
        own = item.limit[:1] in ("<", ">")
        value = item.why or ("" if item.value is None else f"{item.value:.4g}")
        said = {
            EXCEEDS: f"beyond the limit {item.limit}",
            CANNOT_TELL: f"and the limit {item.limit} lies within its interval",
        }.get(item.verdict, item.verdict)
        texts.append(f"{item.name} {'is' if own else 'changes by'} {value}, {said}")
    return tuple(texts)


def _harms(rung: Rung) -> list[str]:
    """What is worse beyond chance, where no limits were given to say how much is too much."""
    found = []
    for name, result in rung.metrics.items():
        change = result.difference
        if change is None or math.isnan(change.value):
            continue
        low, high = change.low, change.high
        worse = change.value if result.higher_is_better else -change.value
        edge = high if result.higher_is_better else low
        sure = edge is None or (edge < 0 if result.higher_is_better else edge > 0)
        if worse < 0 and sure:
            found.append(f"{name} changed by {change.text(signed=True)}, beyond chance")
    found += [f"the slice {row.name} is worse beyond chance" for row in rung.harmed]
    if not rung.metrics:
        found += [
            f"the output {name} has {part.sqnr_db:.1f} dB of signal to noise, "
            f"less than {SAME_DB:g} dB"
            for name, part in rung.divergence.items()
            if part.sqnr_db < SAME_DB
        ]
    return found


def stored_cost(cost: Mapping[str, Any], target: str, recipe: str) -> CostReport:
    """A report from the totals that an entry keeps."""
    totals = (
        "file_bytes",
        "parameters",
        "macs",
        "flops",
        "bytes_moved",
        "peak_activation_bytes",
    )
    return CostReport(
        target=target,
        recipe=recipe,
        latency=Latency(**cost["latency"]),
        unknown_ops=tuple(
            (row["op"], row["count"], row["reason"]) for row in cost.get("unknown_ops", ())
        ),
        notes=tuple(cost.get("notes", ())),
        **{name: cost[name] for name in totals},
    )


def kept_cost(cost: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry keeps of `Compiled.cost`: the totals, no tables."""
    return {key: value for key, value in cost.items() if key not in ("nodes", "kernels", "advice")}
