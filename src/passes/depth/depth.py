"""Depth pruning: residual blocks leave the model, those first that matter least.

Here: the pass `depth`, its options and its notes. Not here: finding blocks (`depth_blocks`),
measuring (`depth_harm`), choosing (`depth_choice`), making up for them (`depth_repair`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...cost.text import format_count
from ...errors import PassOptionError, UsageError
from ...ir.graph import absent_weights
from ...ir.shapes import infer_shapes
from ...targets.onnxruntime import OrtRunner
from ..base import Context, Feed, Pass, PassResult, Stage
from ..probe import default_dims
from ..quantize.capture import Progress, require_samples
from ..quantize.sensitivity import TRYING_MACS, spread_over
from ..quantize.switched import divergence_over
from .blocks import Block, Found, find_blocks
from .choice import (
    Chosen,
    Goal,
    Policy,
    Unit,
    at_random,
    by_place,
    choose,
    db,
    units_of,
)
from .harm import Harm, Skipping, influence
from .removal import close_places, remove_blocks
from .repair import repair_cuts

SAMPLES = 16
"""As many samples, evenly spread, tell what a block does."""
FEWEST_SAMPLES = 4
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Depth(Pass):
    """Removes residual blocks, f of x + f(x): those that the outputs miss least on your samples.

    `blocks`: how many go; or `ratio`: the share that goes of what all blocks compute. `unit`: a
    "branch" at a time, or a whole "layer" (an attention and the products that follow it). `by`:
    "harm", the outputs' error without it, measured again after every removal; "influence", 1 -
    cosine of x and x + f(x) (Men et al. 2024, arXiv:2403.03853); without data "last", the deepest
    first but for the last layer (Gromov et al. 2024, arXiv:2403.17887), or "random". `max_harm`:
    the ratio of signal to error in dB that the outputs must keep on the samples; removal stops
    before it. `repair`: put a scale and a shift of each channel where a block was, if the outputs
    come nearer to what they were by it.
    `exclude`: parts of names of blocks that stay. `seed`: of "random".
    """

    name = "depth"
    stage = Stage.PRUNE
    lossless = False

    blocks: int = 0
    ratio: float = 0.25
    unit: Unit = Unit.BRANCH
    by: Policy = Policy.HARM
    max_harm: float = 10.0
    repair: bool = False
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise _bad_option("blocks", f"{self.blocks} blocks can't go", "0 or more")
        if not 0.0 <= self.ratio <= 1.0:
            raise _bad_option("ratio", f"a share of {self.ratio} can't go", "0 <= ratio <= 1")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: there is no calibration data for a policy that measures.
            CalibrationError: a sample does not fit the model, or there is none.
        """
        found = find_blocks(model, default_dims(model, context.dims))
        kept = tuple(b for b in found.blocks if not any(part in b.name for part in self.exclude))
        found = dataclasses.replace(found, blocks=kept)
        if not found.blocks:
            return PassResult(model, False, _nothing(found))
        absent = bool(absent_weights(model))
        samples = None if absent else self._samples(context)
        chosen = self._choose(model, found, samples, absent, context.progress)
        if not chosen.blocks:
            why = chosen.stopped or "the goal is less than any of them"
            text = f"none of {len(found.blocks)} residual blocks removed: {why}"
            return PassResult(model, False, (text,))
        notes = [*self._notes(found, chosen, absent)]
        reference = model.clone() if samples else None
        blocks = [block for unit in chosen.blocks for block in unit]
        places = remove_blocks(model, blocks)
        if samples and reference is not None:
            notes.append(self._settle(model, reference, places, samples, context.progress))
        close_places([place for place, _ in places])
        infer_shapes(model)
        return PassResult(model, True, tuple(notes))

    def _samples(self, context: Context) -> Sequence[Feed] | None:
        if self.by in (Policy.LAST, Policy.RANDOM) and not context.calibration:
            return None
        if context.calibration is None:
            raise UsageError(
                f"The pass 'depth' needs calibration data to choose blocks by {self.by.value}",
                where=f"pass {str(self)!r}",
                why="what the outputs miss without a block is measured on samples",
                fix="give `calibration=`, some tens of samples; or choose without looking: "
                "depth{by=last} or depth{by=random}",
            )
        return require_samples(context.calibration, self.name, "blocks are chosen by it")

    # --- choosing --------------------------------------------------------------------------------

    def _choose(
        self,
        model: ir.Model,
        found: Found,
        samples: Sequence[Feed] | None,
        absent: bool,
        progress: Progress,
    ) -> Chosen:
        units = units_of(found, self.unit)
        goal = Goal(self.blocks, 0.0 if self.blocks else self.ratio, 10 ** (-self.max_harm / 10))
        if samples is None:
            order = at_random(units, self.seed) if self.by is Policy.RANDOM else by_place(units)
            return choose(found, units, goal, order=order)
        tried, few = self._effort(found, units, samples)
        with Skipping(model, found.blocks) as skipping:
            harm = Harm(skipping, few).without
            if self.by in (Policy.LAST, Policy.RANDOM):
                order = at_random(units, self.seed) if self.by is Policy.RANDOM else by_place(units)
                return choose(found, units, goal, order=order, harm=harm)
            ranked = self._ranked(model, found, units, few, tried, progress)
            if self.by is Policy.INFLUENCE:
                return choose(found, units, goal, order=ranked, harm=harm)
            return choose(
                found, units, goal, ranked=ranked, tried=tried, harm=harm, progress=progress
            )

    def _effort(
        self, found: Found, units: Sequence[tuple[Block, ...]], samples: Sequence[Feed]
    ) -> tuple[int, Sequence[Feed]]:
        """How many units are tried at each step (0: all), and the samples they are tried on: what
        the time for trying is enough for."""
        few = spread_over(samples, SAMPLES)
        steps = self.blocks or max(1, round(self.ratio * len(units)))
        runs = TRYING_MACS / max(1, (found.macs or 0) * min(steps, len(units)))
        if runs < len(units) * len(few):
            few = spread_over(few, max(FEWEST_SAMPLES, int(runs / len(units))))
        tried = 0 if runs >= len(units) * len(few) else max(3, int(runs / len(few)))
        return tried, few

    def _ranked(
        self,
        model: ir.Model,
        found: Found,
        units: Sequence[tuple[Block, ...]],
        samples: Sequence[Feed],
        tried: int,
        progress: Progress,
    ) -> list[int]:
        """Units by influence, the least first; not looked at where all are tried anyway."""
        if self.by is Policy.HARM and not tried:
            return []
        turned = influence(model, found.blocks, samples, progress)
        index = {block: i for i, block in enumerate(found.blocks)}
        sums = [sum(turned[index[block]] for block in unit) for unit in units]
        return sorted(range(len(units)), key=lambda i: (sums[i], i))

    # --- afterwards ------------------------------------------------------------------------------

    def _settle(
        self,
        model: ir.Model,
        reference: ir.Model,
        places: Sequence[tuple[ir.Node, int]],
        samples: Sequence[Feed],
        progress: Progress,
    ) -> str:
        """Repair if that helps the outputs; what is left of them."""
        few = spread_over(samples, 2 * SAMPLES)
        with OrtRunner(reference) as runner:
            wanted = [_outputs(runner, reference)(sample) for sample in few]
        before = _divergence(model, few, wanted)
        if not self.repair:
            return f"{db(before)} at the outputs on calibration data"
        sources = [place.inputs[0] for place, _ in places]
        count = repair_cuts(model, reference, places, samples, progress)
        after = _divergence(model, few, wanted) if count else before
        if count and after < before:
            return (
                f"{db(after)} at the outputs on calibration data; {db(before)} before {count} of "
                f"{len(places)} places got a scale and a shift"
            )
        for (place, _), source in zip(places, sources, strict=True):
            place.replace_input_with(0, source)
        return f"{db(before)} at the outputs on calibration data; scales and shifts did not help"

    def _notes(self, found: Found, chosen: Chosen, absent: bool) -> list[str]:
        blocks = [block for unit in chosen.blocks for block in unit]
        text = f"removed {len(blocks)} of {len(found.blocks)} residual blocks"
        saved = found.saved(blocks)
        if saved is not None and found.macs:
            text += f": {format_count(saved)} MACs, {saved / found.macs:.0%} of the model's"
        if found.share is not None:
            text += f" ({found.share:.0%} are in blocks)"
        notes = [text]
        for unit, harm in zip(chosen.blocks, chosen.harms, strict=True):
            names = ", ".join(f"{block.name} ({block.kind})" for block in unit)
            left = "" if np.isnan(harm) else f": {db(harm)} at the outputs"
            notes.append(f"  {names}{left}")
        if len(notes) > _SHOWN + 2:
            notes[_SHOWN + 1 :] = [f"  and {len(notes) - _SHOWN - 1} more"]
        if chosen.stopped:
            goal = f"{self.blocks} {self.unit.value}" if self.blocks else f"{self.ratio:.0%}"
            notes.append(f"stopped before the goal ({goal}): {chosen.stopped}")
        if absent:
            notes.append("weights have no data: blocks were chosen by their place")
        elif all(np.isnan(chosen.harms)):
            notes.append("what the outputs lost was not measured: there are no samples")
        return notes


def _nothing(found: Found) -> tuple[str, ...]:
    first = "nothing to remove: no sum of a value and of something computed from it alone"
    more = [f"  {item.node}: {item.why}" for item in found.refused[:3]]
    return (first, *more)


def _outputs(runner: OrtRunner, model: ir.Model) -> Callable[[Feed], list[np.ndarray]]:
    names = [value.name or "" for value in model.graph.outputs]

    def run(sample: Feed) -> list[np.ndarray]:
        found = runner.run(sample, names)
        return [found[name] for name in names]

    return run


def _divergence(
    model: ir.Model, samples: Sequence[Feed], wanted: Sequence[list[np.ndarray]]
) -> float:
    with OrtRunner(model) as runner:
        run = _outputs(runner, model)
        return divergence_over(
            (reference, run(sample)) for reference, sample in zip(wanted, samples, strict=True)
        )


def _bad_option(option: str, what: str, fix: str) -> PassOptionError:
    return PassOptionError(
        f"The option {option!r} does not fit: {what}", where="pass 'depth'", fix=fix
    )
