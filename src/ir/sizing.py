"""A model at given sizes: symbolic input dimensions bound to integers.

Here: naming the symbolic dimensions of inputs, `fix_dims` (what a user asks for) and `static_twin`
(what the cost model looks at). Not here: inference itself (`shapes`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..errors import UsageError
from .graph import graph_tree
from .shapes import infer_shapes


def dim_name(value: ir.Value, axis: int) -> str:
    """The name of an input's symbolic dimension; `<input>_d<axis>` where it has none.

    Paddle's exporter calls every one of them `?`.
    """
    dim = value.shape.dims[axis] if value.shape is not None else None
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return f"{value.name}_d{axis}" if name is None or name == "?" else name


def symbolic_dims(model: ir.Model) -> dict[str, list[str]]:
    """The name of each symbolic input dimension -> the places (`input[axis]`) that have it."""
    found: dict[str, list[str]] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if not isinstance(dim, int):
                found.setdefault(dim_name(value, axis), []).append(f"{value.name}[{axis}]")
    return found


def is_dynamic(model: ir.Model) -> bool:
    """Whether an input has a dimension without a size."""
    return bool(symbolic_dims(model))


def check_dims(model: ir.Model, dims: Mapping[str, int]) -> None:
    """
    Raises:
        UsageError: no input has such a dimension, or a size is below 1.
    """
    known = symbolic_dims(model)
    for name, size in dims.items():
        if name not in known or size < 1:
            raise UsageError(
                f"The dimension {name!r} cannot be fixed to {size}",
                where=f"dims={dict(dims)!r}",
                why=f"dynamic dimensions of the inputs: {', '.join(known) or 'none'}"
                if name not in known
                else "a dimension is at least 1",
                fix="name a dynamic dimension of an input, and a size of 1 or more",
            )


def fix_dims(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """A copy with the named dimensions of `symbolic_dims` fixed; the others stay symbolic.

    Raises:
        UsageError: no input has such a dimension, or a size is below 1.
    """
    check_dims(model, dims)
    return static_twin(model, dims)


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
    symbolic: list[tuple[ir.Value, ir.Shape]] = []
    for graph in graph_tree(twin.graph):
        for node in graph:
            for value in node.outputs:
                if value.shape is not None and not value.shape.is_static():
                    symbolic.append((value, value.shape))
                    value.shape = None
    infer_shapes(twin, strict=False)
    for value, shape in symbolic:
        if value.shape is None:  # an operator that inference does not know
            value.shape = shape
    return twin
