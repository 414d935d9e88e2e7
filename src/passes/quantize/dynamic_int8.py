"""Dynamic int8: weights in 8 bits, activations quantized while the model runs; no calibration.

Here: the pass `int8_dynamic`, for MatMul and Gemm with constant weights (language models). The
product is a MatMulInteger: ONNX Runtime 1.32 makes DynamicQuantizeMatMul (one reader) or
MatMulIntegerToFloat of it. The Q/DQ form is as fast, but there the runtime first
merges a product of matrices and its bias into a float Gemm.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir

from ...errors import UsageError
from ...ir.edit import Editor
from ...ir.graph import (
    Dim,
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
from .known_types import require_types
from .notes import refusal_notes
from .numbers import weight_affine
from .qdq import Stored, absent, drop_unused_constant, store
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
        granularity = PerChannel(1) if per_channel else PerTensor()
        return QuantSpec(ir.DataType.INT8, True, granularity, zero_points=False)

    def _select(self, model: ir.Model) -> tuple[list[ir.Node], list[tuple[str, str]]]:
        opset = opset_of(model)
        if opset < 13:
            raise UsageError(
                f"Opset {opset} has no per-channel DequantizeLinear",
                where=f"pass {self.name!r}",
                fix="load the model with edgepass.load, which converts old opsets",
            )
        require_types(model)
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
    after:  x8, s, z = DynamicQuantizeLinear(x)
            MatMulInteger(x8, W8, z) -> Cast -> Mul(s * scales of W) -> y
    """

    def __init__(self, model: ir.Model, item: DynamicInt8, reduce_range: bool) -> None:
        self.model = model
        self.graph = model.graph
        self.item = item
        self.reduce_range = reduce_range
        self.editor = Editor()
        self.quantized: dict[ir.Value, ir.Node] = {}
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

    def _multiply(self, node: ir.Node, quantized: ir.Node, stored: Stored) -> None:
        result = node.outputs[0]
        integers, scales, _ = stored
        x, scale, zero_point = quantized.outputs
        product = self._insert(node, "MatMulInteger", [x, integers, zero_point], ir.DataType.INT32)
        product = self._insert(node, "Cast", [product], to=int(ir.DataType.FLOAT))
        both = self._insert(node, "Mul", [scale, scales])
        both.shape = scales.shape
        value = self._insert(node, "Mul", [product, both])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            value = self._insert(node, "Add", [value, bias])
        self.editor.replace_value(result, value)
        self.editor.erase(node)

    def _insert(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int,
    ) -> ir.Value:
        """A node before `anchor` whose result has the shape of the anchor's."""
        like = anchor.outputs[0]
        node = ir.Node(
            "", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1
        )
        value = node.outputs[0]
        value.type = ir.TensorType(dtype)
        value.shape = None if like.shape is None else ir.Shape(list(like.shape.dims))
        value.name = node.name = fresh_name(self.graph, f"{like.name}/{op_type}")
        self.editor.insert_before(anchor, node)
        return value

    def _quantize_input(self, node: ir.Node) -> ir.Node:
        """One DynamicQuantizeLinear for all readers of a value, before the first."""
        value = node.inputs[0]
        assert value is not None
        if value in self.quantized:
            return self.quantized[value]
        quantized = ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3)
        shape = None if value.shape is None else list(value.shape.dims)
        kinds: tuple[tuple[str, ir.DataType, list[Dim] | None], ...] = (
            ("quantized", ir.DataType.UINT8, shape),
            ("scale", ir.DataType.FLOAT, []),
            ("zero_point", ir.DataType.UINT8, []),
        )
        for output, (suffix, dtype, dims) in zip(quantized.outputs, kinds, strict=True):
            output.name = fresh_name(self.graph, f"{value.name}/{suffix}")
            output.type = ir.TensorType(dtype)
            output.shape = None if dims is None else ir.Shape(dims)
        quantized.name = quantized.outputs[0].name
        self.editor.insert_before(node, quantized)
        self.quantized[value] = quantized
        return quantized


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
