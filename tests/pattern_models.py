"""Small models made from the pattern of a rewrite rule: what the rule should find, and near-misses.

`PatternModel` walks a pattern downwards and makes up what it leaves open: ranks, sizes, dtypes,
broadcast forms, attributes, constants, whether an input is a graph input or computed. Most of what
it makes is no sound model or not what the rule's check wants; the caller makes many and keeps those
that run. `near_misses` changes one thing about a model that the rule did rewrite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from edgepass.ir.match import AnyOf, Const, OpPattern, ValuePattern, Var
from edgepass.ir.shapes import ShapeInference
from edgepass.passes.rules import RewriteRule
from pattern_operands import attributes_for, constant_for, extra_inputs, operand_shape

Shape = tuple[int | str, ...]

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
BOOLS = frozenset({"And", "Or", "Xor", "Not"})
BITS = frozenset({"BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"})
COMPARES = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})


class DiscardError(Exception):
    """What was made up is no sound model."""


@dataclasses.dataclass
class PatternModel:
    """One attempt. `model` is set once `make` has returned."""

    rng: np.random.Generator
    opset: int

    def __post_init__(self) -> None:
        imports = {"": self.opset, "com.microsoft": 1}
        graph = ir.Graph([], [], nodes=[], opset_imports=imports, name="pattern")
        self.model = ir.Model(graph, ir_version=10)
        self.graph = graph
        self.engine = ShapeInference(self.model)
        self.bound: dict[str, ir.Value] = {}
        self.made: dict[str | int, ir.Value] = {}
        self.count = 0
        self.symbolic = self.rng.random() < 0.3
        kinds = [ir.DataType.FLOAT] * 8 + [ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64]
        self.dtype = kinds[self.rng.integers(len(kinds))]
        self.base = self.random_shape()

    # --- the whole ---

    def make(self, pattern: OpPattern) -> ir.Model:
        """A model that the pattern matches, for all it says. Raises `DiscardError`."""
        results = [self.build(pattern, self.base, self.dtype)]
        if self.rng.random() < 0.3:  # the same again on the same inputs: siblings, duplicates
            constants = {k: v for k, v in self.bound.items() if v.is_initializer()}
            self.bound = {k: v for k, v in self.bound.items() if k not in constants}
            if self.rng.random() < 0.5:
                self.bound.update(constants)
            self.made.clear()
            results.append(self.build(pattern, self.base, self.dtype))
        for value in results:
            node = value.producer()
            assert node is not None
            for output in node.outputs:
                self.finish(output)
        if not self.graph.outputs:
            raise DiscardError("no tensor comes out")
        return self.model

    def finish(self, value: ir.Value) -> None:
        """Make a value an output of the graph, itself or through a node."""
        if not isinstance(value.type, ir.TensorType):
            if isinstance(value.type, ir.SequenceType):
                value = self.node("ConcatFromSequence", [value], {"axis": 0})
            else:
                return
        elif self.rng.random() < 0.5:
            value = self.node("Identity", [value], {})
        self.graph.outputs.append(value)

    # --- values ---

    def build(self, pattern: ValuePattern, shape: Shape | None, dtype: ir.DataType) -> ir.Value:
        if isinstance(pattern, Var):
            if pattern.name not in self.bound:
                self.bound[pattern.name] = self.variable(shape, dtype)
            return self.bound[pattern.name]
        if isinstance(pattern, AnyOf):
            return self.build(self.pick(pattern.alternatives), shape, dtype)
        if isinstance(pattern, Const):
            return self.constant(pattern, None, 0, [], {}, shape, dtype)
        return self.operator(pattern, shape, dtype)

    def operator(self, pattern: OpPattern, shape: Shape | None, dtype: ir.DataType) -> ir.Value:
        """The node of a pattern. One that occurs again, by name or as the same object, mostly is
        the same node."""
        key = pattern.name or id(pattern)
        if key in self.made and self.rng.random() < 0.85:
            return self.made[key]
        self.made[key] = made = self.new_operator(pattern, shape, dtype)
        return made

    def new_operator(self, pattern: OpPattern, shape: Shape | None, dtype: ir.DataType) -> ir.Value:
        op_type = self.pick(pattern.op_types)
        shape = None if shape is not None and self.rng.random() < 0.1 else shape
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in pattern.attributes}
        attributes = {**attributes_for(op_type, self.rng, self.opset, shape), **wanted}
        inputs: list[ir.Value | None] = [None] * len(pattern.inputs)
        order = sorted(range(len(inputs)), key=lambda i: isinstance(pattern.inputs[i], Const))
        for i in order:
            part = pattern.inputs[i]
            if part is None:
                continue
            below = operand_shape(op_type, i, shape, inputs, attributes, self.rng)
            kind = self.operand_dtype(op_type, i, dtype)
            if isinstance(part, Const):
                inputs[i] = self.constant(part, op_type, i, inputs, attributes, below, kind)
            else:
                inputs[i] = self.build(part, below, kind)
        if len(inputs) == 2 and op_type in ("Add", "Mul") and self.rng.random() < 0.5:
            inputs.reverse()
        if pattern.rest:
            extra = extra_inputs(op_type, len(inputs), inputs, attributes, self.rng, self.opset)
            inputs += [None if e is None else self.initializer(e) for e in extra]
        count = max(pattern.output + 1, int(attributes.pop("_outputs", 1)))
        made = self.node(op_type, inputs, attributes, pattern.domain, count)
        node = made.producer()
        assert node is not None
        return node.outputs[pattern.output]

    def operand_dtype(self, op_type: str, index: int, dtype: ir.DataType) -> ir.DataType:
        if op_type in BOOLS or (op_type == "Where" and index == 0):
            return ir.DataType.BOOL
        if op_type in BITS:
            return ir.DataType.INT32
        if op_type in ("Gather", "GatherND", "SequenceAt", "OneHot") and index == 1:
            return ir.DataType.INT64
        if op_type in COMPARES or dtype == ir.DataType.BOOL:
            return self.dtype
        if op_type == "Cast":
            kinds = [ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE]
            return kinds[self.rng.integers(4)]
        return dtype

    def variable(self, shape: Shape | None, dtype: ir.DataType) -> ir.Value:
        dims = self.random_shape() if shape is None else self.perhaps_symbolic(shape)
        static = all(isinstance(d, int) for d in dims)
        if static and self.rng.random() < 0.06:
            return self.initializer(self.numbers(dims, dtype))
        value = ir.Value(name=self.name("x"), shape=ir.Shape(dims), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        if dtype in FLOATS and self.rng.random() < 0.2:
            return self.node(self.pick(("Neg", "Relu", "Tanh")), [value], {})
        return value

    def constant(
        self,
        pattern: Const,
        op_type: str | None,
        index: int,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, object],
        shape: Shape | None,
        dtype: ir.DataType,
    ) -> ir.Value:
        if pattern.name in self.bound and pattern.name:
            return self.bound[pattern.name]
        if pattern.value is not None:
            form = [(), (), (), (1,), (1, 1)][self.rng.integers(5)]
            array = np.full(form, pattern.value).astype(dtype.numpy())
        else:
            made = None
            if op_type is not None:
                made = constant_for(op_type, index, inputs, attributes, self.rng, dtype, self.opset)
            array = self.numbers(self.random_shape(static=True), dtype) if made is None else made
        value = self.initializer(array)
        if pattern.name:
            self.bound[pattern.name] = value
        return value

    # --- parts ---

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, object],
        domain: str = "",
        count: int = 1,
    ) -> ir.Value:
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=count,
            name=self.name("n"),
        )
        for value in node.outputs:
            value.name = self.name("v")
        self.graph.append(node)
        self.engine.infer_node(node)
        return node.outputs[0]

    def initializer(self, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=self.name("w"))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(list(array.shape)),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def numbers(self, shape: Sequence[int], dtype: ir.DataType) -> np.ndarray:
        if dtype == ir.DataType.BOOL:
            return self.rng.integers(0, 2, shape).astype(bool)
        if dtype.is_integer():
            return self.rng.integers(-4, 5, shape).astype(dtype.numpy())
        return self.rng.standard_normal(shape).astype(dtype.numpy())

    def random_shape(self, *, static: bool = False) -> Shape:
        rank = self.rng.choice([0, 1, 2, 3, 4, 4], p=[0.06, 0.14, 0.25, 0.25, 0.15, 0.15])
        dims = tuple(int(d) for d in self.rng.choice([1, 2, 3, 4, 5], rank))
        return dims if static else self.perhaps_symbolic(dims)

    def perhaps_symbolic(self, shape: Shape) -> Shape:
        if not self.symbolic:
            return shape
        first, *others = shape or (1,)
        return ("batch", *others) if shape and self.rng.random() < 0.8 and first != 1 else shape

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def pick(self, items: Sequence):
        return items[self.rng.integers(len(items))]


def patterns(rule: RewriteRule) -> tuple[OpPattern, ...]:
    found = rule.pattern()
    return (found,) if isinstance(found, OpPattern) else tuple(found)


# --- near-misses -------------------------------------------------------------------------------


def near_misses(model: ir.Model, rng: np.random.Generator) -> Iterator[tuple[str, ir.Model]]:
    """Copies of a model with one thing changed, that a rule may no longer match or must still get
    right. Some are no sound models: the caller drops those."""
    yield "inner value is an output", _inner_output(model.clone(), rng)
    yield "inner value used elsewhere", _inner_used(model.clone(), rng)
    yield "constant changed", _constant_changed(model.clone(), rng)
    yield "constant of another shape", _constant_reshaped(model.clone(), rng)
    yield "attribute changed", _attribute_changed(model.clone(), rng)
    yield "integers", _integers(model.clone())
    yield "rank raised", _rank_raised(model.clone(), rng)
    yield "size 1", _size_changed(model.clone(), rng)


def _inner(model: ir.Model) -> list[ir.Value]:
    return [v for n in model.graph for v in n.outputs if v.uses() and not v.is_graph_output()]


def _inner_output(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    if inner := _inner(model):
        model.graph.outputs.append(inner[rng.integers(len(inner))])
    return model


def _inner_used(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    if inner := _inner(model):
        value = inner[rng.integers(len(inner))]
        node = ir.Node("", "Identity", [value], num_outputs=1, name="again")
        node.outputs[0].name, node.outputs[0].type = "again", value.type
        node.outputs[0].shape = value.shape
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    return model


def _set(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(list(array.shape))


def _weights(model: ir.Model) -> list[ir.Value]:
    return list(model.graph.initializers.values())


def _constant_changed(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    if values := _weights(model):
        value = values[rng.integers(len(values))]
        array = value.const_value.numpy()
        if array.dtype == bool:
            changed = ~array
        elif array.dtype.kind in "iu":
            changed = array + rng.integers(-1, 2, array.shape).astype(array.dtype)
        else:
            changed = array + rng.standard_normal(array.shape).astype(array.dtype)
        _set(value, np.asarray(changed).astype(array.dtype).reshape(array.shape))
    return model


def _constant_reshaped(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    if values := _weights(model):
        value = values[rng.integers(len(values))]
        array = value.const_value.numpy()
        forms = [array[None], array[..., None], array.reshape(-1), np.stack([array, array])]
        _set(value, np.ascontiguousarray(forms[rng.integers(4)]))
    return model


def _attribute_changed(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    places = [
        (node, item)
        for node in model.graph
        for item in node.attributes.values()
        if item.type in (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT)
    ]
    if places:
        node, item = places[rng.integers(len(places))]
        if item.type == ir.AttributeType.FLOAT:
            changed = item.as_float() * 1.5 + 0.25
        elif item.name in ("keepdims", "transA", "transB"):
            changed = 1 - item.as_int()
        elif item.type == ir.AttributeType.INT:
            changed = item.as_int() + int(rng.choice([-1, 1]))
        else:
            changed = [int(i) for i in rng.permutation(item.as_ints())]
        node.attributes[item.name] = ir.convenience.convert_attribute(item.name, changed)
    return model


def _integers(model: ir.Model) -> ir.Model:
    """Every float an int32."""
    for value in model.graph.inputs:
        if value.dtype in FLOATS:
            value.type = ir.TensorType(ir.DataType.INT32)
    for value in _weights(model):
        array = value.const_value.numpy()
        if array.dtype.kind == "f":
            _set(value, np.round(array).astype(np.int32))
            value.type = ir.TensorType(ir.DataType.INT32)
    return model


def _rank_raised(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    if values := [v for v in model.graph.inputs if v.shape is not None]:
        value = values[rng.integers(len(values))]
        value.shape = ir.Shape([int(rng.choice([1, 2])), *value.shape.dims])
    return model


def _size_changed(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    if values := [v for v in model.graph.inputs if v.shape is not None and len(v.shape)]:
        value = values[rng.integers(len(values))]
        dims = list(value.shape.dims)
        dims[rng.integers(len(dims))] = 1
        value.shape = ir.Shape(dims)
    return model


def forget_shapes(model: ir.Model) -> None:
    """Drop what was inferred, after an edit."""
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.type = None, None
