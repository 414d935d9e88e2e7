"""How much may be lost: limits on metrics and other figures, held against a report.

Here: `judged`, `parse_limit`. Not here: reading them from a file (`cli.evaluating`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from ..errors import UsageError
from .report import (
    CANNOT_TELL,
    EXCEEDS,
    NO_LIMITS,
    WITHIN,
    Estimate,
    LimitResult,
    Report,
    Rung,
)

_FORM = re.compile(r"\s*(<=|>=|<|>)?\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*(%)?\s*")
_ROUNDING = 1e-12
WORST = "@slices"
FIGURES = ("agreement", "sqnr_db", "cosine", "kl", "ece", "broken", "flips", "harmed_slices")
"""What can be limited besides metrics; `ece` as a change, the others as they are."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """`kind` is "change" (by at most `bound`, in the direction of its sign), "relative" (the same,
    as a share of the original's value), "above" or "below" (the value itself)."""

    kind: str
    bound: float
    text: str


def parse_limit(name: str, given: float | str) -> Limit:
    """A number as an allowed change; text as `-0.003`, `-1%`, `>= 0.95`, `<= 3.56`.

    Raises:
        UsageError: another form.
    """
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        found = None
    else:
        found = _FORM.fullmatch(str(given))
    if found is None or (found[1] and found[3]):
        raise UsageError(
            f"The limit {given!r} of {name!r} can't be read",
            fix='give a change like -0.003 or "-1%", or a bound like ">= 0.95"',
        )
    number = float(found[2])
    if found[1]:
        return Limit("above" if found[1].startswith(">") else "below", number, str(given).strip())
    if found[3]:
        return Limit("relative", number / 100, str(given).strip())
    return Limit("change", number, f"{number:+g}")


def judged(report: Report, limits: Mapping[str, float | str], confident: bool) -> Report:
    """The report with each candidate's limits and verdict.

    A limit holds if the figure itself does; with `confident`, only if its whole interval does, and
    it cannot be told where the interval straddles the limit.

    Raises:
        UsageError: a limit on something that was not measured.
    """
    parsed = {name: parse_limit(name, given) for name, given in limits.items()}
    rungs = [report.original]
    for rung in report.candidates:
        results = tuple(
            _result(rung, report.original, name, limit, confident) for name, limit in parsed.items()
        )
        rungs.append(dataclasses.replace(rung, limits=results, verdict=_overall(results)))
    return dataclasses.replace(report, rungs=tuple(rungs))


def _overall(results: tuple[LimitResult, ...]) -> str:
    verdicts = {result.verdict for result in results}
    for verdict in (EXCEEDS, CANNOT_TELL, WITHIN):
        if verdict in verdicts:
            return verdict
    return NO_LIMITS


def _result(rung: Rung, original: Rung, name: str, limit: Limit, confident: bool) -> LimitResult:
    value, change, base, better = _figure(rung, original, name)
    estimate: Estimate | None
    if limit.kind in ("above", "below"):
        estimate, bound = value, limit.bound
    else:
        estimate = change
        bound = limit.bound * (abs(base) if limit.kind == "relative" else 1)
    if estimate is None:
        raise UsageError(
            f"{name!r} has no change from the original to limit",
            fix=f'give a bound on the figure itself: {name} = ">= ..." or "<= ..."',
        )
    if not math.isfinite(estimate.value) and math.isnan(estimate.value):
        return LimitResult(name, limit.text, estimate.value, EXCEEDS, "it is undefined")
    upper = limit.kind == "below" or (
        limit.kind != "above" and (bound > 0 or (bound == 0 and not better))
    )
    verdict = _verdict(estimate, bound, upper, confident)
    interval = (
        "" if estimate.low is None else estimate.text(signed=limit.kind not in ("above", "below"))
    )
    return LimitResult(name, limit.text, estimate.value, verdict, interval)


def _verdict(estimate: Estimate, bound: float, upper: bool, confident: bool) -> str:
    slack = _ROUNDING * (1 + abs(bound))

    def holds(number: float) -> bool:
        return number <= bound + slack if upper else number >= bound - slack

    if not confident or estimate.low is None or estimate.high is None:
        return WITHIN if holds(estimate.value) else EXCEEDS
    ends = (holds(estimate.low), holds(estimate.high))
    return WITHIN if all(ends) else CANNOT_TELL if any(ends) else EXCEEDS


Figure = tuple[Estimate, Estimate | None, float, bool]


def _figure(rung: Rung, original: Rung, name: str) -> Figure:
    """The value, its change from the original, the original's, and whether higher is better."""
    if name in rung.metrics:
        found = rung.metrics[name]
        base = original.metrics[name].value.value
        return found.value, found.difference, base, found.higher_is_better
    metric = name.removesuffix(WORST)
    if name.endswith(WORST) and metric in rung.metrics:
        return _worst_slice(rung, metric)
    values = list(rung.divergence.values())
    numbers: dict[str, list[float | None]] = {
        "agreement": [one.agreement for one in values],
        "kl": [one.kl for one in values],
        "sqnr_db": [one.sqnr_db for one in values],
        "cosine": [one.cosine for one in values],
    }
    if name in numbers:
        known = [number for number in numbers[name] if number is not None]
        if known:
            return Estimate(max(known) if name == "kl" else min(known)), None, 0.0, name != "kl"
    if name == "ece" and rung.ece is not None and original.ece is not None:
        change = Estimate(rung.ece - original.ece)
        return Estimate(rung.ece), change, original.ece, False
    if name in ("broken", "flips") and rung.flips is not None:
        count = rung.flips.broken + (rung.flips.mended if name == "flips" else 0)
        share = Estimate(count / max(rung.flips.decisions, 1))
        return share, share, 0.0, False
    if name == "harmed_slices" and rung.slices:
        count_ = Estimate(float(len({row.name for row in rung.harmed})))
        return count_, count_, 0.0, False
    raise UsageError(
        f"There is a limit on {name!r}, which was not measured",
        why=f"measured: {', '.join(rung.metrics) or 'no metric'}",
        fix=f"limit a metric, METRIC{WORST}, or one of {', '.join(FIGURES)} where they apply",
    )


def _worst_slice(rung: Rung, metric: str) -> Figure:
    better = rung.metrics[metric].higher_is_better
    rows = [r for r in rung.slices if r.metric == metric and math.isfinite(r.difference)]
    if not rows:
        raise UsageError(f"There is no slice to limit {metric!r} on", fix="give `slices`")
    worst = (min if better else max)(rows, key=lambda row: row.difference)
    return Estimate(worst.candidate), Estimate(worst.difference), worst.original, better
