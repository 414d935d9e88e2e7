"""Putting the smaller layers where one layer was.

Here: `write`. Not here: their numbers (`low_rank_factors`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import AbsentTensor, constant_array, constant_tensor, is_absent
from .forms import Candidate, Form
from .sites import Site

_SEAMS = ("down", "middle", "up")


def write(
    site: Site,
    candidate: Candidate,
    weights: Sequence[np.ndarray] | None,
    bias: np.ndarray | None,
    editor: Editor,
) -> ir.Node:
    """Replace the site's node by the steps of a candidate; the last of them is returned.

    `weights` are [outputs, inputs, *kernel] each; None: absent, as the site's is. `bias` is set or
    added as `Factors.weights` says. The result keeps its name.
    """
    node, old = site.node, site.layer.weight
    dtype = old.dtype
    assert dtype is not None
    result = node.outputs[0]
    value = site.layer.data
    last = node
    for i, step in enumerate(candidate.steps):
        seam = _SEAMS[-1] if i == len(candidate.steps) - 1 else _SEAMS[i]
        data: ir.TensorProtocol = AbsentTensor("", dtype, step.shape)
        if weights is not None:
            array = weights[i] if step.op_type == "Conv" else weights[i].T
            data = ir.Tensor(np.ascontiguousarray(array).astype(dtype.numpy()), dtype=dtype)
        inputs = [value, editor.initializer(node, f"{old.name}/{seam}", data)]
        if step.bias and (own := _own_bias(site, bias, dtype, editor)) is not None:
            inputs.append(own)
        attributes = ir.convenience.convert_attributes(dict(step.attributes))
        last = ir.Node("", step.op_type, inputs, attributes, num_outputs=1)
        last.name = f"{node.name or result.name}/{seam}"
        editor.insert_before(node, last)
        value = last.outputs[0]
        value.type = result.type
        value.shape = _shape(site, candidate, i, result)
    if bias is not None and site.bias is not None and site.bias[0] is not node:
        _shift(site.bias, bias, editor)
    name = result.name
    editor.replace_node(node, value)
    if not value.is_graph_output():
        result.name = None
        value.name = name
    _drop_constant(old)
    return last


def _own_bias(
    site: Site, bias: np.ndarray | None, dtype: ir.DataType, editor: Editor
) -> ir.Value | None:
    given = site.layer.bias
    if bias is None or (given is not None and is_absent(constant_tensor(given))):
        return given
    base = given.name if given is not None else f"{site.layer.weight.name}/bias"
    return editor.initializer(site.node, f"{base}", bias.astype(dtype.numpy()))


def _shift(place: tuple[ir.Node, int], shift: np.ndarray, editor: Editor) -> None:
    """Add to the constant that a node adds."""
    node, index = place
    value = node.inputs[index]
    array = constant_array(value)
    if array is None:
        return
    moved = (array.astype(np.float64) + shift).astype(array.dtype)
    assert value is not None
    editor.replace_input(node, index, editor.initializer(node, f"{value.name}/corrected", moved))
    _drop_constant(value)


def set_bias(place: tuple[ir.Node, int], shift: np.ndarray, editor: Editor) -> None:
    """Add to a bias that is there, or give a layer one."""
    node, index = place
    if index >= len(node.inputs) or node.inputs[index] is None:
        weight = node.inputs[1]
        assert weight is not None
        dtype = weight.dtype
        assert dtype is not None
        node.resize_inputs(index + 1)
        made = editor.initializer(node, f"{weight.name}/bias", shift.astype(dtype.numpy()))
        editor.replace_input(node, index, made)
    else:
        _shift(place, shift, editor)


def _shape(site: Site, candidate: Candidate, index: int, result: ir.Value) -> ir.Shape | None:
    """The shape of one step's result, where it follows from the layer's."""
    if result.shape is None:
        return None
    dims = list(result.shape.dims)
    if index == len(candidate.steps) - 1:
        return ir.Shape(dims)
    if site.is_conv and candidate.form in (Form.SPATIAL, Form.TUCKER):
        return None  # inferred: strides and padding come later
    dims[1 if site.is_conv else -1] = candidate.ranks[index]
    return ir.Shape(dims)


def _drop_constant(value: ir.Value) -> None:
    """Remove a Constant node that nothing reads any more."""
    maker = value.producer()
    if maker is not None and maker.graph is not None and not value.uses():
        maker.graph.remove(maker, safe=True)
