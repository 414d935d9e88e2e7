"""Dynamic int8: weights in 8 bits, activations quantized while the model runs; no calibration.

Here: the pass `int8_dynamic`, for MatMul and Gemm with constant weights (language models), in
branches and loop bodies too. The product is a MatMulInteger: ONNX Runtime 1.32 makes
DynamicQuantizeMatMul (one reader) or MatMulIntegerToFloat of it. The Q/DQ form is as fast, but
there the runtime first merges a product of matrices and its bias into a float Gemm. Not here:
LSTMs, tables and the weights of what stays float (`beside`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir

from ...errors import UsageError
from ...ir.edit import Editor, insert_like
from ...ir.graph import (
    Dim,
    add_initializer,
    attribute,
    constant_tensor,
    describe_node,
    fresh_name,
    graph_tree,
    index_names,
    is_absent,
    is_onnx_op,
    node_name,
    opset_of,
)
from ...ir.quant import PerChannel, PerTensor, QuantPlan, QuantSpec, is_dequantize
from ...targets.target import Target
from ..base import Context, Pass, PassResult, Stage
from .beside import Beside, BesideOptions, LeftOver, options
from .beside_guard import guard_beside
from .known_types import require_types
from .notes import refusal_notes
from .numbers import weight_affine
from .qdq import Stored, absent, drop_unused_constant, home_of, store
from .recurrent import Recurrent

MIN_ELEMENTS = 1024
"""Smaller weights lose more in quantizing the activation than the integer product wins."""


@dataclasses.dataclass(frozen=True)
class DynamicInt8(Pass):
    """Dynamic int8 for MatMul, Gemm, LSTM: activations are quantized at run time; no calibration.

    `per_channel`: a scale for each output column of a weight. `exclude`: names of nodes or operator
    types to keep float. `recurrent`: LSTMs in integers where that is faster ("auto"), "always" or
    "never". `leftovers`: "stored", weights of other operators (Conv, GRU) are 8 bits in the file
    and unpacked when the model is loaded, or "float". `protect`: where there are calibration
    samples, LSTMs and stored weights whose 8 bits do most of the harm on them stay float.
    """

    name = "int8_dynamic"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True
    faster = True

    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    recurrent: str = Recurrent.AUTO.value
    leftovers: str = LeftOver.STORED.value
    protect: bool = True

    def __post_init__(self) -> None:
        self._beside()

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value. Weights may be absent; nothing changes."""
        nodes, notes = self._select(model)
        beside = Beside(model, context, self._beside(), nodes)
        return beside.extend(self._plan(nodes, notes))

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, also on an architecture without weights, whose tensors stay absent."""
        return self.run(model, context)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: the opset is below 11.
        """
        nodes, refused = self._select(model)
        given, guarded = self._guarded(model, context, nodes)
        beside = Beside(model, context, given, nodes)
        plan = self._plan(nodes, [*refused, *beside.refused])
        if not nodes and not beside:
            text = "nothing to quantize: no MatMul, Gemm or LSTM with weights"
            return PassResult(model, False, (text, *refusal_notes(plan)))
        index_names(model)
        _Writer(self, _reduced(context.target)).write(nodes)
        notes = beside.write(context.target)
        if nodes:
            counts = Counter(node.op_type for node in nodes)
            text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
            notes = (f"{plan.label}: {text}", *notes)
        return PassResult(model, True, (*notes, *guarded, *refusal_notes(plan)))

    def _guarded(
        self, model: ir.Model, context: Context, nodes: list[ir.Node]
    ) -> tuple[BesideOptions, tuple[str, ...]]:
        """The options with what calibration data, if there is any, shows had better stay float."""
        given = self._beside()
        weights = [v.const_value for g in graph_tree(model.graph) for v in g.initializers.values()]
        if not self.protect or not context.calibration or any(is_absent(w) for w in weights):
            return given, ()
        return guard_beside(model, context, given, nodes)

    def _beside(self) -> BesideOptions:
        return options(self.name, self.exclude, self.recurrent, self.leftovers, self.per_channel)

    def spec(self, node: ir.Node) -> QuantSpec:
        """How the weight of a node is stored, in the layout [in, out] that MatMul reads."""
        tensor = constant_tensor(node.inputs[1])
        assert tensor is not None
        rank = len(tensor.shape)
        per_channel = self.per_channel and rank == 2
        granularity = PerChannel(1) if per_channel else PerTensor()
        return QuantSpec(ir.DataType.INT8, True, granularity, zero_points=False)

    def _select(self, model: ir.Model) -> tuple[list[ir.Node], list[tuple[str, str]]]:
        opset = opset_of(model)
        if opset < 11:
            raise UsageError(
                f"Opset {opset} has no DynamicQuantizeLinear",
                where=f"pass {self.name!r}",
                fix="load the model with edgepass.load, which converts old opsets",
            )
        require_types(model)
        chosen, refused = [], []
        for node in (n for graph in graph_tree(model.graph) for n in graph):
            if is_onnx_op(node, "Conv"):
                refused.append((describe_node(node), "a Conv is faster in float than so"))
            if not is_onnx_op(node, "MatMul", "Gemm"):
                continue
            reason = self._why_not(node)
            if reason:
                refused.append((describe_node(node), reason))
            else:
                chosen.append(node)
        return chosen, refused

    def _why_not(self, node: ir.Node) -> str:
        if node.op_type in self.exclude or (node.name or "") in self.exclude:
            return "excluded by option"
        value, weight = node.inputs[0], node.inputs[1]
        tensor = constant_tensor(weight)
        if constant_tensor(value) is not None:
            return "its first input is constant"
        if tensor is None:
            dequantized = weight is not None and is_dequantize(weight.producer())
            return "already quantized" if dequantized else "both inputs are activations"
        if tensor.dtype != ir.DataType.FLOAT:
            return "its weight is not float32"
        if len(tensor.shape) < 2 or value is None or value.shape is None or len(value.shape) < 2:
            return "it multiplies a vector"
        if tensor.size < MIN_ELEMENTS:
            return f"its weight has fewer than {MIN_ELEMENTS} elements"
        if node.op_type == "Gemm" and _is_scaled(node):
            return "Gemm with transA, alpha or beta"
        return ""

    def _plan(self, nodes: list[ir.Node], notes: list[tuple[str, str]]) -> QuantPlan:
        entries: dict[str, QuantSpec] = {}
        covered: Counter[str] = Counter()
        forms: dict[str, set[bool]] = {}
        for node in nodes:
            weight = node.inputs[1]
            assert weight is not None
            name = weight.name or ""
            covered[name] += 1
            forms.setdefault(name, set()).add(_is_transposed(node))
            spec = self.spec(node)
            if _is_transposed(node) and isinstance(spec.granularity, PerChannel):
                spec = dataclasses.replace(spec, granularity=PerChannel(0))
            entries.setdefault(name, spec)
        kept = {
            v.name or ""
            for node in nodes
            if (v := node.inputs[1]) is not None
            and (len(v.uses()) > covered[v.name or ""] or v.is_graph_output())
        }
        return QuantPlan(
            label=f"int8 dynamic {'per-channel' if self.per_channel else 'per-tensor'}",
            entries=entries,
            nodes=tuple(node_name(node) for node in nodes),
            copies={name: len(found) for name, found in forms.items() if len(found) > 1},
            kept=frozenset(kept),
            notes=tuple(notes),
        )


