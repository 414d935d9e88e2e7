"""Scaled-dot-product attention in its many spellings, as one operator."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup


@dataclasses.dataclass(frozen=True)
class FuseAttention(RuleGroup):
    """Recognizes attention that exporters spell out."""

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = ()
