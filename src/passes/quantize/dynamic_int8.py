"""Dynamic int8: weights in 8 bits, activations quantized while the model runs; no calibration.

Here: the pass `int8_dynamic`, for MatMul and Gemm with constant weights (language models). What a
DynamicQuantizeLinear gives is read through a DequantizeLinear, so that the graph stays in Q/DQ
form; ONNX Runtime 1.32 makes DynamicQuantizeMatMul or MatMulIntegerToFloat of it. Measured on
MiniLM, x86-64 with VNNI: as fast as the MatMulInteger form; one quantization serves all readers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir

from ...errors import UsageError
from ...ir.edit import Editor
from ...ir.graph import (
    add_initializer,
    attribute,
    constant_tensor,
    describe_node,
    fresh_name,
    is_absent,
    is_onnx_op,
    opset_of,
)
from ...ir.ops import Category, facts
from ...ir.quant import PerChannel, PerTensor, QuantPlan, QuantSpec, is_dequantize
from ...targets.target import Target
from ..base import Context, Pass, PassResult, Stage
from .notes import refusal_notes
from .numbers import weight_affine
from .qdq import Stored, absent, dequantize, drop_unused_constant, store
from .tables import lookup_tables, write_tables

MIN_ELEMENTS = 1024
"""Smaller weights lose more in quantizing the activation than the integer product wins."""


@dataclasses.dataclass(frozen=True)
class DynamicInt8(Pass):
    """Dynamic int8 for MatMul and Gemm: activations are quantized at run time; no calibration.

    `per_channel`: a scale for each output column of a weight. `exclude`: names of nodes or operator
    types to keep float.
    """

    name = "int8_dynamic"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    per_channel: bool = True
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value. Weights may be absent; nothing changes."""
        nodes, notes = self._select(model)
        return self._plan(model, nodes, notes)

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, also on an architecture without weights, whose tensors stay absent."""
        return self.run(model, context)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: the opset is below 13.
        """
        nodes, refused = self._select(model)
        plan = self._plan(model, nodes, refused)
        tables = list(lookup_tables(model, self.exclude))
        if not nodes and not tables:
            return PassResult(
                model,
                False,
                ("nothing to quantize: no MatMul or Gemm with weights", *refusal_notes(plan)),
            )
        counts = Counter(node.op_type for node in nodes)
        if tables:
            counts["Gather"] = len(tables)
        _Writer(model, self, _reduced(context.target)).write(nodes)
        write_tables(model, tables)
        text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
        return PassResult(model, True, (f"{plan.label}: {text}", *refusal_notes(plan)))

    def spec(self, node: ir.Node) -> QuantSpec:
        """How the weight of a node is stored, in the layout [in, out] that MatMul reads."""
        tensor = constant_tensor(node.inputs[1])
        assert tensor is not None
        rank = len(tensor.shape)
        per_channel = self.per_channel and rank == 2
        return QuantSpec(ir.DataType.INT8, True, PerChannel(1) if per_channel else PerTensor())

    def _select(self, model: ir.Model) -> tuple[list[ir.Node], list[tuple[str, str]]]:
        opset = opset_of(model)
        if opset < 13:
            raise UsageError(
                f"Opset {opset} has no per-channel DequantizeLinear",
                where=f"pass {self.name!r}",
                fix="load the model with edgepass.load, which converts old opsets",
            )
        chosen, refused = [], []
        for node in model.graph:
            if facts(node).category is Category.RECURRENT:
                refused.append((describe_node(node), "recurrent layers stay float"))
            elif is_onnx_op(node, "Conv"):
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

    def _plan(
        self, model: ir.Model, nodes: list[ir.Node], notes: list[tuple[str, str]]
    ) -> QuantPlan:
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
        entries.update((t.value.name or "", t.spec) for t in lookup_tables(model, self.exclude))
        return QuantPlan(
            label=f"int8 dynamic {'per-channel' if self.per_channel else 'per-tensor'}",
            entries=entries,
            nodes=tuple(node.name or node.outputs[0].name or "" for node in nodes),
            copies={name: len(found) for name, found in forms.items() if len(found) > 1},
            kept=frozenset(kept),
            notes=tuple(notes),
        )


