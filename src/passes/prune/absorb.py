"""What removed channels give, where it is constant, goes to the biases of what reads them.

Here: `absorb`. Not here: which channels are constant (`constants`), what channels give on average
(`repair`).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array, constant_tensor, dims_of, is_absent, is_onnx_op
from ..quantize.layers import LinearLayer, linear_layer
from .constants import Known, channel_values, known_values
from .flow import Flow
from .labels import Track
from .layer_bias import add_to_bias


def absorb(model: ir.Model, flow: Flow, gone: np.ndarray) -> Known:
    """Add what constant channels that go give to the biases of linear layers; what is constant.

    At the border of a padded convolution, whose zeros are not the constant, this is near only.
    """
    masks = {}
    for node in model.graph:
        if is_onnx_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            axis = 1 if node.op_type.startswith("Conv") else -1
            mask = _going(flow, gone, node.outputs[0], axis)
            if mask is not None:
                masks[node.outputs[0]] = mask
    known = known_values(model.graph, masks) if masks else {}
    for node in list(model.graph) if known else ():
        layer = linear_layer(node)
        if layer is None or is_absent(constant_tensor(layer.weight)):
            continue
        axis = layer.channel_axis % len(dims_of(layer.data) or (1,))
        values = channel_values(known, layer.data, axis)
        mask = _going(flow, gone, layer.data, axis)
        if values is None or mask is None:
            continue
        given = np.where(mask & np.isfinite(values), values, 0.0)
        if given.any():
            _absorb(flow, layer, given)
    return known


def _going(flow: Flow, gone: np.ndarray, value: ir.Value, axis: int) -> np.ndarray | None:
    """Which positions along an axis go, None where none does."""
    rank = len(dims_of(value) or ())
    track = flow.at(value, axis % rank) if rank else None
    if track is None or track.ids.ndim > 1 or not gone[track.ids].any():
        return None
    mask: np.ndarray = gone[track.ids]
    return mask


def _absorb(flow: Flow, layer: LinearLayer, given: np.ndarray) -> None:
    weight = constant_array(layer.weight)
    assert weight is not None
    groups, inputs, _ = layer.shape
    rows = given.repeat(math.prod(weight.shape[2:])).reshape(groups, inputs, 1)
    sums = (layer.matrix(weight).astype(np.float64) * rows).sum(axis=1).reshape(-1)
    result = layer.node.outputs[0]
    rank = len(dims_of(result) or ())
    tracks, along = flow.of(result), flow.at(result, layer.channel_axis % rank)
    made = add_to_bias(layer, sums)
    if made is None:
        return
    bias, total = made
    if along is not None and along.ids.ndim == 1:
        flow.put(bias, [Track((0,), along.ids)])
    if total not in flow.tracks:
        flow.put(total, tracks)
