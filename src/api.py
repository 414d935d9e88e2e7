"""The calls a user makes: `compile` and `bisect`. Import -> pipeline -> lower.

Here: putting the parts in order. Not here: what a recipe means (`pipelines`), the result
(`compiled`), the folder on disk (`artifact`), `estimate` (`architecture`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from .architecture import Architecture, ProgressCall, at_sizes, without_weights
from .compiled import Compiled
from .cost.budget import Budget
from .cost.latency import MEASURED, Latency
from .cost.profiles import profile_for
from .cost.report import CostReport, cost_report, of_others
from .cost.text import format_bytes
from .errors import EdgepassError, UnsupportedOpError
from .frontends import load_notes, load_supported
from .ir.graph import all_nodes, graph_tree
from .ir.sizing import check_dims, dim_name, fix_dims
from .passes.base import Context, Feed, Pass, Stage
from .passes.bisect import BisectResult, bisect_passes
from .passes.driver import run_passes, sort_by_stage
from .passes.ledger import Ledger
from .passes.probe import Probe, Sample, working_sample
from .passes.spec import format_passes
from .pipelines import epilogue, parse_recipe
from .samples import as_feeds
from .slower import promises_speed, require_faster
from .speed import Speed, compare, runner_of
from .targets.feed import input_specs
from .targets.registry import get_target, runs_on_host
from .targets.support import Placement, place
from .targets.target import Runtime, Target

LOSSLESS = 1e-4
"""What a lossless recipe may change, relative to an output's range."""
RUINED_DB = 10.0
"""Signal over error of all outputs below which a lossy recipe is announced to do harm."""


def compile(  # noqa: A001 - the name users look for
    model: Any,
    target: str | Target = "host",
    *,
    recipe: str = "default",
    passes: Sequence[Pass] = (),
    calibration: Any = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    strict: bool = False,
    check_numerics: bool = True,
    time_budget_s: float = 0.5,
    budget: Budget | None = None,
    force: bool = False,
    progress: ProgressCall | None = None,
) -> Compiled:
    """Compile a model for a target.

    Args:
        model: an ONNX path, bytes, `ModelProto`, `onnx_ir.Model`; a torch module with
            `example_inputs`, an `ExportedProgram`; a callable, or `package.module:callable`.
        target: a name (`edgepass targets` lists them), `host`, or a `Target`.
        recipe: a named recipe, or passes as text: `cleanup,my_pass{x=1},int8`.
        passes: passes of your own, run at their stage in addition to the recipe's.
        calibration: representative inputs, for recipes that observe ranges; see `samples.as_feeds`.
        example_inputs, dynamic_shapes, input_shapes: for torch; see `frontends.load_model`.
        dims: sizes of symbolic dimensions: at which costs are counted and numerics checked, and
            for TVM the sizes to compile for.
        strict: fail where a node falls off the target's fast path, or a lossless recipe
            changes results by more than 1e-4 of an output's range (in a model that computes in
            16 bits, by more than that dtype's rounding step).
        check_numerics: measure each pass's error against the model before it, on the first
            calibration sample or on random inputs.
        time_budget_s: seconds to spend on timing the result against the original where this
            machine can run it; 0 for none.
        budget: limits to hold the result against, in `Compiled.verdicts`: met, missed, or cannot
            tell. Latency is the measured one where the result was timed on this machine.
        force: keep a result of int8 that is slower than float, which is refused otherwise: by a
            timing on this machine, or, where there is none, by the prediction.
        progress: called with (done, total, what).

    Raises:
        SlowerError: int8 is slower than float here, and `force` was not given.
        EdgepassError: its subclasses say what, where, why and what to do.
    """
    device = get_target(target)
    graph = load_supported(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
        weights_required=True,
    )
    if dims:
        check_dims(graph, dims)
        if device.runtime is Runtime.TVM:  # its importer knows fewer computed shapes
            graph = fix_dims(graph, dims)
    notes = load_notes(graph)
    wanted = sort_by_stage([*parse_recipe(recipe), *passes])
    chosen = sort_by_stage([*wanted, *epilogue()])
    feeds = None if calibration is None else as_feeds(calibration, input_specs(graph))
    sample = sample_for(graph, feeds, dims)
    sizes = sample.dims
    if not sample.runs:
        notes.append(_NO_SAMPLE)
    context = Context(device, feeds, sizes, progress or _silent)
    timed = time_budget_s > 0 and sample.runs and runs_on_host(device)
    original = graph.clone() if timed else None
    hinted = recipe == "default" and device.scheme is not None and len(graph.graph) <= _HINTED
    guarded = not force and bool(promises_speed(wanted))
    pruned = any(item.stage is Stage.PRUNE for item in wanted)
    imported = Architecture(without_weights(graph)) if hinted or guarded or pruned else None
    probe = Probe(sample.feed) if check_numerics and sample.runs else None
    graph, ledger = run_passes(graph, chosen, context, probe=probe)
    _judge(ledger, chosen, strict, notes, _lossless_bound(graph))
    placement = place(device, graph)
    require_placed(placement)
    if strict:
        placement.require_fast()
    profile = profile_for(device)
    report = cost_report(
        at_sizes(graph, sizes),
        device,
        recipe=recipe,
        dims=sizes,
        saved=graph,
        profile=profile,
    )
    if hinted and imported is not None:
        notes.append(_what_int8_adds(imported, report, device, sizes))
    if pruned and imported is not None:
        ledger.remarks += _predicted(imported, report, device, sizes)
    if profile is not None:
        notes += of_others(profile, device)
    compiled = Compiled(
        model=graph,
        target=device,
        recipe=format_passes(wanted) or "none",
        ledger=ledger,
        placement=placement,
        notes=notes,
        session_options=session_options(device, graph),
        cost=_static_only(report),
        dims=sizes,
        golden_input=sample.feed if sample.runs else None,
    )
    if original is not None:
        compiled.speed = _time(original, compiled, sample.feed, time_budget_s)
    if guarded and imported is not None:
        _require_faster(wanted, imported, report, compiled, original, sample)
    if compiled.speed is not None:
        _tell_speed(compiled, compiled.speed)
    if budget is not None:
        compiled.verdicts = budget.check(_with_measured(report, compiled.speed))
        notes += [verdict.text for verdict in compiled.verdicts]
    return compiled


