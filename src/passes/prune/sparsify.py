"""Magnitude pruning: the smallest weights become zero.

Here: the pass `sparsify`, unstructured (Han et al., "Learning both weights and connections for
efficient neural networks", 2015, without the retraining). Not here:
removing channels, which changes shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.graph import constant_tensor, graphs, is_onnx_op
from ..base import Context, Pass, PassResult, Stage

_WEIGHTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Sparsify(Pass):
    """Sets the weights of least magnitude to zero: no faster, and smaller only when compressed.

    `ratio`: the share of weights that are zero afterwards, from 0 to below 1. `scope`: "tensor"
    prunes each weight by that share, "global" all of them together, by one threshold.
    `min_elements`: smaller weights stay.
    """

    name = "sparsify"
    stage = Stage.PRUNE
    lossless = False
    idempotent = True
    needs_weights = True

    ratio: float = 0.5
    scope: str = "tensor"
    min_elements: int = 256

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise _bad_option("ratio", f"a share of {self.ratio} can't be zero", "0 <= ratio < 1")
        if self.scope not in ("tensor", "global"):
            raise _bad_option("scope", f"no scope {self.scope!r}", "tensor or global")
        if self.min_elements < 0:
            raise _bad_option("min_elements", "a negative number of elements", "0 or more")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`. Ties at the threshold are broken by position, so the share is exact."""
        values = self._weights(model)
        total = sum(v.const_value.size for v in values if v.const_value is not None)
        if not total:
            text = f"nothing to sparsify: no weight of {self.min_elements} elements or more"
            return PassResult(model, False, (text,))
        arrays = [_array(value) for value in values]
        masks = self._masks(arrays)
        modified = False
        for value, array, mask in zip(values, arrays, masks, strict=True):
            if array[mask].any():
                modified = True
                pruned = np.where(mask, array.dtype.type(0), array)
                assert value.const_value is not None
                value.const_value = ir.Tensor(
                    pruned, dtype=value.const_value.dtype, name=value.name
                )
        zeros = sum(int((_array(value) == 0).sum()) for value in values)
        notes = (
            f"{zeros / total:.1%} of {total:,} weights in {len(values)} tensors are zero",
            "no faster on this target, smaller only when compressed",
        )
        return PassResult(model, modified, notes)

    def _weights(self, model: ir.Model) -> list[ir.Value]:
        """The float initializers that weigh something, each once, in graph order."""
        found: dict[ir.Value, None] = {}
        for graph in graphs(model):
            for node in graph:
                if not is_onnx_op(node, *_WEIGHTS):
                    continue
                for index in _WEIGHTS[node.op_type]:
                    value = node.inputs[index]
                    tensor = constant_tensor(value)
                    if value is None or tensor is None or not value.is_initializer():
                        continue
                    if tensor.dtype.is_floating_point() and tensor.size >= self.min_elements:
                        found[value] = None
        return list(found)

    def _masks(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Where each array becomes zero."""
        if self.scope == "tensor":
            return [_smallest(np.abs(a).reshape(-1), self.ratio).reshape(a.shape) for a in arrays]
        magnitudes = np.concatenate([np.abs(a).reshape(-1).astype(np.float32) for a in arrays])
        flat = _smallest(magnitudes, self.ratio)
        pieces = np.split(flat, np.cumsum([a.size for a in arrays])[:-1])
        return [piece.reshape(a.shape) for piece, a in zip(pieces, arrays, strict=True)]


def _smallest(magnitudes: np.ndarray, ratio: float) -> np.ndarray:
    """A mask of the `ratio` smallest elements; of equal ones, the first."""
    mask = np.zeros(magnitudes.shape, bool)
    count = round(ratio * magnitudes.size)
    if count:
        mask[np.argsort(magnitudes, kind="stable")[:count]] = True
    return mask


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def _bad_option(option: str, what: str, fix: str) -> PassOptionError:
    return PassOptionError(
        f"The option {option!r} does not fit: {what}", where="pass 'sparsify'", fix=fix
    )