class _Writer:
    """before: MatMul(x, W) -> y
    after:  MatMul(DequantizeLinear(DynamicQuantizeLinear(x)), DequantizeLinear(W8)) -> y
    """

    def __init__(self, model: ir.Model, item: DynamicInt8, reduce_range: bool) -> None:
        self.model = model
        self.graph = model.graph
        self.item = item
        self.reduce_range = reduce_range
        self.editor = Editor()
        self.dequantized: dict[ir.Value, ir.Value] = {}
        self.stored: dict[tuple[ir.Value, bool], Stored] = {}

    def write(self, nodes: list[ir.Node]) -> None:
        weights = dict.fromkeys(v for node in nodes if (v := node.inputs[1]) is not None)
        for node in nodes:
            spec = self.item.spec(node)
            stored = self._store(node, spec)
            node = self._as_matmul(node) if node.op_type == "Gemm" else node
            dequantize(self.editor, node, 1, stored, spec)
            self._quantize_input(node)
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
            source = self._transposed(weight, tensor)
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

    def _transposed(self, weight: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        shape = tuple(int(d) for d in tensor.shape.numpy())[::-1]
        data = (
            absent(tensor.dtype, shape)
            if is_absent(tensor)
            else np.ascontiguousarray(tensor.numpy().T)
        )
        return add_initializer(self.graph, f"{weight.name}/transposed", data)

    def _as_matmul(self, node: ir.Node) -> ir.Node:
        """Gemm(x, W, b) as MatMul + Add: an integer Gemm would need its bias in unknown units."""
        result = node.outputs[0]
        product = ir.Node("", "MatMul", [node.inputs[0], node.inputs[1]], num_outputs=1)
        value = product.outputs[0]
        value.type = result.type
        value.shape = None if result.shape is None else ir.Shape(list(result.shape.dims))
        self.editor.insert_before(node, product)
        product.name = fresh_name(self.graph, f"{node.name or result.name}/matmul")
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            total = ir.Node("", "Add", [value, node.inputs[2]], num_outputs=1)
            total.outputs[0].type, total.outputs[0].shape = value.type, value.shape
            self.editor.insert_before(node, total)
            total.name = fresh_name(self.graph, f"{node.name or result.name}/bias")
            value = total.outputs[0]
        self.editor.replace_node(node, value)
        return product

    def _quantize_input(self, node: ir.Node) -> None:
        value = node.inputs[0]
        assert value is not None
        if value not in self.dequantized:
            self.dequantized[value] = self._insert_pair(node, value)
        node.replace_input_with(0, self.dequantized[value])

    def _insert_pair(self, node: ir.Node, value: ir.Value) -> ir.Value:
        quantized = ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3)
        result = ir.Node("", "DequantizeLinear", quantized.outputs, num_outputs=1)
        shape = None if value.shape is None else list(value.shape.dims)
        scalar: list[int] = []
        kinds = (
            ("quantized", ir.DataType.UINT8, shape),
            ("scale", ir.DataType.FLOAT, scalar),
            ("zero_point", ir.DataType.UINT8, scalar),
            ("dequantized", ir.DataType.FLOAT, shape),
        )
        outputs = (*quantized.outputs, *result.outputs)
        for output, (suffix, dtype, dims) in zip(outputs, kinds, strict=True):
            output.name = fresh_name(self.graph, f"{value.name}/{suffix}")
            output.type = ir.TensorType(dtype)
            output.shape = None if dims is None else ir.Shape(dims)
        quantized.name, result.name = quantized.outputs[0].name, result.outputs[0].name
        self.editor.insert_before(node, quantized)
        self.editor.insert_before(node, result)
        return result.outputs[0]


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
