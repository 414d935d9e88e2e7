"""Which row to ship, and where none may be shipped, why not and what stands in the way.

Here: `choose` and `Best`. Not here: which rows no other beats (`pareto`), which layer is to blame
(`blame`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..artifact import Artifact, load
from ..cost.latency import format_ms
from ..cost.text import format_bytes
from ..errors import UsageError
from ..evaluation.report import EXCEEDS, WITHIN, LimitResult
from .blame import Blame, Found
from .rows import Row

OBJECTIVES = ("both", "size", "latency")
_NOISE = 1.02
"""Times and sizes closer than this are taken as equal: the machine's own noise reaches it."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The row to ship, and the reason in words.

    `met`: a row that compresses the model meets the limits and the budget. Where none does, `row`
    is a lossless one that meets them, or None; `nearest` is the compressing row that misses by
    least, `misses` says by what, and `blame` names the layers, worst first, with a remedy each.
    """

    met: bool
    row: Row | None
    reason: str
    nearest: Row | None = None
    misses: tuple[str, ...] = ()
    blame: tuple[Blame, ...] = ()

    def __bool__(self) -> bool:
        return self.met

    def __str__(self) -> str:
        return self.reason

    @property
    def recipe(self) -> str | None:
        """The text of the row's recipe."""
        return None if self.row is None else self.row.recipe

    @property
    def artifact(self) -> Artifact:
        """The row's artifact, loaded.

        Raises:
            UsageError: there is no row.
            ArtifactError: it was deleted from the cache.
        """
        if self.row is None or self.row.artifact is None:
            raise UsageError("No recipe meets the limits", why=self.reason)
        return load(self.row.artifact)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "met": self.met,
            "recipe": self.recipe,
            "name": None if self.row is None else self.row.name,
            "reason": self.reason,
            "nearest": None if self.nearest is None else self.nearest.name,
            "misses": list(self.misses),
            "blame": [item.as_dict() for item in self.blame],
        }


def choose(
    rows: Sequence[Row],
    *,
    by: str = "both",
    measured: bool,
    blame: Callable[[Row], Found],
) -> Best:
    """The smallest or fastest row without objections; `by` says which of the two counts, "both" is
    the least product of them. `blame` is asked only where no row will do.

    Raises:
        UsageError: there is no such objective.
    """
    check_objective(by)
    allowed = [row for row in rows if not row.objections]
    compressing = [row for row in allowed if not row.lossless]
    wanted = compressing or (allowed if all(row.lossless for row in rows) else [])
    if wanted:
        best = pick(allowed, by, measured)
        return Best(True, best, _praise(best, allowed, rows, by, measured))
    spare = pick(allowed, by, measured) if allowed else None
    near = nearest(rows)
    if near is None:
        return Best(False, spare, _nothing_ran(rows, spare))
    guilty = _guilty(near, rows, blame)
    text = _regret(near, spare, guilty)
    return Best(False, spare, text, near, near.objections, guilty.layers)


def _guilty(near: Row, rows: Sequence[Row], blame: Callable[[Row], Found]) -> Found:
    """The layers to blame, where it is a layer that is: for what the evaluation found, and not
    where what changes no result is no better."""
    if near.rung is None or near.rung.verdict == WITHIN:  # only the budget is missed
        return Found()
    for row in rows:
        if row.lossless and row.rung is not None and row.rung.verdict == EXCEEDS:
            return Found(unknown=f"{row.name}, which is lossless, misses the limits too")
    return blame(near)


def check_objective(by: str) -> None:
    """Raises where rows can't be chosen by it.

    Raises:
        UsageError: there is no such objective.
    """
    if by not in OBJECTIVES:
        raise UsageError(
            f"Rows can't be chosen by {by!r}", fix=f"by one of {', '.join(OBJECTIVES)}"
        )


