"""Dimensions of attention heads turned so that as few of them as possible matter.

Here: `rotate_heads`. Between the products that make queries and keys and the scores that they are
multiplied to there is nothing but layout, and so between values and the product that follows the
attention: Q A and K A^-T have the scores of Q and K for any invertible A. A is taken from a
singular value decomposition in the metric of the activations, so that dropping the last dimensions
is the best approximation of that rank there is. Not here: dropping them (`selection`, `remove`).

The decomposition of a product of matrices in the metric of its inputs is that of Wang et al. 2024,
"SVD-LLM", arXiv:2403.07378; rotating before slicing that of Ashkboos et al. 2024, "SliceGPT",
arXiv:2401.15024.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array, constant_scalar, constant_tensor, is_onnx_op
from ..quantize.layers import linear_layer
from .groups import Group, Site
from .statistics import Statistics

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Split", "Slice", "Gather")
_SMALL = 1e-6
"""Added to second moments of a head, in units of their mean, so that their roots have inverses."""


@dataclasses.dataclass(frozen=True)
class _Side:
    """A product on one side: its site, and the positions of each head's dimensions, [heads, d]."""

    site: Site
    places: np.ndarray
    bias: Site | None = None


def rotate_heads(groups: Sequence[Group], statistics: Mapping[Site, Statistics]) -> list[Group]:
    """Turn the heads of all groups in which that changes no result; these groups.

    Weights change in place; the model computes what it did, up to rounding.
    """
    return [group for group in groups if _rotate(group, statistics)]


def _rotate(group: Group, statistics: Mapping[Site, Statistics]) -> bool:
    if group.blocked or group.multiple != 1 or group.kind != "head dimensions":
        return False
    made = [site for site in group.sites if site.role == "out"]
    read = list(group.consumers)
    biases = [site for site in group.sites if site.role == "bias"]
    if len(made) + len(read) != 2 or len(made) + len(read) + len(biases) != len(group.sites):
        return False
    if not all(_plain(site) for site in (*made, *read, *biases)):
        return False
    ends = [_end(site.node, biases, read) for site in made]
    sides = [_side(group, site, biases, ends) for site in (*made, *read)]
    if any(side is None for side in sides) or any(end is None for end in ends):
        return False
    first, second = (side for side in sides if side is not None)
    if read:
        known = statistics.get(read[0])
        if known is None or ends[0] != "read":
            return False
        _turn_values(first, second, known)
        return True
    if {*ends} != {"0", "1"} or any(site not in statistics for site in made):
        return False
    queries, keys = (first, second) if ends == ["0", "1"] else (second, first)
    _turn_scores(queries, keys, statistics[queries.site], statistics[keys.site])
    return True


def _plain(site: Site) -> bool:
    """Whether the weight is a float one that this node alone reads."""
    tensor = constant_tensor(site.weight)
    if tensor is None or len(site.weight.uses()) != 1 or not site.weight.is_initializer():
        return False
    if site.role == "bias":
        return tensor.size == len(site.units)
    layer = linear_layer(site.node)
    return layer is not None and layer.groups == 1 and site.node.op_type != "Conv"


def _side(
    group: Group, site: Site, biases: Sequence[Site], ends: Sequence[str | None]
) -> _Side | None:
    heads = int(group.rows.max()) + 1
    order = np.argsort(group.rows, kind="stable")
    if len(np.unique(np.bincount(group.rows))) != 1 or (site.units >= 0).sum() != group.size:
        return None
    place = np.empty(group.size, np.int64)
    place[site.units[site.units >= 0]] = np.flatnonzero(site.units >= 0)
    own = [b for b in biases if _belongs(b, site)]
    return _Side(site, place[order].reshape(heads, -1), own[0] if own else None)


def _belongs(bias: Site, site: Site) -> bool:
    """Whether the bias is that of the product: its own, or that of the Add behind it."""
    if site.role != "out":
        return False
    return bias.node is site.node or bias.node in site.node.outputs[0].consumers()


