"""16-bit floats: `fp16` and `bf16`.

Here: the two passes and the rewrite they share. Where the target computes in the 16-bit type, nodes
do, with Casts at the edges; where it does not, only weights are stored so, and a Cast that the
runtime folds when loading gives float32 back. Which nodes may: `half_ops`, and `half_ranges` where
calibration data shows what they compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.edit import Editor, inherit_metadata
from ...ir.graph import (
    AbsentTensor,
    absent_weights,
    constant_tensor,
    describe_node,
    fresh_name,
    graphs,
    is_absent,
    is_onnx_op,
    node_name,
    opset_of,
)
from ...ir.ops import facts
from ...ir.quant import QuantPlan, QuantSpec, is_qdq
from ...targets.target import Target
from ..base import Context, Pass, PassResult, Stage
from .half_ops import Ports, convert, half_ports, limit, misfit
from .half_ranges import Magnitude, observe_magnitudes, out_of_range, statistics
from .known_types import require_types
from .notes import refusal_notes
from .qdq import drop_unused_constant

MIN_STORED = 256
"""Elements from which a weight is worth a Cast of its own when only storage is 16-bit."""


@dataclasses.dataclass(frozen=True)
class _HalfPass(Pass):
    stage = Stage.QUANTIZE
    lossless = False
    dtype: ClassVar[ir.DataType] = ir.DataType.FLOAT16

    keep: tuple[str, ...] = ()
    arithmetic: str = "auto"

    def __post_init__(self) -> None:
        if self.arithmetic not in ("auto", "yes", "no"):
            raise PassOptionError(
                f"'arithmetic' can't be {self.arithmetic!r}",
                where=f"pass {self.name!r}, option 'arithmetic'",
                fix="auto, yes or no",
            )

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What becomes 16-bit. Weights may be absent: then all are taken to fit the range."""
        computes = self._computes(context.target)
        return _Rewriter(model, self, computes, self._magnitudes(model, context, computes)).plan()

    def _magnitudes(
        self, model: ir.Model, context: Context, computes: bool
    ) -> Mapping[str, Magnitude] | None:
        """What calibration data makes of each value; None without data, weights or need."""
        if not computes or not context.calibration or absent_weights(model):
            return None
        require_types(model)
        return observe_magnitudes(model, context.calibration, context.progress)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`."""
        computes = self._computes(context.target)
        magnitudes = self._magnitudes(model, context, computes)
        rewriter = _Rewriter(model, self, computes, magnitudes)
        plan = rewriter.plan()
        if not rewriter.ports and not rewriter.stored:
            notes = ("nothing to convert: no float32 weights or arithmetic", *refusal_notes(plan))
            return PassResult(model, False, notes)
        rewriter.write()
        kind = self.dtype.name.lower()
        notes = (f"{len(plan.entries)} weights and {len(rewriter.ports)} nodes in {kind}",)
        if not computes and self.arithmetic == "auto":
            where = f"the target {context.target.name!r}" if context.target else "ONNX Runtime"
            notes = (
                f"{len(plan.entries)} weights stored in {kind}, arithmetic in float32: {where} has "
                f"no {kind} arithmetic on its fast path",
            )
        if magnitudes is not None:
            count = len(context.calibration or ())
            notes = (*notes, f"ranges of {len(magnitudes)} values seen on {count} samples")
        return PassResult(model, True, (*notes, *refusal_notes(plan)))

    def _computes(self, target: Target | None) -> bool:
        if self.arithmetic != "auto":
            return self.arithmetic == "yes"
        if target is None:  # what ONNX Runtime's CPU provider runs, with casts where it must
            return self.dtype == ir.DataType.FLOAT16
        return self.dtype in target.float_dtypes


@dataclasses.dataclass(frozen=True)
class Fp16(_HalfPass):
    """Weights, and arithmetic where the target has it, in float16; inputs and outputs stay.

    `keep`: names of nodes or operator types to leave in float32. `arithmetic`: "yes", "no" (weights
    only), or "auto": where the target lists float16. Constants beyond 65504 and what reads them
    stay in float32, and the statistics of norms. With calibration data so do values that leave
    float16's range on it, each named with what it reached.
    """

    name = "fp16"
    dtype = ir.DataType.FLOAT16


@dataclasses.dataclass(frozen=True)
class Bf16(_HalfPass):
    """Weights, and arithmetic where the target has it, in bfloat16; inputs and outputs stay.

    `keep`: names of nodes or operator types to leave in float32. `arithmetic`: "yes", "no" (weights
    only), or "auto": where the target lists bfloat16, which ONNX Runtime's CPU does not.
    """

    name = "bf16"
    dtype = ir.DataType.BFLOAT16


class _Rewriter:
    """before: x -> Conv(W) -> Relu -> y
    after:  x -> Cast(16) -> Conv(W16) -> Relu -> Cast(32) -> y
    """

    def __init__(
        self,
        model: ir.Model,
        item: _HalfPass,
        computes: bool,
        magnitudes: Mapping[str, Magnitude] | None = None,
    ) -> None:
        self.model = model
        self.graph = model.graph
        self.item = item
        self.dtype = item.dtype
        self.opset = opset_of(model)
        self.editor = Editor()
        self.refused: list[tuple[str, str]] = []
        self.misfits: dict[ir.Value, str] = {}
        self.large: set[ir.Value] = set()
        require_types(model)
        self.returned = self._returned_by_subgraphs()
        self.outside = {} if magnitudes is None else out_of_range(model, magnitudes, self.dtype)
        self.ports = self._select() if computes else {}
        self.stored = self._select_stored()
        self.cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.constants: dict[tuple[ir.Value, bool], ir.Value] = {}

    # --- choosing ------------------------------------------------------------------------------

    def _select(self) -> dict[ir.Node, Ports]:
        chosen: dict[ir.Node, Ports] = {}
        counted: set[ir.Value] = set()  # floats computed from integers: positions, masks, sizes
        narrow = self.dtype == ir.DataType.FLOAT16  # bfloat16 has float32's range
        measures, measured = statistics(self.model) if narrow else (set(), set())
        for node in self.graph:
            if self._counts(node, counted):
                counted.update(node.outputs)
                continue
            if self._is_kept(node) or any(v in self.returned for v in node.outputs):
                continue
            if node in measures:
                continue
            ports = half_ports(node, self.dtype, self.opset)
            if isinstance(ports, str):
                continue
            reason = self._outside_of(node, ports)
            if reason:
                self.refused.append((describe_node(node), reason))
                continue
            reason = self._misfit_of(node, ports)
            if reason:
                self.refused.append((describe_node(node), reason))
                self.large.update(node.outputs)
                continue
            chosen[node] = ports
        self.large |= counted | measured
        return chosen

    def _counts(self, node: ir.Node, counted: set[ir.Value]) -> bool:
        outputs = [v for v in node.outputs if v.dtype == ir.DataType.FLOAT]
        if not outputs:
            return False
        source = node.inputs[0] if node.inputs else None
        if is_onnx_op(node, "Cast") and source is not None and source.dtype != ir.DataType.FLOAT:
            return True
        if not facts(node).elementwise and not facts(node).movement_only:
            return False
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        computed = [v for v in floats if constant_tensor(v) is None]
        return bool(computed) and all(v in counted for v in computed)

    def _is_kept(self, node: ir.Node) -> bool:
        return node.op_type in self.item.keep or (node.name or "") in self.item.keep

    def _outside_of(self, node: ir.Node, ports: Ports) -> str:
        """Why calibration data forbids the node: what it gives or reads is out of range."""
        for index in ports.outputs:
            if (reason := self.outside.get(node.outputs[index])) is not None:
                return f"its result {node.outputs[index].name!r} {reason}"
        for index in ports.inputs:
            value = node.inputs[index]
            if value is not None and (reason := self.outside.get(value)) is not None:
                return f"its input {value.name!r} {reason}"
        return ""

    def _misfit_of(self, node: ir.Node, ports: Ports) -> str:
        for index in ports.inputs:
            value = node.inputs[index]
            if value is None or _saturates(node, index):
                continue
            reason = self._misfit(value)
            if reason:
                return f"{value.name!r} {reason}"
        return ""

    def _misfit(self, value: ir.Value) -> str:
        tensor = constant_tensor(value)
        if tensor is None or is_absent(tensor):
            return ""
        if value not in self.misfits:
            self.misfits[value] = misfit(tensor.numpy(), self.dtype)
        return self.misfits[value]

    def _select_stored(self) -> list[ir.Value]:
        """Weights of nodes that compute in float32, worth storing in 16 bits."""
        stored = []
        for value in self.graph.initializers.values():
            tensor = constant_tensor(value)
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_STORED:
                continue
            users = [use.node for use in value.uses()]
            if not users or value.is_graph_output() or value in self.returned:
                continue
            if any(u in self.ports or is_qdq(u) or self._is_kept(u) for u in users):
                continue
            reason = self._misfit(value)
            if reason and not self.ports:
                self.refused.append((f"initializer {value.name!r}", reason))
            if not reason:
                stored.append(value)
        return stored

    def _returned_by_subgraphs(self) -> set[ir.Value]:
        """Outer values that a subgraph returns as they are: no use by a node shows it."""
        inner = (graph for graph in graphs(self.model) if graph is not self.graph)
        return {v for graph in inner for v in graph.outputs if v.graph is self.graph}

    def plan(self) -> QuantPlan:
        """The storage of each weight; call before `write`."""
        spec = QuantSpec(self.dtype)
        entries = {value.name or "": spec for value in self.stored}
        kept = set()
        for node, ports in self.ports.items():
            for index in ports.inputs:
                value = node.inputs[index]
                if value is None or constant_tensor(value) is None:
                    continue
                name = value.name or ""
                entries[name] = spec
                if value.is_graph_output() or any(
                    use.node not in self.ports or use.idx not in self.ports[use.node].inputs
                    for use in value.uses()
                ):
                    kept.add(name)
        return QuantPlan(
            label=self.dtype.name.lower(),
            entries=entries,
            nodes=tuple(node_name(n) for n in self.ports),
            kept=frozenset(kept),
            notes=tuple(self.refused),
        )

    # --- writing -------------------------------------------------------------------------------

    def write(self) -> None:
        replaced: dict[ir.Value, None] = {}
        halves = [node.outputs[i] for node, ports in self.ports.items() for i in ports.outputs]
        made_half = set(halves)
        for node, ports in self.ports.items():
            for index in ports.inputs:
                value = node.inputs[index]
                if value is None or value in made_half:
                    continue
                if constant_tensor(value) is not None:
                    replaced[value] = None
                    node.replace_input_with(index, self._constant(node, index, value))
                else:
                    node.replace_input_with(index, self._down(node, value))
        for value in halves:
            value.type = ir.TensorType(self.dtype)
            self._raise_for_others(value)
        for value in self.stored:
            self._store(value)
            replaced[value] = None
        for value in replaced:
            drop_unused_constant(value)

    def _constant(self, node: ir.Node, index: int, value: ir.Value) -> ir.Value:
        key = value, _saturates(node, index)
        if key not in self.constants:
            self.constants[key] = self.editor.initializer(
                node, f"{value.name}/{self._suffix}", self._half(value, saturate=key[1])
            )
        return self.constants[key]

    def _half(self, value: ir.Value, *, saturate: bool = False) -> ir.TensorProtocol:
        tensor = constant_tensor(value)
        assert tensor is not None
        if isinstance(tensor, AbsentTensor):
            shape = ir.Shape(list(tensor.shape.numpy()))
            return AbsentTensor("", self.dtype, shape, tensor.reason)
        return convert(tensor.numpy(), self.dtype, saturate=saturate)

    def _down(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The value in 16 bits, cast once for all readers."""
        key = value, self.dtype
        if key in self.cast:
            return self.cast[key]
        source = value
        maker = value.producer()
        if value in self.large:  # a mask of -3.4e38 must not become -inf: its row may be all masked
            source = self._insert(maker, node, "Clip", self._bounded(node, value), value)
        result = self._insert(
            maker if source is value else source.producer(), node, "Cast", [source], value
        )
        self.cast[key] = result
        return result

    def _bounded(self, node: ir.Node, value: ir.Value) -> list[ir.Value]:
        bound = np.float32(limit(self.dtype))
        return [
            value,
            self.editor.initializer(node, f"{value.name}/least", np.asarray(-bound)),
            self.editor.initializer(node, f"{value.name}/greatest", np.asarray(bound)),
        ]

    def _insert(
        self,
        maker: ir.Node | None,
        reader: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        like: ir.Value,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A Clip or Cast behind a value's maker, or before its reader where nothing makes it."""
        to = (dtype or self.dtype) if op_type == "Cast" else ir.DataType.FLOAT
        attributes = {"to": int(to)} if op_type == "Cast" else {}
        node = ir.Node(
            "", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1
        )
        result = node.outputs[0]
        result.type = ir.TensorType(to)
        result.shape = None if like.shape is None else ir.Shape(list(like.shape.dims))
        suffix = to.name.lower() if op_type == "Cast" else "clipped"
        result.name = node.name = fresh_name(self.graph, f"{like.name}/{suffix}")
        if maker is not None and maker.graph is self.graph:
            self.editor.insert_after(maker, node)
        else:
            self.editor.insert_before(reader, node)
        inherit_metadata([reader], [node])
        return result

    def _raise_for_others(self, value: ir.Value) -> None:
        """float32 again for the graph's outputs and for readers that stay in float32."""
        users = [
            (use.node, use.idx)
            for use in value.uses()
            if use.node not in self.ports or use.idx not in self.ports[use.node].inputs
        ]
        slots = [i for i, output in enumerate(self.graph.outputs) if output is value]
        if not users and not slots:
            return
        maker = value.producer()
        assert maker is not None
        result = self._insert(maker, maker, "Cast", [value], value, ir.DataType.FLOAT)
        for user, index in users:
            user.replace_input_with(index, result)
        if slots:
            for slot in slots:
                self.graph.outputs[slot] = result
            name = value.name
            value.name, result.name = result.name, None
            result.name = name

    def _store(self, value: ir.Value) -> None:
        users = [(use.node, use.idx) for use in value.uses()]
        first = self._first_reader([node for node, _ in users])
        small = self.editor.initializer(first, f"{value.name}/{self._suffix}", self._half(value))
        result = self._insert(None, first, "Cast", [small], value, ir.DataType.FLOAT)
        for user, index in users:
            user.replace_input_with(index, result)

    def _first_reader(self, users: list[ir.Node]) -> ir.Node:
        """A reader in the main graph, or the graph's first node when all are in subgraphs."""
        if len(users) == 1 and users[0].graph is self.graph:
            return users[0]
        wanted = set(users)
        if all(node.graph is self.graph for node in users):
            return next(node for node in self.graph if node in wanted)
        return next(iter(self.graph))

    @property
    def _suffix(self) -> str:
        return self.dtype.name.lower()


def _saturates(node: ir.Node, index: int) -> bool:
    """Whether an input is a bound, for which the greatest 16-bit value is as good as a greater."""
    return is_onnx_op(node, "Clip") and index > 0
