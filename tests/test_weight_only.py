"""Weights in few bits: what is stored, what runs, how close it is, and that sizes are foretold."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgepass
from edgepass.cost.size import file_bytes
from edgepass.errors import CalibrationError, PassOptionError, UsageError
from edgepass.ir.graph import AbsentTensor, all_nodes, graph_tree
from edgepass.ir.ops import node_cost
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.measuring import saved_bytes
from edgepass.passes.base import Context
from edgepass.passes.cleanup.folding import FoldConstants
from edgepass.passes.quantize.folded_chain import pack_bits, pack_places
from edgepass.passes.quantize.fp8 import Fp8
from edgepass.passes.quantize.gptq import gptq
from edgepass.passes.quantize.grids import Grid, clipped, nearest
from edgepass.passes.quantize.hqq import hqq
from edgepass.passes.quantize.kmeans import assign, codebook
from edgepass.passes.quantize.palettize import Palettize
from edgepass.passes.quantize.refine import refine
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.targets.onnxruntime import OrtRunner

QUICK = settings(max_examples=25, deadline=None)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(nodes, inputs, outputs, weights, opset=17) -> ir.Model:
    graph = helper.make_graph(
        [
            helper.make_node(op, ins.split(), outs.split(), name=f"n{i}_{op}", **attributes)
            for i, (op, ins, outs, attributes) in enumerate(nodes)
        ],
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


VOCABULARY, WIDTH = 96, 64


def language_model(opset: int = 17, tied: bool = True, width: int = WIDTH) -> ir.Model:
    """Embedding, a norm, two products, a residual, and the embedding again as the last product."""
    weights = {
        "table": normal(VOCABULARY, width, seed=1),
        "gamma": 1 + 0.5 * normal(width),
        "beta": 0.1 * normal(width, seed=2),
        "up": normal(width, 112) * np.exp(normal(width, 1, seed=3)),
        "down": normal(112, width, seed=4),
    }
    last = [("Transpose", "table", "t", {"perm": [1, 0]}), ("MatMul", "s t", "y", {})]
    if not tied:
        weights["head"] = normal(width, VOCABULARY, seed=5)
        last = [("MatMul", "s head", "y", {})]
    nodes = [
        ("Gather", "table ids", "e", {}),
        ("LayerNormalization", "e gamma beta", "n", {}),
        ("MatMul", "n up", "u", {}),
        ("Relu", "u", "r", {}),
        ("MatMul", "r down", "d", {}),
        ("Add", "e d", "s", {}),
        *last,
    ]
    shape = [1, "length", VOCABULARY]
    ids = {"ids": (TensorProto.INT64, [1, "length"])}
    return model_of(nodes, ids, {"y": shape}, weights, opset)


def texts(count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    chances = 1.0 / np.arange(1, VOCABULARY + 1)
    p = chances / chances.sum()
    return [{"ids": rng.choice(VOCABULARY, (1, 40), p=p)} for _ in range(count)]


def conv_net(opset: int = 17) -> ir.Model:
    return model_of(
        [
            ("Conv", "x w", "c", {"pads": [1, 1, 1, 1]}),
            ("Relu", "c", "r", {}),
            ("ConvTranspose", "r t", "y", {}),
        ],
        {"x": (TensorProto.FLOAT, [1, 8, 9, 9])},
        {"y": [1, 8, 13, 13]},
        {"w": normal(18, 8, 3, 3), "t": normal(18, 8, 5, 5)},
        opset,
    )


def recurrent_branch(inside: bool, opset: int = 17) -> ir.Model:
    """An LSTM in a branch of an If; its weights in the branch or in the main graph."""
    arrays = {"w": normal(1, 128, 16), "r": normal(1, 128, 32) / 4}
    weights = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    hidden = helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 2, 32])
    then = helper.make_graph(
        [helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], name="lstm", hidden_size=32)],
        "then",
        [],
        [hidden],
        weights if inside else [],
    )
    zeros = numpy_helper.from_array(np.zeros((1, 2, 32), np.float32))
    otherwise = helper.make_graph(
        [helper.make_node("Constant", [], ["z"], value=zeros)],
        "otherwise",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2, 32])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], "if", then_branch=then, else_branch=otherwise)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 2, 16]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 32])],
        [] if inside else weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def absent(model: ir.Model) -> ir.Model:
    """The model without the data of its float weights."""
    copy = model.clone()
    for graph in graph_tree(copy.graph):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor.dtype.is_floating_point() and tensor.size > 64:
                shape = tuple(tensor.shape.numpy())
                value.const_value = AbsentTensor(value.name, tensor.dtype, shape)
    return copy


def outputs(model: ir.Model, feed) -> np.ndarray:
    with OrtRunner(model) as runner:
        return next(iter(runner.run(feed).values()))


def sqnr(reference: np.ndarray, result: np.ndarray) -> float:
    noise = np.square(reference.astype(np.float64) - result).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / max(noise, 1e-30)))


def optimized(model: ir.Model, folder) -> collections.Counter[str]:
    """Operators of the graph that ONNX Runtime runs, bodies included."""
    path = folder / "optimized.onnx"
    OrtRunner(model, save_optimized=path).close()

    def walk(graph: onnx.GraphProto):
        for node in graph.node:
            yield node.op_type
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from walk(attribute.g)

    return collections.Counter(walk(onnx.load(path).graph))


def weight_bytes(model: ir.Model) -> int:
    return sum(
        v.const_value.nbytes for g in graph_tree(model.graph) for v in g.initializers.values()
    )


# --- forms that a runtime folds at load --------------------------------------------------------

FOLDED = [
    (WeightOnly(), 30),
    (WeightOnly(others=4), 15),
    (WeightOnly(others=3), 8),
    (WeightOnly(others=5, zero_points=True), 20),
    (Palettize(), 15),
    (Palettize(bits=3, group=6), 8),
    (Palettize(bits=1), 2),
    (Fp8(), 25),
    (Fp8(format="e5m2"), 20),
]


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(("item", "least"), FOLDED, ids=str)
def test_convolutions_run_as_in_float(item, least, opset, tmp_path):
    model = conv_net(opset)
    feed = {"x": normal(1, 8, 9, 9)}
    reference, ops, before = outputs(model, feed), optimized(model, tmp_path), weight_bytes(model)
    assert item.run(model, Context()).modified
    verify(model)
    assert optimized(model, tmp_path) == ops
    assert sqnr(reference, outputs(model, feed)) > least
    assert weight_bytes(model) < before / 3


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("item", [WeightOnly(), Palettize(bits=6), Fp8()], ids=str)
def test_recurrent_layers_in_branches_too(item, inside, tmp_path):
    model = recurrent_branch(inside)
    feed = {"x": normal(5, 2, 16), "c": np.array(True)}
    reference = outputs(model, feed)
    cost = next(node_cost(n) for n in model.graph if n.op_type == "If")
    before = weight_bytes(model)
    item.run(model, Context())
    verify(model)
    infer_shapes(model)
    assert optimized(model, tmp_path) == {"If": 1, "LSTM": 1}
    assert sqnr(reference, outputs(model, feed)) > 15
    assert weight_bytes(model) < before / 2.5
    after = next(node_cost(n) for n in model.graph if n.op_type == "If")
    assert (after.macs, after.flops) == (cost.macs, cost.flops)  # unpacking is no part of a run


def test_cleanup_leaves_small_weights_small():
    model = conv_net(21)
    WeightOnly().run(model, Context())
    size = weight_bytes(model)
    FoldConstants(max_growth=1 << 20).run(model, Context())
    assert weight_bytes(model) == size


def test_a_weight_with_two_readers_is_stored_once():
    nodes = [("Conv", "x w", "a", {}), ("Conv", "a w", "y", {})]
    info = {"x": (TensorProto.FLOAT, [1, 16, 8, 8])}
    model = model_of(nodes, info, {"y": [1, 16, 4, 4]}, {"w": normal(16, 16, 3, 3) / 12})
    WeightOnly().run(model, Context())
    assert weight_bytes(model) == 16 * 16 * 9 + 16 * 4


@QUICK
@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_packed_codes_come_apart(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack_places(codes, bits)
    assert packed.nbytes == -(-count // 8) * bits
    places = np.unpackbits(packed, axis=1, bitorder="little")
    found = (places.astype(int) << np.arange(bits)).sum(axis=2).reshape(-1)[:count]
    assert (found == codes).all()


def test_nibbles_lie_low_first():
    assert pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(np.array([1, 2, 3, 0, 1], np.uint8), 2).tolist() == [0b00111001, 1]


# --- matrices ----------------------------------------------------------------------------------

MATRICES = [
    (WeightOnly(bits=8), 30),
    (WeightOnly(bits=8, block=32), 30),
    (WeightOnly(bits=8, block=32, zero_points=True), 30),
    (WeightOnly(bits=4), 12),
    (WeightOnly(bits=4, block=16, zero_points=True), 14),
    (WeightOnly(bits=4, method="hqq"), 12),
    (WeightOnly(bits=3), 7),
    (WeightOnly(bits=3, zero_points=True), 7),
    (WeightOnly(bits=2, block=16), 1),
    (WeightOnly(bits=6), 22),
    (WeightOnly(bits=4, tables=4), 10),
    (WeightOnly(bits=4, tables=2), 1),
]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("item", "least"), MATRICES, ids=str)
def test_language_models_stay_close(item, least, tied, portable):
    model = language_model(tied=tied)
    feed = texts(1)[0]
    reference = outputs(model, feed)
    item.run(model, Context(portable=portable))
    verify(model)
    assert sqnr(reference, outputs(model, feed)) > least
    if portable:
        assert {n.domain for n in model.graph} == {""}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels_multiply_few_bits_as_they_are(bits, tmp_path):
    model = language_model()
    WeightOnly(bits=bits, block=32).run(model, Context())
    ops = optimized(model, tmp_path)
    assert ops["MatMulNBits"] == 3
    assert ops["GatherBlockQuantized"] == 1
    assert ops["MatMul"] == ops["Transpose"] == ops["DequantizeLinear"] == 0


def test_three_bits_are_packed_and_unpacked_at_load(tmp_path):
    model = language_model(tied=False)
    WeightOnly(bits=3).run(model, Context())
    packed = [
        v.const_value
        for n, v in model.graph.initializers.items()
        if n.rpartition("/")[2] == "bits3"
    ]
    elements = (
        2 * (WIDTH * 112 + 16 * 0) + WIDTH * VOCABULARY + 16 * WIDTH
    )  # 112 rows fill 4 blocks
    assert sum(t.nbytes for t in packed) == elements * 3 // 8
    ops = optimized(model, tmp_path)
    assert ops["BitShift"] == ops["ReduceSum"] == 0
    assert ops["MatMul"] == 3


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (4, 4)])
def test_a_tied_table_is_stored_once(bits, expected):
    model = language_model()
    WeightOnly(bits=4, tables=bits, block=32).run(model, Context())
    stored = [
        v.const_value for n, v in model.graph.initializers.items() if n.startswith("table/int")
    ]
    assert [t.nbytes for t in stored] == [VOCABULARY * WIDTH * expected // 8]
    assert "table" not in model.graph.initializers


def test_a_table_whose_rows_do_not_fill_blocks_is_stored_twice():
    model = language_model(width=72)
    feed = texts(1)[0]
    reference = outputs(model, feed)
    WeightOnly(block=64).run(model, Context())
    verify(model)
    stored = [n for n in model.graph.initializers if n.startswith("table/int")]
    assert len(stored) == 2
    assert sqnr(reference, outputs(model, feed)) > 30


def test_exceptions_by_name_and_operator():
    model = language_model(tied=False)
    item = WeightOnly(bits=4, bits_of=("up:8", "n4_MatMul:2"), exclude=("head",), block=32)
    result = item.run(model, Context())
    widths = {
        n.inputs[1].name: n.attributes["bits"].value for n in model.graph if "NBits" in n.op_type
    }
    assert widths == {"up/int8": 8, "down/int2": 2}
    assert any("excluded by option" in note for note in result.notes)
    assert "head" in model.graph.initializers


@pytest.mark.parametrize("average", [2.0, 3.0, 5.0, 8.0])
def test_bits_within_an_average(average):
    model = language_model(tied=False)
    WeightOnly(method="gptq", average_bits=average, block=16).run(
        model, Context(calibration=texts())
    )
    found = [n for n in model.graph if n.op_type == "MatMulNBits"]
    sizes = [n.attributes["K"].value * n.attributes["N"].value for n in found]
    bits = [n.attributes["bits"].value for n in found]
    assert len(found) == 3
    mean = np.dot(sizes, bits) / sum(sizes)
    assert average - 2.0 < mean <= average


# --- methods -----------------------------------------------------------------------------------


def correlated(depth: int = 64, rows: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with strong correlations and uneven channels, and their second moments."""
    x = normal(rows, depth // 4, seed=7) @ normal(depth // 4, depth, seed=8)
    x = (x + 0.3 * normal(rows, depth, seed=9)) * np.exp(normal(depth, seed=10))
    return x, (x.T @ x).astype(np.float64) / rows


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_method_improves_on_the_simpler_one(bits, symmetric):
    x, moments = correlated()
    matrix = normal(64, 40, seed=11)
    grid = Grid(bits, 16, symmetric)

    def loss(codes):
        return float(np.square(x @ (codes.restored() - matrix)).sum())

    plain, ranged = nearest(matrix, grid), clipped(matrix, grid)
    weighed = clipped(matrix, grid, np.diag(moments))
    passed = gptq(matrix, moments, grid)
    better = refine(matrix, moments, passed)

    def error(codes):
        return float(np.square(codes.restored() - matrix).sum())

    assert error(ranged) < error(plain)
    assert loss(weighed) < loss(plain)
    assert loss(passed) < 0.7 * loss(weighed)
    assert loss(better) < loss(passed)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [0, 16, 128])