def _end(start: ir.Node, biases: Sequence[Site], read: Sequence[Site]) -> str | None:
    """Where the result of a product goes through layout alone: "0" or "1", the operand of a
    product of two activations, "read", the consumer, or None where something else happens."""
    adds = {site.node for site in biases}
    value, weighted = start.outputs[0], False
    for _ in range(64):
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output():
            return None
        node, index = users[0].node, users[0].idx
        if read and node is read[0].node:
            return "read" if weighted else None
        if is_onnx_op(node, "MatMul"):
            if not read:
                return str(index)
            if weighted or index != 1:
                return None
            weighted = True
        elif not (
            (is_onnx_op(node, *_MOVES) and index == 0 and len(node.outputs) == 1)
            or node in adds
            or (is_onnx_op(node, "Mul", "Div") and _scalar(node, index))
        ):
            return None
        value = node.outputs[0]
    return None


def _scalar(node: ir.Node, index: int) -> bool:
    return index == 0 and constant_scalar(node.inputs[1]) is not None


# --- turning -----------------------------------------------------------------------------------


def _turn_scores(queries: _Side, keys: _Side, of_q: Statistics, of_k: Statistics) -> None:
    """A from the decomposition of Gq^1/2 Gk^1/2; keys without their mean, since what is equal for
    all keys of a query leaves the softmax as it is."""
    size_q = _second_moments(queries, of_q, centred=False)
    size_k = _second_moments(keys, of_k, centred=True)
    turns, backs = [], []
    for gq, gk in zip(size_q, size_k, strict=True):
        root_q, inverse_q = _root(gq)
        root_k, _ = _root(gk)
        left, singular, _ = np.linalg.svd(root_q @ root_k)
        scale = np.sqrt(np.maximum(singular, 1e-6 * singular.max(initial=1e-30)))
        turns.append((inverse_q @ left) * scale)
        backs.append((root_q @ left) / scale)  # the inverse, transposed
    _apply(queries, turns)
    _apply(keys, backs)


def _turn_values(values: _Side, reader: _Side, of_reader: Statistics) -> None:
    """A from the decomposition of Gz^1/2 W, z being what the attention makes of the values."""
    covariance = of_reader.covariance()[0]
    turns, backs = [], []
    for place in reader.places:
        root, inverse = _root(covariance[np.ix_(place, place)])
        left, singular, _ = np.linalg.svd(root @ of_reader.weight[0][place])
        scale = np.sqrt(np.maximum(singular, 1e-6 * singular.max(initial=1e-30)))
        scale = np.append(scale, np.full(len(place) - len(scale), scale.min(initial=1.0)))
        turns.append((inverse @ left) * scale)
        backs.append((root @ left) / scale)
    _apply(values, turns)
    _apply(reader, backs)


def _second_moments(side: _Side, known: Statistics, *, centred: bool) -> list[np.ndarray]:
    """Of the result with its bias, head by head: [d, d] each."""
    weight, covariance, mean = known.weight[0], known.covariance()[0], known.gram.mean[0]
    bias = constant_array(side.bias.weight) if side.bias is not None else None
    found = []
    for place in side.places:
        own = weight[:, place]
        moments = own.T @ covariance @ own
        if not centred:
            middle = mean @ own + (0.0 if bias is None else bias.reshape(-1)[place])
            moments = moments + np.outer(middle, middle)
        found.append(moments)
    return found


def _root(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square root of a matrix of second moments, and its inverse."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, 0.0) + _SMALL * max(float(values.mean()), 1e-30)
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _apply(side: _Side, turns: Sequence[np.ndarray]) -> None:
    """Multiply the dimensions of each head: columns of a product's weights, or rows."""
    layer = linear_layer(side.site.node)
    weight = constant_array(side.site.weight)
    assert layer is not None
    assert weight is not None
    matrix = np.array(layer.matrix(weight)[0], np.float64)
    if side.site.role == "in":
        matrix = matrix.T
    bias = constant_array(side.bias.weight) if side.bias is not None else None
    moved = None if bias is None else np.array(bias, np.float64).reshape(-1)
    for place, turn in zip(side.places, turns, strict=True):
        matrix[:, place] = matrix[:, place] @ turn
        if moved is not None:
            moved[place] = moved[place] @ turn
    if side.site.role == "in":
        matrix = matrix.T
    _store(side.site.weight, layer.restore(matrix[None]), weight)
    if side.bias is not None and moved is not None and bias is not None:
        _store(side.bias.weight, moved.reshape(bias.shape), bias)


def _store(value: ir.Value, array: np.ndarray, old: np.ndarray) -> None:
    value.const_value = ir.Tensor(array.astype(old.dtype), name=value.name)
