"""A model at given sizes: symbolic input dimensions bound to integers.

Here: naming the symbolic dimensions of inputs, and `static_twin`, a copy whose shapes are as static
as the sizes make them. Not here: inference itself (`shapes`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .graph import graph_tree
from .shapes import infer_shapes


def dim_name(value: ir.Value, axis: int) -> str:
    """The name of an input's symbolic dimension; `<input>_d<axis>` where it has none."""
    dim = value.shape.dims[axis] if value.shape is not None else None
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return f"{value.name}_d{axis}" if name is None or name == "?" else name


def is_dynamic(model: ir.Model) -> bool:
    """Whether an input has a dimension without a size."""
    return any(
        v.shape is not None and not v.shape.is_static()
        for v in model.graph.inputs
        if not v.is_initializer()
    )


def static_twin(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """A copy with the inputs' dimensions bound by `dims`, and all shapes inferred anew.

    Weights are shared with the original. Shapes that contradict each other at these sizes stay as
    inferred up to there.
    """
    twin = model.clone()
    for value in twin.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    d if isinstance(d, int) else dims.get(dim_name(value, axis), d)
                    for axis, d in enumerate(value.shape.dims)
                ]
            )
    for graph in graph_tree(twin.graph):
        for node in graph:
            for value in node.outputs:
                value.shape = None
    infer_shapes(twin, strict=False)
    return twin
