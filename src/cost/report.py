"""What a model costs on a target, in total and by node, and the table that compares recipes.

Here: `cost_report`, `CostReport`, `Estimate`. Not here: how a number comes about (`size`, `memory`,
`kernels`, `latency`, and `ir.ops` for MACs), running recipes (`api`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..errors import UsageError
from ..ir.graph import is_onnx_op, module_path, source_line
from ..ir.ops import NodeCost, node_cost
from ..ir.quant import QuantPlan
from ..targets.target import Runtime, Target
from .kernels import Kernel, kernels
from .latency import Latency, format_ms, kernel_ms, latency
from .memory import ActivationMemory, activation_memory
from .size import file_bytes, parameter_count
from .storage import storage_for
from .text import format_bytes, format_count

__all__ = [
    "CostReport",
    "Estimate",
    "NodeRow",
    "cost_report",
    "format_bytes",
    "format_count",
]


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRow:
    """One node of the main graph; sizes in bytes, None where not known.

    `bytes_read`, `bytes_written` are of the node alone, before the runtime's fusion. `alive_bytes`
    are all activations alive while it runs. `ms` is the assumed time of the kernel that the node
    leads; `kernel` names that, and both are empty for nodes merged into another or costing nothing.
    """

    name: str
    op: str
    shape: tuple[int | str, ...] | None
    macs: int | None
    bytes_read: int | None
    bytes_written: int | None
    weight_bytes: int
    alive_bytes: int
    kernel: str
    ms: float | None
    source: str
    unknown_reason: str = ""


@dataclasses.dataclass(frozen=True)
class CostReport:
    """The static cost of one model on one target under one recipe.

    `file_bytes`: `model.onnx` with its external data as saved (a TVM library adds its code).
    `macs`, `flops`: of one inference. `bytes_moved`: what kernels read and write, after
    the runtime's fusion. The three are None when dimensions have no size; with operators in
    `unknown_ops` (op, count, reason) they are lower bounds, and `is_lower_bound` says so.
    `peak_activation_bytes` None: `notes` says why. `nodes` has a row a node of the main graph.
    """

    target: str
    recipe: str
    file_bytes: int
    parameters: int
    macs: int | None
    flops: int | None
    bytes_moved: int | None
    peak_activation_bytes: int | None
    latency: Latency
    unknown_ops: tuple[tuple[str, int, str], ...]
    notes: tuple[str, ...]
    nodes: tuple[NodeRow, ...] = dataclasses.field(repr=False, default=())

    @property
    def is_lower_bound(self) -> bool:
        """Whether operators of unknown cost are missing from the totals."""
        return bool(self.unknown_ops)

    @property
    def cells(self) -> tuple[str, ...]:
        """Size, peak memory, parameters, MACs, bytes moved and latency, for people."""
        mark = ">= " if self.is_lower_bound else ""
        counts = [
            "?" if text is None else mark + text
            for text in (
                None if self.macs is None else format_count(self.macs),
                None if self.bytes_moved is None else format_bytes(self.bytes_moved),
            )
        ]
        return (
            format_bytes(self.file_bytes),
            format_bytes(self.peak_activation_bytes),
            format_count(self.parameters),
            *counts,
            str(self.latency),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and the manifest. `nodes` is the long part."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("latency", "unknown_ops", "notes", "nodes")
        }
        plain["is_lower_bound"] = self.is_lower_bound
        plain["latency"] = self.latency.as_dict()
        plain["unknown_ops"] = [
            {"op": op, "count": count, "reason": reason} for op, count, reason in self.unknown_ops
        ]
        plain["notes"] = list(self.notes)
        plain["nodes"] = [dataclasses.asdict(row) for row in self.nodes]
        return plain

    def __str__(self) -> str:
        labels = ("file", "peak activations", "parameters", "MACs", "bytes moved", "latency")
        lines = [f"{self.recipe or 'model'} on {self.target}"]
        lines += [f"  {k}: {v}" for k, v in zip(labels, self.cells, strict=True)]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def cost_report(
    model: ir.Model,
    target: Target,
    *,
    recipe: str = "",
    plan: QuantPlan | None = None,
    dims: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> CostReport:
    """Count what a model costs; weights may be absent and are never read.

    `plan`: a quantization to price that is not applied yet. `dims`: sizes of symbolic dimensions.
    `notes` come first among the report's own. Nothing is raised for what can't be known: it is
    None, and a note says what is missing.
    """
    storage = storage_for(model, target, plan, dims)
    costs = {node: node_cost(node, dims, model.functions) for node in model.graph}
    launched = kernels(model, target, plan, dims, storage=storage, costs=costs)
    memory = activation_memory(model, target=target, storage=storage)
    unbound = unbound_dims(model, dims)
    unknown = [(n, c) for n, c in costs.items() if not c.is_known and not _is_free(n)]
    sized = not (unknown and unbound)
    time = latency(launched, target)
    if not sized:
        time = Latency(
            None, None, None, time.label, time.kernels, time.unknown, "dimensions without a size"
        )
    missing = _unknown_ops(unknown) if sized else ()
    moved = sum((k.bytes_read or 0) + (k.bytes_written or 0) for k in launched)
    return CostReport(
        target=target.name,
        recipe=recipe,
        file_bytes=file_bytes(model, plan),
        parameters=parameter_count(model),
        macs=sum(cost.macs or 0 for cost in costs.values()) if sized else None,
        flops=sum(cost.flops for cost in costs.values()) if sized else None,
        bytes_moved=moved if sized else None,
        peak_activation_bytes=memory.peak_bytes,
        latency=time,
        unknown_ops=missing,
        notes=(*notes, *_notes(target, plan, unbound if not sized else (), missing, memory, time)),
        nodes=_rows(costs, launched, memory, target),
    )


def _is_free(node: ir.Node) -> bool:
    return is_onnx_op(node, "Constant")


def unbound_dims(model: ir.Model, dims: Mapping[str, int] | None) -> tuple[str, ...]:
    """The named dimensions of the model's inputs that `dims` gives no size, in order."""
    found: dict[str, None] = {}
    for value in model.graph.inputs:
        for dim in value.shape.dims if value.shape is not None else ():
            if not isinstance(dim, int) and dim.value is not None and dim.value not in (dims or {}):
                found[dim.value] = None
    return tuple(found)


