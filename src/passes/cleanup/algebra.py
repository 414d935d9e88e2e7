"""Algebraic identities and forms with fewer operators."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup


@dataclasses.dataclass(frozen=True)
class Algebra(RuleGroup):
    """Rewrites arithmetic into forms with fewer operators."""

    stage: ClassVar[Stage] = Stage.CLEANUP
    rules: ClassVar[tuple[type[RewriteRule], ...]] = ()
