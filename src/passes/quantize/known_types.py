"""The types a quantization pass decides by, inferred where a model comes without them.

Here: `require_types`. Inside a pipeline shapes are inferred at import and this does nothing; a pass
run on its own may meet a graph that declares only its interface.
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.shapes import infer_shapes


def require_types(model: ir.Model) -> None:
    """Infer shapes and types if a node of the main graph has an output without a type.

    What can't be inferred stays unknown, and nodes around it stay float.
    """
    if any(value.type is None and value.name for node in model.graph for value in node.outputs):
        infer_shapes(model, strict=False)
