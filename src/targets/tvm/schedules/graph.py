"""A Relax function as a flat list of nodes that the rules can match on.

Names are normalized (`relax.nn.relu` and `relax.relu` are both `relu`), importer idioms become one
node (a clip by two scalars, `where(isnan(x), c, x)`), and operators on constants are evaluated.
Reading only; `rewrite.py` writes the new function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# A Relax expression: a variable, a constant, or anything else. tvm has no type stubs.
Expr = Any


@dataclasses.dataclass(eq=False)
class Node:
    """One binding. `shape` is None where it is not a tensor of static shape."""

    index: int
    var: Expr
    op: str
    inputs: list[Expr]
    shape: tuple[int, ...] | None
    dtype: str
    value: Expr
    params: tuple[float, ...] = ()

    @property
    def attrs(self) -> Any:
        """The operator's attributes."""
        return self.value.attrs


def static_type(expr: Expr) -> tuple[tuple[int, ...] | None, str]:
    """`(shape, dtype)` of a tensor expression; the shape is None unless it is static."""
    from tvm import relax

    kind = getattr(expr, "ty", None)
    if not isinstance(kind, relax.TensorType):
        return None, ""
    dtype = str(kind.dtype)
    if kind.shape is None or not hasattr(kind.shape, "values"):
        return None, dtype
    dims = []
    for value in kind.shape.values:
        if not hasattr(value, "value"):
            return None, dtype
        dims.append(int(value.value))
    return tuple(dims), dtype


def int_tuple(values: Any) -> tuple[int, ...]:
    """An attribute holding integers."""
    return tuple(int(value) for value in values)


