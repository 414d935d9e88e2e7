"""A quantization plan that is not applied yet, written into the mirror as its pass would write it.

Here: `write_plan`. The pairs, integer weights, products and casts that appear are those of the
passes, by type and shape, so that a plan is priced as the graph it leads to. Not here: choosing a
plan (`passes.quantize`), what the runtime makes of pairs (`ort_integer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ..ir.graph import is_onnx_op, node_name
from ..ir.quant import INTEGER_OPS, PerBlock, PerChannel, QuantPlan, QuantSpec, stored_shape
from .ort_dynamic import set_inputs
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_FLOAT = ir.DataType.FLOAT
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def write_plan(graph: RuntimeGraph, plan: QuantPlan) -> None:
    """Rewrite the mirror of a model, not changed by anything yet, as the plan's pass would."""
    writer = _Writer(graph, plan)
    specs = list(plan.entries.values())
    if any(not spec.is_integer for spec in specs):
        writer.write_halves()
    else:
        named = writer.entries
        writer.write_recurrent()
        if any(not tensor.constant for tensor in named):
            writer.write_pairs()
        elif writer.members:
            writer.write_products()
        else:
            writer.write_weights()
        writer.write_tables()
    graph.sort()


class _Writer:
    def __init__(self, graph: RuntimeGraph, plan: QuantPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.entries: dict[Tensor, QuantSpec] = {
            tensor: plan.entries[tensor.name]
            for tensor in graph.tensors.values()
            if tensor.name in plan.entries
        }
        names = set(plan.nodes)
        self.members = {op for op in graph if op.origin and node_name(op.origin[0]) in names}
        self.stored: dict[tuple[Tensor, QuantSpec], list[Tensor | None]] = {}
        self.cast: dict[Tensor, Tensor] = {}

    # --- pieces ----------------------------------------------------------------------------------

    def _store(self, value: Tensor, spec: QuantSpec) -> list[Tensor | None]:
        """A constant's integers, scales and zero points."""
        key = value, spec
        if key not in self.stored and value.shape is not None:
            shape = stored_shape(spec, value.shape)
            if spec.dtype == ir.DataType.INT32:
                shape = (math.prod(shape),)
            parameters = spec.parameter_shape(shape)
            numbers = [
                _constant(f"{value.name}/integers", shape, spec.dtype),
                _constant(f"{value.name}/scale", parameters, _FLOAT),
            ]
            if spec.zero_points:
                numbers.append(_constant(f"{value.name}/zero_point", parameters, spec.dtype))
            self.stored[key] = list(numbers)
        return self.stored.get(key, [value])

    def _unpack(self, op: Op, index: int, spec: QuantSpec) -> None:
        """A DequantizeLinear of a stored constant in front of an operator's input."""
        value = op.inputs[index]
        assert value is not None
        numbers = self._store(value, spec)
        attributes: dict[str, int] = {}
        match spec.granularity:
            case PerChannel(axis):
                attributes["axis"] = axis
            case PerBlock(size, axis):
                attributes.update(axis=axis, block_size=size)
        shape = numbers[0].shape if numbers[0] is not None else value.shape
        result = Tensor(f"{value.name}/dequantized", shape, value.dtype)
        self.graph.add(Op("DequantizeLinear", "", numbers, [result], attributes))
        self.graph.set_input(op, index, result)

    def _insert(
        self,
        kind: str,
        inputs: list[Tensor | None],
        like: Tensor,
        dtype: ir.DataType | None = None,
        origin: tuple[ir.Node, ...] = (),
        **attributes: int,
    ) -> Tensor:
        result = like.like(f"{like.name}/{kind}", dtype)
        self.graph.add(Op(kind, "", inputs, [result], dict(attributes), origin))
        return result

    def _instead(self, op: Op, result: Tensor) -> None:
        """Let the maker of `result` write what an operator wrote, which goes."""
        final, maker = op.outputs[0], result.producer
        assert maker is not None
        self.graph.remove(op)
        self.graph.set_output(maker, 0, final)

    # --- static int8 -----------------------------------------------------------------------------

    def write_pairs(self) -> None:
        """x -> Conv(W, b) -> Relu: x -> Q -> DQ -> Conv(DQ(W8), DQ(b32)) -> Q -> DQ."""
        readers = {op: _data_inputs(op) for op in self.members}
        absorbed = self._absorbed()
        for op in [op for op in self.graph if op in self.members]:
            for index in readers[op]:
                value = op.inputs[index]
                spec = self.entries.get(value) if value is not None else None
                if value is not None and spec is not None and value.constant:
                    self._unpack(op, index, spec)
        for value, spec in self.entries.items():
            if value.constant:
                continue
            maker = value.producer
            everywhere = maker in self.members or value in absorbed
            users = [
                (user, i)
                for user in dict.fromkeys(value.users)
                for i, tensor in enumerate(user.inputs)
                if tensor is value and (everywhere or i in readers.get(user, ()))
            ]
            if value in absorbed:
                self._absorb(absorbed[value])
            self._pair(value, spec, users, everywhere)
        for op in [op for op in self.graph if op in self.members]:
            if INTEGER_OPS[op.type].lowered:
                self._lower(op)

    def _lower(self, op: Op) -> None:
        """HardSigmoid: Add of a constant; HardSwish: that, Q, DQ, Mul; a mean: its pooling."""
        value, result = op.inputs[0], op.outputs[0]
        spec = next(s for t, s in self.entries.items() if not t.constant)
        if op.type == "ReduceMean":
            op.type, op.attributes = "GlobalAveragePool", {}
            set_inputs(self.graph, op, [value])
            return
        numbers = self._scalars(result, spec)
        offset = Tensor(f"{result.name}/offset/float", (), _FLOAT)
        integer = _constant(f"{result.name}/offset", (), spec.dtype)
        self.graph.add(Op("DequantizeLinear", "", [integer, *numbers], [offset]))
        if op.type == "HardSigmoid":
            op.type, op.attributes = "Add", {}
            set_inputs(self.graph, op, [value, offset])
            return
        moved = self._insert("Add", [value, offset], result)
        inputs: list[Tensor | None] = [moved, *self._scalars(result, spec)]
        quantized = self._insert("QuantizeLinear", inputs, result, spec.dtype)
        inputs = [quantized, *self._scalars(result, spec)]
        floats = self._insert("DequantizeLinear", inputs, result)
        op.type, op.attributes = "Mul", {}
        set_inputs(self.graph, op, [value, floats])

    def _scalars(self, like: Tensor, spec: QuantSpec) -> list[Tensor | None]:
        """A scale and a zero point."""
        scale = _constant(f"{like.name}/gate_scale", (), _FLOAT)
        return [scale, _constant(f"{like.name}/gate_zero_point", (), spec.dtype)]

    def _absorbed(self) -> dict[Tensor, Op]:
        """Values that an operator in integers writes once their Relu or Clip is gone."""
        found = {}
        for value in self.entries:
            saturating = value.producer
            if saturating is None or not saturating.is_onnx("Relu", "Clip"):
                continue
            source = saturating.inputs[0]
            if source is None or source in self.entries or source.producer not in self.members:
                continue
            if self.graph.only_user(source) is saturating:
                found[value] = saturating
        return found

    def _absorb(self, saturating: Op) -> None:
        source, value = saturating.inputs[0], saturating.outputs[0]
        assert source is not None
        maker = source.producer
        assert maker is not None
        place = maker.outputs.index(source)
        self.graph.remove(saturating)
        self.graph.set_output(maker, place, value)
        maker.origin += saturating.origin

    def _pair(
        self, value: Tensor, spec: QuantSpec, users: Iterable[tuple[Op, int]], everywhere: bool
    ) -> None:
        scale = _constant(f"{value.name}/scale", (), _FLOAT)
        point = _constant(f"{value.name}/zero_point", (), spec.dtype)
        small = value.like(f"{value.name}/quantized", spec.dtype)
        result = value.like(f"{value.name}/dequantized")
        self.graph.add(Op("QuantizeLinear", "", [value, scale, point], [small]))
        self.graph.add(Op("DequantizeLinear", "", [small, scale, point], [result]))
        for user, index in users:
            self.graph.set_input(user, index, result)
        if everywhere and value.is_output:
            value.is_output, result.is_output = False, True
            self.graph.outputs = [result if t is value else t for t in self.graph.outputs]

    # --- dynamic int8 ----------------------------------------------------------------------------

    def write_products(self) -> None:
        """MatMul: DynamicQuantizeLinear, MatMulInteger, then Cast and Mul by the scales."""
        quantized: dict[Tensor, list[Tensor]] = {}
        for op in [op for op in self.graph if op in self.members]:
            data, weight = op.inputs[0], op.inputs[1]
            assert data is not None
            assert weight is not None
            if data not in quantized:
                quantized[data] = self._quantize(data, op)
            integers, scales = self._integers(op, weight)
            x, scale, point = quantized[data]
            result = op.outputs[0]
            product = self._insert(
                "MatMulInteger", [x, integers, point], result, ir.DataType.INT32, op.origin
            )
            product = self._insert("Cast", [product], result, to=int(_FLOAT))
            both = self._insert("Mul", [scale, scales], scales)
            value = self._insert("Mul", [product, both], result)
            if len(op.inputs) > 2 and op.inputs[2] is not None:
                value = self._insert("Add", [value, op.inputs[2]], result)
            self._instead(op, value)

    def _quantize(self, data: Tensor, reader: Op) -> list[Tensor]:
        results = [
            data.like(f"{data.name}/quantized", ir.DataType.UINT8),
            Tensor(f"{data.name}/scale", (), _FLOAT),
            Tensor(f"{data.name}/zero_point", (), ir.DataType.UINT8),
        ]
        self.graph.add(Op("DynamicQuantizeLinear", "", [data], list(results)))
        return results

    def _integers(self, op: Op, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight's integers as [in, out], and its scales."""
        shape = weight.shape or ()
        per_channel = isinstance(self.entries[weight].granularity, PerChannel)
        if op.type == "Gemm" and op.attribute("transB", 0):
            shape = shape[::-1]
        key = (
            weight,
            QuantSpec(ir.DataType.INT8, granularity=PerChannel(int(shape != weight.shape))),
        )
        if key not in self.stored:
            self.stored[key] = [
                _constant(f"{weight.name}/int8", shape, ir.DataType.INT8),
                _constant(f"{weight.name}/scale", shape[-1:] if per_channel else (), _FLOAT),
            ]
        integers, scales = self.stored[key]
        assert integers is not None
        assert scales is not None
        return integers, scales

    # --- recurrent layers ------------------------------------------------------------------------

    def write_recurrent(self) -> None:
        """LSTM: DynamicQuantizeLSTM, its weights transposed, scales and zero points at the end."""
        for op in [op for op in self.graph if op in self.members and op.is_onnx("LSTM")]:
            self.members.discard(op)
            parts = [self._transposed(value) for value in op.inputs[1:3] if value is not None]
            inputs = [*op.inputs[:7], *([None] * 8)][:8]
            for index, (integers, *numbers) in enumerate(parts, start=1):
                inputs[index] = integers
                inputs.extend(numbers)
            set_inputs(self.graph, op, inputs)
            op.type, op.domain = "DynamicQuantizeLSTM", CONTRIB
            self.graph.renew(op)

    def _transposed(self, weight: Tensor) -> list[Tensor | None]:
        """[directions, gates, in] as integers [directions, in, gates], with scales of rows."""
        spec = self.entries[weight]
        key = weight, spec
        if key not in self.stored:
            directions, gates, size = weight.shape or (0, 0, 0)
            per_channel = isinstance(spec.granularity, PerBlock)
            scales = (directions, gates) if per_channel else (directions,)
            self.stored[key] = [
                _constant(f"{weight.name}/int8", (directions, size, gates), spec.dtype),
                _constant(f"{weight.name}/scale", scales, _FLOAT),
                _constant(f"{weight.name}/zero_point", scales, spec.dtype),
            ]
        return self.stored[key]

    # --- weights alone ---------------------------------------------------------------------------

    def write_weights(self) -> None:
        """MatMul(W): MatMul(DequantizeLinear(W8)); padded blocks: MatMulNBits. Folded: as it is."""
        for op in self.graph:
            if op.is_onnx("Gather"):
                self._look_up_blocks(op)
            if not op.is_onnx(*_WEIGHTED):
                continue
            index = 0 if op.type == "MatMul" and not _is_constant(op, 1) else 1
            value = _stored(op.inputs[index], self.entries)
            spec = self.entries.get(value) if value is not None else None
            if value is None or spec is None or spec.folded:
                continue
            if spec.padded:
                self._to_blocks(op, value, spec)
            else:
                self._unpack(op, index, spec)

    def _to_blocks(self, op: Op, weight: Tensor, spec: QuantSpec) -> None:
        assert isinstance(spec.granularity, PerBlock)
        assert weight.shape is not None
        along = spec.granularity.axis
        depth, columns = weight.shape[along], weight.shape[1 - along]
        inputs: list[Tensor | None] = [op.inputs[0], *self._blocks(weight, spec)]
        if op.type == "Gemm" and len(op.inputs) > 2 and op.inputs[2] is not None:
            inputs += [None] * (5 - len(inputs)) + [op.inputs[2]]
        for index, tensor in enumerate(inputs):
            self.graph.set_input(op, index, tensor)
        op.type, op.domain = "MatMulNBits", CONTRIB
        size = spec.granularity.size
        op.attributes = {"K": depth, "N": columns, "bits": spec.width, "block_size": size}

    def _look_up_blocks(self, op: Op) -> None:
        """A table whose rows are stored in blocks: Gather becomes GatherBlockQuantized."""
        table = op.inputs[0]
        spec = self.entries.get(table) if table is not None else None
        if table is None or table.shape is None or spec is None:
            return
        if not spec.padded or spec.folded or not isinstance(spec.granularity, PerBlock):
            return
        stored, *parameters = self._blocks(table, spec)
        rows = (table.shape[0], table.shape[1] * spec.width // 8)
        codes = _constant(f"{stored.name}/rows", rows, ir.DataType.UINT8)
        for index, tensor in enumerate([codes, op.inputs[1], *parameters]):
            self.graph.set_input(op, index, tensor)
        op.type, op.domain = "GatherBlockQuantized", CONTRIB
        op.attributes = {
            "bits": spec.width,
            "block_size": spec.granularity.size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }

    def _blocks(self, weight: Tensor, spec: QuantSpec) -> list[Tensor]:
        """Codes, scales and zero points of a matrix, as kernels read them."""
        assert isinstance(spec.granularity, PerBlock)
        assert weight.shape is not None
        size, along = spec.granularity.size, spec.granularity.axis
        depth, columns = weight.shape[along], weight.shape[1 - along]
        blocks = -(-depth // size)
        shape = (columns, blocks, size * spec.width // 8)
        name = weight.name
        made = [
            _constant(f"{name}/int{spec.width}", shape, ir.DataType.UINT8),
            _constant(f"{name}/scale", (columns, blocks), _FLOAT),
        ]
        if spec.zero_points:
            row = -(-blocks * spec.width // 8)
            made.append(_constant(f"{name}/zero_point", (columns, row), ir.DataType.UINT8))
        return made

    # --- what several passes share ---------------------------------------------------------------

    def write_tables(self) -> None:
        """Gather of a table: Gather of integers, Cast, Mul by the scales of its columns."""
        for op in self.graph:
            table = op.inputs[0] if op.is_onnx("Gather") else None
            spec = self.entries.get(table) if table is not None else None
            if table is None or spec is None or not table.constant or op in self.members:
                continue
            if spec.folded or spec.padded:
                continue
            integers, scale = self._store(table, spec)[:2]
            result = op.outputs[0]
            rows = result.like(f"{result.name}/rows", spec.dtype)
            self.graph.set_input(op, 0, integers)
            self.graph.set_output(op, 0, rows)
            floats = self._insert("Cast", [rows], result, to=int(_FLOAT))
            self.graph.add(Op("Mul", "", [floats, scale], [result]))

    # --- 16 bits ---------------------------------------------------------------------------------

    def write_halves(self) -> None:
        """Casts around what computes in 16 bits. Weights alone are made floats at load: nothing."""
        half = next(spec.dtype for spec in self.entries.values() if not spec.is_integer)
        made = {
            t for op in self.members for t in op.outputs if t.dtype == _FLOAT and not t.constant
        }
        for op in [op for op in self.graph if op in self.members]:
            for index, value in enumerate(op.inputs):
                if value is None or value.dtype != _FLOAT or value in made:
                    continue
                if value not in self.cast:
                    self.cast[value] = self._halve(value, half)
                self.graph.set_input(op, index, self.cast[value])
        for value in sorted(made, key=lambda t: t.name):
            self._raise_for_others(value, half)

    def _halve(self, value: Tensor, half: ir.DataType) -> Tensor:
        if value.constant:
            return _constant(f"{value.name}/{half.name.lower()}", value.shape or (), half)
        return self._insert("Cast", [value], value, half, to=int(half))

    def _raise_for_others(self, value: Tensor, half: ir.DataType) -> None:
        """float32 again for the graph's outputs and for readers that stay in float32."""
        others = [op for op in dict.fromkeys(value.users) if op not in self.members]
        value.dtype = half
        if not others and not value.is_output:
            return
        result = value.like(f"{value.name}/float", _FLOAT)
        self.graph.replace_uses(value, result, but=self.members)
        self.graph.add(Op("Cast", "", [value], [result], {"to": int(_FLOAT)}))
        if value.is_output:
            value.is_output, result.is_output = False, True
            self.graph.outputs = [result if t is value else t for t in self.graph.outputs]


def _constant(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> Tensor:
    return Tensor(name, shape, dtype, constant=True)


def _stored(value: Tensor | None, entries: Mapping[Tensor, QuantSpec]) -> Tensor | None:
    """The constant that is read: itself, or before a Transpose that the runtime folds."""
    maker = value.source.producer() if value is not None and value.source is not None else None
    if value in entries or maker is None or not is_onnx_op(maker, "Transpose"):
        return value
    return next((tensor for tensor in entries if tensor.source is maker.inputs[0]), value)


def _is_constant(op: Op, index: int) -> bool:
    found = op.inputs[index] if index < len(op.inputs) else None
    return found is not None and found.constant


def _data_inputs(op: Op) -> tuple[int, ...]:
    """The inputs that are behind a pair where an operator runs in integers."""
    row = INTEGER_OPS[op.type]
    indices = range(len(op.inputs)) if row.inputs is None else row.inputs
    return tuple(i for i in indices if i < len(op.inputs) and op.inputs[i] is not None)
