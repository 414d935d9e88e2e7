"""Normalizations that exporters spell out, as the one operator runtimes have."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup


@dataclasses.dataclass(frozen=True)
class FuseNormalizations(RuleGroup):
    """Recognizes normalizations that exporters spell out."""

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = ()
