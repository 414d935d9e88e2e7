"""Functions of the model, in place of their calls."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..base import Context, Pass, PassResult, Stage


@dataclasses.dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replaces every call of a function that the model defines by the function's body.

    y = my.domain.Block(x)   ->   y = Relu(Add(x, 1))
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    idempotent: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if not model.functions:
            return PassResult(model, False)
        count = len(model.functions)
        result = common.InlinePass()(model)
        return PassResult(result.model, result.modified, (f"inlined {count} functions",))
