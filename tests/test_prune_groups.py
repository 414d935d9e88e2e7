"""Dependency groups and removal: known answers, and equality on random networks.

Units whose weights are zero are removed; the outputs stay what they were.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgepass.errors import InvalidGraphError
from edgepass.ir.graph import static_shape
from edgepass.ir.verify import interface, verify
from edgepass.passes.prune.groups import find_groups
from edgepass.passes.prune.remove import remove
from edgepass.targets.onnxruntime import OrtRunner
from fuzz_graph import fuzz_case
from prune_graphs import Net, choose, image_network, outputs, sequence_network, zeroed

IMAGE = [("x", TensorProto.FLOAT, (2, 3, 8, 8))]
HEADS = ("auto", "whole", "dimensions")


def assert_removable(model: ir.Model, seed: int, *, makers_only: bool, **options: object) -> None:
    """Remove units whose weights are zero: same interface, same results, fewer parameters."""
    groups = find_groups(model, **options)  # type: ignore[arg-type]
    chosen = choose(groups, 0.4, seed)
    zeroed(groups, chosen, makers_only=makers_only)
    signature, before, size = signatures(model), outputs(model), parameters(model)
    remove(model, groups, chosen)
    verify(model)
    assert signatures(model) == signature
    assert parameters(model) < size or not chosen
    for x, y in zip(before, outputs(model), strict=True):
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max()


def signatures(model: ir.Model) -> tuple:
    return interface(model.graph.inputs), interface(model.graph.outputs)


def parameters(model: ir.Model) -> int:
    # constants of nodes that shapes are made of aside
    return sum(
        int(np.prod(static_shape(v)))
        for v in model.graph.initializers.values()
        if v.dtype == ir.DataType.FLOAT and len(static_shape(v) or ()) > 1
    )


@pytest.mark.parametrize("seed", range(30))
def test_units_of_zeros_are_removed_from_image_networks(seed):
    assert_removable(
        image_network(seed), seed, makers_only=bool(seed % 2), heads=HEADS[seed % 3],
        widths=bool(seed // 6 % 2),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_units_of_zeros_are_removed_from_sequence_networks(seed):
    assert_removable(
        sequence_network(seed), seed, makers_only=bool(seed % 2), heads=HEADS[seed % 3],
        widths=bool(seed // 6 % 2),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_graphs_of_any_operators_stay_sound(seed):
    proto, feeds = fuzz_case(seed)
    model = ir.from_proto(proto)
    groups = find_groups(model, heads=HEADS[seed % 3], widths=bool(seed // 2 % 2))
    chosen = choose(groups, 0.5, seed)
    zeroed(groups, chosen, makers_only=False)

    def results() -> list[np.ndarray]:
        with OrtRunner(model, optimize=False) as runner:
            return [array for feed in feeds for array in runner.run(feed).values()]

    before = results()
    remove(model, groups, chosen)
    verify(model)
    for x, y in zip(before, results(), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5 * (np.abs(x).max(initial=0) + 1e-9))


# --- known answers -----------------------------------------------------------------------------


def members(group) -> set[tuple[str, str]]:
    return {(site.node.name, site.role) for site in group.sites}


def classifier(net: Net, x) -> ir.Model:
    n, c, _, _ = x[1]
    y = net.op("Flatten", [net.op("GlobalAveragePool", [x[0]], (n, c, 1, 1))[0]], (n, c))
    return net.model(IMAGE, [net.op("Gemm", [y[0], net.weight(5, c)], (n, 5), transB=1)])


def test_a_residual_stream_is_one_group_and_what_is_inside_of_a_block_another():
    net = Net(0)
    net.rng = np.random.default_rng(1)
    a = net.conv(("x", (2, 3, 8, 8)), 8)
    b = net.op("Relu", [net.conv(a, 6, 3)[0]], (2, 6, 8, 8))
    c = net.conv(b, 8)
    groups = find_groups(classifier(net, net.op("Add", [a[0], c[0]], a[1])))
    stream, inner, out = groups
    assert (stream.size, inner.size) == (8, 6)
    nodes = {s.node.op_type + s.role for s in stream.sites if s.role != "bias"}
    assert nodes == {"Convout", "Convin", "Gemmin"}
    assert {s.node for s in inner.producers}.isdisjoint(s.node for s in stream.producers)
    assert len(stream.producers) == 2
    assert "is the output" in out.blocked
    assert [g.blocked for g in (stream, inner)] == ["", ""]


def test_depthwise_and_norm_go_with_the_convolution_before_them():
    net = Net(1)
    a = net.conv(("x", (2, 3, 8, 8)), 8)
    b = net.conv(a, 8, 3, group=8)
    vectors = [net.weight(8), net.weight(8), net.weight(8), net.weight(8, low=0.5)]
    c = net.op("BatchNormalization", [b[0], *vectors], b[1])
    group = find_groups(classifier(net, c))[0]
    assert group.size == 8
    roles = [site.role for site in group.sites if site.role != "bias"]
    assert sorted(roles) == ["depthwise", "in", "norm", "norm", "norm", "norm", "out"]


def test_flattened_channels_are_runs_of_columns():
    net = Net(2)
    a = net.conv(("x", (2, 3, 8, 8)), 4)
    y = net.op("Flatten", [a[0]], (2, 256))
    out = net.op("Gemm", [y[0], net.weight(5, 256)], (2, 5), transB=1)
    group = find_groups(net.model(IMAGE, [out]))[0]
    assert group.size == 4
    (read,) = group.consumers
    assert np.array_equal(read.units, np.repeat(np.arange(4), 64))


def test_a_concatenation_keeps_its_branches_apart():
    net = Net(3)
    a, b = (net.conv(("x", (2, 3, 8, 8)), n) for n in (4, 6))
    joined = net.op("Concat", [a[0], b[0]], (2, 10, 8, 8), axis=1)
    first, second = find_groups(classifier(net, joined)).free
    assert (first.size, second.size) == (4, 6)
    assert np.array_equal(first.consumers[0].units, [0, 1, 2, 3, *[-1] * 6])


def attention(fused: bool, *, normed: bool = False) -> ir.Model:
    """Two heads of four dimensions."""
    net = Net(4)
    x = net.linear(("x", (2, 5, 8)), 8, bias=True)
    heads = []
    for _ in range(3):
        y = net.transpose(net.reshape(net.linear(x, 8, bias=False), 2, 5, 2, 4), 0, 2, 1, 3)
        if normed and len(heads) < 2:
            y = net.op("LayerNormalization", [y[0], net.weight(4), net.weight(4)], y[1])
        heads.append(y)
    q, k, v = heads
    scores = net.op("MatMul", [q[0], net.transpose(k, 0, 1, 3, 2)[0]], (2, 2, 5, 5))
    scores = net.op("Softmax", [scores[0]], scores[1], axis=-1)
    y = net.transpose(net.op("MatMul", [scores[0], v[0]], v[1]), 0, 2, 1, 3)
    out = net.linear(net.reshape(y, 2, 5, 8), 3, bias=False)
    return net.model([("x", TensorProto.FLOAT, (2, 5, 8))], [out])


def test_attention_has_dimensions_in_rows_of_heads_or_whole_heads():
    model = attention(fused=False)
    inner = [g for g in find_groups(model).free if g.rows.max() > 0]
    assert [(g.size, g.rows.tolist()) for g in inner] == [(8, [0] * 4 + [1] * 4)] * 2
    scores, values = inner
    assert len(scores.producers) == 2  # queries and keys
    assert len(values.producers) == 1
    assert scores.cluster != values.cluster
    (heads,) = [g for g in find_groups(model, heads="whole").free if len(g.producers) == 3]
    assert heads.size == 2


def test_heads_that_are_normalized_go_whole():
    groups = find_groups(attention(fused=False, normed=True))
    (heads,) = [g for g in groups.free if len(g.producers) > 1]
    assert heads.size == 2
    assert len(heads.producers) == 3


def test_a_width_under_a_layer_normalization_says_which_option_frees_it():
    net = Net(5)
    x = net.linear(("x", (2, 5, 8)), 8)
    y = net.op("LayerNormalization", [x[0], net.weight(8), net.weight(8)], x[1])
    model = net.model([("x", TensorProto.FLOAT, (2, 5, 8))], [net.linear(y, 3)])
    width = find_groups(model)[0]
    assert width.wish == "widths"
    assert "statistics" in width.blocked
    assert not find_groups(model, widths=True)[0].blocked


def test_vectors_that_layers_share_do_not_tie_the_layers():
    net = Net(6)
    bias = net.weight(8)
    x = ("x", (2, 3, 8, 8))
    for channels in (3, 8):
        weight = net.weight(8, channels, 1, 1)
        x = net.op("Relu", [net.op("Conv", [x[0], weight, bias], (2, 8, 8, 8))[0]], (2, 8, 8, 8))
    assert [g.size for g in find_groups(classifier(net, x)).free] == [8, 8]


def test_a_constant_channel_goes_to_the_bias_of_what_reads_it():
    net = Net(7)
    a = net.op("Conv", ["x", net.constant(np.zeros((4, 3, 1, 1), np.float32))], (2, 4, 8, 8))
    a = net.op("Sigmoid", [a[0]], a[1])
    weight = np.ones((2, 4, 1, 1), np.float32)
    b = net.op("Conv", [a[0], net.constant(weight)], (2, 2, 8, 8))
    model = net.model(IMAGE, [b])
    groups = find_groups(model)
    remove(model, groups, {groups.free[0]: [0, 1, 2]})
    np.testing.assert_allclose(outputs(model)[0], 2.0, rtol=1e-6)  # 1.5 of it from the bias
    conv = [n for n in model.graph if n.op_type == "Conv"][-1]
    assert static_shape(conv.inputs[1]) == (2, 1, 1, 1)
    np.testing.assert_allclose(conv.inputs[2].const_value.numpy(), 1.5)


def test_rows_of_heads_must_stay_equally_long():
    model = attention(fused=False)
    groups = find_groups(model)
    heads = next(g for g in groups.free if g.rows.max() > 0)
    with pytest.raises(InvalidGraphError, match="length"):
        remove(model, groups, {heads: [0]})


def test_weights_may_be_absent():
    from edgepass.ir.graph import AbsentTensor

    model, filled = image_network(3), image_network(3)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor.dtype == ir.DataType.FLOAT:
            shape = list(tensor.shape.numpy())
            value.const_value = AbsentTensor(value.name, tensor.dtype, shape)
    for one in (model, filled):
        groups = find_groups(one)
        remove(one, groups, choose(groups, 0.5, 1))
    shapes = [[static_shape(v) for n in m.graph for v in n.outputs] for m in (model, filled)]
    assert shapes[0] == shapes[1]