def test_gptq_of_independent_inputs_is_rounding(act_order, block):
    matrix = normal(200, 8)
    grid = Grid(4, block)
    found = gptq(matrix, np.eye(200), grid, act_order=act_order)
    rounded = clipped(matrix, grid)
    assert np.array_equal(found.codes, rounded.codes)
    assert np.allclose(found.scale, rounded.scale)


def test_gptq_takes_inputs_that_are_never_on():
    _, moments = correlated()
    moments[:, 5] = moments[5] = 0
    found = gptq(normal(64, 8), moments, Grid(4, 32))
    assert np.isfinite(found.restored()).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_lowers_the_error_of_heavy_tails(bits):
    matrix = np.random.default_rng(0).standard_t(3, (128, 64)).astype(np.float32)
    grid = Grid(bits, 32, symmetric=False)
    error = [
        float((np.abs(codes.restored() - matrix) ** 0.7).mean())
        for codes in (nearest(matrix, grid), hqq(matrix, grid))
    ]
    assert error[1] < error[0]


@QUICK
@given(
    depth=st.integers(1, 70),
    out=st.integers(1, 9),
    bits=st.integers(2, 8),
    block=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_rounding_is_within_half_a_step(depth, out, bits, block, symmetric, seed):
    matrix = normal(depth, out, seed=seed)
    codes = nearest(matrix, Grid(bits, block, symmetric))
    size = block or depth
    step = np.repeat(np.abs(codes.scale), size, axis=0)[:depth]
    slack = 0.5 if symmetric else 1.0  # a rounded zero point moves the ends by half a step
    assert (np.abs(codes.restored() - matrix) <= slack * step * 1.001 + 1e-6).all()


@pytest.mark.parametrize("method", ["gptq", "awq", "awq-gptq"])
@pytest.mark.parametrize("sequential", [False, True])
def test_methods_with_data_beat_rounding(method, sequential):
    reference = [outputs(language_model(), feed) for feed in texts(3, seed=5)]

    def quality(**options):
        model = language_model()
        WeightOnly(bits=3, tables=8, **options).run(model, Context(calibration=texts(16)))
        verify(model)
        found = [outputs(model, feed) for feed in texts(3, seed=5)]
        return sqnr(np.concatenate(reference, 1), np.concatenate(found, 1))

    assert quality(method=method, sequential=sequential) > quality(method="minmax") + 1


def test_awq_scales_what_a_norm_can_take_up():
    model = language_model(tied=False)
    feed = texts(1)[0]
    gamma = model.graph.initializers["gamma"].const_value.numpy().copy()
    result = WeightOnly(bits=8, block=16, method="awq").run(model, Context(calibration=texts()))
    assert any(note.startswith("awq: scaled") for note in result.notes)
    assert any("kept" in note for note in result.notes)  # the residual has no maker
    assert not np.allclose(model.graph.initializers["gamma"].const_value.numpy(), gamma)
    assert sqnr(outputs(language_model(tied=False), feed), outputs(model, feed)) > 30


def test_the_order_of_samples_does_not_matter():
    found = []
    for samples in (texts(), texts()[::-1]):
        model = language_model()
        WeightOnly(bits=4, method="gptq").run(model, Context(calibration=samples))
        found.append({n: v.const_value.numpy() for n, v in model.graph.initializers.items()})
    assert all((found[0][n] == found[1][n]).mean() > 0.999 for n in found[0])


def test_data_is_asked_for():
    with pytest.raises(UsageError, match="needs calibration data"):
        WeightOnly(bits=4, method="gptq").run(language_model(), Context())
    with pytest.raises(CalibrationError, match="empty"):
        WeightOnly(bits=4, method="awq").run(language_model(), Context(calibration=[]))


# --- codebooks ---------------------------------------------------------------------------------


def test_codebooks_find_planted_clusters():
    centres = np.array([-3.0, -1.0, 0.5, 4.0], np.float32)
    rng = np.random.default_rng(0)
    values = rng.choice(centres, 4000) + 0.05 * rng.standard_normal(4000)
    found = codebook(values, 4)
    assert np.allclose(found, centres, atol=0.02)
    assert np.abs(found[assign(values, found)] - values).max() < 0.3


def test_few_distinct_values_are_kept_exactly():
    values = np.array([[0.25, -1.5], [7.0, 0.25]], np.float32)
    found = codebook(values, 8)
    assert (found[assign(values, found)] == values).all()
    assert len(codebook(np.zeros(0), 4)) == 4


@QUICK
@given(size=st.sampled_from([2, 4, 16]), seed=st.integers(0, 50))
def test_a_codebook_beats_even_levels(size, seed):
    values = np.random.default_rng(seed).laplace(size=500).astype(np.float32)
    found = codebook(values, size)
    even = np.linspace(values.min(), values.max(), size).astype(np.float32)
    error = [float(np.square(book[assign(values, book)] - values).sum()) for book in (found, even)]
    assert error[0] <= error[1] * 1.0001


def test_groups_have_codebooks_of_their_own():
    rows = np.concatenate([normal(8, 64), 100 + normal(8, 64, seed=1)])
    weights = {"w": rows.T.copy()}
    info = {"x": (TensorProto.FLOAT, [1, 64])}
    error = []
    for group in (0, 8):
        model = model_of([("MatMul", "x w", "y", {})], info, {"y": [1, 16]}, weights)
        feed = {"x": normal(1, 64)}
        reference = outputs(model, feed)
        Palettize(bits=3, group=group).run(model, Context())
        error.append(float(np.abs(outputs(model, feed) - reference).max()))
    assert error[1] < error[0] / 2


# --- sizes, options, targets -------------------------------------------------------------------

ALL = [
    *(item for item, _ in MATRICES),
    *(item for item, _ in FOLDED),
    WeightOnly(bits=4, method="gptq"),
    WeightOnly(bits=4, method="awq-gptq", tables=4),
    WeightOnly(average_bits=4.5, method="gptq"),
]


@pytest.mark.parametrize("item", ALL, ids=str)
@pytest.mark.parametrize("build", [language_model, conv_net, lambda: recurrent_branch(True)])
def test_sizes_are_foretold_without_weights(item, build):
    model = build()
    foretold = file_bytes(item.preview(absent(model), Context()).model)
    samples = texts() if build is language_model else [{"x": normal(1, 8, 9, 9)}]
    if build not in (language_model, conv_net):
        samples = [{"x": normal(5, 2, 16), "c": np.array(True)}]
    item.run(model, Context(calibration=samples))
    assert abs(foretold / saved_bytes(model) - 1) < 0.01


@pytest.mark.parametrize("item", ALL, ids=str)
def test_a_second_run_and_names_in_text(item):
    text = edgepass.passes.spec.format_pass(item)
    assert str(item) == text
    (again,) = edgepass.pipelines.parse_recipe(f"cleanup,{text}")[-1:]
    assert again == item


def test_packed_graphs_have_unique_names():
    model = recurrent_branch(True)
    Palettize(bits=3).run(model, Context())
    names = [v.name for n in all_nodes(model) for v in n.outputs if v.name]
    inits = [n for g in graph_tree(model.graph) for n in g.initializers]
    assert len(set(names + inits)) == len(names + inits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightOnly(bits=1),
        lambda: WeightOnly(others=9),
        lambda: WeightOnly(block=24),
        lambda: WeightOnly(method="best"),
        lambda: WeightOnly(method="hqq", zero_points=False),
        lambda: WeightOnly(bits_of=("up",)),
        lambda: WeightOnly(bits_of=("up:1",)),
        lambda: WeightOnly(average_bits=1.5),
        lambda: WeightOnly(damping=0.0),
        lambda: WeightOnly(rounds=-1),
        lambda: Palettize(bits=9),
        lambda: Palettize(group=-1),
        lambda: Fp8(format="e3m4"),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(PassOptionError) as caught:
        make()
    assert caught.value.diagnostic.where
    assert caught.value.diagnostic.fix


@pytest.mark.parametrize(
    "item", [WeightOnly(bits=4), WeightOnly(bits=3), Palettize(), Fp8()], ids=str
)
def test_on_tvm_standard_operators_do(item):
    model = conv_net()
    result = item.run(model, Context(edgepass.get_target("x86_64/tvm")))
    assert {n.domain for n in model.graph} == {""}
    assert result.modified


@pytest.mark.parametrize("act", list(itertools.product([False, True], [17, 21])))
def test_gemm_takes_its_bias_along(act, tmp_path):
    transposed, opset = act
    shape = (40, 64) if transposed else (64, 40)
    model = model_of(
        [("Gemm", "x w b", "y", {"transB": int(transposed)})],
        {"x": (TensorProto.FLOAT, [3, 64])},
        {"y": [3, 40]},
        {"w": normal(*shape), "b": normal(40)},
        opset,
    )
    feed = {"x": normal(3, 64)}
    reference = outputs(model, feed)
    WeightOnly(bits=4).run(model, Context())
    assert optimized(model, tmp_path) == {"MatMulNBits": 1}
    assert sqnr(reference, outputs(model, feed)) > 14
