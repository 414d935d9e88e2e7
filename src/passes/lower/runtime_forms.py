"""Operators that only one runtime has: what it would fuse by itself, and what it would not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup
from .conv import ConvActivation


@dataclasses.dataclass(frozen=True)
class RuntimeForms(RuleGroup):
    """Writes the runtime's own fused operators."""

    stage: ClassVar[Stage] = Stage.LOWER
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (ConvActivation,)
