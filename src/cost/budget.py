"""What a model may cost at most, and whether a report says that it does.

Here: `Budget` and `Verdict`. Not here: how costs come about (`report`).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .text import format_bytes

if TYPE_CHECKING:
    from .report import CostReport


class Answer(enum.StrEnum):
    """Whether a limit is kept, as far as can be told."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "cannot tell"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One limit held against one figure. `gap` > 0: how much too large, in the limit's unit.

    `text` says all of it for people.
    """

    name: str
    answer: Answer
    limit: float
    value: float | None
    gap: float | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "answer": str(self.answer)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits: milliseconds for one inference, megabytes (10^6) of file, of peak activations.

    None: no limit. Latency is met or missed where the whole interval is on one side; where the
    interval straddles the limit, or an amount is not known, the answer is "cannot tell".

    Raises:
        UsageError: a limit that is not above zero, or no limit at all.
    """

    latency_ms: float | None = None
    size_mb: float | None = None
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if not given:
            raise UsageError("A budget needs a limit", fix="Budget(latency_ms=20, size_mb=4)")
        for name, value in given.items():
            if not value > 0:
                raise UsageError(f"The limit {name} must be above zero, it is {value}")

    def check(self, report: CostReport) -> tuple[Verdict, ...]:
        """A verdict for each limit."""
        found = []
        if self.latency_ms is not None:
            found.append(_latency(self.latency_ms, report))
        if self.size_mb is not None:
            found.append(_bytes("size", self.size_mb, report.file_bytes))
        if self.memory_mb is not None:
            peak = report.peak_activation_bytes
            found.append(_bytes("peak activations", self.memory_mb, peak))
        return tuple(found)

    def answer(self, report: CostReport) -> Answer:
        """Missed if any limit is, met if all are, else cannot tell."""
        answers = {verdict.answer for verdict in self.check(report)}
        for worst in (Answer.MISSED, Answer.UNKNOWN):
            if worst in answers:
                return worst
        return Answer.MET


def _latency(limit: float, report: CostReport) -> Verdict:
    from .latency import format_ms

    time = report.latency
    if time.ms is None or time.low_ms is None:
        return Verdict(
            "latency", Answer.UNKNOWN, limit, None, None, f"latency: not known ({time.reason})"
        )
    gap = time.ms - limit
    if time.low_ms > limit:
        answer = Answer.MISSED
    elif time.high_ms is not None and time.high_ms <= limit:
        answer = Answer.MET
    else:
        answer = Answer.UNKNOWN
    side = "over" if gap > 0 else "under"
    text = f"latency {answer}: {time}, {format_ms(abs(gap))} ms {side} the limit of {limit:g} ms"
    if answer is Answer.UNKNOWN:
        text += " and the interval straddles it"
    return Verdict("latency", answer, limit, time.ms, gap, text)


def _bytes(name: str, limit_mb: float, value: int | None) -> Verdict:
    if value is None:
        return Verdict(name, Answer.UNKNOWN, limit_mb, None, None, f"{name}: not known")
    gap = value / 1e6 - limit_mb
    answer = Answer.MISSED if gap > 0 else Answer.MET
    side = "over" if gap > 0 else "under"
    text = (
        f"{name} {answer}: {format_bytes(value)}, {format_bytes(abs(gap) * 1e6)} {side} the limit "
        f"of {limit_mb:g} MB"
    )
    return Verdict(name, answer, limit_mb, value / 1e6, gap, text)
