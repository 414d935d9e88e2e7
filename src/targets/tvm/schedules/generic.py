"""Schedules for what no kernel of ours covers: any dtype, any shape, also dynamic ones.

LLVM vectorizes plain elementwise loops well (measured: 200k-element add + relu 64 us untouched,
320 us when fused to one loop and vectorized by hand), so that what is left to do is what keeps it
from that: intermediate tensors between elementwise blocks, reductions innermost, and calls of math
functions. Each step is applied where legal and skipped where not; none changes results beyond the
rounding of the polynomials in `vecmath.py`.
"""

from __future__ import annotations

from typing import Any

from .builder import Expr
from .report import KernelRecord
from .spec import CpuSpec
from .vecmath import VectorMath

_MATH = {"tirx.exp": "exp", "tirx.tanh": "tanh", "tirx.erf": "erf", "tirx.sigmoid": "sigmoid"}


def schedule_generic(
    mod: Any, spec: CpuSpec, refusals: dict[str, str]
) -> tuple[Any, dict[str, KernelRecord]]:
    """Schedule every PrimFunc that has no schedule yet.

    `refusals` maps operator names to why their rule did not apply, for the report. Returns the
    module and a record for each function scheduled.
    """
    from tvm import tirx

    records: dict[str, KernelRecord] = {}
    for variable, function in list(mod.functions.items()):
        if not isinstance(function, tirx.PrimFunc):
            continue
        if function.attrs and "tirx.is_scheduled" in function.attrs:
            continue
        name = variable.name_hint
        function, rules = _schedule(function, spec)
        function, replaced = replace_math_calls(function)
        rules += ["polynomial math"] if replaced else []
        mod.update_func(variable, function.with_attr("tirx.is_scheduled", True))
        reason = "; ".join(f"{op}: {why}" for op, why in refusals.items() if _mentions(name, op))
        simple = not reason and "reduction" not in rules
        records[name] = KernelRecord(
            name=name,
            kind="elementwise" if simple and rules[:1] == ["elementwise"] else "fallback",
            rule=", ".join(rules) or "plain loops",
            reason=reason,
        )
    return mod, records


def _mentions(name: str, op: str) -> bool:
    return op in name or op.replace("_", "") in name.replace("_", "")


def _schedule(function: Any, spec: CpuSpec) -> tuple[Any, list[str]]:
    """Inline, move reductions outwards, share the outer loop among threads."""
    import tvm
    from tvm import s_tir
    from tvm.error import InternalError

    errors = (s_tir.ScheduleError, InternalError, ValueError, TypeError)
    try:
        schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    except errors:
        return function, []
    rules: list[str] = []
    for block in blocks[:-1]:
        try:
            if _may_inline(schedule, block):
                schedule.compute_inline(block)
                rules.append("inline")
        except errors:
            continue
    elementwise = True
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        reduces = _reduction_loops(schedule, block)
        elementwise = elementwise and not reduces
        try:
            if reduces and _reduction_outwards(schedule, block):
                rules.append("reduction")
        except errors:
            continue
        try:
            if spec.threads > 1:
                schedule.parallel(schedule.get_loops(block)[0])
        except (*errors, IndexError):
            continue
    scheduled = schedule.mod["main"]
    if function.attrs:
        scheduled = scheduled.with_attr(dict(function.attrs))
    return scheduled, (["elementwise", *rules] if elementwise else rules)


def _iteration_kinds(schedule: Any, block: Any) -> list[int]:
    return [int(variable.iter_type) for variable in schedule.get(block).iter_vars]


def _reduction_loops(schedule: Any, block: Any) -> bool:
    from tvm import tirx

    return any(kind == tirx.IterVar.CommReduce for kind in _iteration_kinds(schedule, block))


def _may_inline(schedule: Any, block: Any) -> bool:
    """Only into one elementwise consumer: a reduction would compute it again for every use."""
    consumers = schedule.get_consumers(block)
    return (
        not _reduction_loops(schedule, block)
        and len(consumers) == 1
        and not _reduction_loops(schedule, consumers[0])
    )


def _reduction_outwards(schedule: Any, block: Any) -> bool:
    """Make the last spatial loop of more than one iteration the innermost.

    Consecutive iterations then belong to different outputs: independent, and mostly contiguous.
    """
    from tvm import tirx

    kinds = _iteration_kinds(schedule, block)
    loops = schedule.get_loops(block)
    if len(kinds) != len(loops):
        return False
    spatial = [
        (loop, getattr(schedule.get(loop).extent, "value", None))
        for loop, kind in zip(loops, kinds, strict=True)
        if kind == tirx.IterVar.DataPar
    ]
    reduction = [
        loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.CommReduce
    ]
    wide = [index for index, (_, extent) in enumerate(spatial) if extent is None or extent >= 4]
    if not wide or not reduction:
        return False
    inner = spatial.pop(wide[-1])[0]
    schedule.reorder(*(loop for loop, _ in spatial), *reduction, inner)
    schedule.decompose_reduction(block, reduction[0])
    return True


class _LetScope:
    """What `VectorMath` needs of a builder, where values are named by `Let` expressions."""

    def __init__(self) -> None:
        from tvm import tirx

        self.tirx = tirx
        self._bound: list[tuple[Any, Expr]] = []

    def splat(self, value: float, lanes: int) -> Expr:
        assert lanes == 1
        return self.tirx.FloatImm("float32", float(value))

    def let(self, value: Expr, lanes: int) -> Expr:
        assert lanes == 1
        variable = self.tirx.Var("t", "float32")
        self._bound.append((variable, value))
        return variable

    def wrap(self, result: Expr) -> Expr:
        for variable, value in reversed(self._bound):
            result = self.tirx.Let(variable, value, result)
        return result


def replace_math_calls(function: Any) -> tuple[Any, bool]:
    """Put the polynomials of `vecmath.py` in place of float32 math calls."""
    import tvm_ffi
    from tvm import ir

    replaced = False

    def replace(call: Any) -> Any:
        nonlocal replaced
        name = _MATH.get(str(getattr(call.op, "name", "")))
        if name is None or str(getattr(call.ty, "dtype", "")) != "float32":
            return call
        replaced = True
        scope = _LetScope()
        return scope.wrap(getattr(VectorMath(scope, 1), name)(call.args[0]))

    body = tvm_ffi.structural_map(function.body, (ir.Call, replace))
    return (function.with_body(body), True) if replaced else (function, False)