def bisect(
    model: Any,
    target: str | Target = "host",
    *,
    recipe: str = "default",
    passes: Sequence[Pass] = (),
    feed: Mapping[str, np.ndarray] | None = None,
    calibration: Any = None,
    dims: Mapping[str, int] | None = None,
    tolerance: float = LOSSLESS,
    out: str | Path | None = None,
    example_inputs: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
) -> BisectResult:
    """Which pass of a pipeline first changes results by more than `tolerance`.

    `feed` is the input to compare on; without one, the first calibration sample or random inputs.
    With `out`, a minimal reproducer is written there: a model, an input and a report.

    Raises:
        EdgepassError: the model can't be read or run.
    """
    graph = load_supported(
        model, example_inputs=example_inputs, input_shapes=input_shapes, weights_required=True
    )
    feeds = None if calibration is None else as_feeds(calibration, input_specs(graph))
    sample = sample_for(graph, [feed] if feed is not None else feeds, dims)
    chosen = [*parse_recipe(recipe), *passes, *epilogue()]
    context = Context(get_target(target), feeds, sample.dims)
    folder = None if out is None else Path(out)
    return bisect_passes(graph, chosen, context, sample.feed, tolerance=tolerance, out=folder)


# --- parts of compile --------------------------------------------------------------------------


_NO_SAMPLE = (
    "the model ran on none of the random inputs tried, so its numerics were not checked and the "
    "artifact has no golden input; give one real sample as `calibration`, or sizes as `dims`"
)


def sample_for(
    graph: ir.Model, feeds: Sequence[Feed] | None, dims: Mapping[str, int] | None
) -> Sample:
    """A feed to check numerics on: the first given, else a random one; and the sizes of its
    symbolic dimensions."""
    if not feeds:
        return working_sample(graph, dims)
    sizes: dict[str, int] = {}
    for value in graph.graph.inputs:
        if value.name is not None and value.name in feeds[0] and value.shape is not None:
            for axis, size in enumerate(feeds[0][value.name].shape):
                if not isinstance(value.shape.dims[axis], int):
                    sizes.setdefault(dim_name(value, axis), size)
    return Sample(feeds[0], {**sizes, **(dims or {})})


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""


def _lossless_bound(graph: ir.Model) -> float:
    """`LOSSLESS`, or the rounding step of the coarsest float dtype that the model computes in.

    In half precision the same operators in another order already differ by that.
    """
    half = {node.outputs[0].dtype for node in all_nodes(graph) if node.outputs and node.inputs} & {
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
    }
    steps = [float(ml_dtypes.finfo(dtype.numpy()).eps) for dtype in half if dtype is not None]
    return max([LOSSLESS, *steps])


def _judge(
    ledger: Ledger, passes: Sequence[Pass], strict: bool, notes: list[str], bound: float
) -> None:
    """A lossless pipeline that changed the numbers says so, or fails when strict; a lossy one that
    left little of them says so."""
    error = ledger.total_error
    if error is not None and error.sqnr_db < RUINED_DB and not all(p.lossless for p in passes):
        notes.append(
            f"WARNING: on the one sample tried, the outputs are only {error.sqnr_db:.0f} dB from "
            "those of the source: evaluate the model on real data (`edgepass evaluate`), and look "
            "inside (`edgepass inspect`)"
        )
    if error is None or error.relative <= bound or not all(p.lossless for p in passes):
        return
    worst = max(
        (row for row in ledger.rows if row.error is not None),
        key=lambda row: row.error.relative if row.error is not None else 0.0,
    )
    text = (
        f"results differ by {error.relative:.1e} of the range of {error.output!r}, most of it in "
        f"{worst.name}; every pass of this recipe is meant to be lossless"
    )
    if strict:
        from .errors import NumericsError

        raise NumericsError(
            "The recipe is not lossless on this model",
            where=f"output {error.output!r}, pass {worst.name}",
            why=text,
            fix="`edgepass bisect` writes a minimal reproducer; leave the pass out to go on",
        )
    notes.append(f"WARNING: {text}; `edgepass bisect` tells more")


