"""Which pass first broke the numbers, and the smallest graph that shows it.

Here: `bisect_passes`, which replays a pipeline pass by pass, and the reduction of the model to the
nodes that the guilty result needs. Not here: judging accuracy on real data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import EdgepassError
from ..ir.graph import node_count
from ..ir.shapes import infer_shapes
from .base import Context, Feed, Pass
from .driver import run_passes
from .probe import NumericError, Probe, numeric_error


@dataclasses.dataclass(frozen=True)
class BisectResult:
    """The first pass whose result differs from the original by more than the tolerance.

    `guilty` is None when no pass does; `errors` has the error against the original after each
    pass that changed the model. `reproducer` is a folder with `before.onnx`, `input.npz`,
    `report.json`; `nodes` its node count against the whole model's.
    """

    guilty: str | None
    errors: tuple[tuple[str, NumericError], ...]
    tolerance: float
    reproducer: Path | None = None
    nodes: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        lines = [f"{name}: {error}" for name, error in self.errors]
        if self.guilty is None:
            return "\n".join([*lines, f"no pass exceeds {self.tolerance:g}"])
        text = f"{self.guilty} is the first to exceed {self.tolerance:g}"
        if self.reproducer is not None:
            text += f"; reproducer of {self.nodes[0]} of {self.nodes[1]} nodes: {self.reproducer}"
        return "\n".join([*lines, text])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "guilty": self.guilty,
            "tolerance": self.tolerance,
            "errors": [{"pass": n, "error": e.relative} for n, e in self.errors],
            "reproducer": None if self.reproducer is None else str(self.reproducer),
            "nodes": list(self.nodes),
        }


def bisect_passes(
    model: ir.Model,
    passes: Sequence[Pass],
    context: Context,
    feed: Feed,
    *,
    tolerance: float = 1e-4,
    out: Path | None = None,
) -> BisectResult:
    """Replay `passes` on `model` (not changed) and compare after each with the original.

    `tolerance` is relative to each output's range. With `out`, the model before the guilty pass
    is cut down to what still shows an error over the tolerance, and written there.

    Raises:
        LoweringError: the original does not run on `feed`.
    """
    probe = Probe(feed)
    reference = probe.run(model)
    errors: list[tuple[str, NumericError]] = []
    snapshots: list[ir.Model] = [model.clone()]
    guilty: list[Pass] = []

    def watch(item: Pass, changed: ir.Model) -> None:
        error = numeric_error(reference, probe.run(changed))
        errors.append((str(item), error))
        if error.relative > tolerance:
            guilty.append(item)
            raise _FoundError(str(item))
        snapshots[0] = changed.clone()

    with contextlib.suppress(_FoundError):
        run_passes(model.clone(), passes, context, after_pass=watch)
    if not guilty:
        return BisectResult(None, tuple(errors), tolerance)
    if out is None:
        return BisectResult(str(guilty[0]), tuple(errors), tolerance)
    before = snapshots[0]
    small = _reduce(before, guilty[0], context, feed, tolerance)
    _write(out, small, guilty[0], feed, errors[-1][1], tolerance)
    counts = (node_count(small), node_count(before))
    return BisectResult(str(guilty[0]), tuple(errors), tolerance, out, counts)


class _FoundError(EdgepassError):
    """Ends the replay at the guilty pass."""


def _shows(model: ir.Model, item: Pass, context: Context, feed: Feed, tolerance: float) -> bool:
    """Whether the pass alone, on this model, exceeds the tolerance."""
    inputs = {v.name for v in model.graph.inputs}
    probe = Probe({name: array for name, array in feed.items() if name in inputs})
    try:
        before = probe.run(model)
        changed, _ = run_passes(model.clone(), [item], context)
        return numeric_error(before, probe.run(changed)).relative > tolerance
    except EdgepassError:
        return False


def _reduce(
    model: ir.Model, item: Pass, context: Context, feed: Feed, tolerance: float
) -> ir.Model:
    """The shortest prefix of the nodes whose last results still show the error, by bisection,
    without what those results do not need."""
    best = model
    nodes = list(model.graph)
    low, high = 0, len(nodes) - 1
    while low < high:
        middle = (low + high) // 2
        candidate = _cut(model, nodes[: middle + 1], feed)
        if candidate is not None and _shows(candidate[0], item, context, candidate[1], tolerance):
            best, high = candidate[0], middle
        else:
            low = middle + 1
    return best


def _cut(model: ir.Model, kept: Sequence[ir.Node], feed: Feed) -> tuple[ir.Model, Feed] | None:
    """The model up to the last of `kept`, whose outputs become the graph's outputs."""
    last = kept[-1]
    outputs = [v.name for v in last.outputs if v.name]
    copy = model.clone()
    by_name = {v.name: v for node in copy.graph for v in node.outputs}
    wanted = [by_name[name] for name in outputs if name in by_name]
    if not wanted or any(v.dtype is None for v in wanted):
        return None
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(wanted)
    _drop_unused(copy)
    return copy, feed


def _drop_unused(model: ir.Model) -> None:
    from .cleanup.dead_code import DeadCode

    DeadCode().run(model, Context())
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def _write(
    out: Path, model: ir.Model, item: Pass, feed: Feed, error: NumericError, tolerance: float
) -> None:
    from ..targets.onnx_file import write_onnx

    out.mkdir(parents=True, exist_ok=True)
    infer_shapes(model, strict=False)
    write_onnx(model, out / "before.onnx")
    inputs = {v.name for v in model.graph.inputs}
    arrays: dict[str, Any] = {name: np.asarray(a) for name, a in feed.items() if name in inputs}
    np.savez(out / "input.npz", **arrays)
    report = {
        "pass": str(item),
        "error": error.relative,
        "tolerance": tolerance,
        "replay": f"edgepass bisect before.onnx --recipe '{item},' --input input.npz",
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
