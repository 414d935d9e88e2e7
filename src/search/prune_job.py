"""A model with its groups found once, from which each group is pruned alone and judged.

Here: `PruneJob`. Not here: what a user sees of it (`prune_scan`), the pass that prunes all groups
together (`passes.prune.structured`), whose parts this puts together for one group at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..architecture import Architecture, at_sizes, without_weights
from ..cost.latency import Latency
from ..errors import UsageError
from ..ir.graph import absent_weights, all_nodes
from ..ir.ops import node_cost
from ..passes.base import Context, Feed
from ..passes.driver import run_passes
from ..passes.ledger import measure
from ..passes.prune.choice import Choosing, Ranked, choose, rank, together
from ..passes.prune.divergence import held_out
from ..passes.prune.groups import Group, find_groups
from ..passes.prune.importance import Importance, weight_rows
from ..passes.prune.quantized import refuse_quantized
from ..passes.prune.remove import remove
from ..passes.prune.repair import kept_outputs, lost_inputs, repair
from ..passes.prune.repair_heads import rotate_heads
from ..passes.prune.rounding import preferred_multiple
from ..passes.prune.statistics import batches, collect, unit_sums
from ..passes.prune.structured import StructuredPrune
from ..passes.quantize.switched import divergence_over
from ..pipelines import GROUPS, pruning_pass
from ..samples import Feeds
from ..targets.onnxruntime import OrtRunner
from ..targets.target import Target
from .prune_rows import OUTPUTS, WEIGHTS, BlockedRow, GroupRow
from .trials import Progress


@dataclasses.dataclass(frozen=True)
class _Size:
    """Parameters, MACs and predicted latency of a model."""

    parameters: int
    macs: int | None
    latency: Latency


class PruneJob:
    """The groups of a clean model, what is needed to choose units of each, and samples to judge."""

    def __init__(
        self,
        graph: ir.Model,
        target: Target,
        recipe: str,
        ratio: float | None,
        feeds: Sequence[Feed] | None,
        dims: Mapping[str, int],
        samples: int,
        progress: Progress,
    ) -> None:
        item = pruning_pass(recipe)
        if not isinstance(item, StructuredPrune):
            raise UsageError(
                f"The recipe {recipe!r} has no structured pruning to scan",
                fix="give the pass `prune` with its options: prune{heads=whole}",
            )
        self.item = item if ratio is None else dataclasses.replace(item, ratio=ratio)
        self.ratio = self.item.ratio
        self.target, self.dims, self.progress = target, dims, progress
        refuse_quantized(graph, item.name)
        cleanup = [cls() for cls in GROUPS["cleanup"]]
        progress(0, 1, "looking for groups")
        self.model, _ = run_passes(graph.clone(), cleanup, Context(target, None, dims), quick=True)
        self.bare = without_weights(self.model)
        self.groups = find_groups(self.model, heads=item.heads, widths=item.widths)
        self.absent = bool(absent_weights(self.model))
        self.notes: list[str] = []
        self.teachers, self.judges = self._samples(feeds, samples)
        self.measured = OUTPUTS if self.judges else "" if self.absent else WEIGHTS
        self._whole = self._size(self.bare)
        if not self.groups.free:
            self.notes.append(
                "nothing can be pruned: give the model as it was exported, before a runtime's own "
                "operators were fused"
            )

    @property
    def parameters(self) -> int:
        return self._whole.parameters

    @property
    def macs(self) -> int | None:
        return self._whole.macs

    @property
    def latency(self) -> Latency:
        return self._whole.latency

    def rows(self) -> list[GroupRow]:
        """A row for each group that can be pruned, or each cluster of groups that go together."""
        clusters = together(self._ranked())
        shares = self._macs_of_nodes()
        outputs = self._reference()
        rows = []
        for done, members in enumerate(clusters):
            self.progress(done, len(clusters), f"pruning {members[0].group.name} alone")
            rows.append(self._row(members, shares, outputs))
        self.progress(len(clusters), len(clusters), "")
        return rows

    def blocked(self) -> tuple[BlockedRow, ...]:
        """The groups that can't be pruned."""
        total = max(1, self.parameters)
        return tuple(
            BlockedRow(g.name, g.kind, g.size, g.parameters * g.size / total, g.blocked, g.wish)
            for g in self.groups
            if g.blocked
        )

    # --- one group -------------------------------------------------------------------------------

    def _row(
        self,
        members: Sequence[Ranked],
        shares: Mapping[str, float],
        outputs: list[list[np.ndarray]],
    ) -> GroupRow:
        groups = [item.group for item in members]
        first = groups[0]
        chosen = choose(members, self._how())
        numbers = {self.groups.index(group): units for group, units in chosen.items()}
        after = self._size(self._without(self.bare, numbers)) if numbers else self._whole
        nodes = {s.node.outputs[0].name or "" for g in groups for s in g.sites}
        held = sum(g.parameters * g.size for g in groups)
        return GroupRow(
            name=first.name,
            kind=first.kind,
            units=sum(g.size for g in groups),
            rows=sum(int(g.rows.max(initial=0)) + 1 for g in groups),
            also=tuple(g.name for g in groups[1:] if g.name != first.name),
            parameters=held / max(1, self.parameters),
            macs=sum(shares.get(n, 0.0) for n in nodes) if self.macs else None,
            removed=sum(map(len, chosen.values())),
            fewer_parameters=self.parameters - after.parameters,
            fewer_macs=None if self.macs is None or after.macs is None else self.macs - after.macs,
            gained_ms=_less(self.latency.ms, after.latency.ms),
            error=self._error(chosen, numbers, outputs),
        )

    def _error(
        self,
        chosen: Mapping[Group, list[int]],
        numbers: Mapping[int, list[int]],
        outputs: list[list[np.ndarray]],
    ) -> float | None:
        if not self.measured:
            return None
        if not chosen:
            return 0.0
        if self.measured == WEIGHTS:
            return max(_energy(group, units) for group, units in chosen.items())
        pruned = self._without(self.model, numbers, solve=self.item.repair)
        return divergence_over(zip(outputs, self._run(pruned), strict=True))

    def _without(
        self, model: ir.Model, numbers: Mapping[int, list[int]], *, solve: bool = False
    ) -> ir.Model:
        """A copy without those units; layers that lost inputs solved again, as by the pass."""
        copy = model.clone()
        groups = find_groups(copy, heads=self.item.heads, widths=self.item.widths)
        chosen = {groups[i]: units for i, units in numbers.items()}
        kept = kept_outputs(chosen)
        remove(copy, groups, chosen)
        if solve:
            lost = lost_inputs(copy, self.model)
            repair(copy, self.model, kept, self.teachers, only=lost)
        return copy

    # --- all groups ------------------------------------------------------------------------------

    def _samples(
        self, feeds: Sequence[Feed] | None, most: int
    ) -> tuple[Sequence[Feed], Sequence[Feed]]:
        if feeds is None or self.absent:
            return (), ()
        if isinstance(feeds, Feeds):
            count = len(feeds)
            where = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
            feeds = [feeds[int(i)] for i in where]
        teachers, judges = held_out(feeds)
        if len(teachers) == len(judges):
            self.notes.append(
                f"errors are on the same {len(judges)} samples that weights were solved on: they "
                "look smaller than they are"
            )
        return teachers, judges

    def _ranked(self) -> list[Ranked]:
        groups = [g for g in self.groups.free if self.item.takes(g)]
        importance = Importance(self.item.importance)
        if importance is Importance.AUTO:
            importance = Importance.RECONSTRUCTION if self.teachers else Importance.L2
        if self.absent:
            importance = Importance.RANDOM
        self._turn_heads(groups)
        looks = bool(self.teachers) and importance.needs_samples
        ranked: list[Ranked] = []
        for part in batches(groups) if looks else [groups]:
            found = collect(part, self.teachers, self.model, self.progress) if looks else {}
            limit = min(0.9, self.ratio + 0.05)
            ranked += rank(part, found, importance, limit, self.item.seed)
        return ranked

    def _turn_heads(self, groups: Sequence[Group]) -> None:
        """As the pass does before it ranks: no result changes."""
        if not self.teachers or not self.item.repair:
            return
        for part in batches([group for group in groups if group.kind == "head dimensions"]):
            rotate_heads(part, collect(part, self.teachers, self.model, self.progress))

    def _how(self) -> Choosing:
        multiple = self.item.multiple or preferred_multiple(self.target)
        return Choosing(
            ratio=self.ratio, importance=Importance(self.item.importance), multiple=multiple
        )

    def _reference(self) -> list[list[np.ndarray]]:
        return self._run(self.model) if self.judges else []

    def _run(self, model: ir.Model) -> list[list[np.ndarray]]:
        with OrtRunner(model) as runner:
            return [list(runner.run(feed).values()) for feed in self.judges]

    def _size(self, model: ir.Model) -> _Size:
        (row,) = Architecture(model).estimate(self.target, ["fp32"], dims=self.dims).rows
        return _Size(_parameters(model), measure(model, self.dims).macs, row.latency)

    def _macs_of_nodes(self) -> dict[str, float]:
        """The share of all MACs that each node does, by the name of its result."""
        sized = at_sizes(self.bare, self.dims)
        macs = {
            node.outputs[0].name or "": node_cost(node, self.dims, sized.functions).macs or 0
            for node in all_nodes(sized)
            if node.outputs
        }
        total = max(1, sum(macs.values()))
        return {name: count / total for name, count in macs.items()}


def _parameters(model: ir.Model) -> int:
    return sum(
        math.prod(int(d) for d in value.shape.numpy())
        for value in model.graph.initializers.values()
        if value.shape is not None and value.dtype is not None and value.dtype.is_floating_point()
    )


def _energy(group: Group, units: Sequence[int]) -> float:
    """The share of the squared weights that compute units and read them, multiplied, which is in
    these units: what a linear network would lose."""
    total = np.ones(group.size)
    for sites in (group.producers, group.consumers):
        squares = np.zeros(group.size)
        for site in sites:
            rows = weight_rows(site)
            if rows is not None:
                own = (rows.reshape(len(rows), -1) ** 2).sum(1)
                squares += unit_sums(own, site.units, group.size)
        if squares.sum() > 0:
            total *= squares
    lost: float = total[np.asarray(units, int)].sum() / max(float(total.sum()), 1e-300)
    return float(lost)


def _less(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
