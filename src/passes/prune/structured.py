"""Structured pruning: channels, heads and features leave, and what stays makes up for them.

Here: the pass `prune`. Not here: what must go together (`groups`), removing it (`remove`), choosing
it (`choice`), making up for it (`repair`), weights set to zero where they are (`sparsify`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.graph import absent_weights, graphs
from ...ir.ops import graph_macs
from ..base import Context, Feed, Pass, PassResult, Stage
from ..quantize.capture import require_samples
from .alone import Alone, weighed, weighed_together
from .branches import unreached
from .choice import Allocation, Choosing, Ranked, choose, foreseen, rank, together
from .divergence import Outputs, held_out, thinned
from .groups import Group, Groups, find_groups
from .importance import Importance
from .made_samples import made_samples, wanted_samples
from .price import Price, node_times
from .quantized import refuse_quantized
from .remove import remove
from .repair import MAX_SAMPLES, Repaired, kept_outputs, lost_inputs, repair
from .repair_heads import rotate_heads
from .rounding import preferred_multiple
from .statistics import batches, collect

_BACK_OFF, _BACK_OFF_MOST = 0.95, 0.4
"""What is left of a ratio that lost too much: at most, and at least."""
_HALVINGS = 6
_JUDGES = 12
"""Samples, at least, to measure on what the outputs mind."""
_LEAST_RATIO = 0.03


@dataclasses.dataclass(frozen=True)
class StructuredPrune(Pass):
    """Removes channels, dimensions of heads and features: fewer weights and products.

    `ratio` is the share of the units that leaves: of every group with `allocation=uniform`; of all
    together, and at least such a share of the MACs and parameters in reach, with `sensitivity`,
    more from where that does less harm to the outputs, measured, and with `global`, to the layers
    behind, all alike; with `cost` that share of the time in reach, as predicted for the target,
    from where most time is gained for the harm. `auto` is sensitivity where there are samples to
    repair with. No group's share is more than `spread` from `ratio`, or over 85 %. With calibration
    samples units are chosen by what the layers behind them can't make up for, and layers that lost
    inputs are then solved again; without, by magnitude, and nothing is repaired. `importance`:
    auto, reconstruction, activation, l1, l2, median or random. `heads`: dimensions of heads or
    whole ones, or auto. `widths` lets go of what a LayerNormalization takes statistics over. `only`
    and `exclude` are names of groups (with *), or kinds of units. `multiple` is what widths are
    multiples of; 0: what the target's vectors like. `limit` is the share of the outputs' variance
    that may be lost on samples held out; beyond it less is pruned.
    """

    name = "prune"
    stage = Stage.PRUNE
    lossless = False

    ratio: float = 0.3
    importance: str = "auto"
    allocation: str = "auto"
    spread: float = 0.5
    repair: bool = True
    heads: str = "auto"
    widths: bool = False
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multiple: int = 0
    limit: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for option, kinds in (("importance", Importance), ("allocation", Allocation)):
            names = [kind.value for kind in kinds]
            if getattr(self, option) not in names:
                raise _bad_option(
                    option, f"no {option} {getattr(self, option)!r}", ", ".join(names)
                )
        if not 0.0 <= self.ratio < 1.0:
            raise _bad_option("ratio", f"a share of {self.ratio} can't be pruned", "0 <= ratio < 1")
        if not 0.0 <= self.spread < 1.0:
            raise _bad_option("spread", f"{self.spread} is no share", "0 <= spread < 1")
        if self.heads not in ("auto", "whole", "dimensions"):
            raise _bad_option("heads", f"no units {self.heads!r}", "auto, whole or dimensions")
        if self.multiple < 0:
            raise _bad_option("multiple", "a negative number of channels", "0 or more")
        if self.limit <= 0:
            raise _bad_option("limit", "no model is that close to another", "a limit over 0")

    def takes(self, group: Group) -> bool:
        """Whether `only` and `exclude` leave the group to be pruned."""
        wanted = not self.only or _named(group, self.only)
        return wanted and not _named(group, self.exclude)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`."""
        refuse_quantized(model, self.name)
        absent = bool(absent_weights(model))
        if Importance(self.importance).needs_samples:
            require_samples(context.calibration, self.name, "units are judged by activations")
        samples = None if absent else context.calibration
        work = _Work(self, context, samples)
        return work.run(model)


