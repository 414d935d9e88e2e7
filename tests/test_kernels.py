"""Predicted kernels and peak memory against what ONNX Runtime makes of small nets on this host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.cost.kernels import kernels, runtime_graph
from edgepass.cost.memory import activation_memory
from edgepass.ir.shapes import infer_shapes
from edgepass.targets.registry import get_target

HOST = get_target("host")
ARM64 = get_target("arm64")
VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"}
IMAGE = {"x": (1, 32, 8, 8)}
node = helper.make_node


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def net(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    constants: dict[str, Any],
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    for i, made in enumerate(nodes):
        made.name = f"node_{i}"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def loaded(model: onnx.ModelProto) -> ir.Model:
    found = ir.from_proto(model)
    infer_shapes(found)
    return found


def conv(source: str, result: str, name: str, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", [source, name], [result], **attributes)


def op(op_type: str, inputs: str, result: str, domain: str = "", **attributes: Any) -> Any:
    return node(op_type, inputs.split(), [result], domain=domain, **attributes)


def single_conv(channels: int, out: int, group: int = 1, size: int = 3) -> onnx.ModelProto:
    return net(
        [conv("x", "y", "w", group=group)],
        {"x": (1, channels, 8, 8)},
        {"w": weight(out, channels // group, size, size)},
    )


def behind_conv(*nodes: onnx.NodeProto, channels: int = 32, **constants: Any) -> onnx.ModelProto:
    """Nodes that read `a`, the result of a blocked convolution, and give `y`."""
    first = conv("x", "a", "w")
    return net([first, *nodes], IMAGE, {"w": weight(channels, 32, 1, 1), **constants})


def two_convs(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """Nodes that read `a` and `b`, the results of two convolutions, and give `y`."""
    w = weight(32, 32, 1, 1)
    return net(
        [conv("x", "a", "w"), conv("x", "b", "v"), *nodes],
        IMAGE,
        {"w": w, "v": w + 1, **constants},
    )


def squeezed(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes that read `r`, an image, and `b`, one pixel of as many channels."""
    w = weight(32, 32, 1, 1)
    first = [conv("x", "a", "w"), op("Relu", "a", "r"), op("GlobalAveragePool", "r", "g")]
    return net([*first, conv("g", "b", "v"), *nodes], IMAGE, {"w": w, "v": w + 1})


