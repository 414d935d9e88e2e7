"""Whether a target runs a node: Yes, or No with a reason; and the placement table of the answers.

Here: the one question that passes ask of a target. Not here: changing the graph so that the answer
is yes (`passes.legalize`).
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import onnx_ir as ir

from ..errors import StrictTargetError
from ..ir.graph import ONNX_DOMAINS, describe_node, graph_tree, is_onnx_op
from ..ir.quant import integer_islands
from .target import No, Runtime, Target, Yes


class Support:
    """The answers of one target for the nodes of one model: `Support(target, model).of(node)`.

    A target with its own list of operators (`Target.ops`) answers from it; else the runtime's
    kernels do.
    """

    def __init__(self, target: Target, model: ir.Model) -> None:
        self.target = target
        self.model = model
        self._refused: dict[int, str] | None = None

    def of(self, node: ir.Node) -> Yes | No:
        """Whether the target's runtime executes the node, and how."""
        if node.op_identifier() in self.model.functions:
            return Yes("a function of the model")
        if is_onnx_op(node, "Constant"):
            return Yes("a weight")
        if self.target.ops is not None:
            return _from_list(self.target, node)
        if self.target.runtime is Runtime.TVM:
            reason = self._refused_by_tvm().get(id(node))
            return No(reason) if reason else Yes()
        from .ort_support import ort_supports

        return ort_supports(node, self.model.opset_imports)

    def _refused_by_tvm(self) -> dict[int, str]:
        if self._refused is None:
            from .tvm.importer import unsupported_nodes

            self._refused = {id(node): why for node, why in unsupported_nodes(self.model)}
        return self._refused


def _from_list(target: Target, node: ir.Node) -> Yes | No:
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    rows = [o for o in target.ops or () if (o.domain, o.op_type) == (domain, node.op_type)]
    if not rows:
        return No(f"{target.name} lists no {node.op_type}")
    first = next((v for v in node.inputs if v is not None), None)
    dtype = None if first is None else first.dtype
    if any(not o.dtypes or dtype is None or dtype in o.dtypes for o in rows):
        return Yes(rows[0].limits)
    return No(f"{target.name} runs {node.op_type} not in {dtype}")


@dataclasses.dataclass(frozen=True)
class PlacementRow:
    """Nodes of one op type that run in one way. `fast` is False where they fall off the fast path.

    `example` is one of them.
    """

    op_type: str
    count: int
    where: str
    fast: bool
    reason: str
    example: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How each node of a compiled model runs on the target, grouped by op type and reason."""

    target: str
    rows: tuple[PlacementRow, ...]

    @property
    def slow(self) -> tuple[PlacementRow, ...]:
        """The rows off the fast path."""
        return tuple(row for row in self.rows if not row.fast)

    def require_fast(self) -> None:
        """For `strict=True`.

        Raises:
            StrictTargetError: a node falls off the fast path; all such rows are listed.
        """
        if not self.slow:
            return
        listed = "; ".join(f"{r.count} {r.op_type}: {r.reason}" for r in self.slow)
        raise StrictTargetError(
            f"{sum(r.count for r in self.slow)} node(s) fall off {self.target}'s fast path",
            where=self.slow[0].example,
            why=listed,
            fix="leave strict=False to accept it, or rewrite the nodes",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and the manifest."""
        return {"target": self.target, "rows": [row.as_dict() for row in self.rows]}

    def table(self) -> Any:
        """A `rich.table.Table`."""
        from rich.table import Table

        title = f"Placement on {self.target}"
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        for heading in ("op", "nodes", "runs", "reason"):
            table.add_column(heading, justify="right" if heading == "nodes" else "left")
        for row in self.rows:
            table.add_row(row.op_type, str(row.count), row.where, row.reason)
        return table

    def __str__(self) -> str:
        return "\n".join(
            f"{r.op_type:24} {r.count:5}  {r.where}{f': {r.reason}' if r.reason else ''}"
            for r in self.rows
        )


def place(target: Target, model: ir.Model) -> Placement:
    """Ask for the support of every node, and say which run in integers, float32 or half.

    Off the fast path are nodes that the runtime can't execute, nodes of half precision that it
    runs between casts, and, in a quantized model, compute nodes left in float.
    """
    integer = {id(node) for node in integer_islands(model)}
    support = Support(target, model)
    groups: dict[tuple[str, str, bool, str], list[ir.Node]] = collections.defaultdict(list)
    for graph in graph_tree(model.graph):
        for node in graph:
            if node.op_type in ("Constant", "QuantizeLinear", "DequantizeLinear"):
                continue
            where, fast, reason = _place_node(support, node, integer)
            groups[(node.op_type, where, fast, reason)].append(node)
    rows = [
        PlacementRow(op, len(nodes), where, fast, reason, describe_node(nodes[0]))
        for (op, where, fast, reason), nodes in groups.items()
    ]
    return Placement(target.name, tuple(sorted(rows, key=lambda r: (r.fast, -r.count, r.op_type))))


_COMPUTE = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def _place_node(support: Support, node: ir.Node, integer: set[int]) -> tuple[str, bool, str]:
    answer = support.of(node)
    if isinstance(answer, No):
        return "not at all", False, answer.reason
    if id(node) in integer:
        if support.target.runtime is Runtime.TVM:
            return "in float32", False, "TVM computes quantized nodes in float"
        return "in integers", True, ""
    if "casts" in answer.note:
        return "in float32", False, answer.note
    if integer and node.op_type in _COMPUTE:
        return "in float", False, "left in float by the quantization plan"
    output = next((v.dtype for v in node.outputs if v.dtype is not None), None)
    return f"in {output.name.lower() if output else '?'}", True, answer.note
