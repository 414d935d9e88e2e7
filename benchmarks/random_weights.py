"""An architecture loaded from a file, its absent weights filled with random numbers."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edgepass.frontends import load_model
from edgepass.ir.random_weights import fill_random_weights


def with_random_weights(path: str | Path) -> ir.Model:
    """The model with every absent weight drawn; see `edgepass.ir.random_weights`."""
    model = load_model(path, weights_required=False)
    fill_random_weights(model)
    return model
