"""Int8 on emulated arm64: do planned nodes run as integer kernels, and are results the host's?

    python benchmarks/int8_arm64.py [--stories FOLDER] [--feeds N] TASK|MODEL.onnx ...

A task of `labelled_tasks`, or an architecture whose weights are drawn at random, is compiled for
arm64 with the recipe int8. arm64's ONNX Runtime, in emulation, optimizes the file, saves the graph
and runs it. A Conv, Gemm or MatMul of the file whose data and weight both come out of
DequantizeLinear (or that is an integer operator already) is planned in integers; as many integer
kernels must be in the saved graph. The same file runs on this host, with the same options; "equal"
is the share of output elements that differ by at most one step of the output's quantization (its
pair's scale; where no pair is at an output, 1/255 of its range on the host). Where a float operator
between two pairs rounds its last bit otherwise, a value can fall to the next step, and the network
carries that on: the last columns say the same of this host's own run against one without graph
optimizations, which computes every pair in float.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from host import describe_host
from labelled_tasks import NotThere, tasks
from random_weights import with_random_weights

import edgepass
from edgepass.errors import EdgepassError
from edgepass.passes.probe import working_sample
from edgepass.targets.emulator import EmulatedJob, find_emulator
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import OrtRunner

Feed = Mapping[str, np.ndarray]
_CLASSES = {
    "Conv": "conv",
    "FusedConv": "conv",
    "Gemm": "matmul",
    "MatMul": "matmul",
    "FusedGemm": "matmul",
    "FusedMatMul": "matmul",
}
"""Operators that compute in the dtype of their inputs."""
_INTEGER = {
    "QLinearConv": "conv",
    "ConvInteger": "conv",
    "QGemm": "matmul",
    "QLinearMatMul": "matmul",
    "MatMulInteger": "matmul",
    "MatMulIntegerToFloat": "matmul",
    "DynamicQuantizeMatMul": "matmul",
    "DynamicQuantizeLSTM": "lstm",
}


@dataclasses.dataclass
class Result:
    """What one model did; `planned` and `integer` count nodes by class."""

    name: str
    planned: Counter[str] = dataclasses.field(default_factory=Counter)
    integer: Counter[str] = dataclasses.field(default_factory=Counter)
    equal: float = 0.0
    worst: float = 0.0
    own_equal: float = 0.0
    own_worst: float = 0.0
    lost: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="TASK|MODEL.onnx")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    parser.add_argument("--feeds", type=int, default=4, help="samples to run")
    parser.add_argument("--recipe", default="int8")
    options = parser.parse_args()
    print(f"{describe_host()}\n")
    print(
        "| model | planned | integer kernels | equal to a step | largest, steps | "
        "host, unoptimized: equal | largest |"
    )
    print("|---|---|---|---|---|---|---|")
    makers = tasks(options.stories)
    for name in options.models:
        result = Result(Path(name).stem)
        try:
            if name in makers:
                task = makers[name]()
                feeds = task.calibration[:: max(1, len(task.calibration) // options.feeds)]
                source, calibration = task.model, task.calibration
            else:
                source = with_random_weights(name)
                feeds = calibration = [working_sample(source).feed]
            check(result, source, calibration, feeds[: options.feeds], options.recipe)
        except (EdgepassError, NotThere) as error:
            result.error = " ".join(str(error).split())
        print(_line(result), flush=True)
        for line in result.lost:
            print(f"  - {line}")


def check(
    result: Result, source: Any, calibration: Sequence[Feed], feeds: Sequence[Feed], recipe: str
) -> None:
    """Compile for arm64, run there and here, and fill the result in."""
    made = edgepass.compile(
        source, "arm64", recipe=recipe, calibration=calibration, check_numerics=False
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, saved = folder / "model.onnx", folder / "saved.onnx"
        write_onnx(made.model, file)
        job = EmulatedJob(
            name=result.name,
            model=file,
            feeds=feeds,
            session_config={**made.session_options, **_external("saved.data")},
            save_optimized=saved,
        )
        [emulated] = find_emulator().run_jobs([job], timeout=1800.0)
        result.planned = planned(onnx.load(file, load_external_data=False).graph)
        optimized = onnx.load(saved, load_external_data=False).graph
        result.integer = Counter(
            _INTEGER[node.op_type] for node in _nodes(optimized) if node.op_type in _INTEGER
        )
        if result.planned - result.integer:
            result.lost = [
                f"float: {node.op_type} {node.name}"
                for node in _nodes(optimized)
                if node.op_type in _CLASSES
            ]
        steps = output_steps(file)
        host = OrtRunner(file, session_options=made.session_options)
        expected = [host.run(feed) for feed in feeds]
        plain = OrtRunner(file, session_options=made.session_options, optimize=False)
        own = [plain.run(feed) for feed in feeds]
    result.equal, result.worst = compared(expected, emulated.outputs, steps)
    result.own_equal, result.own_worst = compared(expected, own, steps)


def _external(name: str) -> dict[str, str]:
    return {
        "session.optimized_model_external_initializers_file_name": name,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }


def planned(graph: onnx.GraphProto) -> Counter[str]:
    """Nodes that the file means to run in integers, by class. Subgraphs count."""
    found: Counter[str] = Counter()
    for inner in _graphs(graph):
        makers = {name: node.op_type for node in inner.node for name in node.output}
        for node in inner.node:
            if node.op_type in _INTEGER:
                found[_INTEGER[node.op_type]] += 1
            elif node.op_type in _CLASSES and all(
                makers.get(name) == "DequantizeLinear" for name in node.input[:2]
            ):
                found[_CLASSES[node.op_type]] += 1
    return found


def output_steps(file: Path) -> dict[str, float | None]:
    """The scale of the pair that each output comes out of; None where it comes from none."""
    graph = onnx.load(file).graph
    scales = {
        t.name: float(onnx.numpy_helper.to_array(t).item())
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims, dtype=int) == 1
    }
    makers = {name: node for node in graph.node for name in node.output}
    steps: dict[str, float | None] = {}
    for output in graph.output:
        node = makers.get(output.name)
        pair = node is not None and node.op_type == "DequantizeLinear"
        steps[output.name] = scales.get(node.input[1]) if pair else None
    return steps


def compared(
    expected: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]],
    steps: Mapping[str, float | None],
) -> tuple[float, float]:
    """The share of elements within one step, and the largest difference in steps."""
    near = total = 0
    worst = 0.0
    for name in expected[0]:
        host = np.concatenate([np.asarray(run[name], np.float64).ravel() for run in expected])
        guest = np.concatenate([np.asarray(run[name], np.float64).ravel() for run in found])
        step = steps.get(name) or float(np.ptp(host)) / 255 or 1.0
        difference = np.abs(host - guest) / step
        near += int(np.sum(difference <= 1.001))
        total += len(difference)
        worst = max(worst, float(difference.max(initial=0.0)))
    return near / max(total, 1), worst


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for inner in _graphs(graph):
        yield from inner.node


def _line(result: Result) -> str:
    if result.error:
        return f"| {result.name} | {result.error[:300]} | | | | | |"
    verdict = " LOST" if result.planned - result.integer else ""
    return (
        f"| {result.name} | {_counts(result.planned)} | {_counts(result.integer)}{verdict} | "
        f"{result.equal:.2%} | {result.worst:.2g} | "
        f"{result.own_equal:.2%} | {result.own_worst:.2g} |"
    )


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"


if __name__ == "__main__":
    main()
