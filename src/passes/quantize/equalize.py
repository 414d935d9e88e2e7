"""Cross-layer equalization: weight ranges of neighbouring layers made alike, without data.

Here: the pass `equalize`. Where a scale can go is `scaling`'s to say. Not here: scales from
activations (`smooth_quant`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ..base import Context, Pass, PassResult, Stage
from .known_types import require_types
from .scaling import Constants, Group, find_groups, refusals, scale_group

LIMIT = 128.0
"""No channel is scaled by more in total: a channel whose weights are almost zero is all bias."""
_CLOSE = 1e-3


@dataclasses.dataclass(frozen=True)
class Equalize(Pass):
    """Evens out the weight ranges of layers in a row before quantization; nothing else changes.

    For each channel between two products (Conv, Gemm, MatMul, depthwise ones too) with only
    homogeneous operators between them (Relu, pooling, moves), output channel c of the first is
    divided by s = sqrt(r1 / r2) and input channel c of the second multiplied by it, r1 and r2 the
    greatest magnitudes of their weights there; repeated until nothing moves. Nagel et al. 2019,
    "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721,
    section 4.1. Helps weights that share one scale (per tensor) most, and activations, whose
    channels share one anyway. `rounds`: how often at most.
    """

    name = "equalize"
    stage = Stage.QUANTIZE
    needs_weights = True

    rounds: int = 20

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise PassOptionError(
                f"'rounds' can't be {self.rounds}",
                where=f"pass {self.name!r}, option 'rounds'",
                fix="1 or more; 20 is enough for deep networks",
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`. Weights must be there; calibration is not needed."""
        require_types(model)
        groups = list(find_groups(model))
        usable = [g for g in groups if any(fold.product for fold in g.makers)]
        notes = refusals(g for g in groups if g.refusal)
        if not usable:
            return PassResult(model, False, ("no two products in a row to equalize", *notes))
        constants = Constants()
        before = _spread(constants, usable)
        _equalize(constants, usable, self.rounds)
        after = _spread(constants, usable)
        constants.write()
        text = f"equalized {len(usable)} pairs: weight ranges of channels {before:.1f} times apart"
        return PassResult(model, True, (f"{text} before, {after:.1f} after", *notes))


def _equalize(constants: Constants, groups: list[Group], rounds: int) -> None:
    total = {group: np.ones(group.channels) for group in groups}
    for _ in range(rounds):
        moved = 0.0
        for group in groups:
            first, second = _ranges(constants, group)
            ratio = np.where((first > 0) & (second > 0), second / np.maximum(first, 1e-30), 1.0)
            factor = group.shared(np.sqrt(np.maximum(ratio, 1e-30)))
            allowed = np.clip(total[group] * factor, 1 / LIMIT, LIMIT)
            factor = allowed / total[group]
            total[group] = allowed
            moved = max(moved, float(np.abs(np.log(factor)).max(initial=0.0)))
            scale_group(constants, group, factor)
        if moved < _CLOSE:
            return


def _ranges(constants: Constants, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Greatest magnitudes by channel: of the products before, and of those behind."""
    first = constants.peaks((fold for fold in group.makers if fold.product), group.channels)
    return first, constants.peaks((r.fold for r in group.readers), group.channels)


def _spread(constants: Constants, groups: list[Group]) -> float:
    """How many times the greatest channel range exceeds the median one: worst of all weights'."""
    worst = 1.0
    for group in groups:
        for ranges in _ranges(constants, group):
            middle = float(np.median(ranges[ranges > 0])) if (ranges > 0).any() else 0.0
            worst = max(worst, float(ranges.max()) / middle if middle else 1.0)
    return worst
