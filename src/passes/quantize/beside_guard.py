"""LSTMs in integers and weights stored in 8 bits that had better stay float.

Here: `guard_beside`, which tries on calibration data what `beside` would write, each node by itself
where all of it together does harm. Not here: layers with Q/DQ pairs (`sensitivity`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import graph_tree, node_name
from ...targets.onnxruntime import OrtRunner
from ..base import Context, Feed
from ..ledger import measure
from .beside import Beside, BesideOptions
from .sensitivity import ENOUGH, MAX_SAMPLES, MORE_SAMPLES, QUIET, WORTH, decibels, spread_over
from .switched import divergence_over

LOUD = QUIET / 2
"""Error power over signal power of all together above which nodes are tried one by one."""
HARMLESS = QUIET / 4
"""Error of stored weights below which a node that is computed in float keeps them."""
MOST_TRIED = 48
_WORK = 4e11
"""Multiplications that one by one may take: tens of seconds."""

_Make = Callable[[ir.Model, BesideOptions], Beside]


def guard_beside(
    model: ir.Model, context: Context, given: BesideOptions, taken: Collection[ir.Node]
) -> tuple[BesideOptions, tuple[str, ...]]:
    """The options with the nodes kept float whose 8 bits do most of the harm, and why.

    `taken` are nodes that run in integers otherwise. The model does not change.
    Nodes are kept float in the order of what each does alone, until the outputs are within `LOUD`
    of float's. One that is computed in float has its weights stored all the same where that does
    nothing much. Without calibration samples, or where even that is too much work: as given.
    """
    taken_names = {node_name(node) for node in taken}

    def make(copy: ir.Model, options: BesideOptions) -> Beside:
        same = [n for g in graph_tree(copy.graph) for n in g if node_name(n) in taken_names]
        return Beside(copy, context, options, same)

    items = _names(make(model, given))
    if not items or not context.calibration:
        return given, ()
    trial = _Trial(model, context, given, make, items)
    before = trial.harm(given)
    if before <= LOUD or len(items) > MOST_TRIED or not trial.affordable(len(items)):
        return given, ()
    alone = {name: trial.harm(_without(given, [n for n in items if n != name])) for name in items}
    chosen, after, count = given, before, 0
    lines = []
    for name in sorted(items, key=lambda n: -alone[n]):
        chosen = trial.kept(chosen, name)
        after, count = trial.harm(chosen), count + 1
        lines.append(f"  {name}: {decibels(alone[name])} alone")
        if after <= LOUD:
            break
    if after * WORTH > before:
        return given, ()
    note = (
        f"{count} of {len(items)} LSTMs and stored weights kept float: {decibels(before)} at the "
        f"outputs with them in 8 bits, {decibels(after)} without"
    )
    return chosen, (note, *lines)


class _Trial:
    """Copies of the model in which only what is beside the products is written."""

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        given: BesideOptions,
        make: _Make,
        items: Sequence[str],
    ) -> None:
        self.model, self.context, self.make = model, context, make
        self.given, self.items = given, items
        samples = context.calibration or ()
        few = spread_over(samples, MAX_SAMPLES)
        self.names = [value.name or "" for value in model.graph.outputs]
        self.references = self._outputs(model, few)
        size = max(1, min(array.size for array in self.references[0]))
        wanted = min(MORE_SAMPLES, -(-ENOUGH // size))
        if wanted > len(few) < len(samples):
            few = spread_over(samples, wanted)
            self.references = self._outputs(model, few)
        self.samples = few

    def affordable(self, count: int) -> bool:
        macs = measure(self.model, self.context.dims).macs or 0
        return 2 * count * len(self.samples) * macs <= _WORK

    def harm(self, given: BesideOptions) -> float:
        """The divergence of the outputs from float's."""
        copy = self.model.clone()
        beside = self.make(copy, given)
        if not beside:
            return 0.0
        beside.write(self.context.target)
        found = self._outputs(copy, self.samples)
        return divergence_over(zip(self.references, found, strict=True))

    def kept(self, given: BesideOptions, name: str) -> BesideOptions:
        """A node computed in float, its weights stored where that does no harm."""
        others = [n for n in self.items if n != name]
        floating = dataclasses.replace(given, floating=(*given.floating, name))
        stored = dataclasses.replace(self.given, floating=(name,))
        if self.harm(_without(stored, others)) <= HARMLESS:
            return floating
        return _without(given, [name])

    def _outputs(self, model: ir.Model, samples: Sequence[Feed]) -> list[list[np.ndarray]]:
        with OrtRunner(model) as runner:
            return [list(runner.run(sample, self.names).values()) for sample in samples]


def _names(beside: Beside) -> list[str]:
    nodes = [*beside.lstms, *(item.node for item in beside.left)]
    return list(dict.fromkeys(node_name(node) for node in nodes))


def _without(given: BesideOptions, names: Sequence[str]) -> BesideOptions:
    return dataclasses.replace(given, exclude=(*given.exclude, *names))
