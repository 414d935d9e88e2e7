"""The order of things: rewrite with kernels of ours, lower the rest, fuse it, schedule it."""

from __future__ import annotations

from typing import Any

from .generic import schedule_generic
from .graph import FlatGraph
from .legalize import legalizations
from .report import KernelRecord, ScheduleReport
from .rewrite import FunctionWriter, KernelLibrary
from .rules import RULES
from .spec import CpuSpec


def schedule_module(mod: Any, spec: CpuSpec) -> tuple[Any, ScheduleReport]:
    """Optimize a Relax module for a CPU.

    Args:
        mod: an `tvm.IRModule` as `tvm.relax.frontend.onnx.from_onnx` returns it with
            `keep_params_in_input=False`. Static float32 parts get kernels of ours; dynamic shapes
            and other dtypes get TVM's loops, vectorized. It is not changed.
        spec: the CPU.

    Returns:
        `(module, report)`: a module for TVM's data-flow lowering and code generation
        (`tvm.compile`), all of whose PrimFuncs are scheduled, and what was done to each.
    """
    import tvm
    from tvm import relax
    from tvm.relax.backend.cpu_generic import pipeline as cpu_passes

    target = spec.tvm_target()
    library = KernelLibrary()
    refusals: dict[str, str] = {}
    with target:
        mod = relax.transform.DecomposeOpsForInference()(mod)
        mod = relax.transform.CanonicalizeBindings()(mod)
        mod = _rewrite(mod, spec, library, refusals)
        passes = [
            relax.transform.DeadCodeElimination(),
            *cpu_passes.library_dispatch_passes(target),
            relax.transform.LegalizeOps(dict(legalizations())),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
        mod = tvm.transform.Sequential(passes)(mod)
        mod, generic = schedule_generic(mod, spec, refusals)
    records: list[KernelRecord] = []
    for variable in mod.get_global_vars():
        name = variable.name_hint
        record = library.records.get(name) or generic.get(name)
        if record is not None:
            records.append(record)
    return mod, ScheduleReport(tuple(sorted(records, key=lambda record: record.name)))


def _rewrite(mod: Any, spec: CpuSpec, library: KernelLibrary, refusals: dict[str, str]) -> Any:
    """Replace what the rules cover in every flat Relax function."""
    from tvm import relax

    builder = relax.BlockBuilder(mod)
    for variable, function in mod.functions.items():
        if not isinstance(function, relax.Function):
            continue
        reason = FlatGraph.refusal(function)
        if reason:
            refusals["function " + variable.name_hint] = reason
            continue
        graph = FlatGraph(mod, function)
        writer = FunctionWriter(graph, spec, builder, library)
        params = list(function.params)
        scratch = "rewritten_" + variable.name_hint
        with builder.function(scratch, params, attrs=dict(function.attrs or {})):
            with builder.dataflow():
                result = writer.write(params, function.body.body, RULES)
                result = builder.emit_output(result)
            builder.emit_func_output(result)
        refusals.update(writer.refusals)
    return _renamed(builder.get())


def _renamed(mod: Any) -> Any:
    """Put the rewritten functions under the names of the originals."""
    functions = {variable.name_hint: variable for variable in mod.get_global_vars()}
    for name, variable in functions.items():
        original = name.removeprefix("rewritten_")
        if original != name and original in functions:
            rewritten = mod[variable]
            del mod[variable]
            mod.update_func(functions[original], rewritten.with_attr("global_symbol", original))
    return mod
