"""Which layers of a candidate do the harm, and what to do about each.

Here: `Blame`, and finding it through what knows the inside of models. Not here: how errors of
layers are measured (`evaluation`), which candidate to ask about (`choice`).
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Blame:
    """A layer, what it does, and the remedy."""

    layer: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.layer} ({self.why})"
        return f"{text}, remedy: {self.remedy}" if self.remedy else text

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def find_blame(graph: Any, row: Any, evaluation: Any) -> tuple[Blame, ...]:
    """The layers of a row's artifact that do most harm; empty where it can't be told."""
    return ()
