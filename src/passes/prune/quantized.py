"""Models that are quantized already: what pruning says of them.

Here: `quantized_share` and `refuse_quantized`. Not here: quantizing after pruning, which a recipe
does by stages.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ...errors import UsageError
from ...ir.graph import all_nodes, constant_tensor

_MATRIX = 2
"""Axes from which a constant counts as a weight."""


def quantized_share(model: ir.Model) -> float:
    """The share of the weights (elements of constants with two axes or more) stored as integers
    or floats of 8 bits and fewer, 0 to 1."""
    small = total = 0
    seen: set[ir.Value] = set()
    for node in all_nodes(model):
        for value in node.inputs:
            tensor = constant_tensor(value)
            if value is None or tensor is None or value in seen or len(tensor.shape) < _MATRIX:
                continue
            seen.add(value)
            count = math.prod(int(d) for d in tensor.shape.numpy())
            if tensor.dtype.bitwidth <= 8:
                small, total = small + count, total + count
            elif tensor.dtype.is_floating_point():
                total += count
    return small / total if total else 0.0


def refuse_quantized(model: ir.Model, pass_name: str) -> None:
    """Raises where most weights are quantized: what computes them in floats is not there any more.

    Raises:
        UsageError: with the way out.
    """
    share = quantized_share(model)
    if share > 0.5:
        raise UsageError(
            f"The pass {pass_name!r} prunes float models, and this one is quantized already",
            where=f"{share:.0%} of its weights are stored in 8 bits or fewer",
            why="units are judged, and the layers behind them solved again, in floats; rounded "
            "weights would have to be rounded a second time",
            fix="prune the float model and quantize the result, in one recipe: prune+int8",
        )
