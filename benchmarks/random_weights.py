"""An architecture's absent weights, filled with random numbers that keep activations finite."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepass.frontends import load_model
from edgepass.ir.graph import is_absent

_VARIANCE = 4
"""The input of a BatchNormalization that must be positive."""


def with_random_weights(path: str | Path) -> ir.Model:
    """The model with every absent weight drawn, each from a seed made of its name.

    Weights of two or more dimensions have the variance of He et al. 2015; those of one are small,
    but for scales and variances, which lie around one.
    """
    model = load_model(path, weights_required=False)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not is_absent(tensor):
            continue
        shape = tuple(int(d) for d in tensor.shape)
        generator = np.random.default_rng(zlib.crc32((value.name or "").encode()))
        dtype = tensor.dtype.numpy()
        if not np.issubdtype(dtype, np.floating):
            array = np.zeros(shape, dtype)
        elif len(shape) > 1:
            fan_in = max(1, math.prod(shape[1:]))
            array = generator.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_in))
        elif _is_positive(value):
            array = generator.uniform(0.5, 1.5, shape)
        else:
            array = generator.standard_normal(shape, np.float32) * np.float32(0.05)
        value.const_value = ir.tensor(array.astype(dtype, copy=False), name=value.name)
    return model


def _is_positive(value: ir.Value) -> bool:
    return any(
        index in (1, _VARIANCE) if user.op_type == "BatchNormalization" else user.op_type == "Mul"
        for user, index in value.uses()
    ) or any(
        index == 1 and user.op_type.endswith(("LayerNormalization", "InstanceNormalization"))
        for user, index in value.uses()
    )
