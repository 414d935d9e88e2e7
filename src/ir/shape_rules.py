"""What a shape rule sees and how it is found: `Call`, `rule`, and the operators' type signatures.

A rule is a function of one `Call` (a node with what is known of its inputs) that puts the shapes
of the outputs. Element types mostly need no rule: `signature` reads them from the ONNX operator
definitions, and checks the inputs against them. The rules are in `shape_rules_elementwise`,
`_movement`, `_compute`, `_contrib` and `_control`; running them over a model is in `shapes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from . import dims as dim_math
from .graph import ONNX_DOMAINS, Dim

Dims = tuple[Dim, ...]
Element = int | float | ir.SymbolicDim
Data = tuple[Element, ...]
"""The elements of a small tensor, flat in row-major order; symbols where they are not known."""


def element_grid(data: Data, dims: Dims) -> np.ndarray | None:
    """Followed elements as an object array of their shape; None when that is not static."""
    if not all(isinstance(d, int) for d in dims):
        return None
    flat = np.empty(len(data), object)
    flat[:] = data
    try:
        return flat.reshape([d for d in dims if isinstance(d, int)])
    except ValueError:  # a broadcast single element
        return None


class Contradiction(Exception):  # noqa: N818 (internal; becomes ShapeError or a diagnostic)
    """A node's inputs contradict its operator: why, and what to do about it."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.fix = fix


class Undecided(Exception):  # noqa: N818 (internal control flow)
    """A rule can say no more, because an input's shape is not known."""


class Fact:
    """What is known of one value.

    `dtype` and `dims` are those of the tensor (for a sequence or optional: of the tensors in it);
    `kind` is the full type where it is not a plain tensor; `items` the shapes of a sequence's
    elements one by one, where its length is known.
    """

    __slots__ = ("data", "dims", "dtype", "items", "kind")

    def __init__(
        self,
        dtype: ir.DataType | None = None,
        dims: Dims | None = None,
        data: Data | None = None,
        kind: ir.TypeProtocol | None = None,
        items: tuple[Dims | None, ...] | None = None,
    ) -> None:
        self.items = items
        self.dtype = dtype
        self.dims = dims
        self.data = data
        self.kind = kind


class Engine(Protocol):
    """What a rule may ask of the inference that runs it."""

    opsets: dict[str, int]

    def fact(self, value: ir.Value) -> Fact:
        """What is known of a value."""

    def fresh(self, value: ir.Value, axis: int) -> ir.SymbolicDim:
        """A symbol for a dimension that depends on data: the same one each time it is asked."""

    def attribute(self, node: ir.Node, name: str) -> ir.Attr | None:
        """An attribute, looked up at the call site where a function's caller sets it."""

    def infer_graph(self, graph: ir.Graph, *, certain: bool = True) -> None:
        """Infer a subgraph whose inputs have been bound; one that never runs may contradict."""

    def bind(self, value: ir.Value, fact: Fact) -> None:
        """Say what is known of a subgraph's input."""


