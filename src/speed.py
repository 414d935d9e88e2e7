"""Time of a compiled model against its original, or of many models, on this machine.

Here: `compare` and `time_in_turns`, which alternate so that a noisy machine disturbs all alike. Not
here: predictions (`cost`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Speed:
    """Medians of `rounds` alternating runs on one thread of this machine, in milliseconds.

    `ratio` is the median over rounds of original / candidate: above 1, the candidate is faster.
    `low_ms`, `high_ms`: between them lie the middle 80 % of the candidate's runs.
    """

    original_ms: float
    candidate_ms: float
    ratio: float
    rounds: int
    what: str = "compiled"
    low_ms: float | None = None
    high_ms: float | None = None

    @property
    def slower(self) -> bool:
        """Whether the candidate is slower by more than 2 %, which noise alone reaches."""
        return self.ratio < 0.98

    def __str__(self) -> str:
        verdict = "faster" if self.ratio >= 1 else "slower"
        factor = self.ratio if self.ratio >= 1 else 1 / self.ratio
        return (
            f"on this machine, one thread: {self.what} {self.candidate_ms:.3f} ms, original "
            f"{self.original_ms:.3f} ms, {factor:.2f}x {verdict} (measured, {self.rounds} pairs)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {**dataclasses.asdict(self), "label": "measured"}


def compare(
    original: Callable[[], object],
    candidate: Callable[[], object],
    *,
    budget_s: float = 1.0,
    what: str = "compiled",
) -> Speed:
    """Run both in turns for about `budget_s` seconds, at least 3 pairs, after a warm-up."""
    for call in (original, candidate):
        call()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + budget_s
    while len(pairs) < 3 or (time.perf_counter() < end and len(pairs) < 1000):
        order: Sequence[int] = (0, 1) if len(pairs) % 2 == 0 else (1, 0)
        times = [0.0, 0.0]
        for which in order:
            started = time.perf_counter()
            (original, candidate)[which]()
            times[which] = time.perf_counter() - started
        pairs.append((times[0], times[1]))
    array = np.array(pairs)
    return Speed(
        float(np.median(array[:, 0]) * 1e3),
        float(np.median(array[:, 1]) * 1e3),
        float(np.median(array[:, 0] / array[:, 1])),
        len(pairs),
        what,
        float(np.quantile(array[:, 1], 0.1) * 1e3),
        float(np.quantile(array[:, 1], 0.9) * 1e3),
    )


def runner_of(runner: Any, feed: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """A call that runs `feed` once."""
    return lambda: runner.run(feed)


def time_in_turns(
    calls: Sequence[Callable[[], object]], *, budget_s: float = 1.0, rounds: int = 7
) -> list[float]:
    """Milliseconds of each call, warm: the median over rounds of the fastest run of a round.

    Rounds go over the calls in turn, so that a slow spell of the machine falls on all of them.
    `budget_s` is for one call; every round runs a call at least once, at most 50 times.
    """
    fastest: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for which, call in enumerate(calls):
            best = float("inf")
            end = time.perf_counter() + budget_s / rounds
            for _ in range(50):
                started = time.perf_counter()
                call()
                now = time.perf_counter()
                best = min(best, now - started)
                if now > end:
                    break
            fastest[which].append(best)
    return [float(np.median(times)) * 1e3 for times in fastest]
