"""The account of one scheduling run: which rule each PrimFunc got, and why any fell back.

Only data and its printing; the rules that fill it live beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal[
    "matmul", "conv", "depthwise", "pool", "elementwise", "reduction", "layout", "fallback"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """One PrimFunc. `reason` says why a better rule was refused, where one was."""

    name: str
    kind: Kind
    rule: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class ScheduleReport:
    """All PrimFuncs of a scheduled module, in order of their names."""

    kernels: tuple[KernelRecord, ...]

    def of_kind(self, kind: Kind) -> tuple[KernelRecord, ...]:
        """The records of one kind."""
        return tuple(record for record in self.kernels if record.kind == kind)

    @property
    def unscheduled(self) -> tuple[str, ...]:
        """Names of the functions that no rule covered."""
        return tuple(record.name for record in self.of_kind("fallback"))

    def __str__(self) -> str:
        width = max((len(record.name) for record in self.kernels), default=0)
        return "\n".join(
            f"{record.name:{width}}  {record.kind:11}  {record.rule}"
            + (f"  ({record.reason})" if record.reason else "")
            for record in self.kernels
        )
