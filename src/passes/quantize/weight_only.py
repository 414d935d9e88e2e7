"""Weights stored in 8 or 4 bits, arithmetic in float: smaller files, no calibration.

Here: the pass `weight_only` and its plan. ONNX Runtime turns the MatMuls into MatMulNBits, which
unpacks weights as it multiplies. Not here: quantized arithmetic (`static_int8`, `dynamic_int8`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError, UsageError
from ...ir.edit import Editor
from ...ir.graph import (
    CONTRIB_DOMAIN,
    constant_tensor,
    describe_node,
    fresh_name,
    graph_tree,
    is_absent,
    is_onnx_op,
    opset_of,
)
from ...ir.ops import weight_channel_axis
from ...ir.quant import PerBlock, PerChannel, QuantPlan, QuantSpec
from ..base import Context, Pass, PassResult, Stage
from .known_types import require_types
from .notes import refusal_notes
from .numbers import Affine, quantize, weight_affine
from .qdq import Stored, absent, dequantize, drop_unused_constant, store
from .stored import Shared, store_folded
from .tables import Table, lookup_tables, write_tables

MIN_ELEMENTS = 256
"""Smaller weights save less than their scales and nodes cost."""
DEFAULT_BLOCK = 32
"""Elements that share a scale in 4 bits, where the option leaves it open."""
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_BLOCKED_OPSET = 21


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One weight to store: who reads it, on which input, how; `contrib` is the MatMulNBits form."""

    node: ir.Node
    index: int
    spec: QuantSpec
    contrib: bool = False

    @property
    def value(self) -> ir.Value:
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True)
class WeightOnly(Pass):
    """Stores weights in 8 bits (4 for MatMul) and computes in float; needs no calibration.

    `bits`: 8 or 4; in 4-bit models what is not a MatMul or Gemm gets 8. `block`: elements of a
    column that share a scale, a power of two from 16; 0 is the whole column (32 in 4 bits).
    `exclude`: names of nodes or operator types to leave.
    """

    name = "weight_only"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    bits: int = 8
    block: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise PassOptionError(
                f"Weights can't be stored in {self.bits} bits",
                where=f"pass {self.name!r}, option 'bits'",
                fix="8 or 4",
            )
        if self.block and (self.block < 16 or self.block & (self.block - 1)):
            raise PassOptionError(
                f"A block of {self.block} elements has no kernel",
                where=f"pass {self.name!r}, option 'block'",
                fix="0, or a power of two from 16",
            )

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value. Weights may be absent; nothing changes."""
        weights, tables, notes = self._select(model)
        return self._plan(weights, tables, notes)

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, also on an architecture without weights, whose tensors stay absent."""
        return self.run(model, context)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: the opset is below 13.
        """
        weights, tables, refused = self._select(model)
        plan = self._plan(weights, tables, refused)
        if not weights and not tables:
            text = f"nothing to store in {self.bits} bits: no weight of {MIN_ELEMENTS} elements"
            return PassResult(model, False, (text, *refusal_notes(plan)))
        _write(model, weights)
        write_tables(model, tables)
        counts = Counter(w.node.op_type for w in weights)
        if tables:
            counts["Gather"] = len(tables)
        text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
        notes = [f"{plan.label}: weights of {text}"]
        return PassResult(model, True, (*notes, *refusal_notes(plan)))

    def _select(self, model: ir.Model) -> tuple[list[_Weight], list[Table], list[tuple[str, str]]]:
        opset = opset_of(model)
        if opset < 13:
            raise UsageError(
                f"Opset {opset} has no per-channel DequantizeLinear",
                where=f"pass {self.name!r}",
                fix="load the model with edgepass.load, which converts old opsets",
            )
        require_types(model)
        weights: list[_Weight] = []
        refused: list[tuple[str, str]] = []
        for node in (n for graph in graph_tree(model.graph) for n in graph):
            if not is_onnx_op(node, *_OPERATORS):
                continue
            if node.op_type in self.exclude or (node.name or "") in self.exclude:
                refused.append((describe_node(node), "excluded by option"))
                continue
            inside = node.graph is not model.graph
            for index in _weight_inputs(node):
                weight = self._weight(node, index, opset, inside)
                if isinstance(weight, _Weight):
                    weights.append(weight)
                elif weight:
                    refused.append((describe_node(node), weight))
        return weights, list(lookup_tables(model, self.exclude)), refused

    def _weight(self, node: ir.Node, index: int, opset: int, inside: bool) -> _Weight | str:
        """How to store a weight of the node; why not; or '' where there is none."""
        value = node.inputs[index]
        tensor = constant_tensor(value)
        if value is None or tensor is None:
            return ""
        if tensor.dtype != ir.DataType.FLOAT:
            return "its weight is not float32"
        if tensor.size < MIN_ELEMENTS:
            return f"its weight has fewer than {MIN_ELEMENTS} elements"
        rank = len(tensor.shape)
        axis = weight_channel_axis(node, index)
        assert axis is not None
        per_channel = QuantSpec(ir.DataType.INT8, True, PerChannel(axis % rank))
        matrix = node.op_type in ("MatMul", "Gemm") and rank == 2 and index == 1
        if not matrix or inside:
            folded = dataclasses.replace(per_channel, zero_points=False, folded=True)
            return _Weight(node, index, folded)
        if self.bits == 8 and not self.block:
            return _Weight(node, index, per_channel)
        along = 1 - axis % rank
        size = self.block or DEFAULT_BLOCK
        dtype = ir.DataType.INT8 if self.bits == 8 else ir.DataType.INT4
        spec = QuantSpec(dtype, True, PerBlock(size, along), zero_points=False)
        if opset >= _BLOCKED_OPSET:
            return _Weight(node, index, spec)
        if node.op_type == "MatMul":
            return _Weight(node, index, dataclasses.replace(spec, padded=True), contrib=True)
        return _Weight(node, index, per_channel)

    def _plan(
        self, weights: list[_Weight], tables: list[Table], notes: list[tuple[str, str]]
    ) -> QuantPlan:
        entries = {w.value.name or "": w.spec for w in weights}
        covered = Counter(w.value.name or "" for w in weights)
        forms: dict[str, set[tuple[QuantSpec, bool]]] = {}
        for w in weights:
            forms.setdefault(w.value.name or "", set()).add((w.spec, w.contrib))
        entries.update((t.value.name or "", t.spec) for t in tables)
        block = f" block {self.block or DEFAULT_BLOCK}" if self.block or self.bits == 4 else ""
        return QuantPlan(
            label=f"weights int{self.bits}{block}",
            entries=entries,
            copies={name: len(found) for name, found in forms.items() if len(found) > 1},
            kept=frozenset(
                w.value.name or ""
                for w in weights
                if len(w.value.uses()) > covered[w.value.name or ""] or w.value.is_graph_output()
            ),
            notes=tuple(notes),
        )


def _weight_inputs(node: ir.Node) -> tuple[int, ...]:
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return (1, 2)
    if node.op_type == "MatMul" and constant_tensor(node.inputs[1]) is None:
        return (0,)
    return (1,)


def _write(model: ir.Model, weights: list[_Weight]) -> None:
    """before: MatMul(x, W) -> y      after: MatMul(x, DequantizeLinear(W8)) -> y

    What is no matrix of a MatMul or Gemm: see `store_folded`.
    """
    editor = Editor()
    folded: Shared = {}
    affines = {(w.value, w.spec): _affine(w) for w in weights if w.spec.folded}
    stored: dict[tuple[ir.Value, QuantSpec], Stored] = {}
    replaced = dict.fromkeys(w.value for w in weights)
    for item in weights:
        key = item.value, item.spec
        if item.spec.folded:
            store_folded(editor, item.node, item.index, item.spec, affines[key], folded)
            continue
        if key not in stored:
            stored[key] = (
                _store_for_contrib(editor, item)
                if item.contrib
                else store(editor, item.node, item.value, item.spec, _affine(item))
            )
        if item.contrib:
            _to_contrib(model, editor, item, stored[key])
        else:
            dequantize(editor, item.node, item.index, stored[key], item.spec)
    for value in replaced:
        drop_unused_constant(value)


def _affine(item: _Weight) -> Affine | None:
    tensor = constant_tensor(item.value)
    assert tensor is not None
    return None if is_absent(tensor) else weight_affine(tensor.numpy(), item.spec)


# --- the MatMulNBits form, for opsets without blocked DequantizeLinear -------------------------


def _store_for_contrib(editor: Editor, item: _Weight) -> tuple[ir.Value, ir.Value, None]:
    """uint8 [N, blocks, bytes a block] and float32 [N * blocks], as MatMulNBits reads them.

    A column's blocks lie together, the low nibble first, integers offset to be unsigned; the last
    block is padded with the offset, which stands for zero.
    """
    tensor = constant_tensor(item.value)
    assert tensor is not None
    assert isinstance(item.spec.granularity, PerBlock)
    depth, columns = (int(d) for d in tensor.shape.numpy())
    size, bits = item.spec.granularity.size, item.spec.dtype.bitwidth
    blocks = -(-depth // size)
    shape = (columns, blocks, size * bits // 8)
    data: np.ndarray | ir.TensorProtocol
    scales: np.ndarray | ir.TensorProtocol
    if is_absent(tensor):
        data = absent(ir.DataType.UINT8, shape)
        scales = absent(ir.DataType.FLOAT, (columns * blocks,))
    else:
        array = tensor.numpy()
        affine = weight_affine(array, item.spec)
        offset = 1 << (bits - 1)
        integers: np.ndarray = np.full((columns, blocks * size), offset, np.uint8)
        signed = quantize(array, affine, item.spec).astype(np.int16)
        integers[:, :depth] = (signed + offset).T
        if bits == 4:
            integers = integers[:, ::2] | integers[:, 1::2] << 4
        data = np.ascontiguousarray(integers.reshape(shape))
        scales = np.ascontiguousarray(affine.scale.T.reshape(-1))
    base = item.value.name or "weight"
    return (
        editor.initializer(item.node, f"{base}/int{bits}", data),
        editor.initializer(item.node, f"{base}/scale", scales),
        None,
    )


def _to_contrib(
    model: ir.Model,
    editor: Editor,
    item: _Weight,
    stored: Stored,
) -> None:
    tensor = constant_tensor(item.value)
    assert tensor is not None
    assert isinstance(item.spec.granularity, PerBlock)
    depth, columns = (int(d) for d in tensor.shape.numpy())
    result = item.node.outputs[0]
    node = ir.Node(
        CONTRIB_DOMAIN,
        "MatMulNBits",
        [item.node.inputs[0], stored[0], stored[1]],
        ir.convenience.convert_attributes(
            {
                "K": depth,
                "N": columns,
                "bits": item.spec.dtype.bitwidth,
                "block_size": item.spec.granularity.size,
                # 8-bit activations inside the kernel: 3x faster than float ones on x86-64, and
                # what ONNX Runtime itself chooses for blocked DequantizeLinear.
                "accuracy_level": 4,
            }
        ),
        num_outputs=1,
        name=item.node.name,
    )
    node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
    node.outputs[0].name = fresh_name(model.graph, f"{result.name}/nbits")
    editor.insert_before(item.node, node)
    editor.replace_node(item.node, node.outputs[0])
    model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
