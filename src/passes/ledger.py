"""The ledger: one line a pass, with what it bought and what it cost.

Here: rows, their table and plain data. Not here: running passes (`driver`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ..cost.text import format_bytes, format_count
from ..ir.graph import graphs, node_count
from ..ir.ops import graph_macs
from ..ir.sizing import is_dynamic, static_twin
from .base import Rewrite
from .probe import NumericError


@dataclasses.dataclass(frozen=True)
class Measure:
    """What the ledger watches of a model.

    `nodes` without Constant nodes; `weight_bytes` the initializers and constants as stored;
    `macs` multiply-accumulates of one inference, None when some operator's are unknown.
    """

    nodes: int
    weight_bytes: int
    macs: int | None


def measure(
    model: ir.Model, dims: Mapping[str, int] | None = None, *, infer: bool = True
) -> Measure:
    """Count nodes, stored bytes and MACs, symbolic dimensions at the sizes in `dims`.

    Where shapes do not follow from the input's symbols, they are inferred anew at those sizes;
    without `infer` the MACs of a model with such dimensions are left out.
    """
    stored = 0
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                stored += value.const_value.nbytes
        for node in graph:
            if node.op_type == "Constant":
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                        stored += attribute.as_tensor().nbytes
    dynamic = is_dynamic(model)
    macs = graph_macs(model.graph, dims, model.functions) if infer or not dynamic else None
    if macs is None and infer and dims and dynamic:
        twin = static_twin(model, dims)
        macs = graph_macs(twin.graph, dims, twin.functions)
    return Measure(node_count(model), stored, macs)


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One pass. `error` is against the model before the pass; None when it was not checked, and
    `error_note` then says why. `runs` counts the rounds of a fixpoint group. `rewrites` say which
    rule fired where."""

    name: str
    before: Measure
    after: Measure
    seconds: float
    modified: bool
    runs: int = 1
    error: NumericError | None = None
    error_note: str = ""
    notes: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and the manifest. Time is left out: it never repeats."""
        return {
            "pass": self.name,
            "modified": self.modified,
            "nodes": [self.before.nodes, self.after.nodes],
            "weight_bytes": [self.before.weight_bytes, self.after.weight_bytes],
            "macs": [self.before.macs, self.after.macs],
            "error": None if self.error is None else self.error.relative,
            "sqnr_db": None if self.error is None else _finite(self.error.sqnr_db),
            "error_note": self.error_note,
            "notes": list(self.notes),
            "rewrites": [[item.rule, item.node, item.source] for item in self.rewrites],
        }


@dataclasses.dataclass
class Ledger:
    """The rows of one compilation, in the order in which passes ran, and a total error.

    `remarks` are lines below the table, such as which lowering is faster on this machine. They may
    hold timings, so they are no part of `as_dict`, which repeats byte for byte.
    """

    rows: list[LedgerRow] = dataclasses.field(default_factory=list)
    total_error: NumericError | None = None
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def before(self) -> Measure | None:
        """The model as it came."""
        return self.rows[0].before if self.rows else None

    @property
    def after(self) -> Measure | None:
        """The model as it left."""
        return self.rows[-1].after if self.rows else None

    @property
    def seconds(self) -> float:
        """Seconds spent in passes."""
        return sum(row.seconds for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and the manifest."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "total_error": None if self.total_error is None else self.total_error.relative,
        }

    def table(self) -> Any:
        """A rich renderable: the table, and below it the notes of each pass that has any."""
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title="Ledger",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for heading in ("pass", "nodes", "weights", "MACs", "error", "seconds"):
            right = heading != "pass"
            table.add_column(heading, justify="right" if right else "left", no_wrap=right)
        for line in self._lines():
            table.add_row(*line[:6])
        notes = [
            Padding(Text(f"{row.name}: {'; '.join(row.notes)}", style="dim"), (0, 0, 0, 2))
            for row in self.rows
            if row.notes
        ]
        return Group(table, *notes, *(Text(line) for line in self.remarks))

    def _lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        for row in self.rows:
            error = str(row.error) if row.error is not None else row.error_note or "-"
            lines.append(
                (
                    row.name + (f" x{row.runs}" if row.runs > 1 else ""),
                    _change(str(row.before.nodes), str(row.after.nodes)),
                    _change(
                        format_bytes(row.before.weight_bytes), format_bytes(row.after.weight_bytes)
                    ),
                    _change(format_count(row.before.macs), format_count(row.after.macs)),
                    error if row.modified else "unchanged",
                    f"{row.seconds:.2f}",
                    "; ".join(row.notes),
                )
            )
        if self.rows and self.before is not None and self.after is not None:
            error = "-" if self.total_error is None else str(self.total_error)
            lines.append(
                (
                    "total",
                    _change(str(self.before.nodes), str(self.after.nodes)),
                    _change(
                        format_bytes(self.before.weight_bytes),
                        format_bytes(self.after.weight_bytes),
                    ),
                    _change(format_count(self.before.macs), format_count(self.after.macs)),
                    error,
                    f"{self.seconds:.2f}",
                    "",
                )
            )
        return lines

    def __str__(self) -> str:
        rows = [("pass", "nodes", "weights", "MACs", "error", "seconds", "notes"), *self._lines()]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [row[i].rjust(widths[i]) for i in range(1, 6)]
                + [row[6]]
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.remarks])


def _change(before: str, after: str) -> str:
    return after if before == after else f"{before} > {after}"


def _finite(number: float) -> float | None:
    return number if abs(number) != float("inf") else None
