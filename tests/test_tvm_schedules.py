"""TVM CPU schedules: every rule against ONNX Runtime or numpy, on shapes that do not fit tiles."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

os.environ.setdefault("TVM_NUM_THREADS", "1")
tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

from edgepass.targets.tvm.schedules import (  # noqa: E402
    ARM64_NEON_DOTPROD,
    RISCV64,
    X86_64_AVX2,
    X86_64_AVX512,
    CpuSpec,
    ScheduleReport,
    schedule_module,
)
from edgepass.targets.tvm.schedules.builder import KernelBuilder  # noqa: E402
from edgepass.targets.tvm.schedules.epilogue import Access  # noqa: E402
from edgepass.targets.tvm.schedules.matmul import Matmul, matmul_kernel  # noqa: E402
from edgepass.targets.tvm.schedules.pack import block_channels, pack_columns  # noqa: E402
from edgepass.targets.tvm.schedules.tiling import choose_tile, split_extent  # noqa: E402
from edgepass.targets.tvm.schedules.vecmath import VectorMath  # noqa: E402
from edgepass.targets.tvm.schedules.views import View, contiguous_strides  # noqa: E402

# The tiles of a 128-bit machine (as NEON's), in code that runs here.
X86_64_128 = dataclasses.replace(X86_64_AVX2, vector_bits=128, registers=32)
_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
SPECS = [
    pytest.param(X86_64_128, id="128"),
    pytest.param(
        X86_64_AVX2, id="avx2", marks=pytest.mark.skipif("avx2" not in _FLAGS, reason="no AVX2")
    ),
    pytest.param(
        X86_64_AVX512,
        id="avx512",
        marks=pytest.mark.skipif("avx512_vnni" not in _FLAGS, reason="no AVX-512 VNNI"),
    ),
]
HOST = X86_64_AVX512 if "avx512_vnni" in _FLAGS else X86_64_AVX2
pytestmark = pytest.mark.skipif("avx2" not in _FLAGS, reason="the schedules under test need AVX2")
TOLERANCE = 1e-5  # of the output's range; the promise to users is 1e-4

RNG = np.random.default_rng(7)


def weight(*shape: int, scale: float | None = None) -> np.ndarray[Any, Any]:
    fan_in = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
    return (RNG.standard_normal(shape) * (scale or fan_in**-0.5)).astype(np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    constants: dict[str, np.ndarray[Any, Any]],
    output: str = "y",
) -> onnx.ModelProto:
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in inputs.items()
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def lower(model: onnx.ModelProto, spec: CpuSpec) -> tuple[Any, ScheduleReport]:
    from tvm.relax.frontend.onnx import from_onnx

    return schedule_module(from_onnx(model, keep_params_in_input=False), spec)


def run(module: Any, spec: CpuSpec, *arrays: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from tvm import relax

    executable = tvm.compile(module, target=spec.tvm_target())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](*[tvm.runtime.tensor(array) for array in arrays]).numpy()


def check(
    model: onnx.ModelProto,
    spec: CpuSpec,
    kinds: set[str],
    feeds: dict[str, np.ndarray[Any, Any]] | None = None,
) -> ScheduleReport:
    """Compare with ONNX Runtime (unoptimized) and require that kernels of `kinds` were used."""
    feeds = feeds or {
        value.name: RNG.standard_normal(
            [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in model.graph.input
    }
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    want = session.run(None, feeds)[0]
    module, report = lower(model, spec)
    got = run(module, spec, *feeds.values())
    assert got.shape == want.shape
    assert np.array_equal(np.isnan(got), np.isnan(want))
    scale = max(float(np.nanmax(want) - np.nanmin(want)), 1e-6)
    assert float(np.nanmax(np.abs(got - want))) / scale < TOLERANCE
    assert kinds <= {record.kind for record in report.kernels}, str(report)
    return report


# Convolution ---------------------------------------------------------------------------------
# (in, out, height, width, kernel, stride, dilation, pads, groups)
CONVS = {
    "pointwise": (32, 48, 7, 7, 1, 1, 1, 0, 1),
    "pointwise odd channels": (35, 21, 5, 9, 1, 1, 1, 0, 1),
    "pointwise strided": (16, 40, 9, 9, 1, 2, 1, 0, 1),
    "3x3": (16, 32, 14, 14, 3, 1, 1, 1, 1),
    "3x3 strided tails": (24, 19, 15, 13, 3, 2, 1, 1, 1),
    "3x3 no padding": (17, 33, 10, 11, 3, 1, 1, 0, 1),
    "dilated": (16, 16, 12, 12, 3, 1, 2, 2, 1),
    "dilated beyond the edge": (16, 16, 6, 6, 3, 1, 5, 5, 1),
    "stem": (3, 24, 23, 21, 3, 2, 1, 1, 1),
    "stem 7x7": (3, 16, 20, 20, 7, 2, 1, 3, 1),
    "patches": (3, 40, 16, 16, 8, 8, 1, 0, 1),
    "one channel": (1, 5, 9, 30, 3, 1, 1, 1, 1),
    "whole groups": (32, 64, 6, 6, 3, 1, 1, 1, 2),
}


def conv_model(
    case: tuple[int, ...], *, batch: int = 1, tail: Sequence[onnx.NodeProto] = (), **extra: Any
) -> onnx.ModelProto:
    c, oc, h, w, k, stride, dilation, pad, groups = case
    node = helper.make_node(
        "Conv", ["x", "w", "b"], ["c" if tail else "y"], strides=[stride] * 2,
        dilations=[dilation] * 2, pads=[pad] * 4, group=groups,
    )  # fmt: skip
    constants = {"w": weight(oc, c // groups, k, k), "b": weight(oc, scale=1.0)}
    return graph([node, *tail], {"x": (batch, c, h, w)}, constants | extra)


@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_convolution(case: tuple[int, ...]) -> None:
    report = check(conv_model(case), HOST, {"conv"})
    assert not report.unscheduled


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["pointwise odd channels", "3x3 strided tails", "stem"])
def test_convolution_on_every_vector_width(name: str, spec: CpuSpec) -> None:
    check(conv_model(CONVS[name], batch=2), spec, {"conv"})


def test_convolution_of_small_groups_falls_back_with_a_reason() -> None:
    report = check(conv_model((12, 24, 8, 8, 3, 1, 1, 1, 3)), HOST, set())
    assert not report.of_kind("conv")
    assert any("groups" in record.reason for record in report.kernels), str(report)


def test_convolution_in_one_dimension() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["c"], strides=[2], pads=[2, 2])
    model = graph(
        [node, helper.make_node("Relu", ["c"], ["y"])],
        {"x": (1, 20, 37)},
        {"w": weight(33, 20, 5)},
    )
    assert not check(model, HOST, {"conv"}).unscheduled


def test_convolution_with_weights_known_at_run_time_only() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    model = graph([node], {"x": (1, 8, 9, 9), "w": (6, 8, 3, 3)}, {})
    report = check(model, HOST, {"fallback"})
    assert any("constant" in record.reason for record in report.kernels)


def test_threads_share_outer_loops() -> None:
    spec = dataclasses.replace(HOST, threads=2)
    check(conv_model(CONVS["3x3"]), spec, {"conv"})
    module, _ = lower(conv_model(CONVS["3x3"]), spec)
    assert "T.parallel" in module.script()
    module, _ = lower(conv_model(CONVS["3x3"]), HOST)
    assert "T.parallel" not in module.script()


# Depthwise convolution and pooling --------------------------------------------------------------
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(k: int, stride: int, spec: CpuSpec) -> None:
    check(conv_model((20, 20, 17, 19, k, stride, 1, k // 2, 20)), spec, {"depthwise"})


def test_depthwise_dilated_and_narrow() -> None:
    check(conv_model((16, 16, 5, 3, 3, 1, 2, 2, 16)), HOST, {"depthwise"})


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1] * 4}),
        (
            "AveragePool",
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": 1},
        ),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
    ],
)
def test_pooling_behind_a_convolution(op: str, attributes: dict[str, Any]) -> None:
    tail = [helper.make_node(op, ["c"], ["y"], **attributes)]
    check(conv_model((16, 24, 11, 11, 3, 1, 1, 1, 1), tail=tail), HOST, {"conv"})


# Epilogues --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "op", ["Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "Gelu", "Erf", "Abs", "Neg", "Exp"]
)
def test_activation_joins_the_kernel(op: str) -> None:
    tail = [helper.make_node(op, ["c"], ["y"])]
    report = check(conv_model(CONVS["pointwise odd channels"], tail=tail), HOST, {"conv"})
    assert {record.kind for record in report.kernels} <= {"conv", "layout"}, str(report)


def test_relu6_residual_and_swish() -> None:
    tail = [
        helper.make_node("Clip", ["c", "low", "high"], ["d"]),
        helper.make_node("Conv", ["d", "w2"], ["e"]),
        helper.make_node("Add", ["e", "x"], ["f"]),
        helper.make_node("Sigmoid", ["f"], ["g"]),
        helper.make_node("Mul", ["f", "g"], ["y"]),
    ]
    model = conv_model(
        (24, 40, 9, 9, 3, 1, 1, 1, 1),
        tail=tail,
        low=np.float32(0),
        high=np.float32(6),
        w2=weight(24, 40, 1, 1),
    )
    report = check(model, HOST, {"conv"})
    assert len(report.of_kind("conv")) == 2
    assert not report.of_kind("elementwise"), str(report)


def test_squeeze_and_excite_stays_blocked() -> None:
    tail = [
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Conv", ["p", "w1"], ["q"]),
        helper.make_node("Relu", ["q"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["s"]),
        helper.make_node("HardSigmoid", ["s"], ["t"]),
        helper.make_node("Mul", ["c", "t"], ["u"]),
        helper.make_node("Conv", ["u", "w3"], ["y"]),
    ]
    model = conv_model(
        (16, 40, 8, 8, 3, 1, 1, 1, 1),
        tail=tail,
        w1=weight(10, 40, 1, 1),
        w2=weight(40, 10, 1, 1),
        w3=weight(12, 40, 1, 1),
    )
    check(model, HOST, {"conv", "reduction"})


@pytest.mark.parametrize("shape", [(24, 1, 1), (1, 24, 1, 1), (1, 1), (9, 9), (1, 9, 1), (1,)])
def test_constants_of_lower_rank_broadcast(shape: tuple[int, ...]) -> None:
    tail = [helper.make_node("Mul", ["c", "factor"], ["y"])]
    case = (16, 24, 9, 9, 3, 1, 1, 1, 1)
    check(conv_model(case, tail=tail, factor=weight(*shape, scale=1.0)), HOST, {"conv"})


def test_a_value_used_twice_is_not_fused_away() -> None:
    tail = [
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Add", ["d", "c"], ["e"]),
        helper.make_node("Concat", ["e", "d"], ["y"], axis=1),
    ]
    check(conv_model(CONVS["3x3"], tail=tail), HOST, {"conv"})


def test_split_and_concat_between_convolutions() -> None:
    tail = [
        helper.make_node("Split", ["c"], ["s0", "s1"], axis=1, num_outputs=2),
        helper.make_node("Conv", ["s0", "w2"], ["d"], pads=[1] * 4),
        helper.make_node("Add", ["d", "s1"], ["e"]),
        helper.make_node("Concat", ["d", "e"], ["y"], axis=1),
    ]
    model = conv_model((16, 20, 7, 7, 1, 1, 1, 0, 1), tail=tail, w2=weight(10, 10, 3, 3))
    check(model, HOST, {"conv"})


def test_division_by_a_tensor_keeps_padding_lanes_out() -> None:
    tail = [
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Div", ["d", "e"], ["f"]),
        helper.make_node("Conv", ["f", "w2"], ["y"]),
    ]
    model = conv_model((19, 19, 7, 7, 1, 1, 1, 0, 1), tail=tail, w2=weight(5, 19, 1, 1))
    check(model, HOST, {"conv"})


def test_batch_normalization() -> None:
    tail = [helper.make_node("BatchNormalization", ["c", "g", "bb", "m", "v"], ["y"])]
    model = conv_model(
        CONVS["3x3"],
        tail=tail,
        g=weight(32, scale=1.0),
        bb=weight(32, scale=1.0),
        m=weight(32, scale=1.0),
        v=np.abs(weight(32, scale=1.0)) + 0.1,
    )
    assert not check(model, HOST, {"conv"}).unscheduled


def quantized_conv(extra: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """Q/DQ around a convolution.

    Its scales are powers of two, so that its sums are exact in any order: otherwise one that falls
    next to a tie could be rounded to another step by either runtime.
    """
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"]),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "ys", "yz"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "ys", "yz"], ["rd"]),
        *extra,
    ]
    constants: dict[str, np.ndarray[Any, Any]] = {
        "w": RNG.integers(-127, 127, (24, 16, 3, 3)).astype(np.int8),
        "ws": np.exp2(RNG.integers(-8, -5, 24)).astype(np.float32),
        "wz": np.zeros(24, np.int8),
        "b": RNG.integers(-999, 999, 24).astype(np.int32),
        "bs": np.float32(2**-13),
        "xs": np.float32(2**-6),
        "xz": np.uint8(128),
        "ys": np.float32(0.0937),
        "yz": np.uint8(3),
    }
    return graph(nodes, {"x": (1, 16, 9, 9)}, constants)


def test_quantize_pair_joins_the_kernel() -> None:
    model = quantized_conv([helper.make_node("GlobalAveragePool", ["rd"], ["y"])])
    report = check(model, HOST, {"conv"})
    # The pair on the graph's input is left to TVM; the one behind the convolution is fused.
    assert sum("dequantize" in record.name for record in report.kernels) == 1, str(report)
    assert not report.unscheduled


def test_quantized_value_read_twice() -> None:
    extra = [
        helper.make_node("DequantizeLinear", ["rq", "ys", "yz"], ["rd2"]),
        helper.make_node("Cast", ["rq"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["rd", "rd2", "raw"], ["y"], axis=1),
    ]
    check(quantized_conv(extra), HOST, {"conv"})


def test_nan_test_with_another_reader() -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["n"]),
        helper.make_node("Where", ["n", "one", "p"], ["z"]),
        helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["z", "f"], ["y"]),
    ]
    x = RNG.standard_normal((3, 20)).astype(np.float32)
    x[1] = -np.inf
    model = graph(nodes, {"x": x.shape}, {"one": np.float32(1)})
    check(model, HOST, {"reduction"}, {"x": x})


# Matrix products --------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 10, 33), (5, 33, 7), (14, 64, 16), (50, 49, 3), (31, 130, 20)]
)
def test_matmul_by_a_constant(m: int, n: int, k: int, spec: CpuSpec) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Gelu" if m == 5 else "Relu", ["q"], ["y"]),
    ]
    constants = {"w": weight(k, n), "b": weight(n, scale=1.0)}
    report = check(graph(nodes, {"x": (m, k)}, constants), spec, {"matmul"})
    assert len(report.kernels) == 1, str(report)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 20, 8), (17, 16, 5), (1, 7, 12), (6, 1, 6)])
def test_matmul_of_two_inputs(m: int, n: int, k: int, transposed: bool) -> None:
    nodes = [helper.make_node("MatMul", ["x", "t" if transposed else "z"], ["y"])]
    if transposed:
        nodes.insert(0, helper.make_node("Transpose", ["z"], ["t"], perm=[0, 1, 3, 2]))
    z = (2, 3, n, k) if transposed else (2, 3, k, n)
    check(graph(nodes, {"x": (2, 3, m, k), "z": z}, {}), HOST, {"matmul"})


@pytest.mark.parametrize(
    ("left", "right"), [((4, 6), (3, 6, 5)), ((2, 1, 4, 6), (3, 6, 5)), ((3, 4, 6), (6, 5))]
)
def test_matmul_broadcasts_batches(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    node = helper.make_node("MatMul", ["x", "z"], ["y"])
    check(graph([node], {"x": left, "z": right}, {}), HOST, {"matmul"})


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm(trans_a: int, trans_b: int) -> None:
    node = helper.make_node(
        "Gemm", ["x", "w", "b"], ["y"], transA=trans_a, transB=trans_b, alpha=0.5, beta=2.0
    )
    shape = (9, 6) if trans_a else (6, 9)
    constants = {"w": weight(11, 9) if trans_b else weight(9, 11), "b": weight(11)}
    check(graph([node], {"x": shape}, constants), HOST, {"matmul"})


def test_attention_reads_heads_through_views() -> None:
    tokens, heads, depth = 13, 3, 8
    width = heads * depth
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}0"]),
            helper.make_node("Add", [f"{name}0", f"b{name}"], [f"{name}1"]),
            helper.make_node("Reshape", [f"{name}1", "split"], [f"{name}2"]),
            helper.make_node(
                "Transpose",
                [f"{name}2"],
                [name],
                perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3],
            ),
        ]
    nodes += [
        helper.make_node("Mul", ["q", "scale"], ["qs"]),
        helper.make_node("MatMul", ["qs", "k"], ["s"]),
        helper.make_node("Add", ["s", "mask"], ["sm"]),
        helper.make_node("Softmax", ["sm"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["o"]),
        helper.make_node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["ot", "merge"], ["om"]),
        helper.make_node("MatMul", ["om", "wo"], ["proj"]),
        helper.make_node("Add", ["proj", "x"], ["res"]),
        helper.make_node("LayerNormalization", ["res", "gamma", "beta"], ["y"]),
    ]
    constants: dict[str, np.ndarray[Any, Any]] = {
        "split": np.array([1, tokens, heads, depth]),
        "merge": np.array([1, tokens, width]),
        "scale": np.float32(depth**-0.5),
        "mask": np.where(np.arange(tokens) < 10, 0, -1e9).astype(np.float32).reshape(1, 1, 1, -1),
        "wo": weight(width, width),
        "gamma": weight(width, scale=1.0),
        "beta": weight(width, scale=1.0),
    }
    for name in "qkv":
        constants |= {f"w{name}": weight(width, width), f"b{name}": weight(width, scale=1.0)}
    report = check(graph(nodes, {"x": (1, tokens, width)}, constants), HOST, {"matmul"})
    # Neither transposes nor additions are left: views and epilogues took them all.
    assert {record.kind for record in report.kernels} == {"matmul", "reduction"}, str(report)


# Rows ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("columns", [1, 16, 87])
def test_softmax(columns: int, spec: CpuSpec) -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], axis=-1)
    x = RNG.standard_normal((3, 2, columns)).astype(np.float32) * 20
    x[0, 0, 0] = -np.inf
    if columns == 1:
        x[0, 0, 0] = 0
    check(graph([node], {"x": x.shape}, {}), spec, {"reduction"}, {"x": x})


def test_softmax_of_masked_rows_is_nan_and_can_be_replaced() -> None:
    x = RNG.standard_normal((4, 20)).astype(np.float32)
    x[1] = -np.inf
    softmax = helper.make_node("Softmax", ["x"], ["p"], axis=-1)
    nodes = [
        softmax,
        helper.make_node("IsNaN", ["p"], ["n"]),
        helper.make_node("Where", ["n", "zero", "p"], ["y"]),
    ]
    model = graph(nodes, {"x": x.shape}, {"zero": np.float32(0)})
    report = check(model, HOST, {"reduction"}, {"x": x})
    assert len(report.kernels) == 1
    plain = graph([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], {"x": x.shape}, {})
    check(plain, HOST, {"reduction"}, {"x": x})


def test_softmax_over_another_axis() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    check(graph([node], {"x": (2, 7, 9)}, {}), HOST, {"fallback"})


@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_layer_normalization(columns: int) -> None:
    node = helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], epsilon=1e-6)
    constants = {"g": weight(columns, scale=1.0), "b": weight(columns, scale=1.0)}
    check(graph([node], {"x": (2, 3, columns)}, constants), HOST, {"reduction"})


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("axes", [[-1], [2, 3], [1], [0, 1, 2, 3]])
def test_reductions(op: str, axes: list[int]) -> None:
    keep = int(op in ("ReduceMean", "ReduceMax"))
    node = helper.make_node(op, ["x", "axes"], ["y"], keepdims=keep)
    model = graph([node], {"x": (2, 5, 6, 19)}, {"axes": np.array(axes)})
    module, report = lower(model, HOST)
    x = RNG.standard_normal((2, 5, 6, 19)).astype(np.float32)
    reduce = {"Mean": np.mean, "Sum": np.sum, "Max": np.max, "Min": np.min}[op[6:]]
    want = reduce(x.astype(np.float64), axis=tuple(axes), keepdims=bool(keep))
    np.testing.assert_allclose(run(module, HOST, x), want, rtol=1e-5, atol=1e-5)
    assert report.kernels


# What is left to TVM ------------------------------------------------------------------------------
def test_dynamic_shapes_fall_back_and_stay_correct() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Tanh", ["p"], ["t"]),
        helper.make_node("Softmax", ["t"], ["y"], axis=-1),
    ]
    w = weight(6, 11)
    model = graph(nodes, {"x": ("batch", 6)}, {"w": w})
    module, report = lower(model, HOST)
    assert any("dynamic" in record.reason for record in report.kernels), str(report)
    from tvm import relax

    machine = relax.VirtualMachine(tvm.compile(module, target=HOST.tvm_target()), tvm.cpu())
    for batch in (1, 5):
        x = RNG.standard_normal((batch, 6)).astype(np.float32)
        exponent = np.exp(np.tanh(x.astype(np.float64) @ w))
        want = exponent / exponent.sum(-1, keepdims=True)
        got = machine["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_elementwise_math_in_tvm_loops_is_polynomial() -> None:
    nodes = [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Erf", ["e"], ["y"])]
    report = check(graph(nodes, {"x": (3, 50)}, {}), HOST, {"elementwise"})
    assert any("polynomial" in record.rule for record in report.kernels)


def test_the_same_module_twice_gives_the_same_code() -> None:
    first, _ = lower(conv_model(CONVS["stem"]), HOST)
    second, _ = lower(conv_model(CONVS["stem"]), HOST)
    assert [v.name_hint for v in first.get_global_vars()] == [
        v.name_hint for v in second.get_global_vars()
    ]
    for variable in first.get_global_vars():
        if isinstance(first[variable], tvm.tirx.PrimFunc):
            same = second[second.get_global_var(variable.name_hint)]
            tvm.ir.assert_structural_equal(first[variable], same)


def test_equal_kernels_are_generated_once() -> None:
    nodes, last = [], "x"
    constants = {}
    for index in range(4):
        constants[f"w{index}"] = weight(16, 16, 3, 3)
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        last = f"r{index}"
    model = graph(nodes, {"x": (1, 16, 8, 8)}, constants, output=last)
    report = check(model, HOST, {"conv"})
    assert len(report.of_kind("conv")) == 1


# Code for other machines --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "instruction"), [(ARM64_NEON_DOTPROD, "fmla"), (RISCV64, "fmadd.s")]
)
def test_other_machines_get_code(spec: CpuSpec, instruction: str) -> None:
    tail = [
        helper.make_node("Sigmoid", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["g"]),
        helper.make_node("Softmax", ["g"], ["y"]),
    ]
    model = conv_model((3, 24, 18, 18, 3, 2, 1, 1, 1), tail=tail, fc=weight(24, 10))
    module, report = lower(model, spec)
    assert not report.unscheduled, str(report)
    kernels = tvm.IRModule(
        {
            variable: function.with_attr("global_symbol", variable.name_hint)
            for variable, function in module.functions.items()
            if isinstance(function, tvm.tirx.PrimFunc)
        }
    )
    built = tvm.tirx.build(kernels, target=spec.tvm_target())
    assert instruction in built.inspect_source("s")


# Pieces -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "bound"), [("exp", 2.5e-7), ("tanh", 3e-7), ("erf", 3e-7), ("sigmoid", 3e-7)]
)
def test_polynomials(name: str, bound: float) -> None:
    x = np.concatenate(
        [np.linspace(-86.9, 88, 16000), np.linspace(-5, 5, 16000), np.geomspace(1e-6, 1, 2000)]
    ).astype(np.float32)
    special = np.array([0, np.inf, -np.inf, np.nan, 200, -200] + [1.0] * 10, np.float32)
    x = np.concatenate([x[: len(x) // 16 * 16], special])
    b = KernelBuilder(16)
    source, out = b.param("x", x.shape), b.param("out", x.shape)
    with b.loop(x.size // 16) as i:
        b.store(out, i * 16, getattr(VectorMath(b, 16), name)(b.load(source, i * 16, 16)))
    compiled = tvm.compile(tvm.IRModule({"f": b.finish("f")}), target=HOST.tvm_target())
    result = tvm.runtime.tensor(np.zeros_like(x))
    compiled["f"](tvm.runtime.tensor(x), result)
    got = result.numpy().astype(np.float64)
    exact = {
        "exp": np.exp,
        "tanh": np.tanh,
        "erf": np.vectorize(math.erf),
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    }[name]
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
    finite = np.isfinite(want) & (np.abs(want) < 3.4e38) & (np.abs(want) > 1.8e-38)
    error = np.abs(got[finite] - want[finite]) / np.abs(want[finite])
    assert error.max() < bound
    # 200 overflows float32's exp.
    with np.errstate(over="ignore"):
        limits = want[-16:-10].astype(np.float32)
    limits[np.abs(limits) < 1.8e-38] = 0
    np.testing.assert_allclose(got[-16:-10], limits, rtol=bound)


def test_pack_columns_pads_and_narrows_the_last_tile() -> None:
    matrix = np.arange(2 * 5, dtype=np.float32).reshape(2, 5)
    packed = pack_columns(matrix, lanes=2, vectors=2)
    expected = [0, 1, 2, 3, 5, 6, 7, 8, 4, 0, 9, 0]
    np.testing.assert_array_equal(packed, expected)


def test_block_channels() -> None:
    array = np.arange(3 * 2, dtype=np.float32).reshape(1, 3, 1, 2)
    blocked = block_channels(array, 2, 1)
    assert blocked.shape == (1, 2, 1, 2, 2)
    np.testing.assert_array_equal(blocked[0, 0, 0], [[0, 2], [1, 3]])
    np.testing.assert_array_equal(blocked[0, 1, 0], [[4, 0], [5, 0]])


@given(rows=st.integers(1, 400), vectors=st.integers(1, 80), registers=st.sampled_from([16, 32]))
@settings(max_examples=60, deadline=None)
def test_tiles_fit_the_registers(rows: int, vectors: int, registers: int) -> None:
    spec = dataclasses.replace(X86_64_AVX512, registers=registers)
    tile = choose_tile(rows, vectors, spec)
    assert 1 <= tile.rows <= rows
    assert 1 <= tile.vectors <= vectors
    assert tile.rows * tile.vectors <= registers - 4
    assert sum(size * count for size, count in split_extent(rows, tile.rows)) == rows


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_views_agree_with_numpy(data: st.DataObject) -> None:
    """A chain of transposes and reshapes: strides must address what numpy's copies hold."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    array = np.arange(math.prod(shape)).reshape(shape)
    flat = array.ravel()
    view = View(None, shape, contiguous_strides(shape))
    for _ in range(3):
        if data.draw(st.booleans()):
            axes = list(data.draw(st.permutations(range(array.ndim))))
            array, view = array.transpose(axes), view.permuted(axes)
        else:
            divisors = [d for d in range(1, array.size + 1) if array.size % d == 0]
            first = data.draw(st.sampled_from(divisors))
            target = data.draw(
                st.sampled_from([(first, array.size // first), (1, first, array.size // first)])
            )
            reshaped = view.reshaped(target)
            if reshaped is None:
                return
            array, view = array.reshape(target), reshaped
    index = np.zeros(view.shape, np.int64)
    for axis, stride in enumerate(view.strides):
        steps = np.arange(view.shape[axis]) * stride
        index += steps.reshape([-1 if a == axis else 1 for a in range(index.ndim)])
    np.testing.assert_array_equal(flat[index], array)


@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 20))
@settings(max_examples=12, deadline=None)
def test_matmul_kernel_on_any_shape(m: int, n: int, k: int) -> None:
    config = Matmul(
        (), m, n, k, Access((m, k), (k, 1)), None, Access((m, n), (n, 1))
    )  # fmt: skip
    a, b = weight(m, k, scale=1.0), weight(k, n, scale=1.0)
    packed = pack_columns(b, HOST.lanes, config.tile(HOST).vectors)
    function = matmul_kernel(config, HOST, "f")
    compiled = tvm.compile(tvm.IRModule({"f": function}), target=HOST.tvm_target())
    out = tvm.runtime.tensor(np.full((m, n), np.nan, np.float32))
    compiled["f"](tvm.runtime.tensor(a), tvm.runtime.tensor(packed), out)
    np.testing.assert_allclose(out.numpy(), a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)
