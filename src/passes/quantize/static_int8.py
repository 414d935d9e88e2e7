"""Static int8: weights and activations in 8 bits, with scales from calibration.

Here: the pass `int8`. What runs in integers is `plan`'s to say, ranges come from `calibrate`, the
pairs are written by `qdq`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.quant import INTEGER_OPS, QuantPlan
from ...targets.target import QuantScheme, Target
from ..base import Context, Pass, PassResult, Stage
from .biases import merge_biases
from .calibrate import Observer, observe
from .known_types import require_types
from .notes import refusal_notes
from .plan import DEFAULT_OPS, Int8Layout, PlanOptions, lay_out
from .qdq import write_qdq
from .scheme import AUTO, check_scheme_name, for_opset, resolve_scheme
from .tables import lookup_tables, write_tables


@dataclasses.dataclass(frozen=True)
class StaticInt8(Pass):
    """Static int8 with Q/DQ pairs: needs calibration data; smallest and, where fused, fastest.

    `scheme`: dtypes of activations and weights, "u8s8" or "s8s8"; "auto" is what the target
    prefers. `per_channel`: a scale for each output channel of a weight. `observer`: how ranges are
    made of calibration values. `exclude`: names of nodes or operator types to keep float. `ops`:
    operators that may run in integers. `attention`: also MatMuls of two activations (measured on
    MiniLM: no faster). Embedding tables are stored in 8 bits unless "Gather" is excluded.
    """

    name = "int8"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    scheme: str = AUTO
    per_channel: bool = True
    observer: str = Observer.MINMAX.value
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = DEFAULT_OPS
    attention: bool = False

    def __post_init__(self) -> None:
        check_scheme_name(self.scheme, self.name)
        if self.observer not in tuple(Observer):
            raise PassOptionError(
                f"There is no observer {self.observer!r}",
                where=f"pass {self.name!r}, option 'observer'",
                fix=f"one of {', '.join(Observer)}",
            )
        unknown = [op for op in self.ops if op not in INTEGER_OPS]
        if unknown:
            raise PassOptionError(
                f"The operator {unknown[0]!r} does not run in integers",
                where=f"pass {self.name!r}, option 'ops'",
                fix=f"any of {', '.join(INTEGER_OPS)}",
            )

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value of a graph that has been through the fuse stage.

        Weights may be absent; nothing changes.
        """
        layout, _ = self._layout(model, context.target)
        tables = {t.value.name or "": t.spec for t in lookup_tables(model, self.exclude)}
        return dataclasses.replace(layout.plan, entries={**layout.plan.entries, **tables})

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """The model with pairs whose numbers are absent, in place: exact in structure and size.

        Needs neither weights nor calibration.
        """
        merge_biases(model, context)
        layout, notes = self._layout(model, context.target)
        if layout.nodes:
            write_qdq(model, layout)
        tables = self._write_tables(model)
        modified = bool(layout.nodes or tables)
        return PassResult(model, modified, (*notes, *_notes(layout), *tables))

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: no calibration data; a target without integers; opset below 10.
            CalibrationError: see `calibrate.observe`.
        """
        merge_biases(model, context)
        layout, notes = self._layout(model, context.target)
        notes = (*notes, *_notes(layout))
        if not layout.nodes:
            tables = self._write_tables(model)
            return PassResult(model, bool(tables), (*notes, *tables))
        ranges = observe(model, layout.sources, context.calibration, context.progress)
        write_qdq(model, layout, ranges)
        notes += self._write_tables(model)
        count = len(context.calibration or ())
        return PassResult(model, True, (*notes, f"calibrated on {count} samples, {self.observer}"))

    def _write_tables(self, model: ir.Model) -> tuple[str, ...]:
        tables = list(lookup_tables(model, self.exclude))
        write_tables(model, tables)
        return (f"{len(tables)} lookup tables stored in 8 bits",) if tables else ()

    def _layout(self, model: ir.Model, target: Target | None) -> tuple[Int8Layout, tuple[str, ...]]:
        scheme, notes = for_opset(resolve_scheme(self.scheme, target), model)
        if not self.per_channel:
            scheme = dataclasses.replace(scheme, per_channel=False)
        require_types(model)
        options = PlanOptions(ops=self.ops, exclude=self.exclude, attention=self.attention)
        notes += _session_notes(scheme, target)
        return lay_out(model, scheme, options), notes


def _session_notes(scheme: QuantScheme, target: Target | None) -> tuple[str, ...]:
    given = target.session_options if target is not None else {}
    missing = {k: v for k, v in scheme.session_options.items() if given.get(k) != v}
    if not missing:
        return ()
    text = ", ".join(f"{key}={value}" for key, value in missing.items())
    return (f"runs in integers only with the session option {text}",)


def _notes(layout: Int8Layout) -> tuple[str, ...]:
    plan = layout.plan
    if not layout.nodes:
        return ("nothing to quantize: no Conv, Gemm or MatMul qualifies", *refusal_notes(plan))
    counts = Counter(node.op_type for node in layout.nodes)
    text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
    return (f"{plan.label}: {len(layout.nodes)} nodes in integers ({text})", *refusal_notes(plan))
