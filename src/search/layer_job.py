"""A model before its int8 pass, with the session that has a switch for each of its layers.

Here: `LayerJob`: running the recipe up to the pass, making the switches, and writing a choice of
layers for real. Not here: which subsets are measured (`sensitivity`, `mixed`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..api import session_options
from ..cost.text import format_bytes
from ..errors import UsageError
from ..evaluation.evaluation import Evaluation
from ..ir.graph import graph_tree, node_name
from ..ir.ops import node_cost
from ..passes.base import Context, Feed, Pass, Stage
from ..passes.driver import run_passes
from ..passes.probe import default_dims
from ..passes.quantize.sensitivity import spread_over
from ..passes.quantize.static_int8 import StaticInt8
from ..passes.quantize.switched import Unit
from ..passes.spec import format_pass, format_passes
from ..pipelines import GROUPS, epilogue, parse_recipe
from ..targets.feed import TensorSpec, input_specs
from ..targets.onnxruntime import OrtRunner
from ..targets.target import Target
from .mixed import Mixed, MixedSearch, Trial
from .trials import Outcome, Progress, Trials, loss, samples_in

_TOO_LARGE = 1 << 30
"""Bytes of weights; a session holds them in float and rounded to 8 bits."""


class LayerJob:
    """The model before its int8 pass, the pass, and the session that has the switches."""

    trials: Trials
    units: tuple[Unit, ...]
    shares: list[float]

    def __init__(
        self,
        graph: ir.Model,
        target: Target,
        recipe: str,
        feeds: Sequence[Feed],
        dims: Mapping[str, int] | None,
        progress: Progress,
    ) -> None:
        self.target, self.recipe = target, recipe
        self.written = parse_recipe(recipe)
        self.item = _static_int8(self.written, recipe)
        self.notes = [
            "on ONNX Runtime's CPU a layer is in 8 bits or float; nothing between is tried"
        ]
        if self.item.bias_correction or self.item.reconstruct or self.item.rounding != "nearest":
            self.notes.append("corrections of the recipe are not part of what was measured")
        _refuse_large(graph)
        self.context = Context(target, feeds, dims or {}, progress)
        place = self.written.index(self.item)
        self.after = [*self.written[place + 1 :], *epilogue()]
        self.float, _ = run_passes(graph.clone(), self.written[:place], self.context)
        self.names = [value.name or "" for value in graph.graph.outputs]
        self.inputs: tuple[TensorSpec, ...] = input_specs(graph)

    def prepare(
        self, evaluation: Evaluation | None, samples: int, max_runs: int
    ) -> tuple[Trials, int]:
        """The trials, and the number of samples that each is made on."""
        trial = self.float.clone()
        switched, plan = self.item.switched(trial, self.context)
        if switched is None or not switched.units:
            reasons = "; ".join(f"{node}: {why}" for node, why in plan.notes[:3])
            raise UsageError(
                "No layer of this model runs in 8 bits",
                where=f"recipe {self.recipe!r}, target {self.target.name!r}",
                why=reasons or "there is no Conv, Gemm or MatMul with constant weights",
            )
        self.units = switched.units
        self.shares = _shares(trial, self.units, self.context)
        variants = 2 * len(self.units) + 2
        feeds: list[Feed] = []
        if evaluation is None:
            count = min(samples, max_runs // variants)
            if count:
                feeds = spread_over(self.context.calibration or (), count)
            count = len(feeds)
            if count < len(self.context.calibration or ()):
                self.notes.append(
                    f"tried on {count} of {len(self.context.calibration or ())} calibration samples"
                )
        self.trials = Trials(switched, self.names, self.inputs, feeds, evaluation)
        if evaluation is not None:
            count = samples_in(evaluation, self.trials.runner(switched.none()))
        if not count or count * variants > max_runs:
            raise UsageError(
                f"{len(self.units)} layers on {max(count, 1)} samples are too many to try",
                why=f"that is {variants * max(count, 1)} runs of the model, max_runs is {max_runs}",
                fix="evaluate on fewer samples, or raise max_runs",
            )
        return self.trials, count

    def estimate(self, none: np.ndarray, runs: int) -> str:
        """About how long so many runs take; '' where no sample is at hand."""
        feeds = self.context.calibration or ()
        sample = next(iter(feeds), None)
        if sample is None:
            return ""
        self.trials.switched.run(sample, none)
        start = time.perf_counter()
        self.trials.switched.run(sample, none)
        return f", about {math.ceil((time.perf_counter() - start) * runs)} s"

    def proved(self, search: MixedSearch, trial: Trial, every: Outcome) -> Mixed:
        """The choice as it is compiled, measured; with more layers where it has to be."""
        simulated = trial
        outcome, held, missed = self._measured(search, trial.kept)
        if trial.held and not held:
            for larger in search.repairs(trial):
                if larger.held:
                    trial = larger
                    outcome, held, missed = self._measured(search, trial.kept)
                    if held:
                        break
        names = tuple(self.units[i].name for i in trial.kept)
        if search.limits is None:
            higher = self.trials.higher
            held = loss(outcome, higher) < loss(every, higher)
        share = float(np.sum([self.shares[i] for i in trial.kept]))
        text = f"{len(names)} of {len(self.units)} layers float ({share:.1%} of the products)"
        text += f", {outcome.sqnr_db:.1f} dB at the outputs"
        text += "".join(f", {name} {change:+.4g}" for name, change in outcome.changes.items())
        if not held:
            text += "; no set that was tried meets the limits" if search.limits else "; no gain"
            text += f": {missed}" if missed else ""
        elif len(trial.kept) > len(simulated.kept):
            text += f"; {len(simulated.kept)} seemed enough before the model was written"
        return Mixed(names, self._recipe(names), held, outcome, text, share, len(search.tried))

    def _measured(self, search: MixedSearch, kept: Sequence[int]) -> tuple[Outcome, bool, str]:
        names = tuple(self.units[i].name for i in kept)
        context = dataclasses.replace(self.context, progress=_silent)
        model, _ = run_passes(self.float.clone(), [self._excluding(names), *self.after], context)
        with OrtRunner(model, session_options=session_options(self.target, model)) as runner:
            return search.judged(runner)

    def _excluding(self, names: tuple[str, ...]) -> StaticInt8:
        exclude = (*self.item.exclude, *names)
        return dataclasses.replace(self.item, exclude=exclude, protect=False)

    def _recipe(self, names: tuple[str, ...]) -> str:
        """The recipe with those layers excluded: a whole pipeline where it is one."""
        changed = self._excluding(names)
        passes = [changed if item == self.item else item for item in self.written]
        usual = {cls() for group in GROUPS.values() for cls in group}
        short = "+".join(format_pass(item) for item in passes if item not in usual)
        return short if parse_recipe(short) == passes else format_passes(passes)


# --- parts -----------------------------------------------------------------------------------


def _static_int8(passes: Sequence[Pass], recipe: str) -> StaticInt8:
    found = [item for item in passes if item.stage is Stage.QUANTIZE]
    static = [item for item in found if isinstance(item, StaticInt8)]
    if len(static) != 1:
        raise UsageError(
            f"The recipe {recipe!r} has no static int8 to look into",
            why=f"it quantizes by {', '.join(str(i) for i in found) or 'nothing'}",
            fix='recipe="int8", with options if you like',
        )
    return static[0]


def _refuse_large(graph: ir.Model) -> None:
    size = sum(
        value.const_value.nbytes
        for part in graph_tree(graph.graph)
        for value in part.initializers.values()
        if value.const_value is not None
    )
    if size > _TOO_LARGE:
        raise UsageError(
            "The model is too large to try its layers one by one",
            why=f"it has {format_bytes(size)} of weights, which are held twice; at most "
            f"{format_bytes(_TOO_LARGE)} are",
            fix="`edgepass.inspect(model, compiled, samples)` measures each layer in one run",
        )


def _shares(model: ir.Model, units: Sequence[Unit], context: Context) -> list[float]:
    """Each unit's share of the multiply-accumulates that are known."""
    sizes = default_dims(model, context.dims)
    counted: dict[str, float] = {}
    total = 0.0
    for graph in graph_tree(model.graph):
        for node in graph:
            macs = float(node_cost(node, sizes, model.functions).macs or 0)
            counted[node_name(node)] = macs
            total += macs
    return [counted.get(unit.name, 0.0) / total if total else 0.0 for unit in units]


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""
