"""What every form of ONNX Runtime's own asks first: may it be written here.

Here: `refusal`. Not here: the forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ...ir.graph import CONTRIB_DOMAIN
from ...ir.match import Match
from ...ir.quant import is_dequantize, is_quantize
from ...targets.target import Runtime
from ..base import Context
from ..operators import missing_operator


def refusal(
    m: Match,
    context: Context,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    domain: str = CONTRIB_DOMAIN,
    float_root: bool = False,
) -> str | None:
    """Why the match must not become `op_type` with these inputs.

    The kernels of these forms compute in float32. What reads a DequantizeLinear or is read by a
    QuantizeLinear is left as it is: the runtime makes integer kernels of it. `float_root`: it has
    none for the root, whatever reads its result.
    """
    if context.target is None:
        return "no target is given"
    if context.target.runtime is not Runtime.ONNXRUNTIME:
        return f"{context.target.name} does not run on ONNX Runtime"
    for value in inputs:
        if value is not None and value.dtype != ir.DataType.FLOAT:
            return f"its kernel computes in FLOAT, not {value.dtype.name if value.dtype else '?'}"
    return between_integers(m, float_root=float_root) or missing_operator(
        context, op_type, inputs, domain=domain
    )


def between_integers(m: Match, *, float_root: bool = False) -> str | None:
    """Why the runtime may make integer kernels of the match, or None."""
    for node in m.matched_nodes:
        if any(v is not None and is_dequantize(v.producer()) for v in node.inputs):
            return f"{node.op_type} reads a DequantizeLinear: the runtime computes it in integers"
    if float_root:
        return None
    if any(is_quantize(user) for value in m.root.outputs for user in value.consumers()):
        return "a QuantizeLinear reads the result: the runtime computes it in integers"
    return None


def options_of(node: ir.Node) -> dict[str, object]:
    """The attributes of a node, to make another like it."""
    return {a.name: a.value for a in node.attributes.values()}
