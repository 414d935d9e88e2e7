"""A plan in the mirror is the graph that its pass makes: same operators, types and shapes."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from edgepass.cost.kernels import runtime_graph
from edgepass.cost.ort_plan import write_plan
from edgepass.cost.runtime_graph import RuntimeGraph
from edgepass.passes.base import Context, Pass
from edgepass.passes.quantize.dynamic_int8 import DynamicInt8
from edgepass.passes.quantize.half import Bf16, Fp16
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.targets.registry import get_target

RNG = np.random.default_rng(3)
PASSES = {
    "int8": StaticInt8(),
    "int8 attention": StaticInt8(attention=True, per_channel=False),
    "dynamic": DynamicInt8(),
    "dynamic per tensor": DynamicInt8(per_channel=False),
    "weights 8": WeightOnly(),
    "weights 4": WeightOnly(bits=4),
    "weights 8 blocks": WeightOnly(block=32),
    "fp16": Fp16(),
    "fp16 arithmetic": Fp16(arithmetic="yes"),
    "bf16": Bf16(),
}


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, tuple[int, ...]],
    inputs: dict[str, tuple[int, list[int]]],
    outputs: list[str],
    opset: int,
) -> ir.Model:
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [oh.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ]
        + [numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0.0), ("six", 6.0))]
        + [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return ir.from_proto(proto)


def convnet(opset: int = 21) -> ir.Model:
    """Relu and Clip to absorb, a residual, pools, a split, a result also given to the caller."""
    nodes = [
        oh.make_node("Conv", ["x", "w0", "b0"], ["c0"], "c0", pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["c0"], ["r0"], "r0"),
        oh.make_node("MaxPool", ["r0"], ["p0"], "p0", kernel_shape=[2, 2], strides=[2, 2]),
        oh.make_node("Conv", ["p0", "w1"], ["c1"], "c1", pads=[1, 1, 1, 1], group=32),
        oh.make_node("Clip", ["c1", "zero", "six"], ["k1"], "k1"),
        oh.make_node("Add", ["k1", "p0"], ["s1"], "s1"),
        oh.make_node("Split", ["s1"], ["h0", "h1"], "split", axis=1, num_outputs=2),
        oh.make_node("Conv", ["h0", "w2"], ["c2"], "c2"),
        oh.make_node("Conv", ["h1", "w2"], ["c3"], "c3"),
        oh.make_node("Sigmoid", ["c3"], ["g3"], "g3"),
        oh.make_node("Mul", ["c2", "g3"], ["m3"], "m3"),
        oh.make_node("Concat", ["m3", "c2"], ["cat"], "cat", axis=1),
        oh.make_node("GlobalAveragePool", ["cat"], ["p"], "p"),
        oh.make_node("Flatten", ["p"], ["f"], "f"),
        oh.make_node("Gemm", ["f", "w3", "b3"], ["y"], "y", transB=1),
    ]
    weights: dict[str, tuple[int, ...]] = {
        "w0": (32, 3, 3, 3), "b0": (32,), "w1": (32, 1, 3, 3),
        "w2": (16, 16, 1, 1), "w3": (40, 32), "b3": (40,),
    }  # fmt: skip
    return model(nodes, weights, {"x": (TensorProto.FLOAT, [1, 3, 16, 16])}, ["y", "c2"], opset)


def gates(opset: int = 21) -> ir.Model:
    """Gates with a hard slope, a mean over places, groups of few channels."""
    nodes = [
        oh.make_node("Conv", ["x", "w0", "b0"], ["c0"], "c0", pads=[1, 1, 1, 1]),
        oh.make_node("HardSwish", ["c0"], ["h0"], "h0"),
        oh.make_node("Conv", ["h0", "w1"], ["c1"], "c1", pads=[1, 1, 1, 1], group=8),
        oh.make_node("ReduceMean", ["c1", "axes"], ["p"], "p"),
        oh.make_node("Conv", ["p", "w2", "b2"], ["c2"], "c2"),
        oh.make_node("HardSigmoid", ["c2"], ["g"], "g", alpha=1 / 6),
        oh.make_node("Mul", ["c1", "g"], ["m"], "m"),
        oh.make_node("Conv", ["m", "w2"], ["y"], "y"),
    ]
    weights: dict[str, tuple[int, ...]] = {
        "w0": (32, 16, 3, 3), "b0": (32,), "w1": (32, 4, 3, 3), "w2": (32, 32, 1, 1), "b2": (32,),
    }  # fmt: skip
    return model(nodes, weights, {"x": (TensorProto.FLOAT, [1, 16, 8, 8])}, ["y"], opset)


def tokens(opset: int = 21) -> ir.Model:
    """A table, products with one reader and with several, a tied weight, a product of two."""
    nodes = [
        oh.make_node("Gather", ["table", "ids"], ["e"], "e"),
        oh.make_node("MatMul", ["e", "wq"], ["q"], "q"),
        oh.make_node("MatMul", ["e", "wk"], ["k"], "k"),
        oh.make_node("Transpose", ["k"], ["kt"], "kt", perm=[0, 2, 1]),
        oh.make_node("MatMul", ["q", "kt"], ["a"], "a"),
        oh.make_node("Softmax", ["a"], ["sm"], "sm"),
        oh.make_node("MatMul", ["sm", "e"], ["v"], "v"),
        oh.make_node("MatMul", ["v", "wo"], ["o"], "o"),
        oh.make_node("Add", ["o", "bo"], ["ob"], "ob"),
        oh.make_node("Relu", ["ob"], ["h"], "h"),
        oh.make_node("MatMul", ["h", "wo"], ["y"], "y"),
    ]
    weights: dict[str, tuple[int, ...]] = {
        "table": (200, 72), "wq": (72, 64), "wk": (72, 64), "wo": (72, 72), "bo": (72,),
    }  # fmt: skip
    return model(nodes, weights, {"ids": (TensorProto.INT64, [1, 9])}, ["y"], opset)


def kinds(graph: RuntimeGraph) -> collections.Counter[tuple[object, ...]]:
    return collections.Counter(
        (
            op.domain,
            op.type,
            tuple((t.shape, t.dtype, t.constant) for t in op.outputs),
            tuple(None if t is None else (t.shape, t.dtype, t.constant) for t in op.inputs),
        )
        for op in graph
    )


NETS: dict[str, Callable[[], ir.Model]] = {
    "convnet": convnet,
    "convnet opset 19": lambda: convnet(19),
    "tokens": tokens,
    "tokens opset 17": lambda: tokens(17),
}


def prepared(net: str, item: Pass, context: Context) -> ir.Model:
    """A net as the pass makes its plan of it: biases in products, groups joined, for int8."""
    found = NETS[net]()
    if isinstance(item, StaticInt8):
        item._prepare(found, context)
    return found


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("device", ["x86_64", "arm64"])
def test_a_plan_is_written_as_its_pass_writes_it(name: str, net: str, device: str) -> None:
    item, context = PASSES[name], Context(get_target(device))
    before, after = prepared(net, item, context), NETS[net]()
    plan = item.plan(before, context)
    assert plan is not None
    assert plan.entries
    mirror = RuntimeGraph(before)
    write_plan(mirror, plan)
    after = getattr(item, "preview", item.run)(after, context).model
    expected = RuntimeGraph(after)
    assert kinds(mirror) == kinds(expected)
    assert [t.dtype for t in mirror.outputs] == [t.dtype for t in expected.outputs]
    changes = bool(plan.nodes) or any(spec.is_integer for spec in plan.entries.values())
    assert (kinds(mirror) != kinds(RuntimeGraph(before))) == changes


@pytest.mark.parametrize("name", ["int8", "dynamic", "weights 8", "weights 4", "fp16"])
@pytest.mark.parametrize("net", NETS)
def test_kernels_of_a_plan_are_those_of_the_graph_it_leads_to(name: str, net: str) -> None:
    target = get_target("x86_64-avx512")
    item, context = PASSES[name], Context(target)
    before, after = prepared(net, item, context), NETS[net]()
    planned = runtime_graph(before, target, item.plan(before, context))
    applied = runtime_graph(getattr(item, "preview", item.run)(after, context).model, target)
    assert kinds(planned) == kinds(applied)


@pytest.mark.parametrize("device", ["x86_64", "x86_64-avx512", "arm64"])
def test_gates_means_and_groups_are_written_as_int8_writes_them(device: str) -> None:
    item, target = StaticInt8(), get_target(device)
    before, after = gates(), gates()
    item._prepare(before, Context(target))
    plan = item.plan(before, Context(target))
    mirror = RuntimeGraph(before)
    write_plan(mirror, plan)
    after = item.preview(after, Context(target)).model
    assert kinds(mirror) == kinds(RuntimeGraph(after))
    left = {op.type for op in mirror} & {"HardSigmoid", "HardSwish", "ReduceMean"}
    assert not left
    assert kinds(runtime_graph(before, target, plan)) == kinds(runtime_graph(after, target))


def test_work_absorbed_by_saturation_stays_with_its_kernel() -> None:
    built = convnet()
    context = Context(get_target("x86_64"))
    mirror = RuntimeGraph(built)
    write_plan(mirror, StaticInt8().plan(built, context))
    first = next(op for op in mirror if op.type == "Conv")
    assert [node.op_type for node in first.origin] == ["Conv", "Relu"]
    assert not any(op.type in ("Relu", "Clip") for op in mirror)
    assert all(not op.origin for op in mirror if op.type.endswith("quantizeLinear"))
