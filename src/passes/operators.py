"""Whether an operator may be written into a model: its opset has it and the target runs it.

Here: `missing_operator`, which rules ask in `check` before they write an operator that not every
runtime has. Not here: what the target makes of a whole model (`targets.support`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx_ir as ir

from ..ir.graph import CONTRIB_DOMAIN, ONNX_DOMAINS, RUNTIME_OWN
from ..targets.target import No, Runtime
from .base import Context


def missing_operator(
    context: Context,
    op_type: str,
    inputs: Sequence[ir.Value | None] = (),
    *,
    domain: str = "",
    outputs: int = 1,
) -> str | None:
    """Why the operator can't be used on these inputs, or None when it can.

    A standard operator must be in the model's opset and, where a target is given, run there. One of
    `com.microsoft` needs a target whose runtime has a kernel for it.
    """
    standard = domain in ONNX_DOMAINS and op_type not in RUNTIME_OWN
    if standard and (reason := _not_in_opset(op_type, _opset(context))):
        return reason
    if not standard and context.portable:
        return f"{op_type} is no standard operator, and the result is to be portable"
    if context.target is None:
        return (
            None
            if standard
            else f"{op_type} is no standard operator, and no target is given that runs it"
        )
    if context.target.ops is not None:
        found = any((o.domain, o.op_type) == (domain, op_type) for o in context.target.ops)
        return None if found else f"{context.target.name} lists no {op_type}"
    stand_ins = [
        None if v is None else ir.Value(name=f"i{i}", shape=v.shape, type=v.type)
        for i, v in enumerate(inputs)
    ]
    node = ir.Node(domain, op_type, stand_ins, num_outputs=outputs)
    if context.target.runtime is Runtime.TVM:
        from ..targets.tvm.importer import refusal

        return refusal(node)
    from ..targets.ort_support import ort_supports

    answer = ort_supports(node, {CONTRIB_DOMAIN: 1, **context.opsets})
    if isinstance(answer, No):
        return answer.reason
    return None


def _opset(context: Context) -> int:
    return context.opsets.get("", context.opsets.get("ai.onnx", 0))


@functools.cache
def _not_in_opset(op_type: str, opset: int) -> str | None:
    import onnx.defs

    if onnx.defs.has(op_type, opset, ""):
        return None
    if not onnx.defs.has(op_type, ""):
        return f"ONNX has no operator {op_type}"
    versions = range(opset, onnx.defs.onnx_opset_version() + 1)
    first = next((v for v in versions if onnx.defs.has(op_type, v, "")), None)
    return f"{op_type} is new in opset {first}, and the model has {opset}"
