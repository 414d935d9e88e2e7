"""Sparsification: weights become zero, one by one, N of M, or in blocks; shapes stay.

Here: the pass `sparsify`, its options and its plan, and magnitudes (Han et al., "Learning both
weights and connections for efficient neural networks", 2015, without the retraining). Not here:
methods that need data (`sparsify_data`), removing channels (`structured`), storing few weights in
few bytes (`lower.pack_zeros`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.quant import QuantPlan
from ..base import Context, Pass, PassResult, Stage
from ..fuse.affine import FoldAffine
from ..quantize.capture import require_samples
from .data import Layers, layers_with_data, ratios_by_error
from .patterns import Pattern, parse_pattern, smallest
from .weights import Weight, find_weights

_METHODS = ("auto", "magnitude", "wanda", "sparsegpt")
_SCOPES = ("tensor", "global")


@dataclasses.dataclass(frozen=True)
class Sparsify(Pass):
    """Sets weights to zero; they take no less time on most targets, and less space when packed.

    `ratio`: the share of weights that are zero afterwards, from 0 to below 1. `pattern`:
    unstructured; N:M, as "2:4": at most N of M neighbouring input channels are not zero, which says
    the share by itself; or block, of `block` output x input channels. `scope`: "tensor" gives each
    weight that share, "global" all of them together, by one threshold. `method`: magnitude; wanda
    and sparsegpt, which need calibration data; auto is sparsegpt where there is data. `solve`: with
    data, what is left is solved again for the float model's results, and biases corrected.
    `min_elements`: smaller weights stay. `exclude`: nodes, weights or operators to leave.
    """

    name = "sparsify"
    stage = Stage.PRUNE
    lossless = False
    needs_weights = True

    ratio: float = 0.5
    pattern: str = "unstructured"
    block: str = "4x1"
    scope: str = "tensor"
    method: str = "auto"
    solve: bool = True
    min_elements: int = 256
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise _bad_option("ratio", f"a share of {self.ratio} can't be zero", "0 <= ratio < 1")
        if parse_pattern(self.pattern, self.block) is None:
            what = f"no pattern {self.pattern!r} with blocks {self.block!r}"
            fix = "unstructured; N:M with N below M and M up to 64, as 2:4; block, as block=4x1"
            raise _bad_option("pattern", what, fix)
        for option, allowed in (("scope", _SCOPES), ("method", _METHODS)):
            if getattr(self, option) not in allowed:
                what = f"no {option} {getattr(self, option)!r}"
                raise _bad_option(option, what, " or ".join(allowed))
        if self.scope == "global" and self.pattern != "unstructured":
            what = f"{self.pattern} has one threshold for each weight"
            raise _bad_option("scope", what, "scope=tensor, or pattern=unstructured")
        if self.min_elements < 0:
            raise _bad_option("min_elements", "a negative number of elements", "0 or more")

    @property
    def zeros(self) -> Pattern:
        """Where zeros may lie."""
        found = parse_pattern(self.pattern, self.block)
        assert found is not None
        return found

    @property
    def share(self) -> float:
        """The share of zeros in each weight, or in all."""
        return self.zeros.share(self.ratio)

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What `estimate` says of it: shapes and stored types stay."""
        found = find_weights(model, self.zeros, self.min_elements, self.exclude)
        return QuantPlan(label=f"{self.share:.0%} of {len(found)} weights zero", entries={})

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, for an architecture without weights: nothing changes."""
        return PassResult(model, False, _promises(self.pattern, context))

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`. Ties are broken by position, so the share is exact.

        Raises:
            UsageError: the method needs calibration data.
            CalibrationError: it is empty, or does not fit the model.
        """
        samples = context.calibration
        method = self.method
        if method in ("wanda", "sparsegpt"):
            why = f"{method} looks at what the weights are multiplied by"
            samples = require_samples(samples, self.name, why)
        elif method == "auto":
            method = "sparsegpt" if samples else "magnitude"
        # weights that act together are compared: scales of a normalization belong to them
        folded = FoldAffine().run(model, context).modified
        weights = find_weights(model, self.zeros, self.min_elements, self.exclude)
        if not weights:
            text = f"nothing to sparsify: no weight of {self.min_elements} elements or more"
            return PassResult(model, folded, (text,))
        before = [_array(weight.value) for weight in weights]
        notes: list[str] = []
        layers = {} if method == "magnitude" else layers_with_data(model, weights)
        if layers:
            assert samples is not None
            ratios = dict.fromkeys(layers, self.ratio)
            if self.scope == "global":
                ratios = ratios_by_error(model, layers, samples, self.ratio)
            work = Layers(model, layers, ratios, self.zeros, method=method, solve=self.solve)
            work.run(samples, context.progress)
            notes.append(_summary(work, method))
        rest = [weight for weight in weights if weight not in layers]
        self._by_magnitude(rest)
        if layers and rest:
            notes.append(f"{len(rest)} weights by magnitude: shared, in a branch, or no product")
        after = [_array(weight.value) for weight in weights]
        modified = any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        total = sum(array.size for array in after)
        zeros = sum(int((array == 0).sum()) for array in after)
        share = f"{zeros / total:.1%} of {total:,} weights in {len(weights)} tensors are zero"
        return PassResult(
            model, modified or folded, (share, *notes, *_promises(self.pattern, context))
        )

    def _by_magnitude(self, weights: Sequence[Weight]) -> None:
        arrays = {weight: np.abs(_array(weight.value).astype(np.float32)) for weight in weights}
        for weight, mask in self._masks(arrays).items():
            array = _array(weight.value)
            if array[mask].any():
                tensor = weight.value.const_value
                assert tensor is not None
                pruned = np.where(mask, array.dtype.type(0), array)
                weight.value.const_value = ir.Tensor(
                    pruned, dtype=tensor.dtype, name=weight.value.name
                )

    def _masks(self, scores: Mapping[Weight, np.ndarray]) -> dict[Weight, np.ndarray]:
        """Where each weight becomes zero."""
        if self.scope == "tensor" or not scores:
            pattern = self.zeros
            return {
                weight: pattern.zeros(array, weight.out_axis, weight.in_axis, self.ratio)
                for weight, array in scores.items()
            }
        together = np.concatenate([array.reshape(-1) for array in scores.values()])
        flat = smallest(together, round(self.ratio * together.size))
        pieces = np.split(flat, np.cumsum([array.size for array in scores.values()])[:-1])
        return {
            weight: piece.reshape(array.shape)
            for (weight, array), piece in zip(scores.items(), pieces, strict=True)
        }


def _summary(work: Layers, method: str) -> str:
    text = f"{method} in {len(work.layers)} layers"
    if work.resolve:
        text += f", {work.solved} solved again, {work.biases} biases corrected"
    if work.wide:
        text += f"; {work.wide} with too many inputs by wanda"
    return text


def _promises(pattern: str, context: Context) -> tuple[str, ...]:
    """What zeros buy on the target."""
    target = context.target
    if target is not None and pattern in target.sparse_patterns:
        return (f"{pattern} is multiplied by sparse kernels on this target",)
    return ("no faster on this target, smaller only when compressed",)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def _bad_option(option: str, what: str, fix: str) -> PassOptionError:
    return PassOptionError(
        f"The option {option!r} does not fit: {what}", where="pass 'sparsify'", fix=fix
    )
