"""Bias correction: the mean error that quantization adds to each output channel, taken away.

Here: the arithmetic. Not here: mean errors (`moments`), which layers, running (`corrections`).
"""

from __future__ import annotations

import numpy as np


def corrected_bias(bias: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The bias, in its own shape, with the mean error of each output channel added.

    `error` is the mean of the float result less the quantized layer's, in the order of channels.
    Nagel et al. 2019, arXiv:1906.04721, section 4.2; empirical: means are those of the calibration
    data, through the quantized layers before.
    """
    flat = np.broadcast_to(bias.reshape(-1), (error.size,)) + error.reshape(-1)
    shape = bias.shape if bias.size == error.size else (error.size,)
    corrected: np.ndarray = flat.astype(np.float32).reshape(shape)
    return corrected
