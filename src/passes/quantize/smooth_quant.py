"""SmoothQuant: outliers of activation channels moved into the weights that read them.

Here: the pass `smooth_quant`. Where a scale can go is `scaling`'s to say. Not here: scales from
weights alone (`equalize`), quantization itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.quant import PerChannel, QuantSpec
from ..base import Context, Feed, Pass, PassResult, Stage
from .capture import ChannelStats, iterate, require_samples, stats_of
from .known_types import require_types
from .layers import LinearLayer, linear_layer
from .numbers import Range, activation_affine, round_trip, weight_affine
from .scaling import Constants, Group, find_groups, insert_factor, refusals, scale_group

AUTO = "auto"
GRID = (0.2, 0.35, 0.5, 0.65, 0.8)
"""The strengths that `alpha="auto"` tries for each activation, besides leaving it as it is."""
_GAIN = 0.98
_GAIN_INSERTED = 0.8
_ROW_ELEMENTS = 1 << 20
_BUDGET = 1 << 28


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Evens out activation channels before int8: needs calibration data; computes the same.

    Channel j of an activation is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and the
    weights that read it multiplied by it. Xiao et al. 2022, "SmoothQuant: accurate and efficient
    post-training quantization for large language models", arXiv:2211.10438, equations 3 and 4. The
    division goes into the norm, product or factor before the activation, all of whose readers
    (q, k, v) share it; where there is none, `insert=true` puts a Mul there. `alpha`: 0 to 1, or
    "auto": for each activation the strength, none included, that gives the least error of its
    products in 8 bits on the calibration data. Write it before the pass that quantizes:
    `smooth_quant,int8`.
    """

    name = "smooth_quant"
    stage = Stage.QUANTIZE
    needs_weights = True

    alpha: str = AUTO
    insert: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", str(self.alpha))
        try:
            valid = self.alpha == AUTO or 0.0 <= float(self.alpha) <= 1.0
        except ValueError:
            valid = False
        if not valid:
            raise PassOptionError(
                f"'alpha' can't be {self.alpha!r}",
                where=f"pass {self.name!r}, option 'alpha'",
                fix='a number from 0 (weights stay even) to 1 (activations are), or "auto"',
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: no calibration data.
            CalibrationError: it is empty, or does not fit the model.
        """
        why = "which channels are outliers shows on real inputs only"
        samples = require_samples(context.calibration, self.name, why)
        require_types(model)
        groups = list(find_groups(model))
        usable = [g for g in groups if g.makers or (self.insert and g.insertable)]
        notes = refusals(g for g in groups if g not in usable)
        constants = Constants()
        chosen: dict[Group, tuple[float, np.ndarray]] = {}
        for group, seen in self._observe(model, usable, samples, context.progress):
            found = self._choose(group, seen, constants)
            if found is not None:
                chosen[group] = found
                if group.makers:
                    scale_group(constants, group, found[1])
                else:
                    constants.multiply((r.fold for r in group.readers), 1.0 / found[1])
        constants.write()
        for group, (_, factor) in chosen.items():
            if not group.makers:
                insert_factor(group, factor)
        return PassResult(model, bool(chosen), (_summary(chosen, usable), *notes))

    def _observe(
        self,
        model: ir.Model,
        groups: Sequence[Group],
        samples: Sequence[Feed],
        progress: Callable[[int, int, str], None],
    ) -> Iterator[tuple[Group, _Seen]]:
        """What each activation does on the samples, in batches of activations that fit in memory.

        The model must not change in between.
        """
        with_rows = self.alpha == AUTO
        batch: list[Group] = []
        size = 0
        for group in [*groups, None]:
            layers = [] if group is None or not with_rows else _layers(group)
            need = sum(8 * max(_ROW_ELEMENTS, layer.shape[1] * 64) for layer in layers)
            if batch and (group is None or size + need > _BUDGET):
                seen = {g: _Seen(g, _layers(g) if with_rows else []) for g in batch}
                for arrays in iterate(model, [g.value for g in batch], samples, progress):
                    for item in seen.values():
                        item.add(arrays[item.group.value.name or ""], len(samples))
                yield from seen.items()
                batch, size = [], 0
            if group is not None:
                batch.append(group)
                size += need

    def _choose(
        self, group: Group, seen: _Seen, constants: Constants
    ) -> tuple[float, np.ndarray] | None:
        """The strength and the factor on the activation; None to leave it alone."""
        assert seen.stats is not None
        weights = constants.peaks((r.fold for r in group.readers), group.channels)
        if self.alpha != AUTO:
            alpha = float(self.alpha)
            return alpha, _factor(group, seen.stats.peak, weights, alpha)
        best: tuple[float, np.ndarray] | None = None
        ones = np.ones(group.channels)
        least = seen.loss(constants, ones) * (_GAIN if group.makers else _GAIN_INSERTED)
        for alpha in GRID:
            factor = _factor(group, seen.stats.peak, weights, alpha)
            loss = seen.loss(constants, factor)
            if loss < least:
                best, least = (alpha, factor), loss
        return best


class _Seen:
    """What one activation did: its channels' extremes, and some rows of each of its products."""

    def __init__(self, group: Group, layers: Sequence[LinearLayer]) -> None:
        self.group = group
        self.stats: ChannelStats | None = None
        self.rows: dict[LinearLayer, list[np.ndarray]] = {layer: [] for layer in layers}

    def add(self, x: np.ndarray, samples: int) -> None:
        seen = stats_of(x, self.group.axis)
        self.stats = seen if self.stats is None else self.stats.union(seen)
        done: dict[tuple[object, ...], np.ndarray] = {}
        for layer, rows in self.rows.items():
            wanted = max(64, _ROW_ELEMENTS // max(1, layer.groups * layer.shape[1]))
            if sum(part.shape[1] for part in rows) < wanted:
                key = layer.rows_key
                if key not in done:
                    done[key] = layer.inputs(x, layer.positions(x, max(1, wanted // samples)))
                rows.append(done[key])

    def loss(self, constants: Constants, factor: np.ndarray) -> float:
        """Relative squared error of the products in 8 bits with the activation times `factor`."""
        assert self.stats is not None
        ends = self.stats.low * factor, self.stats.high * factor
        span = Range(float(ends[0].min()), float(ends[1].max()))
        affine = activation_affine(span, ir.DataType.UINT8, symmetric=False)
        total = 0.0
        for item in self.group.readers:
            layer = linear_layer(item.node)
            if layer is None or layer not in self.rows:
                continue
            weight = constants.array(item.fold)
            index = layer.matrix(np.broadcast_to(item.fold.index, weight.shape))[:, :, 0]
            by_input = factor[index][:, None]
            rows = np.concatenate(self.rows[layer], axis=1)
            matrix = layer.matrix(weight)
            wanted = rows @ matrix
            scaled = (matrix / by_input.swapaxes(1, 2)).astype(np.float32)
            spec = QuantSpec(ir.DataType.INT8, True, PerChannel(1))
            stored = np.stack([round_trip(m, weight_affine(m, spec), spec) for m in scaled])
            narrow = round_trip(
                (rows * by_input).astype(np.float32), affine, QuantSpec(ir.DataType.UINT8)
            )
            error = narrow @ stored - wanted
            total += float(np.square(error).sum() / max(np.square(wanted).sum(), 1e-30))
        return total


def _factor(group: Group, data: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """1 / s by channel; 1 where either side is all zero."""
    alive = (data > 0) & (weights > 0)
    data, weights = np.where(alive, data, 1.0), np.where(alive, weights, 1.0)
    scale = data**alpha / weights ** (1.0 - alpha)
    middle = np.exp(np.log(scale[alive]).mean()) if alive.any() else 1.0
    # only ratios between channels matter to the products; a common factor would move other ranges
    return group.shared(np.where(alive, middle / scale, 1.0))


def _layers(group: Group) -> list[LinearLayer]:
    found = (linear_layer(item.node) for item in group.readers)
    return [layer for layer in found if layer is not None]


def _summary(chosen: Mapping[Group, tuple[float, np.ndarray]], usable: Sequence[Group]) -> str:
    inserted = sum(not group.makers for group in chosen)
    alphas = sorted({alpha for alpha, _ in chosen.values()})
    text = f"smoothed {len(chosen)} of {len(usable)} activations"
    if alphas:
        text += f", alpha {alphas[0]:g}" + (f" to {alphas[-1]:g}" if len(alphas) > 1 else "")
    return text + (f", {inserted} by a Mul of their own" if inserted else "")
