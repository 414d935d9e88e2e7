"""Operators that only one runtime has: what it would fuse by itself, and what it would not.

Here: the pass. The rules are in `conv`, `products` and `elementwise`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..base import Stage
from ..rules import RewriteRule, RuleGroup
from .conv import ConvActivation, ConvResidual
from .elementwise import AffineByChannel, BiasGelu, QuickGeluForm, SumBeforeNorm
from .products import GemmActivation, ProductOfScaled, ProductOfTransposed, ScaledProduct


@dataclasses.dataclass(frozen=True)
class RuntimeForms(RuleGroup):
    """Writes ONNX Runtime's own fused operators, for targets that run on it.

    Relu(Conv(x, W, b))   ->   com.microsoft.FusedConv(x, W, b, activation="Relu")
    """

    stage: ClassVar[Stage] = Stage.LOWER
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        ConvResidual,
        ConvActivation,
        QuickGeluForm,
        BiasGelu,
        AffineByChannel,
        SumBeforeNorm,
        ProductOfTransposed,
        ProductOfScaled,
        ScaledProduct,
        GemmActivation,
    )
