"""Patterns over the graph; a match that fails has a reason.

Here: the pattern language (`op`, `var`, `const`, `any_of`) and `match`, which returns either a
`Match` or a `Mismatch` that names the node and says what was expected. Not here: rewriting
(`edit`), the rules themselves (passes), the worklist that applies them.

    x = var("x")
    pattern = op.Mul(x, op.Sigmoid(x))          # SiLU; Mul commutes, either order matches
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import (
    ONNX_DOMAINS,
    attribute,
    constant_array,
    constant_scalar,
    constant_tensor,
    describe_node,
    describe_value,
)

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr"})


@dataclasses.dataclass(frozen=True)
class Var:
    """Any value; the same name must be the same value everywhere in a pattern."""

    name: str


@dataclasses.dataclass(frozen=True)
class Const:
    """A constant. `value`: a number it must equal to `tolerance`, relative; None: any.

    `data` False accepts a weight without data, of which only dtype and shape are known.
    """

    name: str = ""
    value: float | None = None
    tolerance: float = 1e-4
    data: bool = True


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """The first alternative that matches."""

    alternatives: tuple[ValuePattern, ...]


@dataclasses.dataclass(frozen=True)
class OpPattern:
    """The output of one of `op_types` whose inputs match.

    `shared` allows the value to be used outside the match (the node then stays in the graph).
    `rest` allows inputs beyond those listed. `attributes` must equal the node's.
    """

    op_types: tuple[str, ...]
    inputs: tuple[ValuePattern | None, ...]
    domain: str = ""
    name: str = ""
    output: int = 0
    shared: bool = False
    rest: bool = False
    attributes: tuple[tuple[str, Any], ...] = ()


ValuePattern = Var | Const | AnyOf | OpPattern


class _Ops:
    """`op.Add(x, y)`; `op("Relu", "Clip", x)` by `op.one_of(("Relu", "Clip"), x)`."""

    def __getattr__(self, op_type: str) -> Callable[..., OpPattern]:
        if op_type.startswith("__"):
            raise AttributeError(op_type)
        return lambda *inputs, **kwargs: self.one_of((op_type,), *inputs, **kwargs)

    def one_of(
        self,
        op_types: tuple[str, ...],
        *inputs: ValuePattern | float | None,
        _domain: str = "",
        _name: str = "",
        _output: int = 0,
        _shared: bool = False,
        _rest: bool = False,
        **attributes: Any,
    ) -> OpPattern:
        """A pattern for any of several operators with the same inputs."""
        return OpPattern(
            op_types=op_types,
            inputs=tuple(
                Const(value=float(i)) if isinstance(i, int | float) else i for i in inputs
            ),
            domain=_domain,
            name=_name,
            output=_output,
            shared=_shared,
            rest=_rest,
            attributes=tuple(sorted(attributes.items())),
        )


op = _Ops()


def var(name: str) -> Var:
    """Any value, called `name` in the match."""
    return Var(name)


def const(name: str = "", value: float | None = None, *, data: bool = True) -> Const:
    """A constant value, called `name` in the match."""
    return Const(name, value, data=data)


def any_of(*alternatives: ValuePattern) -> AnyOf:
    """The first alternative that matches."""
    return AnyOf(alternatives)


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why a pattern did not match. `depth` is how many pattern nodes did, before.

    `place` is the node or value where it stopped; `where` describes it.
    """

    reason: str
    place: ir.Node | ir.Value | None = None
    depth: int = 0

    @property
    def where(self) -> str:
        """The node or value where the match stopped, in words."""
        if isinstance(self.place, ir.Node):
            return describe_node(self.place)
        return "" if self.place is None else describe_value(self.place)

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.reason} (at {self.where})" if self.where else self.reason


