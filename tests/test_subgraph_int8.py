"""8-bit passes on nodes inside If, Loop and Scan: what is planned; results load and are close."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgepass
from edgepass.frontends import load_model
from edgepass.ir.graph import graph_tree
from edgepass.ir.quant import planned_model_bytes
from edgepass.ir.verify import interface, interface_difference, verify
from edgepass.passes.base import Context, Pass
from edgepass.passes.quantize.dynamic_int8 import DynamicInt8
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target
from subgraph_models import feed, subgraph_model

PASSES: list[Pass] = [StaticInt8(), DynamicInt8(), WeightOnly()]


def apart(reference: np.ndarray, found: np.ndarray) -> float:
    """The norm of the error, relative."""
    size = max(float(np.linalg.norm(reference)), 1e-3)
    return float(np.linalg.norm(found - reference)) / size


def all_ops(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for g in graph_tree(graph) for node in g)


def runtime_ops(model: ir.Model, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime executes, branches included."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return all_ops(ir.load(folder / "optimized.onnx").graph)


@pytest.mark.parametrize("item", PASSES, ids=lambda p: p.name)
@pytest.mark.parametrize("seed", range(16))
def test_any_nesting_loads_and_stays_close(seed: int, item: Pass) -> None:
    proto = subgraph_model(seed)
    if item.name == "weight_only" and proto.opset_import[0].version < 13:
        pytest.skip("refused: no per-channel DequantizeLinear")
    model = load_model(proto)
    before = interface(model.graph.outputs)
    context = Context(get_target("x86_64"), calibration=[feed(i) for i in range(4)])
    result = item.run(model, context)
    verify(model)
    assert not interface_difference("output", before, interface(model.graph.outputs))
    assert result.modified
    # the second takes the branches that calibration never took
    samples = [feed(100), feed(101, flag=False, other=True, trips=1)]
    with OrtRunner(load_model(proto)) as original, OrtRunner(model) as runner:
        for sample in samples:
            found = runner.run(sample)
            for name, reference in original.run(sample).items():
                assert apart(reference, found[name]) < 0.25, name


@pytest.mark.parametrize("seed", range(0, 16, 5))
@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic"])
def test_compiled_whole(seed: int, recipe: str) -> None:
    proto = subgraph_model(seed)
    samples = [feed(i, trips=i % 3) for i in range(4)]
    compiled = edgepass.compile(proto, "x86_64", recipe=recipe, calibration=samples)
    with OrtRunner(load_model(proto)) as original:
        for name, reference in original.run(feed(7)).items():
            assert apart(reference, compiled.run(feed(7))[name]) < 0.25, name


# --- what is planned ---------------------------------------------------------------------------


def branches(*, opset: int = 17, width: int = 64) -> onnx.ModelProto:
    """Both branches read one weight of the outer graph and a value that a convolution made.

    x -> Conv -> Relu -> c;  If(flag): Conv(c, shared) -> Relu, else Conv(c, shared);  the results
    are outputs of the model.
    """
    rng = np.random.default_rng(0)

    def side(name: str, relu: bool) -> onnx.GraphProto:
        nodes = [helper.make_node("Conv", ["c", "shared"], ["s"], pads=[1, 1, 1, 1])]
        if relu:
            nodes.append(helper.make_node("Relu", ["s"], ["t"]))
        result = "t" if relu else "s"
        info = helper.make_tensor_value_info(result, TensorProto.FLOAT, [1, width, 8, 8])
        return helper.make_graph(nodes, name, [], [info])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="outer", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["c"]),
        helper.make_node(
            "If", ["flag"], ["y"], then_branch=side("t", True), else_branch=side("e", False)
        ),
    ]
    weights = {
        name: (rng.standard_normal(shape) / 12).astype(np.float32)
        for name, shape in {"w": (width, 8, 3, 3), "shared": (width, width, 3, 3)}.items()
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def images(flags: list[bool]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {"x": rng.standard_normal((1, 8, 8, 8)).astype(np.float32), "flag": np.array(flag)}
        for flag in flags
    ]


def test_both_branches_run_in_integers_and_share_the_weight(tmp_path: Path) -> None:
    model = load_model(branches())
    context = Context(get_target("x86_64"), calibration=images([True, False]))
    plan = StaticInt8().plan(model, context)
    assert plan.nodes == ("outer", "s", "s")
    StaticInt8().run(model, context)
    found = runtime_ops(model, tmp_path)
    assert found["QLinearConv"] == 3
    assert not found["Conv"] + found["FusedConv"] + found["NhwcFusedConv"]
    stored = [
        v
        for g in graph_tree(model.graph)
        for v in g.initializers.values()
        if v.dtype.name == "INT8"
    ]
    assert sum(v.const_value.size == 64 * 64 * 9 for v in stored) == 1


def test_a_branch_that_calibration_never_ran_stores_its_weights(tmp_path: Path) -> None:
    model = load_model(branches())
    reference = load_model(branches())
    context = Context(get_target("x86_64"), calibration=images([True, True]))
    result = StaticInt8().run(model, context)
    assert any("calibration never ran" in note for note in result.notes)
    assert any("1 Conv" in note and "stored" in note for note in result.notes)
    assert not any(
        v.dtype == ir.DataType.FLOAT and v.const_value is not None and v.const_value.size > 1000
        for v in model.graph.initializers.values()
    )
    assert runtime_ops(model, tmp_path)["QLinearConv"] == 2
    with OrtRunner(reference) as original, OrtRunner(model) as runner:
        for sample in images([True, False]):
            assert apart(original.run(sample)["y"], runner.run(sample)["y"]) < 0.05


def test_the_plan_prices_what_is_written_in_branches() -> None:
    model, written = load_model(branches()), load_model(branches())
    context = Context(get_target("x86_64"), calibration=images([True, False]))
    for item in PASSES:
        model, written = load_model(branches()), load_model(branches())
        plan = item.plan(model, context)
        assert plan is not None
        item.run(written, context)
        stored = sum(
            v.const_value.nbytes
            for g in graph_tree(written.graph)
            for v in g.initializers.values()
            if v.const_value is not None
        )
        # a captured value has a pair in each branch, whose scale the plan counts once
        assert abs(planned_model_bytes(plan, model) - stored) <= 10


def test_old_opsets_lose_channels_not_the_model() -> None:
    proto = branches(opset=11)
    context = Context(get_target("x86_64"), calibration=images([True, False]))
    for item in (StaticInt8(), DynamicInt8()):
        model = load_model(proto)
        item.run(model, context)
        with OrtRunner(load_model(proto)) as original, OrtRunner(model) as runner:
            for sample in images([True, False]):
                assert apart(original.run(sample)["y"], runner.run(sample)["y"]) < 0.05
