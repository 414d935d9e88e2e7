"""Writing a static int8 layout into the graph as Q/DQ pairs.

Here: `write_qdq`, and the small writers it is made of, which the weight-only pass shares. With
ranges it writes numbers; without, on an architecture with no weights, tensors that have dtype and
shape only, so that the size of the result is exact. Not here: what gets a pair (`plan`), the
arithmetic (`numbers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import (
    AbsentTensor,
    add_initializer,
    constant_tensor,
    fresh_name,
    graph_tree,
    index_names,
    is_absent,
)
from ...ir.quant import PerBlock, PerChannel, PerTensor, QuantSpec, data_inputs
from .lowered import lower_members
from .numbers import (
    Affine,
    Range,
    activation_affine,
    quantize,
    quantize_bias,
    raise_for_bias,
    weight_affine,
)
from .plan import Activation, Int8Layout, Weighted
from .plan_nodes import is_gate_result, saturation

Stored = tuple[ir.Value, ir.Value, ir.Value | None]
"""The values of a constant's integers, scales and zero points."""


class Ready(NamedTuple):
    """A weight that is integers already, in its own layout, with what they stand for."""

    integers: np.ndarray
    affine: Affine


def write_qdq(
    model: ir.Model,
    layout: Int8Layout,
    ranges: Mapping[str, Range] | None = None,
    ready: Mapping[str, Ready] | None = None,
) -> None:
    """Insert the pairs of a layout, in place.

    before: x -> Conv(W, b) -> Relu -> y
    after:  x -> Q -> DQ -> Conv(DQ(W8), DQ(b32)) -> Q -> DQ -> y

    `ranges` is by the name of each of `layout.sources`; None writes absent tensors. `ready` has
    weights, by name, that corrections have made integers of.
    """
    index_names(model)
    _Writer(model, layout, ranges, ready or {}).write()


def input_affines(layout: Int8Layout, ranges: Mapping[str, Range]) -> dict[ir.Value, Affine]:
    """Scale and zero point of each activation that gets a pair."""
    scheme = layout.scheme
    absorbed = {a.value: a.absorbed for a in layout.activations}
    by_source = {
        source: activation_affine(
            _range_of(source, absorbed.get(source), ranges),
            scheme.activation,
            scheme.symmetric_activation,
        )
        for source in dict.fromkeys(a.source for a in layout.activations)
    }
    return {a.value: by_source[a.source] for a in layout.activations}


def _range_of(source: ir.Value, absorbed: ir.Node | None, ranges: Mapping[str, Range]) -> Range:
    """What the integers of a value hold: no more than the activation gives that they stand for.

    (The range may be that of another value as well, of the same name in a branch beside.)
    """
    if is_gate_result(source):
        return Range(0.0, 1.0)
    seen = ranges[source.name or ""]
    bounds = None if absorbed is None else saturation(absorbed)
    if bounds is None:
        return seen
    return Range(max(seen.low, bounds[0]), min(seen.high, bounds[1]))