class _Work:
    """One run of the pass."""

    def __init__(
        self, options: StructuredPrune, context: Context, samples: Sequence[Feed] | None
    ) -> None:
        self.options = options
        self.context = context
        self.teaching, self.judging = held_out(samples) if samples else ([], [])
        self.multiple = options.multiple or preferred_multiple(context.target)
        self.importance = Importance(options.importance)
        if self.importance is Importance.AUTO:
            self.importance = Importance.RECONSTRUCTION if self.teaching else Importance.L2
        self.allocation = self._allocation()
        self.notes: list[str] = []
        self.unreached: dict[Group, str] = {}
        self.wanted = 0

    def run(self, model: ir.Model) -> PassResult:
        before = _size(model, self.context.dims)
        groups = find_groups(model, heads=self.options.heads, widths=self.options.widths)
        if self.teaching:
            self.unreached = unreached(model, groups.free, self.teaching)
        if not self._taken(groups) or self.options.ratio == 0:
            text = (
                "nothing to prune: no group of units can be removed"
                if self.options.ratio
                else ("nothing to prune: the ratio is 0")
            )
            return PassResult(model, False, (text, *_blocked(groups, self.unreached)))
        self._teach_more(model, groups)
        turned = self._turn_heads(model, groups)
        ranked = self._ranked(model, groups)
        price = self._price(model, ranked)
        reference = model.clone() if self.teaching else None
        outputs = Outputs(model, self.judging) if self.judging else None
        ratio = self.options.ratio
        while True:
            chosen = choose(ranked, self._how(ratio), price)
            if not chosen:
                text = "nothing was pruned: the ratio is less than one block of channels"
                return PassResult(model, turned > 0, (text, *self.notes))
            numbers = {groups.index(group): units for group, units in chosen.items()}
            pruned, repaired = self._pruned(model, reference, numbers)
            if outputs is None:
                break
            lost = outputs.divergence(pruned)
            limit = self.options.limit * outputs.allowance
            if lost <= limit:
                break
            self.notes.append(
                f"a ratio of {ratio:.2g} lost {lost:.0%} of the outputs' variance on samples held "
                f"out, over the limit of {limit:.0%}{outputs.why_less}"
            )
            ratio = self._less(ranked, price, ratio, limit / lost)
            if ratio < _LEAST_RATIO:
                return PassResult(model, turned > 0, ("nothing was pruned", *self.notes))
        notes = [_told(before, _size(pruned, self.context.dims)), _units(groups, chosen)]
        if repaired is not None:
            notes.append(
                f"{repaired.solved} of {repaired.layers} layers that lost inputs solved again"
            )
        if turned:
            notes.append(f"heads of {turned} products turned before")
        if outputs is not None:
            notes.append(f"{lost:.1%} of the outputs' variance lost on {len(self.judging)} samples")
        else:
            notes.append("no calibration samples: chosen by magnitude, not repaired, not judged")
        return PassResult(pruned, True, (*notes, *self.notes, *_blocked(groups, self.unreached)))

    def _allocation(self) -> Allocation:
        """How groups share the loss."""
        wanted = Allocation(self.options.allocation)
        if wanted is Allocation.SENSITIVITY or wanted is Allocation.AUTO:
            able = bool(self.teaching)
            if wanted is Allocation.AUTO:
                able = able and self.options.repair and self.importance.needs_samples
            return Allocation.SENSITIVITY if able else Allocation.UNIFORM
        return wanted

    def _price(self, model: ir.Model, ranked: Sequence[Ranked]) -> Price | None:
        if not self.allocation.spreads:
            return None
        parts = [[item.group for item in members] for members in together(ranked)]
        times, target = None, self.context.target
        if self.allocation is Allocation.COST and target is not None:
            times = node_times(model, target, self.context.dims)
        return Price(parts, self.context.dims, times or None)

    def _less(
        self, ranked: Sequence[Ranked], price: Price | None, ratio: float, share: float
    ) -> float:
        """The ratio at which the errors foreseen are that share of those at `ratio`, or less."""
        goal = max(share, 0.05) * foreseen(ranked, self._how(ratio), price)
        least, most = _BACK_OFF_MOST * ratio, _BACK_OFF * ratio
        for _ in range(_HALVINGS):
            middle = (least + most) / 2
            if foreseen(ranked, self._how(middle), price) > goal:
                most = middle
            else:
                least = middle
        return least

    def _how(self, ratio: float) -> Choosing:
        return Choosing(
            ratio=ratio,
            importance=self.importance,
            allocation=self.allocation,
            multiple=self.multiple,
            spread=self.options.spread,
            seed=self.options.seed,
        )

    def _taken(self, groups: Groups) -> list[Group]:
        """The groups that can and are to be pruned."""
        free = [group for group in groups.free if group not in self.unreached]
        return [group for group in free if self.options.takes(group)]

    def _teach_more(self, model: ir.Model, groups: Groups) -> None:
        """Make samples where the layers need more than there are, and say what they need."""
        if not self.teaching or not (self.options.repair or self.importance.needs_samples):
            return
        given = len(self.teaching)
        self.wanted = wanted_samples(model, self._taken(groups), self.teaching)
        made = made_samples(model, self.teaching, self.wanted - given, self.options.seed)
        self.teaching = [*self.teaching, *made]
        if given < self.wanted:
            by = f", {len(made)} made of them by swapping tokens" if made else ""
            self.notes.append(
                f"few samples for layers this wide: {given} to learn from{by}; "
                f"{self.wanted} or more would be better"
            )

    def _turn_heads(self, model: ir.Model, groups: Groups) -> int:
        """Turn heads in place; how many products' heads were."""
        if not self.teaching or not self.options.repair:
            return 0
        heads = [group for group in self._taken(groups) if group.kind == "head dimensions"]
        turned = 0
        for part in batches(heads):
            statistics = collect(part, self.teaching, model, self.context.progress)
            turned += len(rotate_heads(part, statistics))
        return turned

    def _ranked(self, model: ir.Model, groups: Groups) -> list[Ranked]:
        spread = self.options.spread if self.allocation.spreads else 0.25
        limit = min(0.9, self.options.ratio + spread)
        taken, progress = self._taken(groups), self.context.progress
        measured = self.allocation in (Allocation.SENSITIVITY, Allocation.COST)
        measured = measured and bool(self.teaching)
        looks = self.importance.needs_samples or measured
        alone = None
        if measured:
            heads, widths = self.options.heads, self.options.widths
            # those that weights are solved on are better than none
            more = thinned(self.teaching, max(0, _JUDGES - len(self.judging)))
            alone = Alone(model, [*self.judging, *more], len(taken), heads, widths)
        ranked: list[Ranked] = []
        known: set[Group] = set()
        for part in batches(taken) if looks else [taken]:
            found = collect(part, self.teaching, model, progress) if looks else {}
            scored = found if self.importance.needs_samples else {}
            for item in rank(part, scored, self.importance, limit, self.options.seed):
                own = None if alone is None else weighed(item, alone, found)
                ranked.append(own or item)
                if own is not None:
                    known.add(item.group)
        if alone is None:
            return ranked
        result: list[Ranked] = []
        for members in together(ranked):
            if not all(item.group in known for item in members):
                places = [groups.index(item.group) for item in members]
                members = weighed_together(members, alone, places)
            result += members
        return result

    def _pruned(
        self, model: ir.Model, reference: ir.Model | None, numbers: Mapping[int, list[int]]
    ) -> tuple[ir.Model, Repaired | None]:
        """A copy of the model without the units of the groups of those numbers."""
        copy = model.clone()
        groups = find_groups(copy, heads=self.options.heads, widths=self.options.widths)
        chosen = {groups[i]: units for i, units in numbers.items()}
        kept = kept_outputs(chosen)
        remove(copy, groups, chosen)
        if reference is None or not self.options.repair:
            return copy, None
        # what few samples say of the other layers is worth less than what they were trained to
        lost, progress = lost_inputs(copy, reference), self.context.progress
        most = max(MAX_SAMPLES, self.wanted)
        return copy, repair(copy, reference, kept, self.teaching, progress, lost, most)