class Match:
    """A successful match: values by variable name, nodes by pattern name.

    `findings` is for what a rule's check worked out and its rewrite needs again.
    """

    def __init__(self, root: ir.Node) -> None:
        self.root = root
        self.values: dict[str, ir.Value] = {}
        self.nodes: dict[str, ir.Node] = {}
        self.inner: list[tuple[ir.Node, bool]] = [(root, True)]
        self.findings: dict[str, Any] = {}

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]

    def node(self, name: str) -> ir.Node:
        """The node matched by the pattern called `name`."""
        return self.nodes[name]

    def array(self, name: str) -> np.ndarray:
        """The data of the constant called `name`."""
        array = constant_array(self.values[name])
        assert array is not None, f"{name!r} matched a constant"
        return array

    def attribute(self, node: str, name: str, default: Any = None) -> Any:
        """An attribute of the node called `node`."""
        return attribute(self.nodes[node], name, default)

    @property
    def matched_nodes(self) -> list[ir.Node]:
        """The nodes of the match, root first."""
        return [node for node, _ in self.inner]

    def include(self, nodes: Iterable[ir.Node]) -> None:
        """Count in more nodes, which a rule's check found by itself: they go where unused.

        Users come before what they use.
        """
        self.inner += [(node, True) for node in nodes]

    def _snapshot(self) -> tuple[dict[str, ir.Value], dict[str, ir.Node], int]:
        return dict(self.values), dict(self.nodes), len(self.inner)

    def _restore(self, saved: tuple[dict[str, ir.Value], dict[str, ir.Node], int]) -> None:
        self.values, self.nodes, length = saved[0], saved[1], saved[2]
        del self.inner[length:]


def match(pattern: OpPattern, node: ir.Node) -> Match | Mismatch:
    """Match a pattern with `node` as its root.

    A value inside the match that is used outside it is a mismatch (it could not be removed),
    unless its pattern says `_shared=True`. A name is one node wherever it occurs. The operands of a
    commutative root are then tried the other way round.
    """
    best: Mismatch | None = None
    for order in _orders(pattern):
        found = Match(node)
        failure = _match_node(pattern, node, found, 0, (order,))
        if failure is None:  # not `or`: a mismatch is false
            failure = _used_outside(found)
        if failure is None:
            return found
        if best is None or failure.depth > best.depth:
            best = failure
    assert best is not None
    return best


def _used_outside(found: Match) -> Mismatch | None:
    inside = {id(n) for n, _ in found.inner}
    for inner, exclusive in found.inner[1:]:
        if not exclusive:
            continue
        for value in inner.outputs:
            if value.is_graph_output():
                return Mismatch(
                    f"the inner value {value.name!r} is an output of the graph",
                    inner,
                    len(found.inner),
                )
            for user in value.consumers():
                if id(user) not in inside:
                    return Mismatch(
                        f"the inner value {value.name!r} is also used by "
                        f"{user.op_type} {user.name!r}",
                        inner,
                        len(found.inner),
                    )
    return None


_Order = tuple[ValuePattern | None, ...]


def _match_node(
    pattern: OpPattern,
    node: ir.Node,
    found: Match,
    depth: int,
    orders: Iterable[_Order] | None = None,
) -> Mismatch | None:
    if node.op_type not in pattern.op_types or not _same_domain(node.domain, pattern.domain):
        return Mismatch(
            f"expected {' or '.join(pattern.op_types)}, found {node.op_type}",
            node,
            depth,
        )
    for name, wanted in pattern.attributes:
        actual = attribute(node, name)
        if actual != wanted:
            return Mismatch(f"attribute {name} is {actual!r}, not {wanted!r}", node, depth + 1)
    extra = [i for i in node.inputs[len(pattern.inputs) :] if i is not None]
    if extra and not pattern.rest:
        return Mismatch(
            f"{node.op_type} has {len(node.inputs)} inputs, expected {len(pattern.inputs)}",
            node,
            depth + 1,
        )
    best: Mismatch | None = None
    saved = found._snapshot()
    for order in _orders(pattern) if orders is None else orders:
        found._restore(saved)
        saved = found._snapshot()
        failure = _match_inputs(order, node, found, depth + 1)
        if failure is None:
            bound = found.nodes.setdefault(pattern.name, node) if pattern.name else node
            if bound is node:
                return None
            failure = Mismatch(f"{pattern.name!r} stands for two nodes", node, depth + 1)
        if best is None or failure.depth > best.depth:
            best = failure
    return best


