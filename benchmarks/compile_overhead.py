"""Seconds that `compile` spends outside the runtime and the exporter.

    python benchmarks/compile_overhead.py model.onnx [model.onnx ...]

Weights that are absent are filled with random numbers. Numeric checks and timing run in ONNX
Runtime; they are left out here, so that what is left is edgepass.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from host import describe_host

import edgepass
from edgepass.frontends import load_model
from edgepass.ir.graph import is_absent


def with_random_weights(path: str) -> ir.Model:
    """The model, absent weights drawn so that activations stay finite (He et al. 2015)."""
    model = load_model(path, weights_required=False)
    generator = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not is_absent(tensor):
            continue
        shape = tuple(tensor.shape.numpy())
        fan_in = max(1, int(np.prod(shape[1:])))
        array = generator.standard_normal(shape).astype(np.float32) * np.sqrt(2 / fan_in)
        value.const_value = ir.tensor(array.astype(tensor.dtype.numpy()), name=value.name)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    print(describe_host())
    edgepass.compile(_tiny(), target="x86_64", time_budget_s=0, check_numerics=False)
    for path in arguments.models:
        model = with_random_weights(path)
        started = time.perf_counter()
        compiled = edgepass.compile(model, target="x86_64", time_budget_s=0, check_numerics=False)
        seconds = time.perf_counter() - started
        print(f"{Path(path).name:40} {seconds:6.2f} s")
        print(compiled.ledger)


def _tiny() -> ir.Model:
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )


if __name__ == "__main__":
    main()