class Call:
    """One node as a rule sees it."""

    __slots__ = ("engine", "node", "results")

    def __init__(self, engine: Engine, node: ir.Node) -> None:
        self.engine = engine
        self.node = node
        self.results: dict[int, Fact] = {}

    # Reading.

    @property
    def opset(self) -> int:
        """The opset version in force for the node."""
        domain = self.node.domain
        opsets = self.engine.opsets
        version = opsets.get(domain)
        if version is None and domain in ONNX_DOMAINS:
            version = opsets.get("", opsets.get("ai.onnx"))
        return version or 1

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        inputs = self.node.inputs
        return index < len(inputs) and inputs[index] is not None

    def fact(self, index: int) -> Fact:
        """What is known of input `index`; nothing when it is not given."""
        inputs = self.node.inputs
        if index >= len(inputs):
            return Fact()
        value = inputs[index]
        return Fact() if value is None else self.engine.fact(value)

    def dims(self, index: int) -> Dims | None:
        """Input dimensions, None when the rank is unknown."""
        return self.fact(index).dims

    def known(self, index: int) -> Dims:
        """Input dimensions; the rule ends here when the rank is unknown."""
        found = self.fact(index).dims
        if found is None:
            raise Undecided
        return found

    def rank(self, index: int, *allowed: int, at_least: int = 0) -> Dims:
        """Input dimensions, checked to have one of the ranks allowed."""
        found = self.known(index)
        if (allowed and len(found) not in allowed) or len(found) < at_least:
            wanted = " or ".join(map(str, allowed)) if allowed else f"at least {at_least}"
            self.fail(
                f"input {index} {dim_math.text(found)} has rank {len(found)}, expected {wanted}"
            )
        return found

    def dtype(self, index: int) -> ir.DataType | None:
        """Input element type."""
        return self.fact(index).dtype

    def data(self, index: int) -> Data | None:
        """Elements of a small input, symbols included, or None."""
        return self.fact(index).data

    def ints(self, index: int) -> tuple[int, ...] | None:
        """Elements of a small integer input if all are known ints, else None."""
        data = self.fact(index).data
        if data is None or not all(type(e) is int for e in data):
            return None
        return data  # type: ignore[return-value]

    def floats(self, index: int) -> tuple[float, ...] | None:
        """Elements of a small input if all are known numbers, else None."""
        data = self.fact(index).data
        if data is None or any(isinstance(e, ir.SymbolicDim) for e in data):
            return None
        return data  # type: ignore[return-value]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's plain value: int, float, str, tuple, tensor or graph."""
        found = self.engine.attribute(self.node, name)
        if found is None:
            return default
        return tuple(found.value) if isinstance(found.value, (list, tuple)) else found.value

    def axis(self, value: int, rank: int, what: str = "axis") -> int:
        """A possibly negative axis as one in [0, rank)."""
        if not -rank <= value < rank:
            self.fail(f"{what} {value} is out of range for rank {rank}")
        return value % rank if rank else 0

    def fresh(self, output: int, axis: int) -> Dim:
        """A symbol for a dimension that depends on data."""
        return self.engine.fresh(self.node.outputs[output], axis)

    # Answering.

    def put(
        self,
        output: int = 0,
        dims: Sequence[Dim] | None = None,
        *,
        dtype: ir.DataType | None = None,
        data: Data | None = None,
        kind: ir.TypeProtocol | None = None,
        items: tuple[Dims | None, ...] | None = None,
    ) -> None:
        """Say what is known of an output; later calls add to earlier ones."""
        if output >= len(self.node.outputs):
            return
        fact = self.results.setdefault(output, Fact())
        if dims is not None:
            fact.dims = tuple(dims)
        if dtype is not None:
            fact.dtype = dtype
        if data is not None:
            fact.data = data
        if kind is not None:
            fact.kind = kind
        if items is not None:
            fact.items = items

    def fail(self, why: str, fix: str = "") -> NoReturn:
        """The node contradicts itself."""
        raise Contradiction(why, fix)

    def require_same(self, a: Dim, b: Dim, why: str, fix: str = "") -> None:
        """Fail when two dimensions are known to differ."""
        if dim_math.same(a, b) is False:
            raise Contradiction(why, fix)


Rule = Callable[[Call], None]
RULES: dict[tuple[str, str], Rule] = {}


