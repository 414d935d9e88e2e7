"""Static cost against the truth: file bytes and peak activation memory, predicted and observed.

    python benchmarks/estimate_accuracy.py [--no-memory] MODEL.onnx ...

For each model: bytes predicted (from shapes alone, and for int8 from the plan alone) against the
files that edgepass then writes, and the predicted peak of activations against ONNX Runtime's own
plan. The runtime records where each activation lives in a first run and asks its arena for one
block in the second; its log says how big. Scratch space inside kernels is asked for later and not
counted; callers' inputs and outputs are outside the block and are added to it. Weights that are
absent are filled with random numbers, which changes no size.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepass.cost.memory import activation_memory
from edgepass.cost.size import file_bytes
from edgepass.ir.graph import is_absent
from edgepass.ir.ops import value_bytes
from edgepass.passes.base import Context
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.registry import get_target

_RUN_TWICE = r"""
import sys, numpy as np, onnxruntime as ort
ort.set_default_logger_severity(0)
options = ort.SessionOptions()
options.log_severity_level = 0
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
shrink = ort.RunOptions()
shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
session.run(None, feed, shrink)
print("SECOND RUN", file=sys.stderr, flush=True)
session.run(None, feed)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--no-memory", action="store_true", help="sizes only: runs nothing")
    options = parser.parse_args()
    print(f"{'model':36} {'fp32 bytes':>12} {'error':>8} {'int8 bytes':>12} {'error':>8}", end="")
    print("" if options.no_memory else f" {'peak':>10} {'runtime':>10} {'error':>8}")
    errors: dict[str, list[float]] = {}
    for path in options.models:
        for what, error in _compare(path, memory=not options.no_memory).items():
            errors.setdefault(what, []).append(error)
    for what, found in errors.items():
        absolute = sorted(abs(e) for e in found)
        within = sum(e <= 0.15 for e in absolute) / len(absolute)
        print(
            f"{what}: median error {statistics.median(absolute):.3%}, largest {absolute[-1]:.3%}, "
            f"{within:.0%} within 15 %, {len(found)} models"
        )


def _compare(path: Path, *, memory: bool) -> dict[str, float]:
    model = ir.load(path)
    context = Context(get_target("arm64"))
    int8 = StaticInt8()
    predicted = file_bytes(model), file_bytes(model, int8.plan(model, context))
    quantized = int8.preview(model.clone(), context).model
    peak = activation_memory(model)
    _fill(model)
    _fill(quantized)
    with tempfile.TemporaryDirectory() as folder:
        saved = tuple(
            sum(file.stat().st_size for file in write_onnx(m, Path(folder) / name))
            for m, name in ((model, "fp32.onnx"), (quantized, "int8.onnx"))
        )
        block = _planned_block(Path(folder) / "fp32.onnx") if memory else None
    errors = {
        "fp32 size": predicted[0] / saved[0] - 1,
        "int8 size": predicted[1] / saved[1] - 1,
    }
    line = f"{path.stem[:36]:36} {saved[0]:12} {errors['fp32 size']:+8.3%}"
    line += f" {saved[1]:12} {errors['int8 size']:+8.3%}"
    if block is not None and peak.peak_bytes is not None:
        ports = [*model.graph.inputs, *model.graph.outputs]
        held = block + sum(value_bytes(v) or 0 for v in ports if not v.is_initializer())
        errors["peak memory"] = peak.peak_bytes / held - 1
        line += f" {peak.peak_bytes:10} {held:10} {errors['peak memory']:+8.1%}"
    print(line, flush=True)
    return errors


def _fill(model: ir.Model) -> None:
    generator = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not (isinstance(tensor, ir.ExternalTensor) or is_absent(tensor)):
            continue
        shape = tuple(int(d) for d in tensor.shape.numpy())
        if tensor.dtype == ir.DataType.FLOAT and len(shape) > 1:
            fan_in = max(1, int(np.prod(shape[1:])))
            array = generator.standard_normal(shape, np.float32) / np.float32(fan_in**0.5)
        else:
            array = np.ones(shape, tensor.dtype.numpy())
        value.const_value = ir.tensor(array, name=value.name)


def _planned_block(path: Path) -> int | None:
    """The block ONNX Runtime asks for before a run whose activations it has seen."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN_TWICE, str(path)], capture_output=True, text=True, check=False
    )
    second = done.stderr.partition("SECOND RUN")[2]
    asked = [int(n) for n in re.findall(r"Extending BFCArena for Cpu.*?num_bytes: (\d+)", second)]
    return asked[0] if asked else None


if __name__ == "__main__":
    main()
