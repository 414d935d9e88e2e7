"""Static cost: exact file sizes, MACs by hand, peak memory of small graphs, kernels, reports."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from edgepass.cost.buffers import Buffer, alive_bytes, planned_bytes
from edgepass.cost.estimate import Estimate
from edgepass.cost.kernels import DEPTHWISE, Kernel, kernels
from edgepass.cost.latency import SPREAD, latency
from edgepass.cost.memory import activation_memory, peak_activation_bytes
from edgepass.cost.report import CostReport, cost_report
from edgepass.cost.size import file_bytes, parameter_count
from edgepass.cost.text import format_bytes, format_count
from edgepass.errors import UsageError
from edgepass.ir.graph import AbsentTensor
from edgepass.passes.base import Context
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.registry import get_target

FLOAT = ir.DataType.FLOAT
ARM64 = get_target("arm64")


class Net:
    """Builds small models whose shapes are all given."""

    def __init__(self, *, weights: bool = True) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.weights = weights
        self.random = np.random.default_rng(0)

    def value(self, name: str, *shape: int | str, dtype: ir.DataType = FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def weight(self, name: str, *shape: int) -> ir.Value:
        value = self.value(name, *shape)
        if self.weights:
            value.const_value = ir.tensor(self.random.standard_normal(shape, np.float32), name=name)
        else:
            value.const_value = AbsentTensor(name, FLOAT, shape)
        self.constants.append(value)
        return value

    def ints(self, name: str, *numbers: int) -> ir.Value:
        value = self.value(name, len(numbers), dtype=ir.DataType.INT64)
        value.const_value = ir.tensor(np.array(numbers, np.int64), name=name)
        self.constants.append(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value],
        shape: tuple[int | str, ...] | None,
        *,
        domain: str = "",
        **attributes: object,
    ) -> ir.Value:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
        output = node.outputs[0]
        output.name, output.type = f"{name}_out", ir.TensorType(FLOAT)
        output.shape = None if shape is None else ir.Shape(shape)
        self.nodes.append(node)
        return output

    def model(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": 21},
            name="net",
        )
        return ir.Model(graph, ir_version=10)


def conv_net(*, weights: bool = True, batch: int | str = 1) -> ir.Model:
    """Conv3x3 > Relu > depthwise > Relu > pointwise, residual, pool, Gemm."""
    net = Net(weights=weights)
    x = net.value("x", batch, 3, 16, 16)
    pads, same = {"pads": [1, 1, 1, 1]}, (batch, 8, 16, 16)
    y = net.op("Conv", [x, net.weight("w1", 8, 3, 3, 3), net.weight("b1", 8)], same, **pads)
    first = net.op("Relu", [y], same)
    y = net.op("Conv", [first, net.weight("w2", 8, 1, 3, 3)], same, group=8, **pads)
    y = net.op("Relu", [y], same)
    y = net.op("Conv", [y, net.weight("w3", 8, 8, 1, 1), net.weight("b3", 8)], same)
    y = net.op("Add", [y, first], same)
    y = net.op("GlobalAveragePool", [y], (batch, 8, 1, 1))
    y = net.op("Flatten", [y], (batch, 8))
    y = net.op("Gemm", [y, net.weight("w4", 8, 10), net.weight("b4", 10)], (batch, 10))
    return net.model([x], [y])


CONV_MACS = 256 * 8 * 27 + 256 * 8 * 9 + 256 * 8 * 8 + 8 * 10
CONV_PARAMETERS = 8 * 27 + 8 + 72 + 64 + 8 + 80 + 10


def attention(*, weights: bool = True) -> ir.Model:
    """One attention head and an MLP over [1, 12, 32], a weight shared by two nodes."""
    net = Net(weights=weights)
    x = net.value("x", 1, 12, 32)
    shared = net.weight("shared", 32, 32)
    q = net.op("MatMul", [x, shared], (1, 12, 32))
    k = net.op("MatMul", [x, shared], (1, 12, 32))
    k = net.op("Transpose", [k], (1, 32, 12), perm=[0, 2, 1])
    scores = net.op("Softmax", [net.op("MatMul", [q, k], (1, 12, 12))], (1, 12, 12), axis=-1)
    mixed = net.op("MatMul", [scores, q], (1, 12, 32))
    scale, bias = net.weight("ln_scale", 32), net.weight("ln_bias", 32)
    normal = net.op("LayerNormalization", [mixed, scale, bias], (1, 12, 32), epsilon=1e-5)
    flat = net.op("Reshape", [normal, net.ints("flat", 12, 32)], (12, 32))
    y = net.op("Gemm", [flat, net.weight("w", 32, 64), net.weight("b", 64)], (12, 64))
    return net.model([x], [net.op("Sigmoid", [y], (12, 64))])


def saved_bytes(model: ir.Model, folder: Path, **options: object) -> int:
    return sum(f.stat().st_size for f in write_onnx(model, folder / "model.onnx", **options))  # type: ignore[arg-type]


def filled(model: ir.Model) -> ir.Model:
    """The same model with zeros where weights were absent."""
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, AbsentTensor):
            tensor = value.const_value
            array = np.zeros(tuple(tensor.shape.numpy()), tensor.dtype.numpy())
            value.const_value = ir.tensor(array, name=name)
    return model


# --- file size -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [conv_net, attention])
def test_file_bytes_are_exact(build, tmp_path: Path) -> None:
    model = build()
    assert file_bytes(model) == saved_bytes(model, tmp_path)


@pytest.mark.parametrize("build", [conv_net, attention])
def test_absent_weights_count_as_if_they_were_there(build, tmp_path: Path) -> None:
    bare = build(weights=False)
    predicted = file_bytes(bare)
    assert predicted == file_bytes(build()) == saved_bytes(filled(bare), tmp_path)


def test_external_data_counts_with_its_padding(tmp_path: Path) -> None:
    net = Net()
    x = net.value("x", 1, 300)
    y = net.op("MatMul", [x, net.weight("w", 300, 50)], (1, 50))
    y = net.op("MatMul", [y, net.weight("v", 50, 30)], (1, 30))
    model = net.model([x], [net.op("Add", [y, net.weight("small", 30)], (1, 30))])
    predicted = file_bytes(model, external_data=True)
    assert predicted == saved_bytes(model, tmp_path, external_data=True)
    assert predicted > file_bytes(model)
    assert file_bytes(model, inline_limit=1000) == predicted


def test_attributes_subgraphs_functions_and_metadata_are_exact(tmp_path: Path) -> None:
    net = Net()
    flag, x = net.value("flag", dtype=ir.DataType.BOOL), net.value("x", 2, "anything", 3)
    branches = []
    for i in range(2):
        constant = ir.node("Constant", [], {"value": ir.tensor(np.full((7, i + 1), -1.5))})
        constant.outputs[0].name = f"const_{i}"
        branches.append(
            ir.Graph([], [constant.outputs[0]], nodes=[constant], name=f"branch_{i}" * 50)
        )
    node = ir.node("If", [flag], {"then_branch": branches[0], "else_branch": branches[1]})
    node.outputs[0].name = "chosen"
    odd = ir.node(
        "Odd",
        [x, None, node.outputs[0]],
        {
            "int": -5,
            "ints": [0, 127, 128, -1, 1 << 40],
            "float": 0.1,
            "floats": [1.0, 2.0],
            "text": "naïve",
            "texts": ["a", "b" * 200],
            "tensor": ir.tensor(np.arange(3, dtype=np.int64), name="t"),
        },
        domain="my.ops",
        num_outputs=3,
    )
    odd.outputs[0].name, odd.outputs[1].name, odd.outputs[2].name = "o0", "o1", ""
    odd.metadata_props.update({"kept": "yes", "pkg.torch.onnx.stack_trace": "left out" * 100})
    odd.doc_string = "emptied"
    net.nodes += [node, odd]
    inner = ir.Value(name="inner", shape=ir.Shape([None, 2]), type=ir.TensorType(FLOAT))
    body = ir.node("Relu", [inner])
    body.outputs[0].name = "inner_out"
    function = ir.Function(
        "my.ops",
        "F",
        graph=ir.Graph([inner], body.outputs, nodes=[body], opset_imports={"": 21}),
        attributes=[],
    )
    model = net.model([flag, x], [odd.outputs[0]])
    for version in (8, 10):
        model.ir_version = version
        model.functions[function.identifier()] = function
        model.producer_name, model.metadata_props["key"] = "somebody", "value"
        model.graph.doc_string = "about"
        assert file_bytes(model) == saved_bytes(model, tmp_path), version


@pytest.mark.parametrize(
    ("build", "item"),
    [
        (conv_net, StaticInt8()),
        (conv_net, StaticInt8(scheme="u8s8")),
        (attention, StaticInt8()),
        (attention, WeightOnly()),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
def test_a_plan_is_priced_as_the_file_it_becomes(build, item, tmp_path: Path) -> None:
    model = build(weights=False)
    context = Context(ARM64)
    plan = item.plan(model, context)
    predicted = file_bytes(model, plan)
    after = item.preview(build(weights=False), context).model
    assert predicted == pytest.approx(saved_bytes(filled(after), tmp_path), rel=0.02)
    assert plan.entries


def test_parameters_leave_out_scales_shapes_and_scalars() -> None:
    model = conv_net(weights=False)
    assert parameter_count(model) == CONV_PARAMETERS
    quantized = StaticInt8().preview(conv_net(weights=False), Context(ARM64)).model
    assert parameter_count(quantized) == CONV_PARAMETERS
    assert parameter_count(attention()) == 32 * 32 + 64 + 32 * 64 + 64


# --- MACs and kernels ------------------------------------------------------------------------


def test_macs_by_hand() -> None:
    assert cost_report(conv_net(), ARM64).macs == CONV_MACS
    assert (
        cost_report(attention(), ARM64).macs == 2 * 12 * 32 * 32 + 2 * 12 * 12 * 32 + 12 * 32 * 64
    )


def test_activations_and_residuals_are_part_of_their_kernel() -> None:
    found = kernels(conv_net(), ARM64)
    assert [k.op for k in found] == [
        "Conv+Relu",
        "Conv+Relu",
        "Conv+Add",
        "GlobalAveragePool",
        "Gemm",
    ]
    assert [k.kind for k in found[:3]] == ["convolution", DEPTHWISE, "convolution"]
    plane = 8 * 16 * 16 * 4
    assert found[0].bytes_read == 3 * 16 * 16 * 4 + (216 + 8) * 4
    assert found[0].bytes_written == plane
    assert found[2].bytes_read == 2 * plane + (64 + 8) * 4
    assert found[2].weight_bytes == (64 + 8) * 4
    assert all(k.dtype == "float32" and k.is_known for k in found)


def test_a_value_with_a_second_reader_is_not_merged_over() -> None:
    net = Net()
    x = net.value("x", 1, 4, 8, 8)
    y = net.op("Conv", [x, net.weight("w", 4, 4, 1, 1)], (1, 4, 8, 8))
    out = net.op("Relu", [y], (1, 4, 8, 8))
    found = kernels(net.model([x], [out, y]), ARM64)
    assert [k.op for k in found] == ["Conv", "Relu"]


def test_what_is_computed_from_constants_alone_is_no_kernel() -> None:
    net = Net()
    x = net.value("x", 1, 12)
    w = net.op("Transpose", [net.weight("w", 6, 12)], (12, 6), perm=[1, 0])
    found = kernels(net.model([x], [net.op("MatMul", [x, w], (1, 6))]), ARM64)
    assert [k.op for k in found] == ["MatMul"]


@pytest.mark.parametrize("build", [conv_net, attention])
@pytest.mark.parametrize("item", [StaticInt8(), WeightOnly()], ids=str)
def test_kernels_of_a_plan_are_those_of_the_graph_it_becomes(build, item) -> None:
    model, context = build(weights=False), Context(ARM64)
    planned = cost_report(model, ARM64, plan=item.plan(model, context))
    graph = cost_report(item.preview(build(weights=False), context).model, ARM64)
    assert planned.latency.kernels == graph.latency.kernels
    assert planned.macs == graph.macs
    assert planned.peak_activation_bytes == graph.peak_activation_bytes
    assert planned.latency.ms == pytest.approx(graph.latency.ms, rel=1e-3)
    assert planned.bytes_moved == pytest.approx(graph.bytes_moved, rel=0.05)  # scales, zero points


def test_int8_runs_in_integers_where_the_target_has_them() -> None:
    model = conv_net(weights=False)
    plan = StaticInt8().plan(model, Context(ARM64))
    assert [k.dtype for k in kernels(model, ARM64, plan) if k.macs] == ["int8"] * 4
    tvm = get_target("arm64/tvm")
    assert {k.dtype for k in kernels(model, tvm, plan)} == {"float32"}
    notes = " ".join(cost_report(model, tvm, plan=plan).notes)
    assert "8 bits save size, not time" in notes


# --- memory ----------------------------------------------------------------------------------


def test_memory_of_a_chain_reuses_buffers_in_place() -> None:
    net = Net()
    x = net.value("x", 100)
    y = net.op("Relu", [x], (100,))
    for _ in range(5):
        y = net.op("Sigmoid", [y], (100,))
    # the caller's input, one buffer written over five times less the output's own
    model = net.model([x], [net.op("Tanh", [y], (100,))])
    assert activation_memory(model).alive == (800, 800, 800, 800, 800, 800, 1200)


def test_memory_of_a_diamond_holds_both_branches() -> None:
    net = Net()
    x = net.value("x", 1, 4, 10, 10)
    w, shape = net.weight("w", 4, 4, 1, 1), (1, 4, 10, 10)
    left = net.op("Conv", [x, w], shape)
    right = net.op("Conv", [left, w], shape)
    last = net.op("Conv", [net.op("Add", [left, right], shape), w], shape)
    found = activation_memory(net.model([x], [last]))
    assert found.alive == (3200, 4800, 6400, 4800)  # a sum takes a new buffer
    assert found.live_bytes == 6400
    assert found.peak_node == 2
    assert found.peak_bytes == 8000  # the runtime's block of three, the input, the output


def test_a_runtime_reuses_buffers_of_one_shape_only() -> None:
    same = [Buffer(100, "a", 0, 2), Buffer(100, "a", 2, 4), Buffer(100, "a", 4, 6)]
    assert planned_bytes(same) == 200
    other = [Buffer(100, "a", 0, 2), Buffer(60, "b", 4, 6), Buffer(100, "a", 8, 9)]
    assert max(alive_bytes(other, 10)) == 100
    assert planned_bytes(other) == 160  # the first is tied up until the last has run


def test_a_runtime_fills_the_tightest_gap() -> None:
    buffers = [
        Buffer(50, "a", 0, 2),
        Buffer(10, "b", 0, 9),
        Buffer(30, "c", 0, 2),
        Buffer(10, "d", 0, 9),
        Buffer(25, "e", 3, 9),
        Buffer(45, "f", 3, 9),
        Buffer(40, "g", 5, 9),
        Buffer(99, "h", 5, 9, own=False),
    ]
    assert planned_bytes(buffers) == 100 + 40


def test_memory_of_views_is_their_inputs() -> None:
    net = Net()
    x = net.value("x", 6, 10)
    y = net.op("Softmax", [x], (6, 10))
    y = net.op("Reshape", [y, net.ints("shape", 60)], (60,))
    y = net.op("Unsqueeze", [y, net.ints("axes", 0)], (1, 60))
    model = net.model([x], [net.op("Softmax", [y], (1, 60))])
    assert activation_memory(model).alive == (480, 480, 480, 720)


def test_memory_of_an_if_adds_its_hungrier_branch() -> None:
    net = Net()
    flag, x = net.value("flag", dtype=ir.DataType.BOOL), net.value("x", 10)
    bodies = []
    for i, depth in enumerate((1, 3)):
        nodes, value = [], x
        for j in range(depth):
            node = ir.node("Exp", [value])
            value = node.outputs[0]
            value.name, value.shape = f"b{i}_{j}", ir.Shape([10])
            value.type = ir.TensorType(FLOAT)
            nodes.append(node)
        bodies.append(ir.Graph([], [value], nodes=nodes, name=f"b{i}"))
    node = ir.node("If", [flag], {"then_branch": bodies[0], "else_branch": bodies[1]})
    out = node.outputs[0]
    out.name, out.shape, out.type = "out", ir.Shape([10]), ir.TensorType(FLOAT)
    net.nodes.append(node)
    # flag, x, out; inside: two intermediate vectors at once
    assert peak_activation_bytes(net.model([flag, x], [out])) == 1 + 40 + 40 + 80


def test_memory_of_a_plan_is_smaller() -> None:
    model = conv_net(weights=False)
    plan = StaticInt8().plan(model, Context(ARM64))
    full = activation_memory(model).live_bytes
    plane, image = 8 * 16 * 16, 3 * 16 * 16
    assert full == 4 * image + 3 * 4 * plane
    assert activation_memory(model, plan=plan).live_bytes == 4 * image + 3 * plane
    on_tvm = peak_activation_bytes(model, plan=plan, target=get_target("arm64/tvm"))
    assert on_tvm == full + 4 * (8 * 8 + 8)  # the weights of the pointwise convolution, unpacked


# --- what is not known -----------------------------------------------------------------------


def unknown_net() -> ir.Model:
    net = Net()
    x = net.value("x", 1, 8)
    y = net.op("Mystery", [x], (1, 8), domain="my.ops")
    y = net.op("Mystery", [y], (1, 8), domain="my.ops")
    return net.model([x], [net.op("MatMul", [y, net.weight("w", 8, 4)], (1, 4))])


def test_unknown_operators_make_totals_lower_bounds() -> None:
    report = cost_report(unknown_net(), ARM64, recipe="fp32")
    assert report.macs == 32
    assert report.is_lower_bound
    ((op, count, reason),) = report.unknown_ops
    assert (op, count) == ("my.ops.Mystery", 2)
    assert "not described" in reason
    assert report.latency.unknown == 2
    assert report.latency.unknown_share == pytest.approx(2 / 3)
    assert report.latency.high_ms is None
    text = str(report)
    assert ">= 32" in text
    assert "2 my.ops.Mystery" in text
    assert "2 of 3 kernels unknown" in text
    assert report.peak_activation_bytes is not None


def test_a_value_without_a_shape_is_named() -> None:
    net = Net()
    x = net.value("x", 1, 8)
    y = net.op("Relu", [x], None)
    found = activation_memory(net.model([x], [net.op("Relu", [y], (1, 8))]))
    assert found.peak_bytes is None
    assert "relu_0_out" in found.reason


def test_symbolic_dimensions_are_asked_for_and_bound() -> None:
    model = conv_net(batch="batch")
    report = cost_report(model, ARM64, recipe="fp32")
    assert (report.macs, report.bytes_moved, report.peak_activation_bytes) == (None,) * 3
    assert report.latency.ms is None
    assert str(report.latency) == "? (assumed)"
    assert any("dims={'batch': 1}" in n and "--dim batch=1" in n for n in report.notes)
    assert report.file_bytes == file_bytes(model)
    bound = cost_report(model, ARM64, dims={"batch": 3})
    assert bound.macs == 3 * CONV_MACS
    assert bound.peak_activation_bytes == 3 * cost_report(conv_net(), ARM64).peak_activation_bytes
    assert not bound.notes


# --- latency ---------------------------------------------------------------------------------


def test_latency_is_assumed_and_wide() -> None:
    found = latency(kernels(conv_net(), ARM64), ARM64)
    assert found.ms is not None
    assert found.label == "assumed"
    assert "assumed" in str(found)
    assert found.low_ms == pytest.approx(found.ms / SPREAD)
    assert found.high_ms == pytest.approx(found.ms * SPREAD)


def test_latency_falls_with_threads_and_with_int8() -> None:
    kernel = Kernel("matmul", "MatMul", (), 10**9, 2 * 10**9, 10**6, 10**6, 10**6, "float32")
    one, four = latency([kernel], ARM64, 1), latency([kernel], ARM64, 4)
    assert one.ms is not None
    assert four.ms is not None
    assert four.ms < one.ms
    assert latency([kernel], ARM64, 64).ms == four.ms
    int8 = latency([dataclasses.replace(kernel, dtype="int8")], ARM64)
    assert int8.ms is not None
    assert int8.ms < one.ms / 2


def test_latency_of_undescribed_hardware_is_not_a_number() -> None:
    blank = ARM64.replace(name="blank", frequency_ghz=0.0)
    found = latency(kernels(conv_net(), blank), blank)
    assert found.ms is None
    assert "frequency_ghz" in found.reason
    assert any("frequency_ghz" in note for note in cost_report(conv_net(), blank).notes)


# --- reports ---------------------------------------------------------------------------------


@pytest.fixture
def estimate() -> Estimate:
    model = conv_net(weights=False)
    plan = StaticInt8().plan(model, Context(ARM64))
    rows = (
        cost_report(model, ARM64, recipe="fp32", notes=["first note"]),
        cost_report(model, ARM64, recipe="int8", plan=plan),
    )
    return Estimate("arm64", rows, {"int3": "No such recipe"})


def test_an_estimate_prints_all_recipes_and_says_assumed(estimate: Estimate) -> None:
    lines = str(estimate).splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", "fp32", "int8", "int3"]
    assert all("(assumed," in line for line in lines[1:3])
    assert "first note" in lines[1]
    assert "No such recipe" in lines[3]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(estimate.table())
    shown = console.file.getvalue().splitlines()
    for row in estimate.rows:
        (line,) = [text for text in shown if text.split()[:1] == [row.recipe]]
        assert "(assumed, " in line
    assert estimate["int8"].file_bytes != estimate["fp32"].file_bytes


def test_an_estimate_is_plain_data(estimate: Estimate) -> None:
    data = json.loads(json.dumps(estimate.as_dict()))
    fp32, int8 = data["recipes"]
    assert fp32["macs"] == int8["macs"] == CONV_MACS
    assert fp32["parameters"] == CONV_PARAMETERS
    assert fp32["latency"]["label"] == "assumed"
    assert sum(node["macs"] for node in fp32["nodes"]) == fp32["macs"]
    assert data["failed"] == {"int3": "No such recipe"}


def test_offenders_are_the_longest_kernels(estimate: Estimate) -> None:
    first, second = estimate.offenders("fp32", 2)
    assert first.ms is not None
    assert second.ms is not None
    assert first.ms >= second.ms > 0
    assert first.op == "Conv+Relu"
    assert estimate.per_node_table("fp32").row_count == len(estimate["fp32"].nodes) == 9
    rows = estimate["fp32"].nodes
    total = sum(row.ms or 0.0 for row in rows)
    assert total == pytest.approx(estimate["fp32"].latency.ms)


def test_a_recipe_that_is_not_there_says_what_is(estimate: Estimate) -> None:
    with pytest.raises(UsageError, match="int8"):
        estimate.per_node_table("int3")


def test_weights_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *arguments: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(AbsentTensor, "_fail", fail)
    net = Net(weights=False)
    x = net.value("x", 1, 65536)
    model = net.model([x], [net.op("MatMul", [x, net.weight("w", 65536, 65536)], (1, 65536))])
    report = cost_report(model, ARM64, plan=WeightOnly().plan(model, Context(ARM64)))
    assert isinstance(report, CostReport)
    assert report.parameters == 65536**2
    assert report.file_bytes == pytest.approx(65536**2, rel=0.001)


def test_quantities_for_people() -> None:
    assert [format_bytes(n) for n in (None, 999, 3_500_000, 7e9)] == [
        "?",
        "999 B",
        "3.50 MB",
        "7.00 GB",
    ]
    assert [format_count(n) for n in (None, 999, 300_100_000)] == ["?", "999", "300.1 M"]
