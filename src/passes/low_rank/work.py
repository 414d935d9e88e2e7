"""From a model and samples to menus, and from a choice to a model: what the pass `low_rank` runs.

Here: `Work`. Not here: options and notes (`low_rank`), prices, errors, choosing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import (
    attribute,
    constant_array,
    index_names,
    is_onnx_op,
    opset_of,
    static_shape,
)
from ...ir.shapes import infer_shapes, infer_shapes_from
from ...ir.sizing import is_dynamic, static_twin
from ...targets.onnxruntime import OrtRunner
from ..base import Context, Feed
from ..probe import NumericError, default_dims, numeric_error, run_on_sample
from ..prune.divergence import Outputs, held_out
from ..prune.rounding import preferred_multiple
from .choice import Choice, Menu, Option
from .factors import Factors, Known
from .forms import Candidate, Form, candidates, forms_of, original
from .price import Price, Prices
from .refit import Written, refit
from .sites import Refusal, Site, bias_array, find_sites
from .statistics import ChannelMoments, channel_moments
from .write import write

_WEIGHED = 8
"""Samples on which one layer's error is held against the model's."""
_FAR_OFF = 0.05
"""Error over signal of the outputs beyond which more of the same does less."""
_TRIALS = 3
_BYTES_A_WEIGHT = 32
_KEPT_BYTES = 1 << 30
_SUMS = 3
"""Sums in a row, of a bias and a residual, that a normalization is looked for behind."""
_ROW_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_LEAST_SCALE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What menus are made by: see the options of `low_rank.LowRank`."""

    measure: str = "macs"
    rank: int = 0
    margin: float = 0.05
    exclude: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()


