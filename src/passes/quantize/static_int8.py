"""Static int8: weights and activations in 8 bits, with scales from calibration.

Here: the pass `int8`. What runs in integers is `plan`'s to say, ranges come from `calibrate`, the
pairs are written by `qdq`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.graph import graph_tree
from ...ir.quant import INTEGER_OPS, QuantPlan
from ...targets.target import QuantScheme, Runtime, Target
from ..base import Context, Pass, PassResult, Stage
from .beside import Beside, BesideOptions, LeftOver, options
from .biases import merge_biases
from .calibrate import Observer, ObserverOptions, observe
from .corrections import Corrections, Rounding, add_missing_biases, correct
from .groups import widen_groups
from .known_types import require_types
from .notes import refusal_notes
from .numbers import Range
from .observers import check_observer
from .plan import DEFAULT_OPS, Int8Layout, PlanOptions, lay_out
from .qdq import Ready, write_qdq
from .recurrent import Recurrent
from .scheme import AUTO, check_scheme_name, for_opset, resolve_scheme


@dataclasses.dataclass(frozen=True)
class StaticInt8(Pass):
    """Static int8 with Q/DQ pairs: needs calibration data; smallest and, where fused, fastest.

    `scheme`: dtypes of activations and weights, "u8s8" or "s8s8"; "auto" is what the target
    prefers. `per_channel`: a scale for each output channel of a weight. `observer`: how ranges are
    made of calibration values: "minmax", "average" (mean of samples' ranges), "percentile" (of the
    values that are not zero, `percentile` % are inside), "entropy" or "mse". `exclude`: names of
    nodes or operator types to keep float. `ops`: operators that may run in integers. `attention`:
    also MatMuls of two activations (measured on MiniLM: no faster). Embedding tables are stored in
    8 bits unless "Gather" is excluded.
    `bias_correction`: the mean error of each output channel on the calibration data goes into its
    bias. `rounding`: "nearest", or "adaround": up or down as serves each layer's result (minutes
    for large models). `reconstruct`: solves each layer's weights again, by least squares, for the
    inputs that the quantized layers before it make.
    `recurrent`: LSTMs in integers, quantized while they run, where that is faster ("auto"),
    "always" or "never". `leftovers`: "stored", weights of what can't run in integers (GRU,
    ConvTranspose, branches that calibration never ran) are 8 bits in the file and unpacked when the
    model is loaded, or "float".
    """

    name = "int8"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    scheme: str = AUTO
    per_channel: bool = True
    observer: str = Observer.MINMAX.value
    percentile: float = 99.99
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = DEFAULT_OPS
    attention: bool = False
    recurrent: str = Recurrent.AUTO.value
    leftovers: str = LeftOver.STORED.value

    bias_correction: bool = False
    rounding: str = Rounding.NEAREST.value
    reconstruct: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in tuple(Rounding):
            raise PassOptionError(
                f"There is no rounding {self.rounding!r}",
                where=f"pass {self.name!r}, option 'rounding'",
                fix=f"one of {', '.join(Rounding)}",
            )
        self._beside()
        check_scheme_name(self.scheme, self.name)
        check_observer(self.observer, self.percentile, self.name)
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
        return Beside(model, context, self._beside(), layout.nodes).extend(layout.plan)

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """The model with pairs whose numbers are absent, in place: exact in structure and size.

        Needs neither weights nor calibration.
        """
        self._prepare(model, context)
        layout, notes = self._layout(model, context.target)
        beside = Beside(model, context, self._beside(), layout.nodes)
        notes = (*notes, *_notes(layout, beside))
        if layout.nodes:
            write_qdq(model, layout)
        notes += beside.write(context.target)
        return PassResult(model, bool(layout.nodes or beside), notes)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: no calibration data; a target without integers; opset below 10.
            CalibrationError: see `calibrate.observe`.
        """
        self._prepare(model, context)
        layout, notes = self._layout(model, context.target)
        calibrated: tuple[str, ...] = ()
        unseen: frozenset[ir.Graph] = frozenset()
        ranges = None
        if layout.nodes:
            observer = ObserverOptions(
                observer=self.observer,
                percentile=self.percentile,
                dtype=layout.scheme.activation,
                symmetric=layout.scheme.symmetric_activation,
            )
            ranges = observe(model, layout.sources, context.calibration, context.progress, observer)
            calibrated = (
                f"calibrated on {ranges.samples} samples, {self.observer}",
                *ranges.notes,
            )
            unseen = frozenset(
                item.graph for item in layout.activations if item.source in ranges.unseen
            )
            if unseen:  # no range tells of what calibration never computed
                layout, _ = self._layout(model, context.target, unseen)
        beside = Beside(model, context, self._beside(), layout.nodes)
        notes = (*notes, *_notes(layout, beside))
        if layout.nodes:
            corrected, more = self._correct(model, layout, ranges, unseen, context)
            write_qdq(model, layout, ranges, corrected)
            notes += more
        notes += beside.write(context.target)
        return PassResult(model, bool(layout.nodes or beside), (*notes, *calibrated))

    def _beside(self) -> BesideOptions:
        return options(self.name, self.exclude, self.recurrent, self.leftovers, self.per_channel)

    def _prepare(self, model: ir.Model, context: Context) -> None:
        merge_biases(model, context)
        self._widen_groups(model, context.target)
        if self.bias_correction:
            add_missing_biases(model)

    def _correct(
        self,
        model: ir.Model,
        layout: Int8Layout,
        ranges: Mapping[str, Range] | None,
        unseen: frozenset[ir.Graph],
        context: Context,
    ) -> tuple[dict[str, Ready], tuple[str, ...]]:
        """Integers that corrections make of weights, by name; biases change in place."""
        chosen = Corrections(
            bias=self.bias_correction,
            rounding=Rounding(self.rounding),
            reconstruct=self.reconstruct,
        )
        if not chosen or ranges is None:
            return {}, ()
        places = [graph in unseen for graph in graph_tree(model.graph)]

        def plan(copy: ir.Model) -> Int8Layout:
            left = zip(graph_tree(copy.graph), places, strict=True)
            same = frozenset(graph for graph, missing in left if missing)
            return self._layout(copy, context.target, same)[0]

        samples = context.calibration or ()
        return correct(model, layout, ranges, samples, chosen, plan, context.progress)

    def _widen_groups(self, model: ir.Model, target: Target | None) -> None:
        """Join groups of the convolutions to be, as the target's integer kernels want them."""
        if target is None or target.runtime is Runtime.ONNXRUNTIME:
            layout, _ = self._layout(model, target)
            widen_groups(layout.nodes, layout.scheme.group_channels)

    def _layout(
        self, model: ir.Model, target: Target | None, unseen: frozenset[ir.Graph] = frozenset()
    ) -> tuple[Int8Layout, tuple[str, ...]]:
        scheme, notes = for_opset(resolve_scheme(self.scheme, target), model)
        if not self.per_channel:
            scheme = dataclasses.replace(scheme, per_channel=False)
        require_types(model)
        chosen = PlanOptions(
            ops=self.ops, exclude=self.exclude, attention=self.attention, unseen=unseen
        )
        notes += _session_notes(scheme, target)
        return lay_out(model, scheme, chosen), notes


def _session_notes(scheme: QuantScheme, target: Target | None) -> tuple[str, ...]:
    given = target.session_options if target is not None else {}
    missing = {k: v for k, v in scheme.session_options.items() if given.get(k) != v}
    if not missing:
        return ()
    text = ", ".join(f"{key}={value}" for key, value in missing.items())
    return (f"runs in integers only with the session option {text}",)


def _notes(layout: Int8Layout, beside: Beside) -> tuple[str, ...]:
    plan = dataclasses.replace(layout.plan, notes=layout.plan.notes + beside.refused)
    if not layout.nodes:
        return ("nothing to quantize: no Conv, Gemm or MatMul qualifies", *refusal_notes(plan))
    counts = Counter(node.op_type for node in layout.nodes)
    text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
    return (f"{plan.label}: {len(layout.nodes)} nodes in integers ({text})", *refusal_notes(plan))
