"""Depth pruning: which sums end a residual block, what is measured, and what is left behind."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgepass
from edgepass.errors import CalibrationError, PassOptionError, UsageError
from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.passes.base import Context
from edgepass.passes.depth import blocks as depth_blocks
from edgepass.passes.depth.blocks import Found, find_blocks
from edgepass.passes.depth.choice import Goal, Policy, Unit, by_place, choose, units_of
from edgepass.passes.depth.depth import Depth
from edgepass.passes.depth.harm import Skipping, influence
from edgepass.passes.depth.removal import close_places, remove_blocks
from edgepass.passes.driver import run_passes
from edgepass.passes.spec import build_pass, format_pass, parse_specs
from edgepass.pipelines import parse_recipe
from edgepass.targets.onnxruntime import OrtRunner
from generated import feed_for, models

WIDTH, LENGTH = 8, 6


class Net:
    """Nodes one after the other; each method adds some and returns the name of what they make."""

    def __init__(self, shape: tuple[int, ...] = (1, LENGTH, WIDTH), seed: int = 0) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)
        self.extra_inputs: list[onnx.ValueInfoProto] = []

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def const(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int, size: float = 0.3) -> str:
        return self.const((self.rng.standard_normal(shape) * size).astype(np.float32))

    def norm(self, x: str) -> str:
        return self.add(
            "LayerNormalization", x, self.const(np.ones(WIDTH, np.float32)), axis=-1, epsilon=1e-5
        )

    def mlp(self, x: str, size: float = 0.3) -> str:
        hidden = self.add("Relu", self.add("MatMul", x, self.weight(WIDTH, 16, size=size)))
        return self.add("MatMul", hidden, self.weight(16, WIDTH, size=size))

    def attention(self, x: str, size: float = 0.3, mask: str = "") -> str:
        q, k, v = (self.add("MatMul", x, self.weight(WIDTH, WIDTH, size=size)) for _ in range(3))
        scores = self.add("MatMul", q, self.add("Transpose", k, perm=[0, 2, 1]))
        if mask:
            scores = self.add("Add", scores, mask)
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        return self.add("MatMul", mixed, self.weight(WIDTH, WIDTH, size=size))

    def conv(self, x: str, channels: int = 4, size: float = 0.3) -> str:
        return self.add("Conv", x, self.weight(channels, 4, 3, 3, size=size), pads=[1, 1, 1, 1])

    def proto(self, *outputs: str) -> onnx.ModelProto:
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(
            self.nodes, "net", [*given, *self.extra_inputs], made, self.weights
        )
        opset = [helper.make_opsetid("", 20)]
        proto = helper.make_model(graph, opset_imports=opset, ir_version=10)
        return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)

    def model(self, *outputs: str) -> ir.Model:
        return load_model(self.proto(*outputs))

    def feeds(self, count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(seed)
        return [{"x": rng.standard_normal(self.shape).astype(np.float32)} for _ in range(count)]


def image_net() -> Net:
    return Net((1, 4, 5, 5))


def transformer(layers: int = 3, *, post: bool = False, weak: int = -1) -> tuple[Net, str]:
    """Blocks 0, 2, ... are attentions, 1, 3, ... MLPs; block `weak` has tiny weights."""
    net = Net()
    x = net.add("MatMul", "x", net.weight(WIDTH, WIDTH, size=1.0))
    for i in range(2 * layers):
        branch = net.mlp if i % 2 else net.attention
        size = 1e-4 if i == weak else 0.3
        if post:
            x = net.norm(net.add("Add", x, branch(x, size)))
        else:
            x = net.add("Add", x, branch(net.norm(x), size))
    return net, net.add("MatMul", x, net.weight(WIDTH, WIDTH))


def ends(found: Found) -> list[str]:
    return [block.add.name or "" for block in found.blocks]


def results(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with OrtRunner(model, optimize=False) as runner:
        return list(runner.run(feed).values())


# --- what is a block -------------------------------------------------------------------------


@pytest.mark.parametrize("post", [False, True], ids=["pre_norm", "post_norm"])
def test_branches_of_a_transformer(post: bool) -> None:
    net, out = transformer(2, post=post)
    found = find_blocks(net.model(out))
    assert [block.kind for block in found.blocks] == ["attention", "product"] * 2
    assert [block.layer for block in found.blocks] == [0, 0, 1, 1]
    heads = 4 * LENGTH * WIDTH * WIDTH + 2 * LENGTH * LENGTH * WIDTH
    assert [block.macs for block in found.blocks] == [heads, 2 * LENGTH * WIDTH * 16] * 2
    assert [block.parameters for block in found.blocks][1] == 2 * WIDTH * 16 + (not post) * WIDTH
    assert found.reach == sum(block.macs or 0 for block in found.blocks)
    assert found.macs == found.reach + 2 * LENGTH * WIDTH * WIDTH


def test_convolutions_with_a_relu_behind_the_sum() -> None:
    net = image_net()
    x = net.add("Relu", net.conv("x"))
    for _ in range(2):
        x = net.add("Relu", net.add("Add", net.conv(net.add("Relu", net.conv(x))), x))
    found = find_blocks(net.model(net.conv(x)))
    assert [block.kind for block in found.blocks] == ["convolution"] * 2
    assert [block.layer for block in found.blocks] == [0, 1]
    assert found.blocks[0].entry.name == "Relu_1"


def test_a_projected_shortcut_is_no_block() -> None:
    net = image_net()
    out = net.add("Add", net.conv(net.add("Relu", net.conv("x"))), net.conv("x"))
    assert not find_blocks(net.model(out)).blocks


def test_sums_within_an_activation_are_no_blocks() -> None:
    net = Net()
    x = net.add("MatMul", "x", net.weight(WIDTH, WIDTH))
    cube = net.add("Mul", net.add("Mul", x, x), x)
    gelu = net.add("Tanh", net.add("Add", x, net.add("Mul", cube, net.weight(1))))
    found = find_blocks(net.model(net.add("Mul", x, gelu)))
    assert found == Found((), (), found.macs, found.costs)


def test_a_branch_that_broadcasts_is_a_block_and_a_sum_that_grows_is_none() -> None:
    net = Net()
    pooled = net.add("ReduceMean", "x", net.const(np.array([1])), keepdims=1)
    grown = net.add("Add", pooled, net.mlp("x"))  # what is left without f is smaller
    narrow = net.add("Add", grown, net.mlp(net.add("Slice", grown, *_first_row(net))))
    model = net.model(narrow, net.mlp(narrow), net.mlp(narrow), net.mlp(narrow))
    assert ends(find_blocks(model)) == [narrow]


def _first_row(net: Net) -> list[str]:
    return [net.const(np.array([value])) for value in (0, 1, 1)]


def test_what_does_not_depend_on_x_may_come_from_anywhere() -> None:
    net = Net()
    net.extra_inputs.append(
        helper.make_tensor_value_info("mask", TensorProto.FLOAT, [LENGTH, LENGTH])
    )
    x = net.mlp("x")
    late = net.add("Neg", "mask")  # behind x, and used by both blocks
    for _ in range(2):
        x = net.add("Add", x, net.attention(x, mask=late))
    model = net.model(net.mlp(x))
    found = find_blocks(model)
    assert len(found.blocks) == 2
    assert all("Neg" not in node.op_type for block in found.blocks for node in block.nodes)


def test_a_value_of_the_branch_that_is_used_elsewhere_is_the_reason() -> None:
    net = Net()
    x = net.mlp("x")
    inner = net.add("Relu", net.mlp(x))
    out = net.add("Add", x, net.mlp(inner))
    found = find_blocks(net.model(out, inner))  # like a cache of keys that the model gives
    assert not found.blocks
    assert [item.node for item in found.refused] == [out]
    assert inner in found.refused[0].why


def test_a_whole_model_between_input_and_output_is_no_block() -> None:
    net, out = transformer(2)
    total = net.add("Add", "x", out)
    found = find_blocks(net.model(total))
    assert total not in ends(found)
    assert len(found.blocks) == 4
    assert "multiply-accumulates" in found.refused[0].why


@pytest.mark.parametrize("order", ["one after the other", "together"])
def test_parallel_branches(order: str) -> None:
    net = Net()
    x = net.mlp(net.mlp("x"))
    h = net.norm(x)
    if order == "together":
        out = net.add("Add", net.add("Add", net.attention(h), net.mlp(h)), x)
    else:
        out = net.add("Add", net.add("Add", x, net.attention(h)), net.mlp(h))
    for _ in range(3):
        out = net.mlp(out)
    found = find_blocks(net.model(out))
    kinds = sorted(block.kind for block in found.blocks)
    assert kinds == sorted(["attention", "product"] + ["attention"] * (order == "together"))


@pytest.mark.parametrize("way", ["Mul", "Transpose", "Sum", "LayerScale"])
def test_ways_of_x_to_the_sum(way: str) -> None:
    net = Net()
    x = net.mlp("x")
    if way == "Mul":
        out = net.add("Add", net.add("Mul", x, net.weight(1)), net.mlp(x))
    elif way == "Transpose":
        turned = net.add("Transpose", net.mlp(x), perm=[0, 2, 1])
        out = net.add("Add", net.add("Transpose", x, perm=[0, 2, 1]), turned)
        out = net.add("Transpose", out, perm=[0, 2, 1])
    elif way == "Sum":
        out = net.add("Sum", x, net.weight(1, LENGTH, WIDTH), net.mlp(x))
    else:
        out = net.add("Add", net.add("Mul", net.mlp(x), net.weight(WIDTH)), x)
    model = net.model(net.mlp(out))
    found = find_blocks(model)
    assert len(found.blocks) == 1
    assert found.blocks[0].entry.name == x
    assert_same_as_skipped(model, net.feeds(1)[0], [0])


def test_the_search_is_linear_in_a_chain_and_bounded_in_sums(monkeypatch) -> None:
    looked = itertools.count()
    monkeypatch.setattr(depth_blocks, "_read", _counting(depth_blocks._read, looked))
    visits = []
    for layers in (20, 40):
        net, out = transformer(layers)
        # a table that every layer adds to something of its shape, as T5 does with positions
        model = net.model(out)
        begin = next(looked)
        assert len(find_blocks(model).blocks) == 2 * layers
        visits.append(next(looked) - begin)
    assert visits[1] < 2.2 * visits[0]


def _counting(function, counter):
    def counted(node):
        next(counter)
        return function(node)

    return counted


# --- skipping and removing -------------------------------------------------------------------


def assert_same_as_skipped(
    model: ir.Model, feed: dict[str, np.ndarray], gone: list[int], atol: float = 1e-5
) -> None:
    """Removing blocks gives what the session with switches gives, in a sound model."""
    found = find_blocks(model)
    present = np.ones(len(found.blocks), bool)
    present[gone] = False
    with Skipping(model, found.blocks) as skipping:
        wanted = skipping.run(feed, present)
    copy = model.clone()
    places = remove_blocks(copy, [find_blocks(copy).blocks[i] for i in gone])
    close_places([place for place, _ in places])
    copy, _ = run_passes(copy, [])  # verifies and infers shapes
    assert [v.name for v in copy.graph.outputs] == [v.name for v in model.graph.outputs]
    for expected, actual in zip(wanted, results(copy, feed), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


@given(st.sets(st.integers(0, 5)), st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_subset_of_blocks_can_go(gone: set[int], post: bool) -> None:
    net, out = transformer(3, post=post)
    assert_same_as_skipped(net.model(out), net.feeds(1)[0], sorted(gone))


@given(st.lists(st.integers(0, 2), unique=True, max_size=3))
@settings(max_examples=10, deadline=None)
def test_blocks_within_blocks_and_terms_of_one_sum_go_in_any_order(gone: list[int]) -> None:
    net = Net()
    x = net.mlp("x")
    h = net.norm(x)
    inner = net.add("Add", net.attention(h), net.mlp(h))
    out = net.add("Add", x, inner)
    for _ in range(6):
        out = net.mlp(out)
    model = net.model(out)
    found = find_blocks(model)
    assert [block.add.name for block in found.blocks].count(inner) == 2
    assert len(found.blocks) == 3
    assert_same_as_skipped(model, net.feeds(1)[0], gone)


@given(models())
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_generated_graphs(proto: onnx.ModelProto) -> None:
    model = load_model(proto)
    model, _ = run_passes(model, [])
    count = len(find_blocks(model).blocks)
    for gone in ([i] for i in range(count)):
        assert_same_as_skipped(model, feed_for(proto), gone, atol=1e-3)


def test_a_block_that_computes_nothing_goes_without_a_trace() -> None:
    net, out = transformer(3)
    proto = net.proto(out)
    names = _weights_of(proto, 3)
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            zeros = np.zeros(list(tensor.dims), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
    feeds = net.feeds(4)
    model, ledger = run_passes(load_model(proto), [Depth(blocks=1)], Context(calibration=feeds))
    assert "1 of 6" in " ".join(ledger.rows[0].notes)
    for feed in feeds:
        expected = results(load_model(proto), feed)[0]
        np.testing.assert_allclose(results(model, feed)[0], expected, atol=1e-6)
    assert not names & set(model.graph.initializers)
    saved = ledger.rows[0].before.macs - ledger.rows[0].after.macs
    assert saved == find_blocks(load_model(proto)).blocks[3].macs


def _weights_of(proto: onnx.ModelProto, block: int) -> set[str]:
    nodes = find_blocks(load_model(proto)).blocks[block].nodes
    last = [n for n in nodes if n.op_type == "MatMul"]
    return {v.name for n in last for v in n.inputs if v is not None and v.is_initializer()}


# --- the choice ------------------------------------------------------------------------------


def test_the_block_of_least_harm_goes_first() -> None:
    net, out = transformer(3, weak=4)
    model = net.model(out)
    feeds = net.feeds()
    found = find_blocks(model)
    assert int(np.argmin(influence(model, found.blocks, feeds))) == 4
    for policy in (Policy.HARM, Policy.INFLUENCE):
        _, ledger = run_passes(
            model.clone(), [Depth(blocks=1, by=policy)], Context(calibration=feeds)
        )
        assert found.blocks[4].name in ledger.rows[0].notes[1]


def test_influence_of_a_known_turn() -> None:
    net = Net((1, 1, WIDTH))
    turn = np.zeros((WIDTH, WIDTH), np.float32)
    turn[0, 1] = 1.0  # e0 -> e0 + e1: 45 degrees
    block = net.add("Add", "x", net.add("MatMul", "x", net.const(turn)))
    model = net.model(net.mlp(net.mlp(block)))
    feed = {"x": np.eye(WIDTH, dtype=np.float32)[:1][None]}
    found = influence(model, find_blocks(model).blocks, [feed])
    np.testing.assert_allclose(found, [1 - np.sqrt(0.5)], atol=1e-6)


def test_collapse_is_not_shipped() -> None:
    net, out = transformer(3, weak=4)
    context = Context(calibration=net.feeds())
    _, ledger = run_passes(net.model(out), [Depth(blocks=5, max_harm=30)], context)
    notes = "\n".join(ledger.rows[0].notes)
    assert "removed 1 of 6" in notes
    assert "stopped before the goal (5 branch)" in notes
    assert "30.0 dB must be" in notes
    _, ledger = run_passes(net.model(out), [Depth(blocks=1, max_harm=200)], context)
    assert not ledger.rows[0].modified
    assert "none of 6 residual blocks removed" in ledger.rows[0].notes[0]


def test_a_share_of_what_blocks_compute() -> None:
    net, out = transformer(4)
    found = find_blocks(net.model(out))
    model, ledger = run_passes(
        net.model(out), [Depth(ratio=0.5, max_harm=-100)], Context(calibration=net.feeds())
    )
    before, after = ledger.rows[0].before.macs, ledger.rows[0].after.macs
    smallest = min(block.macs for block in found.blocks)
    assert abs((before - after) - 0.5 * found.reach) <= smallest / 2
    assert len(find_blocks(model).blocks) < 8


def test_what_lies_in_two_blocks_counts_once() -> None:
    net = Net()
    x = net.mlp(net.mlp(net.mlp("x")))
    inner = net.mlp(x)
    out = net.add("Add", x, net.add("Add", inner, net.mlp(inner)))
    found = find_blocks(net.model(net.mlp(net.mlp(net.mlp(out)))))
    assert len(found.blocks) == 2
    assert found.saved(found.blocks) == max(block.macs for block in found.blocks)
    # the last ones first, but what holds others after all others
    assert by_place(units_of(found, Unit.BRANCH)) == [0, 1]
    chosen = choose(found, units_of(found, Unit.BRANCH), Goal(units=2), order=[1, 0])
    assert len(chosen.blocks) == 1
    assert chosen.stopped == "there are no more blocks"


def test_layers_go_whole_and_the_last_one_stays() -> None:
    net, out = transformer(3)
    model, _ = run_passes(net.model(out), [Depth(blocks=1, unit=Unit.LAYER, by=Policy.LAST)])
    left = find_blocks(model)
    names = ends(find_blocks(net.model(out)))
    assert ends(left) == [*names[:2], *names[4:]]


def test_at_random_is_the_same_for_the_same_seed() -> None:
    net, out = transformer(3)
    picks = []
    for seed in (0, 0, 1, 2, 3):
        _, ledger = run_passes(net.model(out), [Depth(blocks=2, by=Policy.RANDOM, seed=seed)])
        picks.append(ledger.rows[0].notes[1:3])
        assert "not measured" in ledger.rows[0].notes[-1]
    assert picks[0] == picks[1]
    assert len({tuple(pick) for pick in picks}) > 1


def test_excluded_blocks_stay() -> None:
    net, out = transformer(2)
    names = ends(find_blocks(net.model(out)))
    item = Depth(blocks=4, by=Policy.LAST, exclude=(names[1],))
    model, ledger = run_passes(net.model(out), [item])
    assert set(names) & {node.name for node in model.graph} == {names[1]}
    assert "there are no more blocks" in ledger.rows[0].notes[-2]


def test_an_architecture_without_weights_goes_by_place() -> None:
    net, out = transformer(2)
    model = net.model(out)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = AbsentTensor(value.name or "", tensor.dtype, tensor.shape)
    model, ledger = run_passes(model, [Depth(ratio=0.5)])
    assert "chosen by their place" in ledger.rows[0].notes[-1]
    assert ledger.rows[0].after.macs < ledger.rows[0].before.macs


# --- repair ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, LENGTH, WIDTH), (1, 4, 5, 5)], ids=["rows", "images"])
def test_a_scale_and_a_shift_of_each_channel_are_found_again(shape: tuple[int, ...]) -> None:
    net = Net(shape)
    if len(shape) == 3:
        gain = net.const(np.diag(np.linspace(-0.5, 1, WIDTH)).astype(np.float32))
        x = net.mlp("x")
        branch = net.add("Add", net.add("MatMul", x, gain), net.weight(WIDTH, size=1))
        block = net.add("Add", x, branch)
        out = net.mlp(net.mlp(block))
    else:
        kernel = np.zeros((4, 4, 1, 1), np.float32)
        kernel[range(4), range(4)] = np.linspace(-0.5, 1, 4)[:, None, None]
        x = net.conv("x")
        branch = net.add("Conv", x, net.const(kernel), net.weight(4, size=1))
        block = net.add("Add", x, branch)
        out = net.conv(net.conv(block))
    feeds = net.feeds(16)
    item = Depth(blocks=1, max_harm=-100, repair=True)
    model, ledger = run_passes(net.model(out), [item], Context(calibration=feeds))
    assert "got a scale and a shift" in ledger.rows[0].notes[-1]
    wanted = results(net.model(out), feeds[0])[0]
    np.testing.assert_allclose(results(model, feeds[0])[0], wanted, rtol=1e-3, atol=1e-4)
    plain, _ = run_passes(
        net.model(out), [Depth(blocks=1, max_harm=-100)], Context(calibration=feeds)
    )
    assert np.abs(results(plain, feeds[0])[0] - wanted).max() > 0.01


# --- as a user sees it -----------------------------------------------------------------------


def test_nothing_to_remove_says_so() -> None:
    net = Net()
    _, ledger = run_passes(net.model(net.mlp("x")), [Depth()])
    assert not ledger.rows[0].modified
    assert ledger.rows[0].notes[0].startswith("nothing to remove")


def test_without_samples_the_policy_must_be_named() -> None:
    net, out = transformer(1)
    with pytest.raises(UsageError, match="calibration") as caught:
        run_passes(net.model(out), [Depth()])
    assert "depth{by=last}" in caught.value.diagnostic.fix
    with pytest.raises(CalibrationError):
        run_passes(net.model(out), [Depth()], Context(calibration=[]))


def test_options() -> None:
    text = "depth{blocks=2,unit=layer,by=influence,max_harm=6}"
    item = build_pass(Depth, parse_specs(text)[0])
    assert item == Depth(blocks=2, unit=Unit.LAYER, by=Policy.INFLUENCE, max_harm=6)
    assert build_pass(Depth, parse_specs(format_pass(item))[0]) == item
    for wrong in ({"blocks": -1}, {"ratio": 1.5}):
        with pytest.raises(PassOptionError):
            Depth(**wrong)
    assert "depth" in [p.name for p in parse_recipe("depth{blocks=1}+int8")]


def test_with_int8_behind_it() -> None:
    net, out = transformer(3, weak=2)
    compiled = edgepass.compile(
        net.proto(out),
        "x86_64",
        recipe="depth{blocks=1}+int8",
        calibration=net.feeds(16),
        force=True,
        time_budget_s=0,
    )
    rows = {row.name.split("{")[0]: row for row in compiled.ledger.rows}
    assert rows["depth"].modified
    assert rows["int8"].modified
    feed = net.feeds(1, seed=9)[0]
    wanted = results(net.model(out), feed)[0]
    found = next(iter(compiled.run(feed).values()))
    assert np.sum((found - wanted) ** 2) < 0.05 * np.sum(wanted**2)


def test_outputs_of_the_model_keep_their_names() -> None:
    net = Net()
    x = net.mlp(net.mlp("x"))
    once = net.add("Add", x, net.mlp(x))
    twice = net.add("Add", once, net.mlp(once))
    model = net.model(x, once, twice)
    for gone in ([0], [1], [0, 1]):
        assert_same_as_skipped(model, net.feeds(1)[0], gone)
