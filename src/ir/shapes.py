"""Strict shape and type inference over a model: in place, symbols kept, first contradiction named.

Here: running the rules (`shape_rules_*`) over graphs, subgraphs and function calls, merging what
is inferred with what the model declares, and re-inferring after an edit. What one operator does
is not here. Only shapes, types and constants of at most 1,024 integers are read, so an
architecture without weights infers like any model.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..errors import Diagnostic, EdgepassError, ShapeError
from . import (
    dims as dim_math,
)
from . import (
    shape_rules_compute,
    shape_rules_contrib,
    shape_rules_control,
    shape_rules_movement,
)
from .graph import (
    ONNX_DOMAINS,
    Dim,
    all_nodes,
    constant_tensor,
    describe_node,
    graph_tree,
    graphs,
    is_absent,
    node_subgraphs,
)
from .shape_fallback import infer_with_onnx
from .shape_rules import (
    RULES,
    Call,
    Contradiction,
    Data,
    Dims,
    Fact,
    Undecided,
    check_types,
    signature,
    type_text,
)
from .shape_rules_control import common_dims
from .shape_rules_elementwise import MAX_DATA

__all__ = ["ShapeInference", "ShapeReport", "infer_node", "infer_shapes", "infer_shapes_from"]

# Imported for the rules they register.
_RULE_MODULES = (
    shape_rules_compute,
    shape_rules_contrib,
    shape_rules_control,
    shape_rules_movement,
)

_MAX_FLOATS = 16  # Resize scales, Range ends: the only floats a shape depends on
_FOLLOWED = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
_MALFORMED = (TypeError, ValueError, IndexError, KeyError, AttributeError)


@dataclasses.dataclass(frozen=True)
class ShapeReport:
    """What an inference found. `diagnostics` is empty unless it ran with `strict=False`.

    `outputs` counts node outputs visited, `ranked` those whose rank is known, `static` those
    with every dimension an int. `mended` are declared shapes that gave way, one sentence each.
    """

    diagnostics: tuple[Diagnostic, ...]
    outputs: int
    ranked: int
    static: int
    mended: tuple[str, ...]
    _data: Mapping[ir.Value, Data] = dataclasses.field(repr=False)

    def shape_values(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """The elements of a small integer tensor, flat, symbols for what depends on an input.

        None when they are not followed. An element of which nothing is known is an unnamed symbol.
        """
        data = self._data.get(value)
        if data is None or value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            return None
        return tuple(dim_math.UNKNOWN if isinstance(e, float) else e for e in data)

    def condition(self, value: ir.Value) -> bool | None:
        """What a bool of one element always is, or None when that is not known."""
        data = self._data.get(value)
        if data is None or value.dtype != ir.DataType.BOOL or len(data) != 1:
            return None
        return bool(data[0]) if isinstance(data[0], int) else None


def infer_shapes(
    model: ir.Model, *, strict: bool = True, refresh: bool = False, mend: bool = False
) -> ShapeReport:
    """Set `shape` and `type` of every value of the model, subgraphs and functions included.

    Declared shapes are merged with inferred ones: static beats symbolic, symbolic beats unknown,
    and names that graph inputs and outputs declare are kept. With `refresh` what inner values
    declare is replaced instead, for use after an edit that changes shapes. With `mend` a declared
    shape that can't be that of the result gives way to what is computed, as it does in ONNX Runtime
    (exporters leave such behind); the report's `mended` says where.

    Raises:
        ShapeError: at the first node whose inputs contradict its operator, or whose declared
            output contradicts what it computes. With `strict=False` these become diagnostics of the
            report, and inference goes on with what is declared.
    """
    engine = ShapeInference(model, strict=strict, refresh=refresh, mend=mend)
    engine.run()
    return engine.report()


def infer_shapes_from(
    model: ir.Model, nodes: Iterable[ir.Node], *, strict: bool = True, refresh: bool = True
) -> ShapeReport:
    """Re-infer some nodes and whatever follows from a change in their outputs, and nothing else.

    By default what the values declared is replaced (see `infer_shapes`). Raises as it does.
    """
    engine = ShapeInference(model, strict=strict, refresh=refresh)
    engine.update(nodes)
    return engine.report()


def infer_node(node: ir.Node, context: ShapeInference) -> bool:
    """Re-infer one node's outputs; whether anything about them changed. Raises `ShapeError`."""
    return context.infer_node(node)