def pick(rows: Sequence[Row], by: str, measured: bool) -> Row:
    """The best of some rows. What is equal within the noise is decided by the next criterion, and
    at last by which changes the model least: nothing is given up for nothing."""

    def size(row: Row) -> float:
        return math.inf if row.file_bytes is None else float(max(1, row.file_bytes))

    def time(row: Row) -> float:
        value = row.latency_on(measured)
        return math.inf if value is None else max(value, 1e-9)

    timeless = all(math.isinf(time(row)) for row in rows)

    def both(row: Row) -> float:
        return size(row) * (1.0 if timeless else time(row))

    criteria = {"size": (size, time), "latency": (time, size), "both": (both,)}[by]
    left = list(rows)
    for criterion in criteria:
        least = min(criterion(row) for row in left)
        left = [row for row in left if criterion(row) <= least * _NOISE]
    return min(left, key=lambda row: (not row.lossless, _loss(row)))


def _loss(row: Row) -> float:
    return math.inf if row.loss is None else row.loss


def nearest(rows: Sequence[Row]) -> Row | None:
    """The compressing row that misses the limits by least; None where none was judged.

    Every limit counts by how much it is exceeded, as a share of what is allowed; rows without such
    limits by their loss.
    """
    judged = [row for row in rows if row.objections and not row.failed and not row.lossless]
    if not judged:
        return None

    def key(row: Row) -> tuple[float, float]:
        limits = () if row.rung is None else row.rung.limits
        over = sum(excess(item) for item in limits if item.verdict == EXCEEDS)
        over += sum(max(0.0, (v.gap or 0.0) / v.limit) for v in row.budget)
        return over, _loss(row)

    return min(judged, key=key)


def excess(item: LimitResult) -> float:
    """How far a value is beyond its limit, relative to the limit; 1 where that can't be told."""
    number = _number(item.limit)
    if number is None or item.value is None or math.isnan(item.value):
        return 1.0
    return abs(item.value - number) / (abs(number) or 1.0)


def _number(text: str) -> float | None:
    """The first number in a limit's text."""
    for word in text.replace("%", " ").replace(",", " ").split():
        try:
            return float(word)
        except ValueError:
            continue
    return None


# --- words -----------------------------------------------------------------------------------


def row_text(row: Row) -> str:
    """A row's size, time and first metric, for people."""
    parts = [format_bytes(row.file_bytes)]
    if row.timing is not None:
        parts.append(
            f"{format_ms(row.timing.ms)} ms measured, {row.timing.share:.2f} of the original's"
        )
    elif row.predicted is not None:
        parts.append(str(row.predicted))
    if (first := row.first_metric) is not None:
        parts.append(f"{first[0]} {first[1].value.text()}")
    return ", ".join(parts)


def _praise(best: Row, allowed: Sequence[Row], rows: Sequence[Row], by: str, measured: bool) -> str:
    found = [
        word
        for word, objective in (("smallest", "size"), ("fastest", "latency"))
        if pick(allowed, objective, measured) is best
    ]
    words = {"both": "best in size times latency", "size": "smallest", "latency": "fastest"}
    how = " and ".join(found) or words[by]
    count = f"{len(allowed)} of {len(rows)} recipes"
    text = f"{best.name} ({row_text(best)}): the {how} of {count} that may be shipped"
    if best.lossless and len(allowed) > 1:
        text += "; no other gains anything"
    if best.timing is not None and best.timing.share > _NOISE:
        text += "; it is slower than the original"
    return text


def _nothing_ran(rows: Sequence[Row], spare: Row | None) -> str:
    text = "No recipe that compresses the model gave anything to judge"
    reasons = [f"{row.name}: {row.failed.splitlines()[0]}" for row in rows if row.failed]
    if reasons:
        text += "; " + "; ".join(reasons[:3])
    return text + _fallback(spare)


def _regret(near: Row, spare: Row | None, guilty: Found) -> str:
    text = (
        "No recipe that compresses the model meets the limits. The nearest is "
        f"{near.name} ({row_text(near)}): {'; '.join(near.objections)}"
    )
    if guilty.layers:
        text += f". To blame: {'; '.join(str(item) for item in guilty.layers)}"
    elif guilty.unknown:
        text += f". Which layer is to blame can't be told: {guilty.unknown}"
    return text + _fallback(spare)


def _fallback(spare: Row | None) -> str:
    return "" if spare is None else f". What may be shipped is {spare.name} ({row_text(spare)})"