def _unknown_ops(unknown: Sequence[tuple[ir.Node, NodeCost]]) -> tuple[tuple[str, int, str], ...]:
    counts: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for node, cost in unknown:
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        counts[op] = counts.get(op, 0) + 1
        reasons.setdefault(op, cost.unknown_reason)
    return tuple((op, count, reasons[op]) for op, count in counts.items())


_LISTED = 6


def _notes(
    target: Target,
    plan: QuantPlan | None,
    unbound: Sequence[str],
    unknown: Sequence[tuple[str, int, str]],
    memory: ActivationMemory,
    time: Latency,
) -> list[str]:
    notes = []
    for name in unbound:
        notes.append(
            f"dimension {name!r} has no size: set it with dims={{{name!r}: 1}} or --dim {name}=1"
        )
    if unknown:
        listed = ", ".join(f"{count} {op}" for op, count, _ in unknown[:_LISTED])
        more = f" and {len(unknown) - _LISTED} more operators" if len(unknown) > _LISTED else ""
        notes.append(f"unknown cost, not in the totals: {listed}{more} (first: {unknown[0][2]})")
    if memory.peak_bytes is None and not unbound:
        notes.append(f"peak memory unknown: {memory.reason}")
    if time.ms is None and not unbound:
        notes.append(f"latency unknown: {time.reason}")
    if plan is not None:
        notes.append(f"priced from a plan, before weights are seen: {plan.label}")
        if target.runtime is Runtime.TVM and plan.nodes:
            notes.append("TVM computes quantized nodes in floats: 8 bits save size, not time")
    return notes


def _rows(
    costs: Mapping[ir.Node, NodeCost],
    launched: Sequence[Kernel],
    memory: ActivationMemory,
    target: Target,
) -> tuple[NodeRow, ...]:
    times: dict[ir.Node, float | None] = {}
    names: dict[ir.Node, str] = {}
    for kernel in launched:
        if not kernel.nodes:
            continue
        node = kernel.nodes[0]
        ms = kernel_ms(kernel, target.hardware)
        if node in names:  # the conversions around a node
            names[node] += f", {kernel.op}"
            before = times[node]
            times[node] = None if ms is None or before is None else before + ms
        else:
            names[node], times[node] = kernel.op, ms
    rows = []
    for (node, cost), alive in zip(costs.items(), memory.alive, strict=True):
        if _is_free(node):
            continue
        output = node.outputs[0] if node.outputs else None
        dims = output.shape.dims if output is not None and output.shape is not None else None
        rows.append(
            NodeRow(
                name=node.name or (output.name if output is not None else None) or "",
                op=node.op_type,
                shape=None if dims is None else tuple(_dim(d) for d in dims),
                macs=cost.macs,
                bytes_read=cost.bytes_read,
                bytes_written=cost.bytes_written,
                weight_bytes=cost.weight_bytes,
                alive_bytes=alive,
                kernel=names.get(node, ""),
                ms=times.get(node, 0.0),
                source=source_line(node) or module_path(node),
                unknown_reason=cost.unknown_reason,
            )
        )
    return tuple(rows)


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else dim.value or "?"


