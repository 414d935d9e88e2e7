"""AdaRound: each weight rounded up or down, whichever serves the layer's result.

Here: the optimisation on one layer's moments, in numpy. Not here: which layers (`corrections`),
scales (`numbers`).
"""

from __future__ import annotations

import numpy as np

from .moments import Moments, excess

STEPS = 400
_ZETA, _GAMMA = 1.1, -0.1
_RATE = 0.03
_WARM = 0.2
_SHARPNESS = (20.0, 2.0)
_PULL = 0.02
_DAMP = 0.01


def adaround(
    moments: Moments,
    matrix: np.ndarray,
    bias: np.ndarray | None,
    scale: np.ndarray,
    limits: tuple[int, int],
    steps: int = STEPS,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    """Integers [groups, in, out] of a weight, to be multiplied by `scale` (which broadcasts).

    Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization",
    arXiv:2004.10568: minimises |X W^ - Y|^2 + lambda sum (1 - |2 h(V) - 1|^beta) over V by Adam,
    W^ = s clip(floor(W / s) + h(V)), h the rectified sigmoid (equations 21 to 24), beta falling.
    Their samples of inputs are moments here, so that a step is one product of matrices, exact in
    all rows. The error is that of inputs as quantized against the float result. Columns for which
    nothing better than the nearest integers comes out keep those. `limits` are the least and the
    greatest integer. What `zeros` says stays zero.
    """
    low, high = limits
    a, b = moments.problem(bias)
    size = a.shape[-1]
    # a little of every input's own variance: rows that the samples lack must not decide
    damp = np.trace(a, axis1=1, axis2=2)[:, None, None] / size * _DAMP + 1e-12
    a = a + damp * np.eye(size)
    b = b + damp * matrix
    scale = np.broadcast_to(scale, matrix.shape).astype(np.float32)
    scaled = matrix / scale
    nearest = np.clip(np.rint(scaled), low, high)
    floor = np.floor(scaled)
    if zeros is None:
        zeros = np.zeros(matrix.shape, bool)
    up = _optimised(a, b, scaled, floor, scale, limits, steps, zeros) & ~zeros
    chosen = np.clip(floor + up, low, high)
    better = excess(a, b, chosen * scale) < excess(a, b, nearest * scale)
    found: np.ndarray = np.where(better[:, None, :], chosen, nearest)
    return found


def _optimised(
    a: np.ndarray,
    b: np.ndarray,
    scaled: np.ndarray,
    floor: np.ndarray,
    scale: np.ndarray,
    limits: tuple[int, int],
    steps: int,
    zeros: np.ndarray,
) -> np.ndarray:
    """Whether each weight is rounded up."""
    # in units of a step of each column, with mean input variance 1: one rate suits every layer
    unit = np.trace(a, axis1=1, axis2=2)[:, None, None] / a.shape[-1]
    gram = (a / unit).astype(np.float32)
    target = (b / unit / scale).astype(np.float32)
    rest = np.clip(scaled - floor, 1e-3, 1 - 1e-3).astype(np.float32)
    v = -np.log((_ZETA - _GAMMA) / (rest - _GAMMA) - 1)
    v[zeros] = -20.0  # down for good: where the sigmoid is cut off it has no slope
    first, second = np.zeros_like(v), np.zeros_like(v)
    for step in range(1, steps + 1):
        sigmoid = 1 / (1 + np.exp(-v))
        soft = sigmoid * (_ZETA - _GAMMA) + _GAMMA
        h = np.clip(soft, 0, 1)
        integers = np.clip(floor + h, *limits)
        gradient = gram @ integers - target
        gradient *= (floor + h > limits[0]) & (floor + h < limits[1])
        done = step / steps
        if done > _WARM:
            beta = _SHARPNESS[1] + (_SHARPNESS[0] - _SHARPNESS[1]) * (
                0.5 * (1 + np.cos(np.pi * (done - _WARM) / (1 - _WARM)))
            )
            side = 2 * h - 1
            gradient -= _PULL * beta * np.abs(side) ** (beta - 1) * np.sign(side)
        gradient *= sigmoid * (1 - sigmoid) * ((soft > 0) & (soft < 1))
        first += 0.1 * (gradient - first)
        second += 0.001 * (np.square(gradient) - second)
        corrected = np.sqrt(second / (1 - 0.999**step)) + 1e-10
        v -= _RATE * (first / (1 - 0.9**step)) / corrected
    chosen: np.ndarray = h >= 0.5
    return chosen