def qkv() -> onnx.ModelProto:
    picks = [op("Gather", f"t i{i}", name, axis=0) for i, name in enumerate("qkv")]
    return net(
        [
            op("Transpose", "x", "t", perm=[2, 0, 3, 1, 4]),
            *picks,
            op("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
            op("MatMul", "q kt", "m"),
            op("MatMul", "m v", "y"),
        ],
        {"x": (1, 20, 3, 4, 8)},
        {f"i{i}": np.int64(i) for i in range(3)},
    )


def rows_first(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes that read `p` and `q`, (batch, rows, columns) of what has the rows first."""
    return net(
        [op("Transpose", "x", "p", perm=[1, 0, 2]), *nodes], {"x": (6, 4, 8), "z": (6, 4, 8)}, {}
    )


def cut(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes that take `f`, the first row of `e`, and `r`, the others."""
    return net(
        [op("Erf", "x", "e"), op("Gather", "e zero", "f", axis=1), *nodes],
        {"x": (2, 5, 8)},
        {"zero": np.int64(0), "one": ints(1), "two": ints(2), "end": ints(5), "axis": ints(1)},
        ("y", "u"),
    )


def transposed(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **constants: Any) -> Any:
    """Nodes that read `t`, a transposed [1, 36, 20]."""
    return net(
        [op("Transpose", "x", "t", perm=[0, 2, 1]), *nodes],
        {"x": (1, 20, 36)},
        constants,
        outputs,
    )


MS = "com.microsoft"
TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
NETS = {
    "image": single_conv(3, 16),
    "few-channels": single_conv(12, 10),
    "blocked": single_conv(32, 32),
    "odd-output": single_conv(20, 7),
    "odd-input": single_conv(18, 16),
    "depthwise": single_conv(32, 32, 32),
    "depthwise-4": single_conv(12, 12, 12),
    "depthwise-odd": single_conv(18, 18, 18),
    "groups": single_conv(64, 64, 2),
    "narrow-groups": single_conv(32, 32, 8),
    "relu": behind_conv(op("Relu", "a", "y")),
    "leaky": behind_conv(op("LeakyRelu", "a", "y")),
    "quickgelu": behind_conv(op("QuickGelu", "a", "y", MS)),
    "elu": behind_conv(op("Elu", "a", "y")),
    "maxpool": behind_conv(op("MaxPool", "a", "y", kernel_shape=[2, 2])),
    "maxpool-odd": behind_conv(op("MaxPool", "a", "y", kernel_shape=[2, 2]), channels=20),
    "normalized": behind_conv(
        op("Relu", "a", "r"), op("BatchNormalization", "r s s s s", "y"), s=abs(weight(32))
    ),
    "averages-of-broken-windows": behind_conv(
        op("AveragePool", "a", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    ),
    "averages-of-broken-windows-and-pads": behind_conv(
        op(
            "AveragePool",
            "a",
            "y",
            kernel_shape=[3, 3],
            strides=[2, 2],
            ceil_mode=1,
            count_include_pad=1,
        )
    ),
    "mish": behind_conv(op("Mish", "a", "y")),
    "scaled-gate": net(
        [op("Mul", "x c", "m"), op("Sigmoid", "m", "s"), op("Mul", "x s", "y")],
        {"x": (1, 6, 8)},
        {"c": np.float32(1.702)},
    ),
    "positions-normalized": net(
        [op("Erf", "x", "e"), op("Add", "e c", "a"), op("LayerNormalization", "a s s", "y")],
        {"x": (1, 6, 8)},
        {"c": weight(1, 6, 8), "s": weight(8)},
    ),
    "product-of-weights": net(
        [op("MatMul", "c w", "k"), op("MatMul", "x k", "y")],
        {"x": (6, 4)},
        {"c": weight(4, 8), "w": weight(8, 5)},
    ),
    "rows-first": rows_first(op("Transpose", "z", "q", perm=[1, 2, 0]), op("MatMul", "p q", "y")),
    "rows-first-of-one": rows_first(
        op("Transpose", "z", "q", perm=[1, 2, 0]),
        op("Erf", "q", "g"),
        op("MatMul", "p g", "y"),
    ),
    "first-and-others": cut(
        op("Slice", "e one end axis", "r"), op("Relu", "f", "y"), op("Relu", "r", "u")
    ),
    "first-and-some": cut(
        op("Slice", "e two end axis", "r"), op("Relu", "f", "y"), op("Relu", "r", "u")
    ),
    "channels-last": behind_conv(op("Transpose", "a", "y", perm=TO_LAST)),
    "resize": behind_conv(
        node("Resize", ["a", "", "s"], ["y"], mode="linear"), s=np.array([1, 1, 2, 2], np.float32)
    ),
    "resize-odd": behind_conv(
        node("Resize", ["a", "", "s"], ["y"], mode="linear"),
        s=np.array([1, 1, 1.5, 1.5], np.float32),
    ),
    "scaled": behind_conv(op("Relu", "a", "r"), op("Mul", "r s", "y"), s=weight(32, 1, 1)),
    "residual": two_convs(op("Add", "a b", "c"), op("Relu", "c", "y")),
    "product": two_convs(op("Mul", "a b", "c"), op("Relu", "c", "y")),
    "difference": two_convs(op("Sub", "a b", "y")),
    "sum-of-activations": two_convs(
        op("Relu", "a", "c"), op("Relu", "b", "d"), op("Add", "c d", "y")
    ),
    "concat": two_convs(op("Concat", "a b", "y", axis=1)),
    "concat-rows": two_convs(op("Concat", "a b", "y", axis=2)),
    "broadcast-sum": squeezed(op("Add", "r b", "y")),
    "broadcast-product": squeezed(op("Mul", "r b", "y")),
    "channels-first": net(
        [op("Transpose", "x", "t", perm=TO_FIRST), conv("t", "y", "w")],
        {"x": (1, 8, 8, 32)},
        {"w": weight(32, 32, 1, 1)},
    ),
    "linear": net(
        [op("MatMul", "x w", "m"), op("Add", "m b", "y")],
        {"x": (1, 6, 8)},
        {"w": weight(8, 5), "b": weight(5)},
    ),
    "not-a-bias": net(
        [op("MatMul", "x w", "m"), op("Add", "m b", "y")],
        {"x": (1, 6, 8)},
        {"w": weight(8, 5), "b": weight(6, 5)},
    ),
    "bias-first": net(
        [op("MatMul", "x w", "m"), op("Add", "b m", "y0"), op("Relu", "y0", "y")],
        {"x": (6, 8)},
        {"w": weight(8, 5), "b": weight(6, 1)},
    ),
    "qkv": qkv(),
    "transposed-product": transposed(op("MatMul", "t w", "y"), w=weight(20, 5)),
    "transposed-split": transposed(
        op("Reshape", "t s", "r"), op("Erf", "r", "y"), s=ints(1, 6, 6, 20)
    ),
    "transposed-merge": transposed(op("Reshape", "t s", "r"), op("Erf", "r", "y"), s=ints(720)),
    "transposed-twice": transposed(
        op("Add", "t c", "r"), op("Transpose", "r", "y", perm=[0, 2, 1]), c=weight(20)
    ),
    "transposed-once": transposed(op("Add", "t c", "y"), c=weight(20)),
    "transposed-shared": transposed(
        op("Reshape", "t s", "r"),
        op("Erf", "r", "y"),
        op("MatMul", "t w", "z"),
        outputs=("y", "z"),
        s=ints(1, 6, 6, 20),
        w=weight(20, 5),
    ),
}


def executed(model: onnx.ModelProto, folder: Path) -> Counter[tuple[str, str, tuple[int, ...]]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / "saved.onnx")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    saved = onnx.load(folder / "saved.onnx").graph
    domains = {(n.name, n.op_type): n.domain for n in saved.node}
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") != "Node" or name == event["name"]:
            continue
        arguments = event["args"]
        if arguments["op_name"] not in VIEWS:
            shape = tuple(next(iter(arguments["output_type_shape"][0].values())))
            domain = domains.get((name, arguments["op_name"]), "")  # functions go in later
            found[domain, arguments["op_name"], shape] += 1
    return found


@pytest.mark.parametrize("name", NETS)
def test_kernels_are_those_that_the_runtime_executes(name: str, tmp_path: Path) -> None:
    model = NETS[name]
    found = kernels(loaded(model), HOST)
    ours = Counter((k.domain, k.type, k.outputs[0].shape) for k in found if k.type not in VIEWS)
    assert ours == executed(model, tmp_path)


def test_kernels_know_their_nodes_and_cost() -> None:
    model = loaded(NETS["residual"])
    target = get_target("x86_64-avx512")
    found = kernels(model, target)
    assert [k.op for k in found] == ["ReorderInput", "Conv", "Conv+Add+Relu", "ReorderOutput"]
    last = found[2]
    assert {n.op_type for n in last.nodes} == {"Conv", "Add", "Relu"}
    assert last.macs == 32 * 32 * 64
    plane = 4 * 32 * 64
    assert last.bytes_read == 2 * plane + 4 * 32 * 32
    assert last.bytes_written == plane
    assert (found[0].macs, found[0].bytes_read, found[0].bytes_written) == (0, plane, plane)
    assert found[0].nodes  # a reader's
    assert all(k.is_known for k in found)


def test_blocks_are_as_wide_as_vectors_and_on_x86_64_only() -> None:
    model = loaded(single_conv(40, 20))
    wide, narrow = (
        [k.outputs[0].shape for k in kernels(model, get_target(name))]
        for name in ("x86_64-avx512", "x86_64")
    )
    assert wide == [(1, 48, 8, 8), (1, 32, 6, 6), (1, 20, 6, 6)]
    assert narrow == [(1, 40, 8, 8), (1, 24, 6, 6), (1, 20, 6, 6)]
    assert [k.type for k in kernels(model, ARM64)] == ["Conv"]


def test_an_arm64_residual_goes_into_no_convolution_without_a_bias() -> None:
    # as the emulated machine's session saves it; with a bias: test_ort_integer
    found = kernels(loaded(NETS["residual"]), ARM64)
    assert [k.op for k in found] == ["Conv", "Conv", "Add", "Relu"]


def test_operators_come_in_the_order_in_which_the_runtime_executes_them() -> None:
    graph = runtime_graph(loaded(NETS["qkv"]), HOST)
    made: set[int] = set()
    for found in graph:
        for tensor in found.inputs:
            assert tensor is None or tensor.producer is None or id(tensor) in made
        made.update(id(tensor) for tensor in found.outputs)


# --- memory ----------------------------------------------------------------------------------


def mlp(activation: str, domain: str = "") -> onnx.ModelProto:
    return net(
        [
            op("MatMul", "x v", "m"),
            op("Add", "m b", "h"),
            op(activation, "h", "g", domain),
            op("MatMul", "g w", "p"),
            op("Add", "p x", "y0"),
            op("LayerNormalization", "y0 s s", "n"),
            op("MatMul", "n u", "y"),
        ],
        {"x": (1, 50, 64)},
        {
            "v": weight(64, 256),
            "b": weight(256),
            "w": weight(256, 64),
            "s": weight(64),
            "u": weight(64, 8),
        },
    )


MEMORY = {
    "relu": mlp("Relu"),
    "gelu": mlp("Gelu", MS),
    "chain": behind_conv(
        conv("a", "b", "w"),
        conv("b", "c", "w"),
        op("MaxPool", "c", "d", kernel_shape=[2, 2], strides=[2, 2]),
        conv("d", "y", "w"),
    ),
    "residual": two_convs(op("Add", "a b", "c"), op("Relu", "c", "d"), conv("d", "y", "w")),
    "gated": squeezed(op("Mul", "r b", "d"), conv("d", "e", "v"), conv("e", "y", "w")),
}
_RUN_TWICE = """
import sys, numpy as np, onnxruntime as ort
ort.set_default_logger_severity(0)
info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(info, ort.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": 1,
    "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}))
options = ort.SessionOptions()
options.log_severity_level = 0
options.intra_op_num_threads = 1
options.add_session_config_entry("session.use_env_allocators", "1")
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
shrink = ort.RunOptions()
shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
session.run(None, feed, shrink)
print("SECOND RUN", file=sys.stderr, flush=True)
session.run(None, feed)
"""


@pytest.mark.parametrize("name", MEMORY)
def test_peak_memory_is_the_block_that_the_runtime_asks_for(name: str, tmp_path: Path) -> None:
    model = MEMORY[name]
    onnx.save(model, tmp_path / "model.onnx")
    done = subprocess.run(
        [sys.executable, "-c", _RUN_TWICE, str(tmp_path / "model.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    second = done.stderr.partition("SECOND RUN")[2]
    block = int(re.findall(r"Extending BFCArena for Cpu.*?num_bytes: (\d+)", second)[0])
    shaped = loaded(model)
    ports = [*shaped.graph.inputs, *shaped.graph.outputs]
    outside = sum(4 * int(np.prod(v.shape.numpy())) for v in ports if not v.is_initializer())
    found = activation_memory(shaped, target=HOST).peak_bytes
    assert found == pytest.approx(block + outside, rel=0.15)
