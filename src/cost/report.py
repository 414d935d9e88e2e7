"""What a model costs on a target: in total, by kernel and by node.

Here: `cost_report` and `CostReport`. Not here: how a number comes about (`size`, `memory`,
`kernels`, `latency`, and `ir.ops` for MACs), recipes side by side (`estimate`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..ir.graph import is_onnx_op, module_path, node_name, source_line
from ..ir.ops import NodeCost
from ..ir.quant import QuantPlan
from ..targets.registry import is_measurable, targets
from ..targets.target import Runtime, Target
from .advice import Advice, advice
from .counts import Counts, count, unbound_dims
from .kernels import Kernel
from .latency import Latency, format_ms, latency
from .memory import ActivationMemory
from .profile import Profile
from .text import format_bytes, format_count

__all__ = [
    "CostReport",
    "KernelRow",
    "NodeRow",
    "cost_report",
    "format_bytes",
    "format_count",
    "of_others",
    "report_of",
    "unbound_dims",
]


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRow:
    """One node of the main graph; sizes in bytes, None where not known.

    `bytes_read`, `bytes_written` are of the node alone, before the runtime's fusion. `alive_bytes`
    are all activations alive while it runs. `ms` is the predicted time of the kernels that the node
    leads; `kernel` names them, and both are empty for nodes merged into another or costing nothing.
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


@dataclasses.dataclass(frozen=True, slots=True)
class KernelRow:
    """One launch of the runtime; sizes in bytes, None where not known.

    `op`: the merged operators; `nodes`: the model's nodes whose work it does; `shape`: of its first
    output. `ms`: predicted, in the order in which kernels run; `share` of the whole, 0 to 1.
    """

    op: str
    kind: str
    dtype: str
    shape: tuple[int, ...] | None
    nodes: tuple[str, ...]
    macs: int | None
    bytes_read: int | None
    bytes_written: int | None
    weight_bytes: int
    ms: float | None
    share: float | None
    source: str
    unknown_reason: str = ""

    @property
    def where(self) -> str:
        """Node and shape, for people."""
        shape = "" if self.shape is None else "x".join(map(str, self.shape))
        return ", ".join(part for part in (self.nodes[0] if self.nodes else "", shape) if part)


@dataclasses.dataclass(frozen=True)
class CostReport:
    """The static cost of one model on one target under one recipe.

    `file_bytes`: `model.onnx` with its external data as saved (a TVM library adds its code).
    `macs`, `flops`: of one inference. `bytes_moved`: what kernels read and write, after
    the runtime's fusion. The three are None when dimensions have no size; with operators in
    `unknown_ops` (op, count, reason) they are lower bounds, and `is_lower_bound` says so.
    `peak_activation_bytes` None: `notes` says why. `nodes` has a row a node of the main graph,
    `kernels` one a launch. `advice`: what compressing weights can't fix. `boards`: the latency on
    measured boards of the architecture, fastest first, where the target is no single device.
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
    kernels: tuple[KernelRow, ...] = dataclasses.field(repr=False, default=())
    advice: tuple[Advice, ...] = dataclasses.field(repr=False, default=())
    boards: tuple[Latency, ...] = dataclasses.field(repr=False, default=())

    def offenders(self, n: int = 10) -> tuple[KernelRow, ...]:
        """The `n` kernels predicted to take longest, longest first."""
        timed = [row for row in self.kernels if row.ms]
        return tuple(sorted(timed, key=lambda row: -(row.ms or 0.0))[:n])

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
        """Plain data, for `--json` and the manifest. `nodes` and `kernels` are the long parts."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name
            not in ("latency", "unknown_ops", "notes", "nodes", "kernels", "advice", "boards")
        }
        plain["is_lower_bound"] = self.is_lower_bound
        plain["latency"] = self.latency.as_dict()
        plain["unknown_ops"] = [
            {"op": op, "count": count, "reason": reason} for op, count, reason in self.unknown_ops
        ]
        plain["notes"] = list(self.notes)
        plain["boards"] = [item.as_dict() for item in self.boards]
        plain["advice"] = [item.as_dict() for item in self.advice]
        plain["nodes"] = [dataclasses.asdict(row) for row in self.nodes]
        plain["kernels"] = [dataclasses.asdict(row) for row in self.kernels]
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
    threads: int = 1,
    profile: Profile | None = None,
    boards: Sequence[Profile] = (),
    saved: ir.Model | None = None,
) -> CostReport:
    """Count what a model costs; weights may be absent and are never read.

    `plan`: a quantization to price that is not applied yet. `dims`: sizes of symbolic dimensions.
    `notes` come first among the report's own. `profile`: fitted latency of the device; without one
    latency is assumed. `boards`: profiles of devices to give the range over besides. `saved`: the
    model as it will be written, where `model` is it at given sizes. Nothing is raised for what
    can't be known: it is None, and a note says what is missing.
    """
    counted = count(model, target, plan, dims, saved)
    return report_of(
        counted,
        target,
        recipe=recipe,
        notes=notes,
        threads=threads,
        profile=profile,
        boards=boards,
    )