# --- recipes side by side --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The reports of several recipes on one target; `failed` gives why others have none."""

    target: str
    rows: tuple[CostReport, ...]
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, recipe: str) -> CostReport:
        for row in self.rows:
            if row.recipe == recipe:
                return row
        raise UsageError(
            f"The estimate has no recipe {recipe!r}",
            where=f"estimate for {self.target}",
            why=self.failed.get(recipe, ""),
            fix=f"it has: {', '.join(row.recipe for row in self.rows) or 'none'}",
        )

    def table(self) -> Any:
        """A rich renderable: a line a recipe, and below the table what each should be read with.

        Every latency says that it is assumed. Fits a terminal of 80 columns.
        """
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"Estimate for {self.target}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        shown = ("recipe", "file", "peak activations", "MACs", "latency")
        for heading in shown:
            left = heading == "recipe"
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        notes = []
        for line in self._lines():
            cells = dict(zip(_HEADINGS, line, strict=True))
            table.add_row(*(cells[heading] for heading in shown))
            if cells["notes"]:
                text = f"{cells['recipe']}: {cells['notes']}"
                notes.append(Padding(Text(text, style="dim"), (0, 0, 0, 2)))
        return Group(table, *notes)

    def per_node_table(self, recipe: str) -> Any:
        """A `rich.table.Table`: a line a node of one recipe's graph.

        Raises:
            UsageError: no report of that recipe.
        """
        from rich.table import Table

        table = Table(
            title=f"{recipe} on {self.target}, by node (times are assumed)",
            title_justify="left",
            show_edge=False,
            pad_edge=False,
        )
        for heading in _NODE_HEADINGS:
            left = heading in ("node", "op", "kernel", "source")
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        for row in self[recipe].nodes:
            table.add_row(*_node_cells(row))
        return table

    def offenders(self, recipe: str, n: int = 10) -> tuple[NodeRow, ...]:
        """The `n` nodes whose kernels take longest (assumed), longest first.

        Raises:
            UsageError: no report of that recipe.
        """
        timed = [row for row in self[recipe].nodes if row.ms]
        return tuple(sorted(timed, key=lambda row: -(row.ms or 0.0))[:n])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "target": self.target,
            "recipes": [row.as_dict() for row in self.rows],
            "failed": dict(self.failed),
        }

    def _lines(self) -> list[tuple[str, ...]]:
        lines = [(row.recipe, *row.cells, "; ".join(row.notes)) for row in self.rows]
        for recipe, why in self.failed.items():
            lines.append((recipe, *["-"] * 6, " ".join(why.split())))
        return lines

    def __str__(self) -> str:
        lines = [_HEADINGS, *self._lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADINGS) - 1)]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0])]
                + [line[i].rjust(widths[i]) for i in range(1, len(widths))]
                + [line[-1]]
            ).rstrip()
            for line in lines
        )


_HEADINGS = (
    "recipe",
    "file",
    "peak activations",
    "parameters",
    "MACs",
    "bytes moved",
    "latency",
    "notes",
)
_NODE_HEADINGS = (
    "node",
    "op",
    "output",
    "MACs",
    "read",
    "written",
    "weights",
    "alive",
    "kernel",
    "ms (assumed)",
    "source",
)


def _node_cells(row: NodeRow) -> tuple[str, ...]:
    return (
        row.name,
        row.op,
        "?" if row.shape is None else "x".join(str(d) for d in row.shape) or "scalar",
        format_count(row.macs),
        format_bytes(row.bytes_read),
        format_bytes(row.bytes_written),
        format_bytes(row.weight_bytes),
        format_bytes(row.alive_bytes),
        row.kernel,
        format_ms(row.ms),
        row.source,
    )