def _orders(pattern: OpPattern) -> Iterator[_Order]:
    yield pattern.inputs
    if len(pattern.inputs) == 2 and all(t in COMMUTATIVE for t in pattern.op_types):
        yield pattern.inputs[::-1]


def _match_inputs(
    patterns: tuple[ValuePattern | None, ...], node: ir.Node, found: Match, depth: int
) -> Mismatch | None:
    for i, wanted in enumerate(patterns):
        value = node.inputs[i] if i < len(node.inputs) else None
        if wanted is None:
            if value is not None:
                return Mismatch(f"input {i} should be absent", node, depth)
            continue
        if value is None:
            return Mismatch(f"input {i} is absent", node, depth)
        failure = _match_value(wanted, value, found, depth)
        if failure is not None:
            return failure
        if isinstance(wanted, Const) and wanted.value is not None and _raises_rank(value, node):
            return Mismatch("the constant gives the result more dimensions", value, depth)
    return None


def _raises_rank(constant: ir.Value, node: ir.Node) -> bool:
    """Whether a one-element constant, by its own dimensions, makes the result's rank higher than
    that of the other inputs: then it is no plain number. Unknown ranks count as too low."""
    rank = 0 if constant.shape is None else len(constant.shape)
    others = [v.shape for v in node.inputs if v is not None and v is not constant]
    return rank > max((len(shape) for shape in others if shape is not None), default=0)


def _match_value(
    pattern: ValuePattern, value: ir.Value, found: Match, depth: int
) -> Mismatch | None:
    if isinstance(pattern, Var):
        bound = found.values.setdefault(pattern.name, value)
        if bound is not value:
            return Mismatch(
                f"{pattern.name!r} is {bound.name!r} in one place and {value.name!r} in another",
                value,
                depth,
            )
        return None
    if isinstance(pattern, Const):
        return _match_const(pattern, value, found, depth)
    if isinstance(pattern, AnyOf):
        best: Mismatch | None = None
        for alternative in pattern.alternatives:
            saved = found._snapshot()
            failure = _match_value(alternative, value, found, depth)
            if failure is None:
                return None
            found._restore(saved)
            if best is None or failure.depth > best.depth:
                best = failure
        return best
    return _match_producer(pattern, value, found, depth)


def _match_producer(
    pattern: OpPattern, value: ir.Value, found: Match, depth: int
) -> Mismatch | None:
    producer = value.producer()
    wanted = " or ".join(pattern.op_types)
    if producer is None:
        return Mismatch(f"expected {wanted}, found a graph input or weight", value, depth)
    if value.index() != pattern.output:
        return Mismatch(f"expected output {pattern.output} of {wanted}", producer, depth)
    if producer.graph is not found.root.graph:
        return Mismatch(
            f"{producer.op_type} is in another graph (an If or Loop body lies between)",
            producer,
            depth,
        )
    found.inner.append((producer, not pattern.shared))
    return _match_node(pattern, producer, found, depth)


def _match_const(pattern: Const, value: ir.Value, found: Match, depth: int) -> Mismatch | None:
    tensor = constant_tensor(value)
    if tensor is None:
        return Mismatch("expected a constant", value, depth)
    if pattern.value is not None:
        actual = constant_scalar(value)
        if actual is None:
            return Mismatch(f"expected the constant {pattern.value:g}", value, depth)
        if abs(actual - pattern.value) > pattern.tolerance * max(abs(pattern.value), 1e-30):
            return Mismatch(
                f"expected the constant {pattern.value:g}, found {actual:g}",
                value,
                depth,
            )
    elif pattern.data and constant_array(value) is None:
        return Mismatch("the weight has no data", value, depth)
    if pattern.name:
        bound = found.values.setdefault(pattern.name, value)
        if bound is not value:
            return Mismatch(f"{pattern.name!r} stands for two constants", value, depth)
    return None


def _same_domain(a: str, b: str) -> bool:
    return a == b or (a in ONNX_DOMAINS and b in ONNX_DOMAINS)