class Work:
    """One model and its samples. The model is changed by `apply` alone, and only a copy of it."""

    def __init__(
        self, model: ir.Model, context: Context, wish: Wish, samples: Sequence[Feed] | None
    ) -> None:
        self.model = model
        self.samples, self.judging = held_out(samples) if samples else ([], [])
        self.wish = wish
        self._context = context
        self.prices = Prices(context.target, opset_of(model))
        found = find_sites(model, wish.exclude)
        self.sites: list[Site] = found[0]
        self.refused: list[Refusal] = found[1]
        self._moments: dict[ir.Value, ChannelMoments] = {}
        self._judge: Outputs | None = None
        self._kept: dict[ir.Node, Factors] = {}
        self._held = 0
        if samples:
            self._observe(self.samples)

    # --- what there is to choose from ----------------------------------------------------------

    def menus(self) -> list[Menu]:
        """A menu for each site, in graph order."""
        twin = self.model
        if is_dynamic(twin):
            twin = static_twin(twin, default_dims(self.model, self._context.dims))
        elif any(static_shape(site.layer.data) is None for site in self.sites):
            twin = self.model.clone()
            infer_shapes(twin, strict=False)
        places = dict(zip(self.model.graph, twin.graph, strict=True))
        found = []
        for i, site in enumerate(self.sites):
            self._context.progress(i, len(self.sites), "pricing factorizations")
            found.append(self._menu(site, static_shape(places[site.node].inputs[0])))
        return found

    def _menu(self, site: Site, data: tuple[int, ...] | None) -> Menu:
        dtype = site.layer.weight.dtype
        nothing = Price(0, 0.0)
        if data is None or dtype is None:
            return Menu(site, nothing, 0.0, (), "the size of its data is not known")
        price = self.prices.of(data, (original(site),), dtype)
        if price is None:
            return Menu(site, nothing, 0.0, (), "its cost is not known")
        multiple = preferred_multiple(self._context.target)
        whole = self._amount(price, site.weights)
        offered = [
            candidate
            for candidate in candidates(site, multiple, self.wish.rank)
            if not self.wish.forms or candidate.form in self.wish.forms
        ]
        if not offered:
            return Menu(site, price, whole, (), "it is too narrow for a rank that saves weights")
        least = (1.0 - self.wish.margin) * price.time
        fast = []
        for candidate in offered:
            own = self.prices.of(data, candidate.steps, dtype)
            if own is not None and own.time < least:
                fast.append((candidate, own))
        if not fast:
            return Menu(site, price, whole, (), "it would be no faster")
        errors = self._errors(site, [candidate for candidate, _ in fast])
        options = tuple(
            Option(candidate, own, error, whole - self._amount(own, candidate.weights))
            for (candidate, own), error in zip(fast, errors, strict=True)
        )
        return Menu(site, price, whole, options)

    def _amount(self, price: Price, weights: int) -> float:
        """What is to be reduced, of one layer."""
        return {"macs": float(price.macs), "time": price.time, "weights": float(weights)}[
            self.wish.measure
        ]

    def _errors(self, site: Site, offered: Sequence[Candidate]) -> list[float]:
        if site.is_absent:  # as if all layers were alike: what is taken from one hurts it squarely
            return [(1.0 - candidate.weights / site.weights) ** 2 for candidate in offered]
        factors = self._factors(site)
        return [factors.error(candidate) for candidate in offered]

    # --- numbers -------------------------------------------------------------------------------

    def _observe(self, samples: Sequence[Feed]) -> None:
        """Moments of the channels before and behind every site that needs them."""
        axes: dict[ir.Value, int] = {}
        sizes: dict[ir.Value, int] = {}
        for site in self.sites:
            if site.is_absent:
                continue
            axis = site.layer.channel_axis
            single = forms_of(site) == (Form.PRODUCT,)
            inward = single and site.inputs < site.outputs
            if inward or not single:
                axes[site.layer.data], sizes[site.layer.data] = axis, site.inputs
            if not inward:
                result = site.node.outputs[0]
                axes[result], sizes[result] = axis, site.outputs
        self._moments = channel_moments(self.model, axes, sizes, samples, self._context.progress)

    def _factors(self, site: Site) -> Factors:
        """The factorizations of a site, kept for when one is written, as far as memory goes."""
        found = self._kept.get(site.node)
        if found is None:
            found = self._new_factors(site)
            self._held += _BYTES_A_WEIGHT * site.weights
            if self._held <= _KEPT_BYTES:
                self._kept[site.node] = found
        return found

    def _new_factors(self, site: Site) -> Factors:
        weight = _weight(site)
        own = bias_array(site)
        bias = np.zeros(site.outputs)
        if own is not None and site.bias is not None and site.bias[0] is site.node:
            array = constant_array(own)
            assert array is not None
            bias = np.broadcast_to(array.astype(np.float64).reshape(-1), (site.outputs,))
        free = site.bias is not None and (
            len(site.bias[0].inputs) <= site.bias[1]
            or site.bias[0].inputs[site.bias[1]] is None
            or own is not None
        )
        inputs = self._moments.get(site.layer.data)
        outputs = self._moments.get(site.node.outputs[0])
        single = forms_of(site) == (Form.PRODUCT,)
        inward = single and site.inputs < site.outputs
        mean = None
        if inward and inputs is not None:
            mean = weight.reshape(site.outputs, -1) @ inputs.mean + bias
        elif not inward and outputs is not None:
            mean = outputs.mean
        centred = free and mean is not None
        return Factors(
            Known(
                weight,
                None
                if inputs is None or (single and not inward)
                else inputs.matrix(centred=centred and inward, shrunk=True),
                None if outputs is None or inward else outputs.matrix(centred=centred),
                mean,
                bias,
                _scale_behind(site),
                free,
            )
        )

    # --- the result ----------------------------------------------------------------------------

    def apply(self, menus: Sequence[Menu], choice: Choice, *, again: bool = True) -> ir.Model:
        """A copy of the model with the choice written into it; `again`: refitted on the samples."""
        model = self.model.clone()
        index_names(model)
        twins = {
            site.node.outputs[0].name: site for site in find_sites(model, self.wish.exclude)[0]
        }
        written: list[Written] = []
        editor = Editor()
        for i, (menu, option) in enumerate(zip(menus, choice, strict=True)):
            if option is None:
                continue
            self._context.progress(i, len(menus), "factorizing")
            site = twins[menu.site.node.outputs[0].name]
            weights, bias = None, None
            if not menu.site.is_absent:
                weights, bias = self._factors(menu.site).weights(option.candidate)
            node = write(site, option.candidate, weights, bias, editor)
            place = site.bias
            if place is not None and place[0] is site.node:
                place = node, 2
            elif place is not None and bias_array(menu.site) is None:
                place = None
            behind = place is not None and place[0] is not node
            written.append(Written(node, place, bias if behind else None))
        infer_shapes_from(model, [n for n in model.graph if _unshaped(n)], strict=False)
        if again and self.samples and not any(m.site.is_absent for m in menus):
            refit(model, self.model, written, self.samples, self._context.progress)
        return model

    def weighed(self, menus: Sequence[Menu], share: float) -> list[Menu]:
        """Menus with the model's error over the layer's own as their weight.

        One layer at a time is factorized by about that share, and a few samples are run.
        """
        if not self.samples:
            return list(menus)
        found = []
        expected = self._results(self.model)
        for i, menu in enumerate(menus):
            self._context.progress(i, len(menus), "weighing errors")
            found.append(dataclasses.replace(menu, weight=self._harm(menus, menu, share, expected)))
        return found

    def _harm(
        self, menus: Sequence[Menu], menu: Menu, share: float, expected: dict[str, np.ndarray]
    ) -> float:
        """What an error of one layer does to the outputs, as a multiple of it.

        Where the outputs are far off it says little of smaller errors: then one is looked at.
        """
        # an option with no error says nothing of the next
        telling = sorted((o for o in menu.options if o.error > 1e-9), key=lambda o: o.error)
        if not telling:
            return 1.0
        probe = min(telling, key=lambda o: abs(o.gain - share * menu.whole))
        harm = 1.0
        for _ in range(_TRIALS):
            alone: Choice = tuple(probe if other is menu else None for other in menus)
            changed = self._results(self.apply(menus, alone, again=False))
            noise = _noise(numeric_error(expected, changed))
            harm = max(noise, 1e-12) / probe.error
            smaller = [o for o in telling if o.error < probe.error / 4]
            if noise < _FAR_OFF or not smaller:
                break
            probe = smaller[-1]
        return harm

    def lost(self, model: ir.Model) -> float | None:
        """The share of the outputs' variance that a model loses on samples held out, if any."""
        if not self.judging:
            return None
        self._judge = self._judge or Outputs(self.model, self.judging)
        return self._judge.divergence(model)

    def _results(self, model: ir.Model) -> dict[str, np.ndarray]:
        """All results of a model on a few samples, by output and number."""
        step = max(1, len(self.samples) // _WEIGHED)
        found: dict[str, np.ndarray] = {}
        with OrtRunner(model, optimize=False, share_weights=True) as runner:
            for i in list(range(0, len(self.samples), step))[:_WEIGHED]:
                made = run_on_sample(runner, self.samples[i], None, f"calibration sample {i}")
                found |= {f"{name} {i}": array for name, array in made.items()}
        return found


def _noise(error: NumericError) -> float:
    """Error power over signal power."""
    return float(10 ** (-min(max(error.sqnr_db, -100.0), 300.0) / 10))


def _weight(site: Site) -> np.ndarray:
    """[outputs, inputs, *kernel] in float64."""
    array = constant_array(site.layer.weight)
    assert array is not None
    if site.is_conv:
        return array.astype(np.float64)
    matrix: np.ndarray = site.layer.matrix(array)[0].T.astype(np.float64)
    return matrix


def _scale_behind(site: Site) -> np.ndarray:
    """What each output is multiplied by in a normalization behind, through sums; ones elsewhere."""
    ones = np.ones(site.outputs)
    gamma = _gamma_behind(site)
    if gamma is None or gamma.size != site.outputs or not gamma.any():
        return ones
    scale = np.abs(gamma.astype(np.float64).reshape(-1))
    return np.maximum(scale, _LEAST_SCALE * float(scale.max()))


def _gamma_behind(site: Site) -> np.ndarray | None:
    value = site.node.outputs[0]
    for _ in range(_SUMS):
        users = [use.node for use in value.uses()]
        for user in users:
            if site.is_conv and is_onnx_op(user, "BatchNormalization"):
                return _batch_norm_factor(user)
            if not site.is_conv and user.op_type in _ROW_NORMS and len(user.inputs) > 1:
                return constant_array(user.inputs[1])
        sums = [user for user in users if is_onnx_op(user, "Add")]
        if not sums or (site.is_conv and len(users) > 1):
            return None
        value = sums[0].outputs[0]
    return None


def _batch_norm_factor(norm: ir.Node) -> np.ndarray | None:
    gamma, variance = constant_array(norm.inputs[1]), constant_array(norm.inputs[4])
    if gamma is None or variance is None or attribute(norm, "training_mode", 0):
        return None
    spread = np.maximum(variance.astype(np.float64), 0.0) + attribute(norm, "epsilon", 1e-5)
    factor: np.ndarray = gamma / np.sqrt(spread)
    return factor


def _unshaped(node: ir.Node) -> bool:
    return any(value.shape is None for value in node.outputs)