def rule(names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators named."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            assert (domain, name) not in RULES, name
            RULES[domain, name] = function
        return function

    return register


# --- type signatures from the operator definitions -------------------------------------------


class Parameter(NamedTuple):
    """One formal input or output: its type variable or type, what is allowed, how it repeats."""

    name: str
    variable: str
    allowed: frozenset[str]
    optional: bool
    variadic: bool
    homogeneous: bool


class Signature(NamedTuple):
    """The types of one version of an operator."""

    schema: onnx.defs.OpSchema
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    least_inputs: int
    most_inputs: int


@functools.lru_cache(maxsize=4096)
def signature(domain: str, name: str, opset: int) -> Signature | None:
    """The operator's types as defined for `opset`; None for an operator ONNX does not define."""
    try:
        schema = onnx.defs.get_schema(name, opset, domain)
    except onnx.defs.SchemaError:
        return None
    return Signature(
        schema,
        tuple(_parameter(p) for p in schema.inputs),
        tuple(_parameter(p) for p in schema.outputs),
        schema.min_input,
        schema.max_input,
    )


def _parameter(formal: onnx.defs.OpSchema.FormalParameter) -> Parameter:
    option = onnx.defs.OpSchema.FormalParameterOption
    return Parameter(
        formal.name,
        formal.type_str,
        frozenset(formal.types),
        formal.option == option.Optional,
        formal.option == option.Variadic,
        formal.is_homogeneous,
    )


_ONNX_NAMES = {
    ir.DataType.FLOAT8E4M3FN: "float8e4m3fn",
    ir.DataType.FLOAT8E4M3FNUZ: "float8e4m3fnuz",
    ir.DataType.FLOAT8E5M2: "float8e5m2",
    ir.DataType.FLOAT8E5M2FNUZ: "float8e5m2fnuz",
}
_TYPE_TEXT = {
    dtype: f"tensor({_ONNX_NAMES.get(dtype, dtype.name.lower())})" for dtype in ir.DataType
}
_TENSOR_TYPES = {text: dtype for dtype, text in _TYPE_TEXT.items()}


def fact_type_text(fact: Fact) -> str | None:
    """`tensor(float)`, `seq(tensor(int64))`, as the operator definitions write types."""
    if fact.kind is not None:
        return type_text(fact.kind)
    return None if fact.dtype is None else _TYPE_TEXT[fact.dtype]


def type_text(kind: ir.TypeProtocol) -> str:
    """The definitions' name of an onnx_ir type."""
    match kind:
        case ir.SequenceType():
            return f"seq({type_text(kind.elem_type)})"
        case ir.OptionalType():
            return f"optional({type_text(kind.elem_type)})"
        case ir.SparseTensorType():
            return f"sparse_{_TYPE_TEXT[kind.dtype]}"
    return _TYPE_TEXT[kind.dtype]


def _fact_of_text(text: str) -> Fact:
    if text.startswith("seq("):
        inner = parse_type(text[4:-1])
        return Fact(inner.dtype, kind=ir.SequenceType(inner)) if inner is not None else Fact()
    if text.startswith("optional("):
        inner = parse_type(text[9:-1])
        return Fact(inner.dtype, kind=ir.OptionalType(inner)) if inner is not None else Fact()
    return Fact(dtype=_TENSOR_TYPES.get(text))


def parse_type(text: str) -> Any:
    """The onnx_ir type of a definition's type name, or None."""
    fact = _fact_of_text(text)
    if fact.kind is not None:
        return fact.kind
    return ir.TensorType(fact.dtype) if fact.dtype is not None else None


def check_types(call: Call, sig: Signature) -> list[Fact]:
    """Check a node's inputs against a signature and return what it says of each output's type.

    Raises `Contradiction` for a missing input, a type that is not allowed, and two inputs of one
    type variable that differ.
    """
    node = call.node
    given = len(node.inputs)
    if given < sig.least_inputs or given > sig.most_inputs:
        raise Contradiction(
            f"{node.op_type} takes {sig.least_inputs} to {sig.most_inputs} inputs, it has {given}"
        )
    bound: dict[str, tuple[Fact, str]] = {}
    formals = sig.inputs
    last = len(formals) - 1
    for index, value in enumerate(node.inputs):
        formal = formals[min(index, last)]
        if value is None:
            if not formal.optional and not formal.variadic:
                raise Contradiction(f"its required input {index} ({formal.name}) is empty")
            continue
        fact = call.engine.fact(value)
        text = fact_type_text(fact)
        if text is None:
            continue
        if text not in formal.allowed:
            raise Contradiction(
                f"input {index} ({formal.name}) is {text}, which {node.op_type} of opset "
                f"{call.opset} does not take",
                f"cast it to one of: {', '.join(sorted(formal.allowed)[:8])}",
            )
        if formal.variadic and not formal.homogeneous:
            continue
        earlier = bound.setdefault(formal.variable, (fact, text))
        if earlier[1] != text:
            raise Contradiction(
                f"its inputs must have one element type, input {index} ({formal.name}) is {text} "
                f"and an earlier one {earlier[1]}",
                "insert a Cast so that both have the same type",
            )
    return _output_types(node, sig, bound)


def _output_types(node: ir.Node, sig: Signature, bound: dict[str, tuple[Fact, str]]) -> list[Fact]:
    result = []
    formals = sig.outputs
    for index in range(len(node.outputs)):
        if not formals:
            break
        formal = formals[min(index, len(formals) - 1)]
        found = bound.get(formal.variable)
        if found is not None and (formal.homogeneous or not formal.variadic):
            result.append(Fact(dtype=found[0].dtype, kind=found[0].kind))
        elif len(formal.allowed) == 1:
            result.append(_fact_of_text(next(iter(formal.allowed))))
        else:
            result.append(Fact())
    return result
