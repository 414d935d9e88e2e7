"""Predicted peak of activations against the block that ONNX Runtime plans for them.

    python benchmarks/peak_memory.py [--recipe fp32|int8] [--raw] MODEL.onnx ...

The runtime records where each activation lives in a first run and asks its arena for one block in
the second; its log says how big. The arena grows by what is asked for only, so that no room left
over from the first run hides the block. Callers' inputs and outputs are outside it and are added.
Scratch space inside kernels is asked for separately and not counted. Weights are random.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from host import describe_host
from kernels import prepared

from edgepass.cost.memory import activation_memory
from edgepass.ir.ops import value_bytes
from edgepass.ir.random_weights import fill_random_weights
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.registry import get_target

_RUN_TWICE = r"""
import sys, numpy as np, onnxruntime as ort
ort.set_default_logger_severity(0)
info = ort.OrtMemoryInfo(
    "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
)
as_asked = {
    "max_mem": 0,
    "arena_extend_strategy": 1,
    "initial_chunk_size_bytes": -1,
    "max_dead_bytes_per_chunk": -1,
}
ort.create_and_register_allocator(info, ort.OrtArenaCfg(as_asked))
options = ort.SessionOptions()
options.log_severity_level = 0
options.intra_op_num_threads = 1
options.add_session_config_entry("session.use_env_allocators", "1")
for pair in sys.argv[2:]:
    options.add_session_config_entry(*pair.split("=", 1))
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
feed = {i.name: np.zeros(i.shape, kinds.get(i.type, np.float32)) for i in session.get_inputs()}
shrink = ort.RunOptions()
shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
session.run(None, feed, shrink)
print("SECOND RUN", file=sys.stderr, flush=True)
session.run(None, feed)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--recipe", default="fp32")
    parser.add_argument("--raw", action="store_true", help="no passes: the file as it is")
    options = parser.parse_args()
    print(describe_host())
    target = get_target("host")
    errors: list[float] = []
    for path in options.models:
        model = prepared(path, target, None if options.raw else options.recipe)
        peak = activation_memory(model, target=target).peak_bytes
        ports = [*model.graph.inputs, *model.graph.outputs]
        outside = sum(value_bytes(v) or 0 for v in ports if not v.is_initializer())
        fill_random_weights(model)
        config = target.scheme.session_options if target.scheme else {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            write_onnx(model, file)
            block = planned_block(file, *(f"{key}={value}" for key, value in config.items()))
        if peak is None or block is None:
            print(f"{path.stem[:44]:44} predicted {peak}, the runtime asked for no block")
            continue
        errors.append(peak / (block + outside) - 1)
        print(f"{path.stem[:44]:44} {peak:11} {block + outside:11} {errors[-1]:+8.2%}", flush=True)
    sizes = sorted(abs(error) for error in errors)
    within = sum(size <= 0.15 for size in sizes)
    exact = sum(size <= 0.001 for size in sizes)
    print(
        f"median error {statistics.median(sizes):.3%}, largest {sizes[-1]:.1%}; {within} of "
        f"{len(sizes)} within 15 %, {exact} within 0.1 %"
    )


def planned_block(path: Path, *config: str) -> int | None:
    """The first block asked for in a second run; None where the first run's room was enough."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN_TWICE, str(path), *config],
        capture_output=True,
        text=True,
        check=False,
    )
    second = done.stderr.partition("SECOND RUN")[2]
    asked = re.findall(r"Extending BFCArena for Cpu.*?num_bytes: (\d+)", second)
    return int(asked[0]) if asked else None


if __name__ == "__main__":
    main()