class ShapeInference:
    """One inference over one model; keep it to re-infer single nodes after edits.

    Implements `shape_rules.Engine`, which is what rules see of it.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        strict: bool = True,
        refresh: bool = False,
        mend: bool = False,
    ) -> None:
        self.model = model
        self.strict = strict
        self.refresh = refresh
        self.mended: dict[str, str] | None = {} if mend else None
        self.opsets: dict[str, int] = dict(model.opset_imports)
        self.diagnostics: list[Diagnostic] = []
        self._facts: dict[ir.Value, Fact] = {}
        self._fresh: dict[tuple[ir.Value, int], ir.SymbolicDim] = {}
        self._taken: set[str] = _interface_symbols(model)
        self._fresh_names: set[str] = set()
        self._declared: dict[ir.Value, tuple[Dims | None, ir.TypeProtocol | None]] = {}
        self._frames: list[tuple[ir.Node, ir.Function]] = []
        self._body_shapes: dict[ir.Value, Dims | None] = {}
        self._depth = 0
        self._active: set[ir.Node] = set()
        self._visited: set[ir.Node] = set()
        self._owners: dict[ir.Graph, ir.Node] | None = None

    # --- running ---

    def run(self) -> None:
        """Infer the main graph (and, from its nodes, subgraphs and functions called)."""
        for node in self.model.graph:
            self._visit(node)

    def update(self, nodes: Iterable[ir.Node]) -> None:
        """Re-infer nodes, and the consumers of every output that changed."""
        waiting = deque(nodes)
        queued = set(waiting)
        while waiting:
            node = waiting.popleft()
            queued.discard(node)
            if not self._visit(node):
                continue
            for value in node.outputs:
                for user in value.consumers():
                    if user not in queued:
                        queued.add(user)
                        waiting.append(user)
                parent = self._owner(value)
                if parent is not None and parent not in queued:
                    queued.add(parent)
                    waiting.append(parent)

    def _owner(self, value: ir.Value) -> ir.Node | None:
        """The node whose subgraph outputs this value, if any."""
        if not value.is_graph_output() or value.graph is self.model.graph:
            return None
        if self._owners is None:
            self._owners = _subgraph_owners(self.model)
        return self._owners.get(value.graph) if isinstance(value.graph, ir.Graph) else None

    def infer_node(self, node: ir.Node) -> bool:
        """Re-infer one node; whether anything about its outputs changed."""
        return self._visit(node)

    def infer_graph(self, graph: ir.Graph, *, certain: bool = True) -> None:
        """Infer a subgraph whose inputs have been bound.

        One that is not certain to run may contradict; of such a one only what it declares is kept,
        so that nothing is rewritten by what would be true if it did run.
        """
        strict, kept = self.strict, len(self.diagnostics)
        self.strict = strict and certain
        self._depth += 1
        try:
            for node in graph:
                self._visit(node)
        finally:
            self._depth -= 1
            self.strict = strict
        if not certain and len(self.diagnostics) > kept:
            del self.diagnostics[kept:]
            self._forget(graph)

    def _forget(self, graph: ir.Graph) -> None:
        """Go back to what the values of a subgraph, and of those in it, declare."""
        for inner in graph_tree(graph):
            for value in (*inner.inputs, *(v for node in inner for v in node.outputs)):
                dims, _ = self._original(value)
                value.shape = None if dims is None else ir.Shape(dims)
                self._facts[value] = self._declared_fact(value)

    def report(self) -> ShapeReport:
        """Counts, diagnostics and followed data so far."""
        outputs = ranked = static = 0
        for node in self._visited:
            for value in node.outputs:
                outputs += 1
                if value.shape is None:
                    continue
                ranked += 1
                static += all(type(d) is int for d in value.shape.dims)
        data = {v: f.data for v, f in self._facts.items() if f.data is not None}
        mended = tuple((self.mended or {}).values())
        return ShapeReport(tuple(self.diagnostics), outputs, ranked, static, mended, data)

    # --- what rules ask ---

    def attribute(self, node: ir.Node, name: str) -> ir.Attr | None:
        """An attribute, looked up at the call site where a function's caller sets it."""
        found = node.attributes.get(name)
        level = len(self._frames) - 1
        while found is not None and found.is_ref():
            if level < 0 or found.ref_attr_name is None:
                return None
            caller, function = self._frames[level]
            reference = found.ref_attr_name
            found = caller.attributes.get(reference) or function.attributes.get(reference)
            level -= 1
        return found if found is not None and found.value is not None else None

    def fresh(self, value: ir.Value, axis: int) -> ir.SymbolicDim:
        """A symbol named after the value and the axis: the same one each time it is asked."""
        found = self._fresh.get((value, axis))
        if found is None:
            stem = re.sub(r"\W", "_", value.name or "value")
            base = (
                f"{stem}_d{axis}" if stem[:1].isalpha() or stem[:1] == "_" else f"_{stem}_d{axis}"
            )
            name, n = base, 1
            while name in self._taken:
                n += 1
                name = f"{base}_{n}"
            self._taken.add(name)
            self._fresh_names.add(name)
            found = self._fresh[value, axis] = ir.SymbolicDim(name)
        return found

    def fact(self, value: ir.Value) -> Fact:
        """What is known of a value: inferred, else declared or read from its constant."""
        found = self._facts.get(value)
        if found is not None:
            return found
        producer = value.producer()
        if producer is not None and producer not in self._active and self._may_follow(value):
            self._visit(producer)  # incremental use: shape computations upstream are still unknown
            found = self._facts.get(value)
            if found is not None:
                return found
        found = self._declared_fact(value)
        self._facts[value] = found
        return found

    def bind(self, value: ir.Value, fact: Fact) -> None:
        """Say what is known of a subgraph's input, merged with what it declares."""
        dims, kind = self._original(value, visited_again=True)
        if dims is not None and fact.dims is not None and len(dims) != len(fact.dims):
            dims = None  # a body declares what its caller contradicts: the caller is right
        merged = fact.dims if dims is None else self._merge(value, dims, fact.dims)
        dtype = fact.dtype if fact.dtype is not None or kind is None else kind.dtype
        bound = Fact(dtype, merged, fact.data, fact.kind, fact.items)
        self._facts[value] = bound
        self._write(value, bound)

    # --- one node ---

    def _visit(self, node: ir.Node) -> bool:
        if node in self._active:
            return False
        self._active.add(node)
        self._visited.add(node)
        try:
            return self._infer(node)
        finally:
            self._active.discard(node)

    def _infer(self, node: ir.Node) -> bool:
        call = Call(self, node)
        types: list[Fact] = []
        try:
            types = self._apply(call)
        except Contradiction as found:
            self._report(node, found)
            call.results.clear()
        changed = False
        for index, value in enumerate(node.outputs):
            result = call.results.get(index) or Fact()
            if index < len(types) and result.dtype is None and result.kind is None:
                result.dtype, result.kind = types[index].dtype, types[index].kind
            try:
                changed = self._commit(value, result) or changed
            except Contradiction as found:
                self._report(node, found)
                self._facts[value] = self._declared_fact(value)
        return changed

    def _apply(self, call: Call) -> list[Fact]:
        """Check types, then run the node's rule, function body or ONNX's own inference."""
        node = call.node
        function = self.model.functions.get(node.op_identifier())
        if function is not None:
            self._call_function(call, function)
            return []
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        sig = signature(domain, node.op_type, call.opset)
        types = check_types(call, sig) if sig is not None else []
        rule = RULES.get((domain, node.op_type))
        try:
            if domain == "" and node.op_type == "Constant":
                self._constant(call)
            elif rule is not None:
                rule(call)
            elif sig is not None:
                infer_with_onnx(call, sig, self.model.ir_version)
            else:
                self._keep_declared(call)
        except Undecided:
            pass
        except _MALFORMED as error:
            raise Contradiction(
                f"its inputs or attributes do not have the form {node.op_type} defines ({error})"
            ) from error
        return types

    def _constant(self, call: Call) -> None:
        value = call.node.outputs[0]
        fact = self._constant_fact(value)
        if fact is not None:
            call.put(0, fact.dims, dtype=fact.dtype, data=fact.data)

    def _keep_declared(self, call: Call) -> None:
        for index, value in enumerate(call.node.outputs):
            dims, kind = self._original(value)
            plain = kind is None or isinstance(kind, ir.TensorType)
            call.put(index, dims, dtype=value.dtype, kind=None if plain else kind)

    def _call_function(self, call: Call, function: ir.Function) -> None:
        """Infer the body with the call's inputs; what its calls disagree on stays open in it."""
        node = call.node
        if any(other is function for _, other in self._frames):
            raise Contradiction(f"function {function.name!r} calls itself")
        if len(node.inputs) > len(function.inputs):
            raise Contradiction(
                f"function {function.name!r} takes {len(function.inputs)} inputs, "
                f"it is given {len(node.inputs)}"
            )
        for index, value in enumerate(function.inputs):
            fact = call.fact(index)
            self._facts[value] = fact
            self._write_body(value, fact)
        outer, self.opsets = self.opsets, dict(function.opset_imports) or self.opsets
        self._frames.append((node, function))
        try:
            self.infer_graph(function.graph)
        finally:
            self._frames.pop()
            self.opsets = outer
        for index, value in enumerate(function.outputs):
            fact = self.fact(value)
            call.put(
                index,
                fact.dims,
                dtype=fact.dtype,
                data=fact.data,
                kind=fact.kind,
                items=fact.items,
            )

    def _report(self, node: ir.Node, found: Contradiction) -> None:
        where = describe_node(node)
        if self._frames:
            where += f", in a function called by {describe_node(self._frames[0][0])}"
        error = ShapeError(
            f"The shapes or types at {node.op_type} {node.name or '(unnamed)'!r} contradict",
            where=where,
            why=found.why,
            fix=found.fix or "correct the node, or what feeds it",
        )
        if self.strict:
            raise error from found
        self.diagnostics.append(error.diagnostic)

    # --- merging with what is declared ---

    def _original(
        self, value: ir.Value, *, visited_again: bool = False
    ) -> tuple[Dims | None, ir.TypeProtocol | None]:
        """What the model declared before this inference wrote anything.

        Inside subgraphs a value is visited more than once, and its first result is no declaration.
        A loop binds its body's inputs at its own depth, so `bind` says so itself.
        """
        found = self._declared.get(value)
        if found is None:
            found = (_declared_dims(value), value.type)
            if self._depth or self.refresh or visited_again:
                self._declared[value] = found
        return found

    def _commit(self, value: ir.Value, result: Fact) -> bool:
        """Merge one output with its declaration, remember and write it; whether it changed."""
        if self._frames:
            self._facts[value] = result
            return self._write_body(value, result)
        dims, kind = self._original(value)
        is_output = value.is_graph_output()
        stale = self.refresh and not is_output
        self._check_kind(value, kind, result, stale)
        if result.dtype is None and result.kind is None and kind is not None:
            result.dtype = kind.dtype
            result.kind = None if isinstance(kind, ir.TensorType) else kind
        if dims is None or (stale and result.dims is not None):
            merged = result.dims
        else:
            try:
                merged = self._merge(value, dims, result.dims)
            except Contradiction as found:
                if self.mended is None:
                    raise
                self.mended[value.name or ""] = found.why
                dims, merged = None, result.dims
        if result.dims is None and merged is not None:
            merged = self._name_unknown(value, merged)
        self._facts[value] = Fact(result.dtype, merged, result.data, result.kind, result.items)
        shown = self._shown(dims, merged) if is_output and dims is not None else merged
        return self._write(value, Fact(result.dtype, shown, None, result.kind))

    def _check_kind(
        self, value: ir.Value, kind: ir.TypeProtocol | None, result: Fact, stale: bool
    ) -> None:
        if kind is None or stale or (result.dtype is None and result.kind is None):
            return
        if result.kind is not None:
            inferred, declared = type_text(result.kind), type_text(kind)
        elif isinstance(kind, ir.TensorType):
            if result.dtype == kind.dtype or kind.dtype == ir.DataType.UNDEFINED:
                return
            inferred, declared = str(result.dtype), str(kind.dtype)
        else:
            inferred, declared = f"tensor of {result.dtype}", type_text(kind)
        if inferred != declared:
            raise Contradiction(
                f"output {value.name!r} is declared {declared}, the operator makes {inferred}",
                "remove the declaration, or insert a Cast",
            )

    def _merge(self, value: ir.Value, declared: Dims, inferred: Dims | None) -> Dims:
        if inferred is None:
            return declared
        if declared == inferred:
            return inferred
        if len(declared) != len(inferred):
            raise Contradiction(
                f"{value.name!r} is declared {dim_math.text(declared)}, "
                f"computed {dim_math.text(inferred)}: different ranks",
                "remove the declared shape",
            )
        merged = []
        for axis, (old, new) in enumerate(zip(declared, inferred, strict=True)):
            if isinstance(old, int) and isinstance(new, int) and old != new:
                raise Contradiction(
                    f"{value.name!r} is declared {dim_math.text(declared)}, "
                    f"computed {dim_math.text(inferred)}: axis {axis} is {old} or {new}",
                    "remove the declared shape, or correct the node that makes it",
                )
            merged.append(self._better(old, new))
        return tuple(merged)

    def _better(self, declared: Dim, inferred: Dim) -> Dim:
        """Static beats symbolic beats unknown; a declared symbol beats one made up here."""
        if isinstance(inferred, int) or dim_math.is_unknown(declared):
            return inferred
        if isinstance(declared, int) or dim_math.is_unknown(inferred):
            return declared
        made_up = dim_math.free_symbols(inferred) & self._fresh_names
        return declared if made_up else inferred

    def _shown(self, declared: Dims, merged: Dims | None) -> Dims | None:
        """A graph output's shape as written: declared names stay, made-up ones stay out.

        A declared expression is no name: what is inferred from the inputs replaces it.
        """
        if merged is None or len(merged) != len(declared):
            return merged
        shown = []
        for old, new in zip(declared, merged, strict=True):
            if isinstance(new, int) or isinstance(old, int):
                shown.append(new)
            elif dim_math.is_unknown(old) or not str(old).isidentifier():
                made_up = dim_math.free_symbols(new) & self._fresh_names
                shown.append(old if made_up else new)
            else:
                shown.append(old)
        return tuple(shown)

    def _write(self, value: ir.Value, fact: Fact) -> bool:
        """Write a fact to the value; whether that changed it. An initializer keeps its own."""
        changed = False
        if fact.dims is not None:
            shape = value.shape
            if shape is None or shape.dims != fact.dims:
                value.shape = ir.Shape(fact.dims)
                changed = True
        if fact.kind is not None:
            if value.type is None or type_text(value.type) != type_text(fact.kind):
                value.type = fact.kind
                changed = True
        elif fact.dtype is not None and (
            value.type is None or (value.type.dtype != fact.dtype and not self._is_wrapped(value))
        ):
            value.type = ir.TensorType(fact.dtype)
            changed = True
        return changed

    @staticmethod
    def _is_wrapped(value: ir.Value) -> bool:
        return value.type is not None and not isinstance(value.type, ir.TensorType)

    def _write_body(self, value: ir.Value, fact: Fact) -> bool:
        """Write to a function's value what all its calls so far share."""
        if value in self._body_shapes:
            shared = common_dims(self._body_shapes[value], fact.dims)
        else:
            shared = fact.dims
        self._body_shapes[value] = shared
        before = value.shape
        value.shape = None if shared is None else ir.Shape(shared)
        typed = self._write(value, Fact(fact.dtype, None, None, fact.kind))
        return typed or before != value.shape

    # --- declarations and constants ---

    def _may_follow(self, value: ir.Value) -> bool:
        """Whether an unvisited value may be a small shape computation worth following."""
        if self._frames:
            return False
        if value.dtype is None:
            return True
        if value.dtype not in _FOLLOWED:
            return False
        return value.shape is None or len(value.shape) <= 1

    def _declared_fact(self, value: ir.Value) -> Fact:
        constant = self._constant_fact(value)
        if constant is not None:
            return constant
        kind = value.type
        plain = kind is None or isinstance(kind, ir.TensorType)
        dims = _declared_dims(value)
        if dims is not None:
            dims = self._name_unknown(value, dims)
        return Fact(value.dtype, dims, None, None if plain else kind)

    def _name_unknown(self, value: ir.Value, dims: Dims) -> Dims:
        """Unnamed dimensions get symbols inside, so that equal ones are seen to be equal."""
        if not any(dim_math.is_unknown(d) for d in dims):
            return dims
        return tuple(
            self.fresh(value, axis) if dim_math.is_unknown(d) else d for axis, d in enumerate(dims)
        )

    def _constant_fact(self, value: ir.Value) -> Fact | None:
        tensor = constant_tensor(value)
        if tensor is None:
            return None
        dims: Dims = tuple(tensor.shape.dims)  # type: ignore[arg-type]
        return Fact(tensor.dtype, dims, _small_data(tensor, dims))


