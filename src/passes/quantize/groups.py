"""Grouped convolutions of few channels, written with fewer and wider groups.

Here: `widen_groups`. An integer kernel works through the groups one by one; where each has a few
channels only, more products in fewer calls are faster. Not here: which nodes run in integers
(`plan`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import attribute, constant_tensor, is_absent, is_onnx_op, static_shape
from .qdq import absent, drop_unused_constant


def widen_groups(nodes: Iterable[ir.Node], channels: int) -> int:
    """Join groups of convolutions up to `channels` input channels a group, in place.

    before: Conv(x, W [M, c, ...], group=g)
    after:  Conv(x, V [M, c * f, ...], group=g / f), V zero outside the blocks of W

    The sums are the same, since zeros stay zeros in symmetric integers. Depthwise convolutions have
    kernels of their own and stay. Returns how many nodes changed.
    """
    editor = Editor()
    changed = 0
    for node in nodes:
        factor = _factor(node, channels)
        if factor > 1:
            _widen(editor, node, factor)
            changed += 1
    return changed


def _factor(node: ir.Node, channels: int) -> int:
    """How many groups become one: the most that stay within `channels`; 1 for none."""
    shape = static_shape(node.inputs[1]) if is_onnx_op(node, "Conv") else None
    groups = int(attribute(node, "group", 1))
    if shape is None or groups == 1 or shape[1] == 1 or constant_tensor(node.inputs[1]) is None:
        return 1
    return max(
        f for f in range(1, groups + 1) if groups % f == 0 and (f == 1 or f * shape[1] <= channels)
    )


def _widen(editor: Editor, node: ir.Node, factor: int) -> None:
    value = node.inputs[1]
    tensor = constant_tensor(value)
    assert value is not None
    assert tensor is not None
    outputs, width, *kernel = (int(d) for d in tensor.shape.numpy())
    groups = int(attribute(node, "group", 1))
    shape = (outputs, width * factor, *kernel)
    data: np.ndarray | ir.TensorProtocol
    if is_absent(tensor):
        data = absent(tensor.dtype, shape)
    else:
        data = np.zeros(shape, tensor.dtype.numpy())
        each = outputs // groups
        for group, block in enumerate(np.split(tensor.numpy(), groups)):
            place = group % factor * width
            data[group * each : (group + 1) * each, place : place + width] = block
    wide = editor.initializer(node, value.name or "weight", data)
    node.replace_input_with(1, wide)
    editor.set_attribute(node, "group", groups // factor)
    drop_unused_constant(value)