class _Writer:
    def __init__(
        self,
        model: ir.Model,
        layout: Int8Layout,
        ranges: Mapping[str, Range] | None,
        ready: Mapping[str, Ready],
    ) -> None:
        self.model = model
        self.layout = layout
        self.editor = Editor()
        self.activation_spec = QuantSpec(
            layout.scheme.activation, layout.scheme.symmetric_activation
        )
        # Everything is looked up by value before the first edit: edits rename and remove values.
        self.affines = {} if ranges is None else input_affines(layout, ranges)
        self.ready = ready
        self.absent = ranges is None
        self.weight_affines = {} if self.absent else self._weight_affines()
        self.readers = self._readers()
        self.stored: dict[tuple[ir.Value, QuantSpec], Stored] = {}

    # --- numbers -------------------------------------------------------------------------------

    def _weight_affines(self) -> dict[tuple[ir.Value, QuantSpec], Affine]:
        found: dict[tuple[ir.Value, QuantSpec], Affine] = {}
        for item in self.layout.weighted:
            data, weight = item.node.inputs[0], item.node.inputs[1]
            assert data is not None
            assert weight is not None
            key = weight, item.spec
            ready = self.ready.get(weight.name or "")
            if ready is not None:
                found[key] = ready.affine
                continue
            if key not in found:
                array = _array(weight)
                found[key] = weight_affine(
                    array, item.spec, reduce_range=self.layout.scheme.reduce_range
                )
            if item.has_bias:
                bias, scale = item.node.inputs[2], float(self.affines[data].scale)
                assert bias is not None
                found[key] = raise_for_bias(found[key], _array(bias), scale)
        return found

    def _readers(self) -> dict[tuple[object, ir.Value], list[tuple[ir.Node, int]]]:
        """The integer nodes of each graph that read each value as data, in graph order."""
        found: dict[tuple[object, ir.Value], list[tuple[ir.Node, int]]] = {}
        for node in self.layout.nodes:
            for index in data_inputs(node):
                value = node.inputs[index]
                if value is not None:
                    found.setdefault((node.graph, value), []).append((node, index))
        return found

    # --- writing -------------------------------------------------------------------------------

    def write(self) -> None:
        replaced: dict[ir.Value, None] = {}
        for item in self.layout.weighted:
            replaced.update(dict.fromkeys(v for v in item.node.inputs[1:3] if v is not None))
            self._write_bias(item)
            self._write_weight(item)
        for node, index in self.layout.constants:
            value = node.inputs[index]
            assert value is not None
            replaced[value] = None
            self._write_constant(node, index, value)
        for activation in self._inner_first():
            self._write_pair(activation)
        for value in replaced:
            drop_unused_constant(value)
        lower_members(self.editor, self.layout.nodes, self.activation_spec.dtype)

    def _inner_first(self) -> list[Activation]:
        """A pair of an outer graph takes over the readers that a branch's pair is one of."""
        place = {graph: i for i, graph in enumerate(graph_tree(self.model.graph))}
        return sorted(self.layout.activations, key=lambda a: -place[a.graph])

    def _write_weight(self, item: Weighted) -> None:
        weight = item.node.inputs[1]
        assert weight is not None
        key = weight, item.spec
        if key not in self.stored:
            affine = self.weight_affines.get(key)
            ready = self.ready.get(weight.name or "")
            integers = None if ready is None else ready.integers
            self.stored[key] = store(self.editor, item.node, weight, item.spec, affine, integers)
        dequantize(self.editor, item.node, 1, self.stored[key], item.spec)

    def _write_bias(self, item: Weighted) -> None:
        """int32 in units of input scale times weight scale, as integer kernels add it."""
        if not item.has_bias:
            return
        node = item.node
        data, weight, bias = node.inputs[:3]
        assert data is not None
        assert weight is not None
        assert bias is not None
        spec = QuantSpec(
            ir.DataType.INT32,
            granularity=PerTensor() if item.spec.granularity == PerTensor() else PerChannel(0),
            zero_points=False,
        )
        tensor = constant_tensor(bias)
        assert tensor is not None
        size = tensor.size
        if self.absent:
            values: ir.TensorProtocol | np.ndarray = absent(spec.dtype, (size,))
            scales: ir.TensorProtocol | np.ndarray = absent(
                ir.DataType.FLOAT, spec.parameter_shape((size,))
            )
        else:
            input_scale = self.affines[data].scale.astype(np.float64)
            product = input_scale * self.weight_affines[weight, item.spec].scale
            scale = np.asarray(product, np.float32)
            values, scales = quantize_bias(_array(bias), scale), scale
        base = bias.name or "bias"
        stored = (
            self.editor.initializer(node, f"{base}/int32", values),
            self.editor.initializer(node, f"{base}/scale", scales),
            None,
        )
        dequantize(self.editor, node, 2, stored, spec)

    def _write_constant(self, node: ir.Node, index: int, value: ir.Value) -> None:
        spec = QuantSpec(self.activation_spec.dtype, symmetric=False)
        key = value, spec
        if key not in self.stored:
            affine = None
            if not self.absent:
                array = _array(value)
                seen = Range(float(array.min(initial=0.0)), float(array.max(initial=0.0)))
                affine = activation_affine(seen, spec.dtype, spec.symmetric)
            self.stored[key] = store(self.editor, node, value, spec, affine)
        dequantize(self.editor, node, index, self.stored[key], spec)

    def _write_pair(self, item: Activation) -> None:
        """Q and DQ behind the value's maker, or before its first integer reader."""
        value, affine = item.value, self.affines.get(item.value)
        readers = self.readers.get((item.graph, value), [])
        if item.absorbed is not None:
            before = item.absorbed.inputs[0]
            assert before is not None
            name = value.name
            self.editor.replace_node(item.absorbed, before)
            before.name = name
            value = before
        maker = value.producer()
        users = list(value.uses()) if item.everywhere else readers
        anchor = maker if item.everywhere and maker is not None else readers[0][0]
        base = value.name or "value"
        dtype = self.activation_spec.dtype
        scale = self.editor.initializer(
            anchor,
            f"{base}/scale",
            absent(ir.DataType.FLOAT, ()) if affine is None else affine.scale,
        )
        zero_point = self.editor.initializer(
            anchor, f"{base}/zero_point", absent(dtype, ()) if affine is None else affine.zero_point
        )
        quantized = _node("QuantizeLinear", [value, scale, zero_point])
        result = _node("DequantizeLinear", [quantized.outputs[0], scale, zero_point])
        _annotate(quantized, f"{base}/quantized", dtype, value)
        _annotate(result, f"{base}/dequantized", ir.DataType.FLOAT, value)
        if anchor is maker:
            self.editor.insert_after(anchor, quantized)
            self.editor.insert_after(quantized, result)
        else:
            self.editor.insert_before(anchor, quantized)
            self.editor.insert_before(anchor, result)
        for node in (quantized, result):
            _name(node, item.graph, node.outputs[0].name or "")
        for user, index in users:
            user.replace_input_with(index, result.outputs[0])
        if item.everywhere and value.is_graph_output():
            self._take_over_output(item.graph, value, result.outputs[0])

    @staticmethod
    def _take_over_output(graph: ir.Graph, value: ir.Value, carrier: ir.Value) -> None:
        for slot, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[slot] = carrier
        name = value.name
        value.name, carrier.name = carrier.name, None
        carrier.name = name


