"""Writes a Relax function anew with kernels of ours in place of the operators they cover.

One pass over the nodes in order. An anchor (convolution, matrix product, pooling, row operator)
takes the elementwise nodes behind it as its epilogue and is emitted where the last of them stood.
Each tensor is kept plain, channel-blocked, or both: it is converted when first wanted in the other
layout, so that consecutive convolutions convert nothing. Everything else is copied unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .epilogue import OPERATIONS, Access
from .fusion import BlockedDomain, Group, Source, grow, spatial_rank4
from .graph import Array, Expr, FlatGraph, Node, static_type
from .layout import blocked_access, blocked_shape, into_blocks, out_of_blocks
from .pack import block_channels
from .report import KernelRecord, Kind
from .spec import CpuSpec


class KernelLibrary:
    """The kernels generated so far; equal requests share one PrimFunc."""

    def __init__(self) -> None:
        self.records: dict[str, KernelRecord] = {}
        self._functions: dict[Any, Any] = {}

    def get(self, block_builder: Any, key: Any, name: str, kind: Kind, rule: str, make: Any) -> Any:
        """The GlobalVar of the kernel that `make(name)` writes."""
        if key not in self._functions:
            function = make(name).without_attr("global_symbol")
            variable = block_builder.add_func(function, name)
            self._functions[key] = variable
            self.records[variable.name_hint] = KernelRecord(
                name=variable.name_hint, kind=kind, rule=rule
            )
        return self._functions[key]


@dataclasses.dataclass
class _Forms:
    """The layouts in which a tensor exists in the new function."""

    plain: Expr | None = None
    blocked: Expr | None = None


class FunctionWriter:
    """The state of one rewrite; the rules in `rules.py` work through it."""

    def __init__(
        self, graph: FlatGraph, spec: CpuSpec, builder: Any, library: KernelLibrary
    ) -> None:
        self.graph = graph
        self.spec = spec
        self.bb = builder
        self.library = library
        self.claimed: set[Node] = set()
        # Values that exist in memory whatever is fused; views stop at them.
        self.materialized: set[Expr] = set()
        self.refusals: dict[str, str] = {}
        self._forms: dict[Expr, _Forms] = {}
        self._deferred: dict[int, list[Callable[[], None]]] = {}
        self._packed: dict[Any, Expr] = {}

    # Reading ---------------------------------------------------------------------------------
    def plain(self, expr: Expr) -> Expr:
        """The expression in the new function, in its own layout."""
        from tvm import relax

        value = self.graph.constant(expr)
        if value is not None:
            if expr not in self._forms:
                self._forms[expr] = _Forms(plain=relax.const(value, static_type(expr)[1]))
            return self._forms[expr].plain
        if not isinstance(expr, relax.Var):
            return expr
        if expr not in self._forms:
            # Part of an idiom (`FlatGraph`) that no kernel took after all.
            self._copy(self.graph.producer[expr])
        forms = self._forms[expr]
        if forms.plain is None:
            forms.plain = self._unblocked(expr, forms.blocked)
        return forms.plain

    def blocked(self, expr: Expr) -> Expr:
        """A tensor of rank 3 or 4 in the channel-blocked layout."""

        shape, _ = static_type(expr)
        assert shape is not None
        value = self.graph.constant(expr)
        if value is not None:
            return self._blocked_constant(expr, value, len(shape))
        forms = self._forms[expr]
        if forms.blocked is None:
            full = spatial_rank4(shape, len(shape))
            source = self.plain(expr)
            if len(shape) == 3:
                source = self.reshape(source, full)
            function = self.library.get(
                self.bb,
                ("into_blocks", full),
                "nchw_to_blocked",
                "layout",
                f"{full} to blocks of {self.spec.lanes} channels",
                lambda name: into_blocks(full, self.spec, name),
            )
            forms.blocked = self.call(function, [source], blocked_shape(full, self.spec.lanes))
        return forms.blocked

    def has_blocked(self, expr: Expr) -> bool:
        """Whether the tensor already exists in the blocked layout, and not in its own."""
        forms = self._forms.get(expr)
        return forms is not None and forms.blocked is not None and forms.plain is None

    def packed(self, expr: Expr, key: Any, make: Callable[[], Array]) -> Expr:
        """A constant derived from the constant `expr`; made once for each `key`."""
        from tvm import relax

        if (expr, key) not in self._packed:
            self._packed[expr, key] = relax.const(make(), "float32")
        return self._packed[expr, key]

    def _unblocked(self, expr: Expr, blocked: Expr) -> Expr:
        from tvm import relax

        shape, _ = static_type(expr)
        assert shape is not None
        full = spatial_rank4(shape, len(shape))
        n, c, h, w = full
        lanes = self.spec.lanes
        if h * w == 1 and (c % lanes == 0 or n == 1):
            if c % lanes == 0:
                return self.reshape(blocked, shape)
            flat = self.reshape(blocked, (n, -(-c // lanes) * lanes))
            flat = self.bb.emit(relax.op.strided_slice(flat, [1], [0], [c]))
            return self.reshape(flat, shape)
        function = self.library.get(
            self.bb,
            ("out_of_blocks", full),
            "blocked_to_nchw",
            "layout",
            f"{full} from blocks of {lanes} channels",
            lambda name: out_of_blocks(full, self.spec, name),
        )
        plain = self.call(function, [blocked], full)
        return plain if len(shape) == 4 else self.reshape(plain, shape)

    # Writing ---------------------------------------------------------------------------------
    def call(self, function: Any, args: list[Expr], shape: tuple[int, ...]) -> Expr:
        """Emit a call of a kernel with one float32 output of `shape`."""
        from tvm import relax

        out = relax.TensorType(shape, "float32")
        return self.bb.emit(relax.call_tir(function, args, out))

    def reshape(self, source: Expr, shape: tuple[int, ...]) -> Expr:
        """Emit a reshape; of a reshape only the outer one (a single one costs nothing at run
        time, two would be fused into a copy)."""
        from tvm import ir, relax

        while isinstance(source, relax.Var):
            made = self.bb.lookup_binding(source)
            reshape = ir.Op.get("relax.reshape")
            if not isinstance(made, relax.Call) or not made.op.same_as(reshape):
                break
            source = made.args[0]
        return self.bb.emit(relax.op.reshape(source, shape))

    def define(self, var: Expr, *, plain: Expr | None = None, blocked: Expr | None = None) -> None:
        """Record the new value of an old variable."""
        forms = self._forms.setdefault(var, _Forms())
        forms.plain = plain if plain is not None else forms.plain
        forms.blocked = blocked if blocked is not None else forms.blocked

    def operands(self, sources: list[Source]) -> list[Expr]:
        """The arguments of an epilogue."""
        found = []
        for source in sources:
            value = self.graph.constant(source.expr)
            if source.blocked and value is not None:
                found.append(self._blocked_constant(source.expr, value, source.rank))
            else:
                found.append((self.blocked if source.blocked else self.plain)(source.expr))
        return found

    def _blocked_constant(self, expr: Expr, value: Array, rank: int) -> Expr:
        """A constant that broadcasts to a tensor of `rank` 3 or 4, in blocks."""
        full = spatial_rank4(value.shape, rank)
        return self.packed(
            expr,
            ("blocked", full),
            lambda: block_channels(value.reshape(full), self.spec.lanes, 1),
        )

    def place(self, anchor: Node, group: Group, emit: Callable[[], None]) -> None:
        """Claim the group and run `emit` where its last node stands (now, if it is the anchor)."""
        self.claimed.add(anchor)
        self.claimed.update(group.nodes)
        self.materialized.add(group.result)
        last = group.nodes[-1].index if group.nodes else anchor.index
        if last == anchor.index:
            emit()
        else:
            self._deferred.setdefault(last, []).append(emit)

    # The pass --------------------------------------------------------------------------------
    def write(self, params: list[Expr], result: Expr, rules: Any) -> Expr:
        """Emit all nodes; returns the new function's result expression."""
        for param in params:
            self._forms[param] = _Forms(plain=param)
            self.materialized.add(param)
        for node in self.graph.nodes:
            if node.op in ("constant", "dead"):
                continue
            if node not in self.claimed and not self._apply(node, rules):
                self._copy(node)
            for emit in self._deferred.pop(node.index, ()):
                emit()
        return self._substitute(result)

    def _apply(self, node: Node, rules: Any) -> bool:
        rule = rules.get(node.op)
        if rule is None and node.op in OPERATIONS:
            rule = rules["elementwise"]
        if rule is None:
            return False
        if node.shape is None or node.dtype != "float32":
            reason = "dynamic shape" if node.shape is None else f"dtype {node.dtype}"
        else:
            reason = rule(self, node)
        if reason and rule is not rules["elementwise"]:
            self.refusals[node.op] = reason
        return not reason

    def _copy(self, node: Node) -> None:
        if node.op == "alias":
            source = self._forms.get(node.inputs[0])
            if source is not None:
                self._forms[node.var] = source
                return
        if node.op in ("reshape", "expand_dims", "squeeze", "flatten") and node.shape is not None:
            value = self.reshape(self.plain(node.inputs[0]), node.shape)
        else:
            value = self.bb.emit(self._substitute(node.value))
        self.define(node.var, plain=value)
        if node.op not in ("permute_dims", "reshape", "expand_dims", "squeeze", "multiply"):
            self.materialized.add(node.var)

    def _substitute(self, expr: Expr) -> Expr:
        from tvm import relax

        if isinstance(expr, relax.Var):
            known = expr in self._forms or expr in self.graph.producer
            return self.plain(expr) if known else expr
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._substitute(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._substitute(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            args = [self._substitute(arg) for arg in expr.args]
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
        return expr


def blocked_group(
    writer: FunctionWriter, node: Node, shape: tuple[int, ...], *, flat: bool = False
) -> Group:
    """The epilogue of an anchor whose result of `shape` is channel-blocked."""
    domain = BlockedDomain(shape, writer.spec.lanes, flat)
    return grow(writer.graph, node.var, domain, shape, writer.claimed)


def blocked_output(shape: tuple[int, ...], lanes: int, flat: bool) -> Access:
    """The output of a kernel over (n, channel block, row, column)."""
    access = blocked_access(spatial_rank4(shape, len(shape)), lanes, broadcast=False)
    if not flat:
        return access
    n_stride, block_stride, _, _ = access.strides
    return Access(access.shape, (n_stride, block_stride, 0, lanes))


def as_float32(value: Array) -> Array:
    """Constants enter kernels as contiguous float32."""
    return np.ascontiguousarray(value, dtype=np.float32)