def _declared_dims(value: ir.Value) -> Dims | None:
    """A value's dimensions; the -1 or "?" that some converters write for "unknown" says nothing."""
    if value.shape is None:
        return None
    dims = value.shape.dims
    if any(_says_nothing(d) for d in dims):
        return tuple(dim_math.UNKNOWN if _says_nothing(d) else d for d in dims)
    return dims


def _says_nothing(dim: Dim) -> bool:
    return dim < 0 if isinstance(dim, int) else dim.value in ("", "?")


def _small_data(tensor: ir.TensorProtocol, dims: Dims) -> Data | None:
    """A constant's elements where a shape may depend on them; never a large one's."""
    if is_absent(tensor):
        return None
    dtype = tensor.dtype
    integer = dtype in _FOLLOWED
    if not integer and dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    size = dim_math.product(dims)
    if not isinstance(size, int) or size > (MAX_DATA if integer else _MAX_FLOATS):
        return None
    try:
        array = np.asarray(tensor.numpy()).reshape(-1)
    except (OSError, ValueError, EdgepassError):  # external data that is not there
        return None
    return tuple(int(e) for e in array) if integer else tuple(float(e) for e in array)


def _interface_symbols(model: ir.Model) -> set[str]:
    """Symbols that graph inputs use, in the main graph and below: not to be made up again."""
    names: set[str] = set()
    for graph in graphs(model):
        for value in graph.inputs:
            if value.shape is not None:
                for dim in value.shape.dims:
                    names |= dim_math.free_symbols(dim)
    return names


def _subgraph_owners(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """The node that each subgraph is an attribute of."""
    return {sub: node for node in all_nodes(model) for sub in node_subgraphs(node)}
