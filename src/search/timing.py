"""Measured latency of a sweep's candidates on this machine, against the original.

Here: `Timing`, `measured_here`, and timing in turns, a few candidates at a time. Not here: how to
time (`speed`), predictions (`cost`), keeping times (`sweep`).
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..speed import time_in_turns
from ..targets.registry import runs_on_host
from ..targets.target import Target
from .fingerprint import machine

GROUP = 5
"""Candidates timed in one go beside the original: what a kill can lose, and what is in memory."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of a run on one thread, and of the original in the same turns.

    `date` and `cpu`: when and where it was measured.
    """

    ms: float
    original_ms: float
    date: str
    cpu: str

    @property
    def share(self) -> float:
        """Of the original's time: 0.5 is twice as fast."""
        return self.ms / self.original_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "share_of_original": self.share, "label": "measured"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        """Back from plain data."""
        return cls(*(data[field.name] for field in dataclasses.fields(cls)))


def measured_here(target: Target) -> bool:
    """Whether times of this machine stand for the target's."""
    return runs_on_host(target)


def groups(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Names in groups of equal size, `GROUP` at most."""
    count = -(-len(names) // GROUP)
    for part in np.array_split(np.arange(len(names)), count) if count else ():
        yield tuple(names[i] for i in part)


def time_group(
    original: Callable[[], object],
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
) -> dict[str, Timing]:
    """Each candidate's time in alternation with the original and the others."""
    calls = [original, *candidates.values()]
    base, *times = time_in_turns(calls, budget_s=budget_s)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cpu = str(machine()["cpu"])
    return {name: Timing(ms, base, now, cpu) for name, ms in zip(candidates, times, strict=True)}
