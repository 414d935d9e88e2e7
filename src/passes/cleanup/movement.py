"""Data movement merged and cancelled: transposes, reshapes, slices, splits, concats, gathers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup
from .reshapes import RESHAPE_RULES
from .slices import SLICE_RULES
from .transposes import TRANSPOSE_RULES


@dataclasses.dataclass(frozen=True)
class Movement(RuleGroup):
    """Merges and cancels operators that only move data.

    Concat(Split(x)), Reshape(Reshape(x)), Slices that divide x   ->   x, Reshape(x), Split(x)
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        *RESHAPE_RULES,
        *TRANSPOSE_RULES,
        *SLICE_RULES,
    )