class _Writer:
    """before: MatMul(x, W) -> y
    after:  x8, s, z = DynamicQuantizeLinear(x)
            MatMulInteger(x8, W8, z) -> Cast -> Mul(s * scales of W) -> y
    """

    def __init__(self, item: DynamicInt8, reduce_range: bool) -> None:
        self.item = item
        self.reduce_range = reduce_range
        self.editor = Editor()
        self.quantized: dict[tuple[object, ir.Value], ir.Node] = {}
        self.stored: dict[tuple[ir.Value, bool], Stored] = {}

    def write(self, nodes: list[ir.Node]) -> None:
        weights = dict.fromkeys(v for node in nodes if (v := node.inputs[1]) is not None)
        for node in nodes:
            stored = self._store(node, self.item.spec(node))
            quantized = self._quantize_input(node)
            self._multiply(node, quantized, stored)
        for weight in weights:
            drop_unused_constant(weight)

    def _store(self, node: ir.Node, spec: QuantSpec) -> Stored:
        weight, transposed = node.inputs[1], _is_transposed(node)
        assert weight is not None
        key = weight, transposed
        if key in self.stored:
            return self.stored[key]
        tensor = constant_tensor(weight)
        assert tensor is not None
        source = weight
        if transposed:
            source = self._transposed(node, weight, tensor)
            tensor = constant_tensor(source)
            assert tensor is not None
        affine = (
            None
            if is_absent(tensor)
            else weight_affine(tensor.numpy(), spec, reduce_range=self.reduce_range)
        )
        self.stored[key] = store(self.editor, node, source, spec, affine)
        if transposed:
            drop_unused_constant(source)
        return self.stored[key]

    @staticmethod
    def _transposed(node: ir.Node, weight: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        shape = tuple(int(d) for d in tensor.shape.numpy())[::-1]
        data = (
            absent(tensor.dtype, shape)
            if is_absent(tensor)
            else np.ascontiguousarray(tensor.numpy().T)
        )
        return add_initializer(home_of(weight, node), f"{weight.name}/transposed", data)

    def _multiply(self, node: ir.Node, quantized: ir.Node, stored: Stored) -> None:
        result = node.outputs[0]
        integers, scales, _ = stored
        x, scale, zero_point = quantized.outputs
        product = insert_like(
            self.editor, node, "MatMulInteger", [x, integers, zero_point], ir.DataType.INT32
        )
        product = insert_like(self.editor, node, "Cast", [product], to=int(ir.DataType.FLOAT))
        both = insert_like(self.editor, node, "Mul", [scale, scales])
        both.shape = scales.shape
        value = insert_like(self.editor, node, "Mul", [product, both])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            value = insert_like(self.editor, node, "Add", [value, bias])
        self.editor.replace_value(result, value)
        self.editor.erase(node)

    def _quantize_input(self, node: ir.Node) -> ir.Node:
        """One DynamicQuantizeLinear for a graph's readers of a value, before the first."""
        value = node.inputs[0]
        assert value is not None
        key = node.graph, value
        if key in self.quantized:
            return self.quantized[key]
        quantized = ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3)
        shape = None if value.shape is None else list(value.shape.dims)
        kinds: tuple[tuple[str, ir.DataType, list[Dim] | None], ...] = (
            ("quantized", ir.DataType.UINT8, shape),
            ("scale", ir.DataType.FLOAT, []),
            ("zero_point", ir.DataType.UINT8, []),
        )
        for output, (suffix, dtype, dims) in zip(quantized.outputs, kinds, strict=True):
            output.name = fresh_name(_graph(node), f"{value.name}/{suffix}")
            output.type = ir.TensorType(dtype)
            output.shape = None if dims is None else ir.Shape(dims)
        quantized.name = quantized.outputs[0].name
        self.editor.insert_before(node, quantized)
        self.quantized[key] = quantized
        return quantized


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def _is_scaled(node: ir.Node) -> bool:
    return bool(
        attribute(node, "transA", 0)
        or attribute(node, "alpha", 1.0) != 1.0
        or attribute(node, "beta", 1.0) != 1.0
    )


def _reduced(target: Target | None) -> bool:
    scheme = target.scheme if target is not None else None
    return scheme is not None and scheme.reduce_range