def report_of(
    counted: Counts,
    target: Target,
    *,
    recipe: str = "",
    notes: Sequence[str] = (),
    threads: int = 1,
    profile: Profile | None = None,
    boards: Sequence[Profile] = (),
) -> CostReport:
    """The report of what was counted, with its time; arguments as in `cost_report`."""
    launched, costs, memory = counted.kernels, counted.costs, counted.memory
    sized = not (counted.unknown and counted.unbound)
    time = latency(launched, target, threads, profile, counted.described)
    if not sized:
        time = dataclasses.replace(
            time, ms=None, low_ms=None, high_ms=None, reason="dimensions without a size"
        )
    missing = _unknown_ops(counted.unknown) if sized else ()
    moved = sum((k.bytes_read or 0) + (k.bytes_written or 0) for k in launched)
    others = sorted(
        (latency(launched, target, threads, board, counted.described) for board in boards if sized),
        key=lambda item: item.ms or 0.0,
    )
    return CostReport(
        target=target.name,
        recipe=recipe,
        file_bytes=counted.file_bytes,
        parameters=counted.parameters,
        macs=sum(cost.macs or 0 for cost in costs.values()) if sized else None,
        flops=sum(cost.flops for cost in costs.values()) if sized else None,
        bytes_moved=moved if sized else None,
        peak_activation_bytes=memory.peak_bytes,
        latency=time,
        unknown_ops=missing,
        notes=(
            *notes,
            *_notes(
                target, counted.plan, counted.unbound if not sized else (), missing, memory, time
            ),
            *(of_others(profile, target) if profile is not None and time.ms is not None else ()),
            *_range(others),
        ),
        nodes=_rows(costs, launched, memory, time),
        kernels=_kernel_rows(launched, time),
        boards=tuple(others),
        advice=(
            advice(launched, time, memory.peak_bytes, counted.file_bytes, counted.described)
            if sized
            else ()
        ),
    )


def _is_free(node: ir.Node) -> bool:
    return is_onnx_op(node, "Constant")


def _unknown_ops(unknown: Sequence[tuple[ir.Node, NodeCost]]) -> tuple[tuple[str, int, str], ...]:
    counts: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for node, cost in unknown:
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        counts[op] = counts.get(op, 0) + 1
        reasons.setdefault(op, cost.unknown_reason)
    return tuple((op, count, reasons[op]) for op, count in counts.items())


_LISTED = 6
_NOTABLE = 0.05


def _how_latency_is_known(time: Latency) -> list[str]:
    if time.ms is None or not time.profile:
        return []
    threads = f"{time.threads} thread{'s' if time.threads > 1 else ''}"
    text = f"latency by the profile {time.profile!r} ({time.device}, {time.runtime}, {threads})"
    if time.held_out:
        text += f": {time.held_out}"
    notes = [text]
    if time.assumed >= _NOTABLE:
        notes.append(
            f"{time.assumed:.0%} of the time is in operators that the profile lacks: assumed"
        )
    if time.novel - time.assumed >= 2 * _NOTABLE:
        notes.append(
            f"{time.novel - time.assumed:.0%} of the time is in kernels unlike those it was fitted "
            "on: the interval is wider"
        )
    return notes


def of_others(profile: Profile, target: Target) -> list[str]:
    """Where the profile is of another runtime than the target's, or of another target's kernels."""
    notes = []
    if profile.runtime and profile.runtime != target.runtime:
        notes.append(
            f"times are predicted by a profile of {profile.runtime}; under {target.runtime} they "
            "differ: compare recipes and architectures, not milliseconds"
        )
    fitted = targets().get(profile.target)
    if fitted is not None and (fitted.hardware.arch, fitted.runtime) != (
        target.hardware.arch,
        target.runtime,
    ):
        notes.append(
            f"the profile {profile.name!r} prices kernels of {profile.target}; {target.name} runs "
            "others"
        )
    return notes


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
    notes += _how_latency_is_known(time)
    if time.ms is not None and not time.profile and is_measurable(target):
        notes.append(
            "latency is assumed: `edgepass calibrate` measures this machine, in nine minutes"
        )
    if plan is not None:
        notes.append(f"priced from a plan, before weights are seen: {plan.label}")
        if target.runtime is Runtime.TVM and plan.nodes:
            notes.append("TVM computes quantized nodes in floats: 8 bits save size, not time")
    return notes


def _range(boards: Sequence[Latency]) -> list[str]:
    if len(boards) < 2:
        return []
    fast, slow = boards[0], boards[-1]
    return [
        f"on {len(boards)} measured boards from {format_ms(fast.ms)} ms ({fast.device}, "
        f"{fast.runtime}) to {format_ms(slow.ms)} ms ({slow.device}, {slow.runtime}): name one "
        "with --target"
    ]


def _rows(
    costs: Mapping[ir.Node, NodeCost],
    launched: Sequence[Kernel],
    memory: ActivationMemory,
    time: Latency,
) -> tuple[NodeRow, ...]:
    times: dict[ir.Node, float | None] = {}
    names: dict[ir.Node, str] = {}
    predicted = time.kernel_ms or (None,) * len(launched)
    for kernel, ms in zip(launched, predicted, strict=True):
        if not kernel.nodes:
            continue
        node = kernel.nodes[0]
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


def _kernel_rows(launched: Sequence[Kernel], time: Latency) -> tuple[KernelRow, ...]:
    predicted = time.kernel_ms or (None,) * len(launched)
    return tuple(
        KernelRow(
            op=kernel.op,
            kind=kernel.kind,
            dtype=kernel.dtype,
            shape=kernel.outputs[0].shape if kernel.outputs else None,
            nodes=tuple(node_name(node) for node in kernel.nodes),
            macs=kernel.macs,
            bytes_read=kernel.bytes_read,
            bytes_written=kernel.bytes_written,
            weight_bytes=kernel.weight_bytes,
            ms=ms,
            share=ms / time.ms if ms is not None and time.ms else None,
            source=kernel.source_line,
            unknown_reason=kernel.unknown_reason,
        )
        for kernel, ms in zip(launched, predicted, strict=True)
    )


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else dim.value or "?"