class FlatGraph:
    """The nodes of a function whose body is one block of plain bindings."""

    def __init__(self, module: Any, function: Any) -> None:
        from tvm import relax

        self._constant_type = type(relax.const(0.0, "float32"))
        self._module = module
        self.nodes: list[Node] = []
        self.producer: dict[Expr, Node] = {}
        self.users: dict[Expr, list[Node]] = {}
        self._constants: dict[Expr, Array] = {}
        self._arrays: dict[Expr, Array] = {}
        for binding in function.body.blocks[0].bindings:
            self._add(binding)
        self.results = set(self._variables(function.body.body))
        for node in self.nodes:
            if node.op == "where":
                self._match_nan_replacement(node)
            elif node.op == "dequantize":
                self._match_quantize_pair(node)

    @staticmethod
    def refusal(function: Any) -> str:
        """Why a function can't be flattened; empty if it can."""
        from tvm import relax

        if not isinstance(function.body, relax.SeqExpr) or len(function.body.blocks) != 1:
            return "control flow or several blocks"
        for binding in function.body.blocks[0].bindings:
            if not isinstance(binding, relax.VarBinding):
                return "a match_cast"
            if isinstance(binding.value, (relax.If, relax.Function)):
                return "control flow"
        return ""

    def constant(self, expr: Expr) -> Array | None:
        """The value of a constant expression, else None."""
        if isinstance(expr, self._constant_type):
            if expr not in self._arrays:
                self._arrays[expr] = expr.value.numpy()
            return self._arrays[expr]
        return self._constants.get(expr)

    def scalar(self, expr: Expr) -> float | None:
        """The value of a constant with one element, else None."""
        value = self.constant(expr)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def escapes(self, node: Node, inside: set[Node]) -> bool:
        """Whether the node's value is used outside a set of nodes."""
        return node.var in self.results or any(
            user not in inside for user in self.users.get(node.var, ())
        )

    def _variables(self, expr: Expr) -> list[Expr]:
        from tvm import relax

        found: list[Expr] = []

        def visit(item: Expr) -> None:
            if isinstance(item, relax.Var):
                found.append(item)

        relax.analysis.post_order_visit(expr, visit)
        return found

    def _add(self, binding: Any) -> None:
        value = binding.value
        shape, dtype = static_type(binding.var)
        op, inputs, params = self._match(value)
        node = Node(len(self.nodes), binding.var, op, inputs, shape, dtype, value, params)
        self.nodes.append(node)
        self.producer[binding.var] = node
        folded = self._fold(node)
        if folded is not None:
            self._constants[binding.var] = folded
            node.op = "constant"
            return
        # All variables, also those inside tuples.
        uses = [item for item in self._variables(value) if self.constant(item) is None]
        for item in dict.fromkeys(uses):
            self.users.setdefault(item, []).append(node)

    def _match(self, value: Expr) -> tuple[str, list[Expr], tuple[float, ...]]:
        from tvm import ir, relax

        if isinstance(value, relax.Var):
            return "alias", [value], ()
        if not isinstance(value, relax.Call) or not isinstance(value.op, ir.Op):
            return "opaque", [], ()
        name = str(value.op.name).removeprefix("relax.").removeprefix("nn.")
        if name == "call_tir":
            return self._match_call_tir(value)
        args = list(value.args)
        if name == "clip":
            return self._match_clip(args)
        if name == "leakyrelu":
            return name, args, (float(value.attrs.alpha),)
        if name == "power" and self.scalar(args[1]) == 2.0:
            return "square", args[:1], ()
        if name == "power" and self.scalar(args[1]) == 0.5:
            return "sqrt", args[:1], ()
        return name, args, ()

    def _match_clip(self, args: list[Expr]) -> tuple[str, list[Expr], tuple[float, ...]]:
        bounds: list[Any] = [getattr(bound, "value", None) for bound in args[1:]]
        if any(not isinstance(bound, (int, float)) for bound in bounds):
            return "opaque", [], ()
        return "clip", args[:1], tuple(float(bound) for bound in bounds)

    def _match_nan_replacement(self, node: Node) -> None:
        """where(isnan(x), c, x) is one elementwise operation on x."""
        test, fill, data = node.inputs
        producer = self.producer.get(test)
        constant = self.scalar(fill)
        if (
            producer is not None
            and producer.op == "isnan"
            and constant is not None
            and producer.inputs[0].same_as(data)
        ):
            self._merge(node, producer, "nan_to", (constant,))

    def _match_quantize_pair(self, node: Node) -> None:
        """dequantize(quantize(x)) by the same scalars rounds and clips x, in float."""
        producer = self.producer.get(node.inputs[0])
        if producer is None or producer.op != "quantize" or node.dtype != "float32":
            return
        pairs = zip(producer.inputs[1:], node.inputs[1:], strict=True)
        found = [(self.scalar(first), self.scalar(second)) for first, second in pairs]
        (scale, scale_again), (zero, zero_again) = found
        if scale is None or zero is None or (scale, zero) != (scale_again, zero_again):
            return
        if static_type(producer.inputs[0])[1] != "float32" or producer.dtype not in _INTEGERS:
            return
        limits = np.iinfo(producer.dtype)
        params = (scale, float(limits.min) - zero, float(limits.max) - zero)
        self._merge(node, producer, "fake_quantize", params)

    def _merge(self, node: Node, producer: Node, op: str, params: tuple[float, ...]) -> None:
        """Make `node` one operation on what `producer` reads; the producer is dead if unused."""
        data = producer.inputs[0]
        node.op, node.inputs, node.params = op, [data], params
        readers = self.users.setdefault(data, [])
        if node not in readers:
            readers.append(node)
        others = self.users[producer.var]
        others.remove(node)
        if not others and producer.var not in self.results:
            producer.op = "dead"
            readers.remove(producer)

    def _match_call_tir(self, value: Expr) -> tuple[str, list[Expr], tuple[float, ...]]:
        """The ONNX importer emits Clip as loops of its own; anything else stays opaque."""
        import tvm_ffi
        from tvm import tirx

        inputs = list(value.args[1].fields) if hasattr(value.args[1], "fields") else []
        name = str(value.args[0].name_hint).rstrip("0123456789_")
        operations = {"maximum": tirx.Max, "minimum": tirx.Min}
        if name not in operations or len(inputs) != 2 or len(value.args) != 2:
            return "opaque", [], ()
        stores: list[Any] = []

        def visit(store: Any) -> None:
            stores.append(store.value)

        body = self._module[value.args[0]].body
        tvm_ffi.structural_walk(body, (tirx.BufferStore, visit), order="post")
        if len(stores) != 1 or not isinstance(stores[0], operations[name]):
            return "opaque", [], ()
        return name, inputs, ()

    def _fold(self, node: Node) -> Array | None:
        """The node's value if all its inputs are constants and numpy computes the same."""
        evaluate = _FOLDABLE.get(node.op)
        if evaluate is None or node.shape is None:
            return None
        if node.op == "alias":
            return self.constant(node.inputs[0])
        tensors = [item for item in node.inputs if static_type(item)[1]]
        values = [self.constant(item) for item in tensors]
        known = [value for value in values if value is not None]
        if not known or len(known) != len(values):
            return None
        with np.errstate(all="ignore"):
            result = evaluate(known, node)
        if result is None or np.shape(result) != node.shape:
            return None
        return np.asarray(result).astype(node.dtype, copy=False)


