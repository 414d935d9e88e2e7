"""What the 8-bit passes do beside their products: LSTMs, lookup tables, weights left over.

Here: `Beside`, shared by `static_int8` and `dynamic_int8`: what it is, what it adds to a plan, and
writing it. Not here: each of the three (`recurrent`, `tables`, `leftovers`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Collection, Iterator

import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.graph import describe_node, graph_tree, is_onnx_op, node_name
from ...ir.quant import QuantPlan, QuantSpec
from ...targets.target import Target
from ..base import Context
from .leftovers import Leftover, leftovers, write_leftovers
from .recurrent import (
    OPERATOR,
    WEIGHTS,
    Recurrent,
    integer_lstms,
    lstm_spec,
    why_not,
    write_lstms,
)
from .tables import Table, lookup_tables, write_tables


class LeftOver(enum.StrEnum):
    """What becomes of weights that do not run in integers."""

    STORED = "stored"
    FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class BesideOptions:
    """`exclude`: names of nodes and operator types that stay float. `floating`: names of LSTMs that
    do not run in integers, whose weights may be stored in 8 bits."""

    exclude: tuple[str, ...]
    recurrent: Recurrent
    left: LeftOver
    per_channel: bool
    floating: tuple[str, ...] = ()


def options(
    pass_name: str, exclude: tuple[str, ...], recurrent: str, left: str, per_channel: bool
) -> BesideOptions:
    """The options, checked.

    Raises:
        PassOptionError: a word that is none of the choices.
    """
    for option, given, choices in (
        ("recurrent", recurrent, Recurrent),
        ("leftovers", left, LeftOver),
    ):
        if given not in tuple(choices):
            raise PassOptionError(
                f"There is no {option} {given!r}",
                where=f"pass {pass_name!r}, option {option!r}",
                fix=f"one of {', '.join(choices)}",
            )
    return BesideOptions(exclude, Recurrent(recurrent), LeftOver(left), per_channel)


class Beside:
    """Found before the products of `taken` nodes are rewritten, written after. Reads no weight."""

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        given: BesideOptions,
        taken: Collection[ir.Node],
    ) -> None:
        self.model = model
        self.given = given
        self.taken = frozenset(taken)
        kept = given.exclude + given.floating
        self.lstms = integer_lstms(model, context, given.recurrent, kept)
        self.tables: list[Table] = list(lookup_tables(model, given.exclude))
        self.left: list[Leftover] = []
        if given.left is LeftOver.STORED:
            self.left = list(leftovers(model, self.taken | set(self.lstms), given.exclude))
        self.refused = tuple(self._refused(context))

    def __bool__(self) -> bool:
        return bool(self.lstms or self.tables or self.left)

    def _refused(self, context: Context) -> Iterator[tuple[str, str]]:
        chosen = set(self.lstms)
        for graph in graph_tree(self.model.graph):
            for node in graph:
                if not is_onnx_op(node, "LSTM") or node in chosen:
                    continue
                if node_name(node) in self.given.floating:
                    yield describe_node(node), "sensitive: in 8 bits it does most of the harm"
                elif "LSTM" in self.given.exclude or node_name(node) in self.given.exclude:
                    yield describe_node(node), "excluded"
                elif reason := why_not(node, context):
                    yield describe_node(node), f"computed in float: {reason}"

    # --- the plan ------------------------------------------------------------------------------

    def extend(self, plan: QuantPlan) -> QuantPlan:
        """A plan of the products, with what is beside them."""
        entries, copies, kept = dict(plan.entries), dict(plan.copies), set(plan.kept)
        for name, spec in self._weights():
            forms = copies.get(name, 1 if name in entries else 0)
            entries.setdefault(name, spec)
            if forms:
                copies[name] = forms + 1
        for value in self._values():
            if self._float_too(value):
                kept.add(value.name or "")
            else:
                kept.discard(value.name or "")
        entries.update((t.value.name or "", t.spec) for t in self.tables)
        names = tuple(node_name(node) for node in self.lstms)
        return dataclasses.replace(
            plan,
            entries=entries,
            nodes=plan.nodes + names,
            copies=copies,
            kept=frozenset(kept),
            notes=plan.notes + self.refused,
        )

    def _weights(self) -> list[tuple[str, QuantSpec]]:
        """Each constant with each way in which it is stored, once."""
        found = dict.fromkeys(
            (node.inputs[index], lstm_spec(node, index, self.given.per_channel))
            for node in self.lstms
            for index in WEIGHTS
        )
        found.update(dict.fromkeys((item.value, item.spec) for item in self.left))
        return [(value.name or "", spec) for value, spec in found if value is not None]

    def _values(self) -> list[ir.Value]:
        values = [node.inputs[i] for node in self.lstms for i in WEIGHTS]
        values += [item.value for item in self.left]
        return [value for value in dict.fromkeys(values) if value is not None]

    def _float_too(self, value: ir.Value) -> bool:
        """Whether a node reads the constant in float."""
        here = {(item.node, item.index) for item in self.left}
        integers = self.taken | set(self.lstms)
        return value.is_graph_output() or any(
            user not in integers and (user, index) not in here for user, index in value.uses()
        )

    # --- writing -------------------------------------------------------------------------------

    def write(self, target: Target | None) -> tuple[str, ...]:
        """Rewrite the model, in place; a line for each of the three."""
        scheme = target.scheme if target is not None else None
        reduced = scheme is not None and scheme.reduce_range
        write_lstms(
            self.model, self.lstms, per_channel=self.given.per_channel, reduce_range=reduced
        )
        write_tables(self.model, self.tables)
        write_leftovers(self.left)
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        if self.lstms:
            yield f"{len(self.lstms)} LSTM in integers ({OPERATOR})"
        if self.tables:
            yield f"{len(self.tables)} lookup tables stored in 8 bits"
        if self.left:
            counts = Counter(item.node.op_type for item in self.left)
            text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
            yield f"weights stored in 8 bits, computed in float: {text}"