# --- pieces -----------------------------------------------------------------------------------


def store(
    editor: Editor,
    anchor: ir.Node,
    value: ir.Value,
    spec: QuantSpec,
    affine: Affine | None,
    ready: np.ndarray | None = None,
) -> Stored:
    """Initializers for a constant's integers, scales and zero points; absent without `affine`.

    `ready` are the integers where they are not the nearest ones.
    They join the graph that holds the constant: readers inside several branches share them.
    """
    tensor = constant_tensor(value)
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    base, home = value.name or "weight", home_of(value, anchor)
    integers: ir.TensorProtocol | np.ndarray
    if affine is None:
        parameters = spec.parameter_shape(shape)
        integers = absent(spec.dtype, shape)
        scale: ir.TensorProtocol | np.ndarray = absent(ir.DataType.FLOAT, parameters)
        zero_point: ir.TensorProtocol | np.ndarray = absent(spec.dtype, parameters)
    else:
        array = quantize(tensor.numpy(), affine, spec) if ready is None else ready
        integers = pack(array, spec.dtype)
        scale = affine.scale
        zero_point = pack(affine.zero_point, spec.dtype)
    suffix = spec.dtype.name.lower()
    editor.modified = True
    return (
        add_initializer(home, f"{base}/{suffix}", integers),
        add_initializer(home, f"{base}/scale", scale),
        add_initializer(home, f"{base}/zero_point", zero_point) if spec.zero_points else None,
    )


def home_of(constant: ir.Value, reader: ir.Node) -> ir.Graph:
    """The graph that holds a constant, which for a node in a branch may be an outer one."""
    maker = constant.producer()
    graph = constant.graph if maker is None else maker.graph
    home = graph or reader.graph
    assert isinstance(home, ir.Graph)
    return home


def dequantize(
    editor: Editor,
    node: ir.Node,
    index: int,
    stored: Stored,
    spec: QuantSpec,
) -> None:
    """Put a DequantizeLinear of stored integers in front of a node's input."""
    integers, scale, zero_point = stored
    inputs = [integers, scale] if zero_point is None else [integers, scale, zero_point]
    attributes: dict[str, int] = {}
    match spec.granularity:
        case PerChannel(axis):
            attributes["axis"] = axis
        case PerBlock(size, axis):
            attributes.update(axis=axis, block_size=size)
    base = (integers.name or "weight").rpartition("/")[0]
    result = _node("DequantizeLinear", inputs, **attributes)
    _annotate(result, None, ir.DataType.FLOAT, integers)
    editor.insert_before(node, result)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    _name(result, graph, f"{base}/dequantized")
    node.replace_input_with(index, result.outputs[0])


def drop_unused_constant(value: ir.Value) -> None:
    """Remove an initializer or `Constant` node that nothing reads any more."""
    if value.uses() or value.is_graph_output():
        return
    if value.is_initializer() and value.graph is not None:
        value.graph.initializers.pop(value.name or "", None)
        return
    node = value.producer()
    if node is not None and node.graph is not None:
        node.graph.remove(node, safe=True)


def absent(dtype: ir.DataType, shape: tuple[int, ...]) -> AbsentTensor:
    """A tensor to be: dtype and shape."""
    return AbsentTensor("", dtype, shape, "the numbers come with weights and calibration")


def pack(array: np.ndarray, dtype: ir.DataType) -> ir.TensorProtocol | np.ndarray:
    """The array as a tensor of a dtype that numpy may lack (4-bit, two to a byte)."""
    if dtype.bitwidth >= 8:
        return array
    return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype)


def _array(value: ir.Value) -> np.ndarray:
    tensor = constant_tensor(value)
    assert tensor is not None
    assert not is_absent(tensor)
    array: np.ndarray = tensor.numpy()
    return array


def _node(op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Node:
    return ir.Node(
        "",
        op_type,
        inputs,
        ir.convenience.convert_attributes(attributes),
        num_outputs=1,
    )


def _name(node: ir.Node, graph: ir.Graph, base: str) -> None:
    """A fresh name for the output, and the node's after it: ONNX Runtime wants both unique."""
    node.outputs[0].name = node.name = fresh_name(graph, base)


def _annotate(node: ir.Node, name: str | None, dtype: ir.DataType, like: ir.Value) -> None:
    output = node.outputs[0]
    output.type = ir.TensorType(dtype)
    output.shape = None if like.shape is None else ir.Shape(list(like.shape.dims))
    if name is not None:
        output.name = name
