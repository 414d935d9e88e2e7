"""Data movement merged and cancelled: transposes, reshapes, slices, splits, concats, gathers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup


@dataclasses.dataclass(frozen=True)
class Movement(RuleGroup):
    """Merges and cancels operators that only move data."""

    stage: ClassVar[Stage] = Stage.CLEANUP
    rules: ClassVar[tuple[type[RewriteRule], ...]] = ()