def _named(group: Group, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(group.name, n) or group.kind == n for n in names)


def _size(model: ir.Model, dims: Mapping[str, int]) -> tuple[int, int | None]:
    """Parameters and multiplications."""
    weights = sum(
        int(np.prod(v.shape.numpy()))
        for graph in graphs(model)
        for v in graph.initializers.values()
        if v.shape is not None and v.dtype is not None and v.dtype.is_floating_point()
    )
    return weights, graph_macs(model.graph, dims or None)


def _told(before: tuple[int, int | None], after: tuple[int, int | None]) -> str:
    text = f"{1 - after[0] / max(1, before[0]):.1%} of {before[0]:,} parameters removed"
    if before[1] and after[1] is not None:
        text += f", {1 - after[1] / before[1]:.1%} of {before[1]:,} MACs"
    return text


def _units(groups: Groups, chosen: Mapping[Group, list[int]]) -> str:
    gone, total = sum(map(len, chosen.values())), sum(group.size for group in groups.free)
    return f"{gone:,} of {total:,} units in {len(chosen)} of {len(groups.free)} groups left"


def _blocked(groups: Groups, unreached: Mapping[Group, str]) -> list[str]:
    """The commonest reasons for which groups stay."""
    reasons: dict[str, int] = {}
    for group in groups:
        reason = group.blocked or unreached.get(group)
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    return [f"{count} groups stay: {reason}" for reason, count in ranked[:3]]


def _bad_option(option: str, what: str, fix: str) -> PassOptionError:
    return PassOptionError(
        f"The option {option!r} does not fit: {what}", where="pass 'prune'", fix=fix
    )