def require_placed(placement: Placement) -> None:
    """Raises `UnsupportedOpError` where the target can't run a node at all."""
    lost = [row for row in placement.rows if row.where == "not at all"]
    if lost:
        raise UnsupportedOpError(
            f"{placement.target} can't run {lost[0].count} {lost[0].op_type} node(s)",
            where=lost[0].example,
            why=lost[0].reason,
            fix="choose another runtime (the plain target name is ONNX Runtime), or rewrite the "
            "nodes with a pass of your own",
        )


def session_options(target: Target, model: ir.Model) -> dict[str, str]:
    """The target's own, and those of its preferred scheme once the model has Q/DQ pairs."""
    options = dict(target.session_options)
    quantized = any(
        node.op_type == "QuantizeLinear" for graph in graph_tree(model.graph) for node in graph
    )
    if quantized:
        for scheme in reversed(target.quantization):
            options.update(scheme.session_options)
    return options


def _static_only(report: CostReport) -> dict[str, Any]:
    """The report's totals for the manifest, without the table of nodes."""
    return {key: value for key, value in report.as_dict().items() if key != "nodes"}


_HINTED = 3000
"""Nodes up to which a compilation also says what int8 would bring: that takes all passes again."""


def _what_int8_adds(
    net: Architecture, before: CostReport, target: Target, dims: Mapping[str, int]
) -> str:
    """One sentence on what `recipe="int8"` would bring to the model as it was imported."""
    try:
        found = net.estimate(target, ["int8"], dims=dims)
    except EdgepassError as error:
        return f'recipe="int8" can\'t be priced here: {error.diagnostic.what}'
    if "int8" in found.failed:
        return f'recipe="int8" can\'t be priced here: {" ".join(found.failed["int8"].split())}'
    after = found["int8"]
    saved = f"{format_bytes(before.file_bytes)} to {format_bytes(after.file_bytes)}"
    return (
        f'this recipe is lossless; recipe="int8" with calibration samples would take the file '
        f"from {saved} (computed), and latency from {before.latency} to {after.latency}"
    )


def _predicted(
    net: Architecture, after: CostReport, target: Target, dims: Mapping[str, int]
) -> list[str]:
    """What a pruned model is predicted to take, beside the model as it was imported."""
    return [
        f"predicted for {target.name}: {after.latency}; without pruning, in float: {row.latency}"
        for row in net.estimate(target, ["fp32"], dims=dims).rows
        if row.latency.ms is not None and after.latency.ms is not None
    ]


def _with_measured(report: CostReport, speed: Speed | None) -> CostReport:
    """The report with the time that was measured here, where one was."""
    if speed is None:
        return report
    time = Latency(speed.candidate_ms, speed.low_ms, speed.high_ms, MEASURED)
    return dataclasses.replace(report, latency=time)


def _time(
    original: ir.Model, compiled: Compiled, feed: Mapping[str, np.ndarray], budget_s: float
) -> Speed | None:
    from .targets.onnxruntime import OrtRunner

    try:
        baseline = OrtRunner(original)
        runner = compiled.runner()  # the one that `run` will use
        what = compiled.target.name
        speed = compare(
            runner_of(baseline, feed), runner_of(runner, feed), budget_s=budget_s, what=what
        )
    except EdgepassError as error:
        compiled.notes.append(f"not timed: {error.diagnostic.what}")
        return None
    return speed


def _tell_speed(compiled: Compiled, speed: Speed) -> None:
    compiled.ledger.remarks.append(str(speed))
    if compiled.target.runtime is Runtime.TVM:
        faster = "TVM" if speed.ratio > 1 else "ONNX Runtime"
        compiled.ledger.remarks.append(f"the faster lowering on this machine: {faster}")
    if speed.slower:
        compiled.notes.append(
            f"SLOWER than the original in ONNX Runtime on this machine: {1 / speed.ratio:.2f}x"
        )


def _require_faster(
    wanted: Sequence[Pass],
    imported: Architecture,
    report: CostReport,
    compiled: Compiled,
    original: ir.Model | None,
    sample: Sample,
) -> None:
    """Refuse what is slower than float (see `slower`); a surer timing replaces the first."""

    def again(seconds: float) -> Speed | None:
        return None if original is None else _time(original, compiled, sample.feed, seconds)

    def predicted() -> tuple[Latency, Latency]:
        before = imported.estimate(compiled.target, ["fp32"], dims=sample.dims)
        return before["fp32"].latency, report.latency

    compiled.speed = require_faster(
        wanted, compiled.speed, again, predicted, compiled.target.name, compiled.notes.append
    )
