"""Static int8: weights and activations in 8 bits, with scales from calibration.

Here: the pass `int8`. What runs in integers is `plan`'s to say, ranges come from `calibrate`, the
pairs are written by `qdq`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.graph import graph_tree
from ...ir.quant import INTEGER_OPS, QuantPlan
from ...targets.onnx_file import weight_bytes
from ...targets.target import QuantScheme, Runtime, Target
from ..base import Context, Pass, PassResult, Stage
from ..ledger import measure
from .beside import Beside, BesideOptions, LeftOver, options
from .beside_guard import guard_beside
from .biases import merge_biases
from .calibrate import Observer, ObserverOptions, Ranges, observe
from .corrections import Corrections, Rounding, add_missing_biases, correct
from .groups import widen_groups
from .known_types import require_types
from .notes import refusal_notes
from .observers import AUTO as AUTO_RANGE
from .observers import check_observer
from .plan import DEFAULT_OPS, Int8Layout, PlanOptions, lay_out
from .qdq import Ready, write_qdq
from .recurrent import Recurrent
from .scheme import AUTO, check_scheme_name, for_opset, resolve_scheme
from .sensitivity import FINE, QUIET, WORTH, decibels, harm, protect
from .smooth_quant import SmoothQuant
from .switched import Switched

_TOO_LARGE = 1 << 29
"""Bytes of weights above which layers are not tried one by one: it takes them twice."""


@dataclasses.dataclass(frozen=True)
class _State:
    """A model on its way: `sensitive` layers stay float, `float_weights` of them unstored too."""

    model: ir.Model
    layout: Int8Layout
    ranges: Ranges | None
    notes: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    unseen: frozenset[ir.Graph] = frozenset()
    sensitive: tuple[str, ...] = ()
    float_weights: tuple[str, ...] = ()
    observer: str = Observer.MINMAX.value


@dataclasses.dataclass(frozen=True)
class StaticInt8(Pass):
    """Static int8 with Q/DQ pairs: needs calibration data; smallest and, where fused, fastest.

    `scheme`: dtypes of activations and weights, "u8s8" or "s8s8"; "auto" is what the target
    prefers. `per_channel`: a scale for each output channel of a weight. `observer`: how ranges are
    made of calibration values: "auto" ("mse" where that brings the outputs nearer to float's than
    "minmax"), "minmax", "average" (mean of samples' ranges), "percentile" (of the
    values that are not zero, `percentile` % are inside), "entropy" or "mse". `exclude`: names of
    nodes or operator types to keep float. `ops`: operators that may run in integers. `attention`:
    also MatMuls of two activations (measured on MiniLM: no faster). Embedding tables are stored in
    8 bits unless "Gather" is excluded.
    `bias_correction`: the mean error of each output channel on the calibration data goes into its
    bias. `rounding`: "nearest", or "adaround": up or down as serves each layer's result (minutes
    for large models). `reconstruct`: solves each layer's weights again, by least squares, for the
    inputs that the quantized layers before it make.
    `protect`: where 8 bits do harm on the calibration data, outliers of activations are smoothed
    (`smooth_quant`) if that helps, and the layers that do most of the harm stay float.
    `recurrent`: LSTMs in integers, quantized while they run, where that is faster ("auto"),
    "always" or "never". `leftovers`: "stored", weights of what can't run in integers (GRU,
    ConvTranspose, branches that calibration never ran) are 8 bits in the file and unpacked when the
    model is loaded, or "float".
    """

    name = "int8"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True
    faster = True

    scheme: str = AUTO
    per_channel: bool = True
    observer: str = AUTO_RANGE
    percentile: float = 99.99
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = DEFAULT_OPS
    attention: bool = False
    protect: bool = True
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
        state = self._calibrate(model, context)
        guarded: tuple[str, ...] = ()
        watched = self.protect and weight_bytes(model) <= _TOO_LARGE
        if state.ranges is not None and watched:
            state, guarded = self._guard(state, context)
        model, layout, ranges = state.model, state.layout, state.ranges
        given = self._beside(state.float_weights)
        if watched:
            given, more = guard_beside(model, context, given, layout.nodes)
            guarded += more
        beside = Beside(model, context, given, layout.nodes)
        notes = (*state.notes, *_notes(layout, beside), *guarded)
        if layout.nodes:
            corrected, more = self._correct(state, context)
            write_qdq(model, layout, ranges, corrected)
            notes += more
        notes += beside.write(context.target)
        return PassResult(model, bool(layout.nodes or beside), (*notes, *state.calibrated))

    def switched(self, model: ir.Model, context: Context) -> tuple[Switched | None, QuantPlan]:
        """A session with a switch for each layer, and the plan; None where no layer is in integers.

        As `run` without `protect` and corrections. The model changes as far as it does before pairs
        are written.

        Raises:
            EdgepassError: see `run`.
        """
        state = self._calibrate(model, context)
        found = None if state.ranges is None else self._switched(state, context)
        return found, state.layout.plan

    def _calibrate(self, model: ir.Model, context: Context, observer: str | None = None) -> _State:
        """The model made ready for its pairs, its layout, and ranges where it has one."""
        self._prepare(model, context)
        layout, notes = self._layout(model, context.target)
        if observer is None:
            observer = Observer.MINMAX if self.observer == AUTO_RANGE else self.observer
        if not layout.nodes:
            return _State(model, layout, None, notes, observer=observer)
        chosen = self._observer(layout, observer)
        ranges = observe(model, layout.sources, context.calibration, context.progress, chosen)
        calibrated = (f"calibrated on {ranges.samples} samples, {observer}", *ranges.notes)
        unseen = frozenset(i.graph for i in layout.activations if i.source in ranges.unseen)
        if unseen:  # no range tells of what calibration never computed
            layout, _ = self._layout(model, context.target, unseen)
        return _State(model, layout, ranges, notes, calibrated, unseen, observer=observer)

    def _guard(self, state: _State, context: Context) -> tuple[_State, tuple[str, ...]]:
        """What makes the result near to float's where 8 bits as they come are not (`protect`)."""
        if not state.layout.nodes:
            return state, ()
        before = self._harm(state, context)
        if before > FINE and self.observer == AUTO_RANGE:
            other = self._calibrate(state.model, context, Observer.MSE)
            after = self._harm(other, context)
            if after < before:
                state, before = other, after
        if before <= QUIET:
            return state, ()
        notes: tuple[str, ...] = ()
        smooth = self._smoothed(state, before, context)
        if smooth is not None:
            state, notes = smooth
        with self._switched(state, context) as switched:
            macs = measure(state.model, context.dims).macs or 0
            found = protect(switched, context.calibration or (), macs, context.progress)
        if found.names:
            layout, _ = self._layout(state.model, context.target, state.unseen, found.names)
            ranges = self._complete(state, layout, context)
            left = tuple(n for n in found.names if n not in found.storable)
            state = dataclasses.replace(
                state, layout=layout, ranges=ranges, sensitive=found.names, float_weights=left
            )
        return state, (*notes, *found.notes)

    def _harm(self, state: _State, context: Context) -> float:
        with self._switched(state, context) as switched:
            return harm(switched, context.calibration or ())

    def _smoothed(
        self, state: _State, before: float, context: Context
    ) -> tuple[_State, tuple[str, ...]] | None:
        """The model with its activations smoothed, calibrated, where that helps much.

        In a model of convolutions it does not; there the trial would only take time.
        """
        weighted = [item.node.op_type for item in state.layout.weighted]
        if weighted.count("Conv") * 2 > len(weighted):
            return None
        trial = state.model.clone()
        done = SmoothQuant(insert=True).run(trial, context)
        if not done.modified:
            return None
        smooth = self._calibrate(trial, context, state.observer)
        if smooth.ranges is None:
            return None
        after = self._harm(smooth, context)
        if after * WORTH > before:
            return None
        return smooth, (f"{done.notes[0]}: {decibels(before)} without, {decibels(after)} with",)

    def _switched(self, state: _State, context: Context) -> Switched:
        assert state.ranges is not None
        plan = self._planner(state.model, state.unseen, context)
        return Switched(state.model, plan, state.ranges)

    def _complete(self, state: _State, layout: Int8Layout, context: Context) -> Ranges:
        """Ranges with those of values that only the new layout has pairs on."""
        ranges = state.ranges
        assert ranges is not None
        missing = [v for v in layout.sources if (v.name or "") not in ranges]
        if missing:
            chosen = self._observer(layout, state.observer)
            samples = context.calibration
            ranges.update(observe(state.model, missing, samples, context.progress, chosen))
        return ranges

    def _beside(self, kept: tuple[str, ...] = ()) -> BesideOptions:
        exclude = self.exclude + kept
        return options(self.name, exclude, self.recurrent, self.leftovers, self.per_channel)

    def _observer(self, layout: Int8Layout, observer: str) -> ObserverOptions:
        return ObserverOptions(
            observer=observer,
            percentile=self.percentile,
            dtype=layout.scheme.activation,
            symmetric=layout.scheme.symmetric_activation,
        )

    def _planner(
        self,
        model: ir.Model,
        unseen: frozenset[ir.Graph],
        context: Context,
        kept: tuple[str, ...] = (),
    ) -> Callable[[ir.Model], Int8Layout]:
        """Lays out a copy of the model as the model is."""
        places = [graph in unseen for graph in graph_tree(model.graph)]

        def plan(copy: ir.Model) -> Int8Layout:
            left = zip(graph_tree(copy.graph), places, strict=True)
            same = frozenset(graph for graph, missing in left if missing)
            return self._layout(copy, context.target, same, kept)[0]

        return plan

    def _prepare(self, model: ir.Model, context: Context) -> None:
        merge_biases(model, context)
        self._widen_groups(model, context.target)
        if self.bias_correction:
            add_missing_biases(model)

    def _correct(self, state: _State, context: Context) -> tuple[dict[str, Ready], tuple[str, ...]]:
        """Integers that corrections make of weights, by name; biases change in place."""
        chosen = Corrections(
            bias=self.bias_correction,
            rounding=Rounding(self.rounding),
            reconstruct=self.reconstruct,
        )
        if not chosen or state.ranges is None:
            return {}, ()
        plan = self._planner(state.model, state.unseen, context, state.sensitive)
        samples = context.calibration or ()
        return correct(
            state.model, state.layout, state.ranges, samples, chosen, plan, context.progress
        )

    def _widen_groups(self, model: ir.Model, target: Target | None) -> None:
        """Join groups of the convolutions to be, as the target's integer kernels want them."""
        if target is None or target.runtime is Runtime.ONNXRUNTIME:
            layout, _ = self._layout(model, target)
            widen_groups(layout.nodes, layout.scheme.group_channels)

    def _layout(
        self,
        model: ir.Model,
        target: Target | None,
        unseen: frozenset[ir.Graph] = frozenset(),
        kept: tuple[str, ...] = (),
    ) -> tuple[Int8Layout, tuple[str, ...]]:
        scheme, notes = for_opset(resolve_scheme(self.scheme, target), model)
        if not self.per_channel:
            scheme = dataclasses.replace(scheme, per_channel=False)
        require_types(model)
        chosen = PlanOptions(
            ops=self.ops,
            exclude=self.exclude,
            attention=self.attention,
            unseen=unseen,
            sensitive=frozenset(kept),
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
