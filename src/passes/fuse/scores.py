"""The scores of attention: softmax(q k^T * scale + bias) in its spellings.

Here: `read_scores`, from the attention weights back to queries, keys, scale and bias. Not here: the
heads (`heads`), the operator (`attention`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir.graph import (
    attribute,
    constant_array,
    constant_scalar,
    constant_tensor,
    dims_of,
    is_onnx_op,
)

LOST_IN_ROUNDING = -1e30
"""Adding this or less to a float32 score below 1e22 leaves no digit of the score."""


@dataclasses.dataclass
class Scores:
    """softmax(scale * query @ keys + sum of biases): `keys` are (..., size, length).

    A bias (condition, value) stands for `value` where the condition holds and 0 elsewhere; one
    (None, value) for the value itself. `guarded`: rows that are NaN become 0.
    """

    query: ir.Value
    keys: ir.Value
    scale: float = 1.0
    biases: list[ir.Value] = dataclasses.field(default_factory=list)
    masks: list[tuple[ir.Value, float, bool]] = dataclasses.field(default_factory=list)
    guarded: bool = False
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)


def read_scores(weights: ir.Value, user: ir.Node) -> Scores | str:
    """The scores behind the left factor of `user`, or why it is no attention."""
    inside: list[ir.Node] = []
    guarded = False
    node = weights.producer()
    if node is not None and is_onnx_op(node, "Where") and (guard := _nan_guard(node)) is not None:
        inside += [node, guard]
        guarded = True
        assert node.inputs[2] is not None
        node = node.inputs[2].producer()
    if node is None or not is_onnx_op(node, "Softmax"):
        found = "a graph input or weight" if node is None else node.op_type
        return f"no attention: expected Softmax before the left factor, found {found}"
    dims = dims_of(node.outputs[0])
    axis = attribute(node, "axis", -1)
    if dims is None or axis not in (-1, len(dims) - 1):
        return f"the Softmax is over axis {axis}, not the last"
    inside.append(node)
    assert node.inputs[0] is not None
    scores = _read(node.inputs[0], len(dims))
    if isinstance(scores, str):
        return scores
    scores.nodes = inside + scores.nodes
    scores.guarded = guarded
    return _used_elsewhere(scores.nodes, user) or scores


def _nan_guard(node: ir.Node) -> ir.Node | None:
    """The IsNaN of Where(IsNaN(p), 0, p), which torch writes around a masked softmax."""
    condition, zero, value = node.inputs
    test = None if condition is None else condition.producer()
    if test is None or not is_onnx_op(test, "IsNaN") or test.inputs[0] is not value:
        return None
    return test if constant_scalar(zero) == 0 else None


def _read(value: ir.Value, rank: int) -> Scores | str:
    """The product and what was done to it, from the last operator back."""
    node = value.producer()
    if node is None:
        return "no attention: the scores are a graph input or weight"
    if is_onnx_op(node, "MatMul"):
        query, keys = node.inputs
        assert query is not None
        assert keys is not None
        if any((dims := dims_of(v)) is None or len(dims) != rank for v in (query, keys)):
            return "queries and keys have not the rank of the scores"
        return Scores(query, keys, nodes=[node])
    if is_onnx_op(node, "Mul", "Div"):
        return _read_scaled(node, rank)
    if is_onnx_op(node, "Add"):
        return _read_biased(node, rank)
    if is_onnx_op(node, "Where"):
        return _read_masked(node, rank)
    return f"no attention: {node.op_type} stands between the product and the Softmax"


def _read_scaled(node: ir.Node, rank: int) -> Scores | str:
    first, second = node.inputs
    factor = constant_scalar(second)
    if factor is None and node.op_type == "Mul":
        first, second = second, first
        factor = constant_scalar(second)
    if not factor or first is None:
        return f"the scores are multiplied by more than one number ({node.op_type})"
    found = _read(first, rank)
    if isinstance(found, str):
        return found
    if found.biases or found.masks:
        return "the scores are scaled after a bias"
    found.scale *= 1 / factor if node.op_type == "Div" else factor
    found.nodes.insert(0, node)
    return found


def _read_biased(node: ir.Node, rank: int) -> Scores | str:
    reason = "no attention: neither summand holds scores"
    for scores, bias in (node.inputs, node.inputs[::-1]):
        assert scores is not None
        assert bias is not None
        found = _read(scores, rank)
        if isinstance(found, Scores):
            found.biases.append(bias)
            found.nodes.insert(0, node)
            return found
        reason = max(reason, found, key=lambda text: not text.startswith("no attention"))
    return reason


def _read_masked(node: ir.Node, rank: int) -> Scores | str:
    """Where(kept, scores, low) or Where(masked, low, scores)."""
    condition, if_true, if_false = node.inputs
    low = constant_scalar(if_false)
    scores, keep = (if_true, True) if low is not None else (if_false, False)
    low = low if keep else constant_scalar(if_true)
    if low is None or scores is None or condition is None:
        return "no attention: Where chooses between two computed scores"
    if low > LOST_IN_ROUNDING:
        return f"masked scores become {low:g}, which a sum with the score would not equal"
    found = _read(scores, rank)
    if isinstance(found, str):
        return found
    found.masks.append((condition, float(low), keep))
    found.nodes.insert(0, node)
    return found


def _used_elsewhere(nodes: list[ir.Node], user: ir.Node) -> str | None:
    inside = {id(node) for node in nodes} | {id(user)}
    for node in nodes:
        for value in node.outputs:
            if value.is_graph_output():
                return f"the attention's inner value {value.name!r} is an output of the graph"
            for consumer in value.consumers():
                if id(consumer) not in inside:
                    return (
                        f"the attention's inner value {value.name!r} is also used by "
                        f"{consumer.op_type} {consumer.name!r}"
                    )
    return None


def never_all_masked(bias: ir.Value, depth: int = 8) -> bool:
    """Whether no row of the bias can be minus infinity throughout, as far as constants show it."""
    array = constant_array(bias, 1 << 24)
    if array is not None:
        return (
            bool(np.all(np.any(array > -np.inf, axis=-1))) if array.ndim else bool(array > -np.inf)
        )
    node = bias.producer()
    if node is None or not depth or constant_tensor(bias) is not None:
        return False
    if is_onnx_op(node, "Where"):
        return all(_finite(v, depth - 1) for v in node.inputs[1:])
    return _finite(bias, depth)


_FINITE_OF_FINITE = (
    "Concat",
    "Expand",
    "Gather",
    "GatherND",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


def _finite(value: ir.Value | None, depth: int) -> bool:
    """Whether no element can be infinite, as far as constants and movement show it."""
    if value is None or not depth:
        return False
    array = constant_array(value, 1 << 24)
    if array is not None:
        return bool(np.isfinite(array).all())
    node = value.producer()
    if node is None:
        return False
    if is_onnx_op(node, "Where"):
        return all(_finite(v, depth - 1) for v in node.inputs[1:])
    if is_onnx_op(node, "Cast"):
        source = node.inputs[0]
        return source is not None and source.dtype is not None and source.dtype.is_integer()
    if is_onnx_op(node, *_FINITE_OF_FINITE):
        count = len(node.inputs) if node.op_type == "Concat" else 1
        return all(_finite(v, depth - 1) for v in node.inputs[:count])
    return False
