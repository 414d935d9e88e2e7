"""What corrections need to know of a layer: moments of its quantized inputs and float results.

Here: `Moments`, folded sample by sample, and the error of a weight by them. The error of any weight
on all rows follows from sums of products, so memory does not grow with the samples. Not here: what
is done about the error (`reconstruct`, `adaround`, `bias_correction`), running the models
(`corrections`).
"""

from __future__ import annotations

import numpy as np

from .capture import ROWS_A_SAMPLE
from .layers import LinearLayer


class Moments:
    """Sums over rows of a layer's inputs x (as quantized) and results y (as in float).

    float64, [groups, ...]: `xx` of x'x, `xy` of x'y, `x` and `y` of themselves, `squares` of x^2.
    `products=False` leaves out the first two, for who needs means only.
    """

    def __init__(self, layer: LinearLayer, *, products: bool = True) -> None:
        groups, size, out = layer.shape
        self.layer = layer
        self.rows = 0.0
        self.x = np.zeros((groups, size))
        self.y = np.zeros((groups, out))
        self.squares = np.zeros((groups, size))
        self.xx = np.zeros((groups, size, size)) if products else None
        self.xy = np.zeros((groups, size, out)) if products else None

    @staticmethod
    def bytes(layer: LinearLayer) -> int:
        """Memory of one layer's sums of products."""
        groups, size, out = layer.shape
        return 8 * groups * size * (size + out)

    def add(
        self, x: np.ndarray, y: np.ndarray, limit: int = ROWS_A_SAMPLE, weight: float = 1.0
    ) -> None:
        """Fold in one sample: the layer's data and its result, each row with that weight."""
        positions = self.layer.positions(x, limit)
        for chunk in self.layer.chunks(positions):
            weights = None if weight == 1.0 else np.full(len(chunk), weight, x.dtype)
            self.add_rows(self.layer.inputs(x, chunk), self.layer.outputs(y, chunk), weights)

    def add_rows(
        self, inputs: np.ndarray, outputs: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        """Fold in rows: [groups, rows, in] and [groups, rows, out], weights [rows] (1 each)."""
        left = inputs if weights is None else inputs * weights[:, None]
        right = outputs if weights is None else outputs * weights[:, None]
        self.x += left.sum(axis=1, dtype=np.float64)
        self.y += right.sum(axis=1, dtype=np.float64)
        self.squares += np.einsum("gri,gri->gi", left, inputs)
        if self.xx is not None and self.xy is not None:
            self.xx += left.swapaxes(1, 2) @ inputs
            self.xy += left.swapaxes(1, 2) @ outputs
        self.rows += inputs.shape[1] if weights is None else float(weights.sum())

    def union(self, other: Moments) -> Moments:
        """Both sets of rows together."""
        both = Moments(self.layer, products=False)
        both.rows, both.x, both.y = self.rows + other.rows, self.x + other.x, self.y + other.y
        both.squares = self.squares + other.squares
        if self.xx is not None and other.xx is not None:
            both.xx = self.xx + other.xx
        if self.xy is not None and other.xy is not None:
            both.xy = self.xy + other.xy
        return both

    def mean_error(self, matrix: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Mean of the float result less the layer's, [groups, out]."""
        count = max(1, self.rows)
        made = np.einsum("gi,gio->go", self.x / count, matrix)
        error: np.ndarray = self.y / count - made - bias.reshape(self.y.shape)
        return error

    def problem(self, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """A and B of the squared error sum |x W + b - y|^2 = tr(W'A W) - 2 tr(W'B) + const.

        With a bias given it stays as it is; None: the best bias for each W is understood.
        """
        assert self.xx is not None
        assert self.xy is not None
        count = max(1, self.rows)
        if bias is None:
            centre = self.x / count
            a = self.xx - np.einsum("gi,gj->gij", self.x, centre)
            return a, self.xy - np.einsum("gi,go->gio", centre, self.y)
        shift = bias.reshape(self.y.shape)
        return self.xx, self.xy - np.einsum("gi,go->gio", self.x, shift)


def excess(a: np.ndarray, b: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The part of the squared error of `Moments.problem` that depends on W, [groups, out]."""
    found: np.ndarray = np.einsum("gio,gio->go", matrix, a @ matrix - 2.0 * b)
    return found