def _permuted(values: Sequence[Array], node: Node) -> Array:
    axes = node.attrs.axes
    return values[0].transpose(None if axes is None else [int(axis) for axis in axes])


def _reshaped(values: Sequence[Array], node: Node) -> Array:
    assert node.shape is not None
    return values[0].reshape(node.shape)


# Quantized types whose whole range float32 holds exactly.
_INTEGERS = ("int8", "uint8", "int16", "uint16")


def _dequantized(values: Sequence[Array], node: Node) -> Array | None:
    """scale * (q - zero point), per tensor or per channel."""
    data, scale, zero = values
    if data.dtype.kind not in "iu" or node.dtype != "float32":
        return None
    shape = [1] * data.ndim
    if data.ndim:
        shape[int(node.attrs.axis)] = -1

    def spread(value: Array) -> Array:
        return value.reshape(()) if value.size == 1 else value.reshape(shape)

    difference = data.astype(np.int32) - spread(zero).astype(np.int32)
    return np.asarray(difference.astype(np.float32) * spread(scale).astype(np.float32))


def _divided(values: Sequence[Array]) -> Array | None:
    return values[0] / values[1] if values[0].dtype.kind == "f" else None


def _reduced(reduce: Callable[..., Any]) -> Callable[[Sequence[Array], Node], Any]:
    def evaluate(values: Sequence[Array], node: Node) -> Array:
        axes = node.attrs.axis
        axis = None if axes is None else tuple(int(item) for item in axes)
        # In double precision: constants are to be no less exact than TVM would make them.
        return np.asarray(
            reduce(values[0].astype(np.float64), axis=axis, keepdims=bool(node.attrs.keepdims))
        )

    return evaluate


_FOLDABLE: dict[str, Callable[[Sequence[Array], Node], Any]] = {
    "alias": lambda values, node: values[0],
    "permute_dims": _permuted,
    "reshape": _reshaped,
    "expand_dims": _reshaped,
    "squeeze": _reshaped,
    "flatten": _reshaped,
    "isnan": lambda values, node: np.isnan(values[0]),
    "where": lambda values, node: np.where(values[0], values[1], values[2]),
    "add": lambda values, node: values[0] + values[1],
    "subtract": lambda values, node: values[0] - values[1],
    "multiply": lambda values, node: values[0] * values[1],
    "divide": lambda values, node: _divided(values),
    "square": lambda values, node: np.square(values[0]),
    "rsqrt": lambda values, node: 1 / np.sqrt(values[0]),
    "negative": lambda values, node: -values[0],
    "mean": _reduced(np.mean),
    "variance": _reduced(np.var),
    "sum": _reduced(np.sum),
    "broadcast_to": lambda values, node: np.broadcast_to(values[0], node.shape or ()),
    "less": lambda values, node: values[0] < values[1],
    "sqrt": lambda values, node: np.sqrt(values[0]),
    "dequantize": _dequantized,
    "astype": lambda values, node: values[0].astype(node.dtype),
}
