"""The types a quantization pass decides by, inferred where a model comes without them.

Here: `require_types`. Inside a pipeline shapes are inferred at import and this does nothing; a pass
run on its own may meet a graph that declares only its interface.
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.graph import graph_tree
from ...ir.shapes import infer_shapes


def require_types(model: ir.Model) -> None:
    """Infer shapes and types if a node has an output without a type, in a branch or loop too.

    What can't be inferred stays unknown, and nodes around it stay float.
    """
    nodes = (node for graph in graph_tree(model.graph) for node in graph)
    if any(value.type is None and value.name for node in nodes for value in node.outputs):
        infer_shapes(model, strict=False)
