"""Low-rank factorization: known ranks are exact, errors as foretold, what pays, what stays."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgepass
from edgepass.errors import PassOptionError
from edgepass.ir.graph import AbsentTensor, is_absent
from edgepass.ir.ops import graph_macs
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.passes.low_rank.choice import Menu, Option, by_energy, by_share, removed
from edgepass.passes.low_rank.factors import Factors, Known
from edgepass.passes.low_rank.forms import Candidate, Form, candidates, make, original
from edgepass.passes.low_rank.low_rank import LowRank
from edgepass.passes.low_rank.price import Price
from edgepass.passes.low_rank.sites import find_sites
from edgepass.passes.prune.divergence import held_out
from edgepass.passes.prune.rounding import preferred_multiple, round_width
from edgepass.pipelines import parse_recipe
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target

QUICK = settings(max_examples=12, deadline=None)
ALONE = {"weigh": False, "refit": False}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def low(rows: int, columns: int, rank: int, seed: int = 0) -> np.ndarray:
    """A matrix of that rank."""
    made = normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)
    return (made / np.sqrt(rank * rows)).astype(np.float32)


def model_of(nodes, inputs, outputs, weights, opset=17, metadata=None) -> ir.Model:
    graph = helper.make_graph(
        [
            helper.make_node(op, ins.split(), outs.split(), name=f"n{i}_{op}", **attributes)
            for i, (op, ins, outs, attributes) in enumerate(nodes)
        ],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def linear(weight, op="MatMul", rows=64, bias=None, **attributes) -> ir.Model:
    """One product with that weight."""
    size, out = reversed(weight.shape) if attributes.get("transB") else weight.shape
    weights = {"w": weight}
    nodes = [(op, "x w", "y", attributes)]
    if bias is not None and op == "Gemm":
        weights["b"] = bias
        nodes = [(op, "x w b", "y", attributes)]
    elif bias is not None:
        weights["b"] = bias
        nodes = [(op, "x w", "h", attributes), ("Add", "h b", "y", {})]
    return model_of(nodes, {"x": [rows, size]}, {"y": [rows, out]}, weights)


def conv(weight, spatial=(24, 24), bias=None, **attributes) -> ir.Model:
    """One convolution with that weight."""
    weights = {"w": weight} | ({} if bias is None else {"b": bias})
    nodes = [("Conv", "x w" + (" b" if bias is not None else ""), "y", attributes)]
    free = [None] * len(spatial)
    shape = [2, weight.shape[1], *spatial]
    return model_of(nodes, {"x": shape}, {"y": [2, weight.shape[0], *free]}, weights)


def run(model: ir.Model, feed) -> dict[str, np.ndarray]:
    with OrtRunner(model, optimize=False) as runner:
        return runner.run(feed)


def feeds_of(model: ir.Model, count=12, seed=0):
    shapes = {v.name: v.shape.numpy() for v in model.graph.inputs}
    return [{n: normal(*s, seed=seed + i) for n, s in shapes.items()} for i in range(count)]


def factorized(model: ir.Model, samples=None, target="x86_64", **options):
    result = LowRank(**options).run(model, Context(target and get_target(target), samples))
    verify(result.model)
    return result


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_data", [False, True], ids=["weights", "data"])
@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Gemm transposed"])
def test_a_matrix_of_low_rank_is_replaced_without_error(op, with_data):
    weight, attributes = low(96, 128, 8), {}
    if op == "Gemm transposed":
        op, weight, attributes = "Gemm", np.ascontiguousarray(weight.T), {"transB": 1}
    model = linear(weight, op, bias=normal(128), **attributes)
    samples = feeds_of(model)
    before = run(model, samples[0])
    result = factorized(model, samples if with_data else None, energy=0.9999, **ALONE)
    assert result.modified
    assert ops(result.model).count(op) == 2
    assert relative(before["y"], run(result.model, samples[0])["y"]) < 1e-4
    sizes = [v.const_value.size for v in result.model.graph.initializers.values()]
    assert sum(sizes) == 8 * (96 + 128) + 128


CONVOLUTIONS = [
    ({"pads": [1, 1, 1, 1]}, (3, 3)),
    ({"pads": [1, 0, 2, 1], "strides": [2, 1]}, (3, 3)),
    ({"pads": [2, 2, 2, 2], "dilations": [2, 2], "strides": [1, 2]}, (3, 3)),
    ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (3, 3)),
    ({"auto_pad": "SAME_LOWER", "kernel_shape": [2, 5]}, (2, 5)),
    ({"auto_pad": "VALID"}, (5, 3)),
    ({"strides": [2, 2]}, (1, 1)),
]


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize(("attributes", "kernel"), CONVOLUTIONS)
def test_every_form_of_a_convolution_of_full_rank_is_the_convolution(form, attributes, kernel):
    """At full rank nothing is lost: padding, strides and dilations are where they belong."""
    weight, bias = normal(6, 4, *kernel), normal(6)
    model = conv(weight, (11, 13), bias=bias, **attributes)
    site = find_sites(model)[0][0]
    if form is Form.SPATIAL and min(kernel) == 1:
        return
    ranks = {Form.TUCKER: (4, 6), Form.SPATIAL: (min(4 * kernel[0], kernel[1] * 6),)}.get(
        form, (6,)
    )
    candidate = make(site, form, ranks)
    feed = feeds_of(model, 1)[0]
    before = run(model, feed)["y"]
    from edgepass.ir.edit import Editor
    from edgepass.passes.low_rank.write import write

    none = Known(weight.astype(float), None, None, None, bias, np.ones(6), True)
    weights, shift = Factors(none).weights(candidate)
    write(site, candidate, weights, shift, Editor())
    infer_shapes(model, refresh=True)
    verify(model)
    assert relative(before, run(model, feed)["y"]) < 1e-5
    assert len(list(model.graph)) == len(candidate.steps)


def test_convolutions_over_one_and_three_axes_are_factorized():
    for spatial, kernel in (((40,), (5,)), ((6, 6, 6), (3, 3, 3))):
        weight = low(48, 32 * int(np.prod(kernel)), 8).reshape(48, 32, *kernel)
        model = conv(weight, spatial)
        feed = feeds_of(model, 1)[0]
        before = run(model, feed)["y"]
        result = factorized(model, energy=0.999, **ALONE)
        assert relative(before, run(result.model, feed)["y"]) < 1e-4
        assert len(ops(result.model)) >= 2


def correlated(rows: int, size: int, seed: int) -> np.ndarray:
    """Inputs about a mean, of which a few directions hold most of the energy."""
    mixing = normal(size, size, seed=99) * np.geomspace(1, 1e-3, size, dtype=np.float32)[:, None]
    return normal(rows, size, seed=seed) @ mixing + 3 * normal(size, seed=98)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=str)
def test_the_error_on_data_is_the_least_and_as_foretold(shape):
    """With second moments of the inputs the error is that of principal components of outputs."""
    weight = normal(*shape, seed=3)
    x = correlated(4000, shape[0], 0).astype(float)
    y = x @ weight
    centre = y - y.mean(0)
    square = np.linalg.svd(centre, compute_uv=False) ** 2
    model = linear(weight, bias=np.zeros(shape[1], np.float32))
    site = find_sites(model)[0][0]
    moments = np.cov(x.T, bias=True)
    data = np.cov(y.T, bias=True) if shape[1] <= shape[0] else None
    known = Known(
        weight.T.astype(float),
        None if data is not None else moments,
        data,
        y.mean(0),
        np.zeros(shape[1]),
        np.ones(shape[1]),
        True,
    )
    factors = Factors(known)
    for rank in (8, 16, 32):
        candidate = make(site, Form.PRODUCT, (rank,))
        (first, last), bias = factors.weights(candidate)
        error = np.square(x @ first.T @ last.T + bias - y).sum() / np.square(centre).sum()
        best = square[rank:].sum() / square.sum()
        assert error == pytest.approx(best, rel=1e-3, abs=1e-9)
        assert factors.error(candidate) == pytest.approx(best, rel=1e-3, abs=1e-5)


def test_data_makes_it_better_than_weights_alone():
    weight = normal(96, 96, seed=5)
    model = linear(weight, bias=normal(96))
    samples = [{"x": correlated(64, 96, i)} for i in range(16)]
    unseen = {"x": correlated(64, 96, 1000)}
    wanted = run(model, unseen)["y"]

    def error(**options):
        result = factorized(model, samples, rank=16, limit=9.0, **ALONE, **options)
        return float(np.square(run(result.model, unseen)["y"] - wanted).mean())

    assert error(data=True) < 0.1 * error(data=False)


@pytest.mark.parametrize("form", ["pointwise", "spatial", "tucker"])
def test_data_and_refitting_make_convolutions_better(form):
    """Smooth images: neighbours are alike, so that much of the kernel is never seen."""
    weight = normal(32, 16, 3, 3, seed=6) / 12
    model = conv(weight, (16, 16), bias=normal(32), pads=[1, 1, 1, 1])

    def image(seed):
        coarse = normal(2, 16, 4, 4, seed=seed) * np.geomspace(1, 0.02, 16)[:, None, None]
        return np.kron(coarse, np.ones((1, 1, 4, 4))).astype(np.float32) + 1

    samples = [{"x": image(i)} for i in range(16)]
    unseen = {"x": image(1000)}
    wanted = run(model, unseen)["y"]

    def error(**options):
        result = factorized(
            model, samples, rank=8, limit=9.0, forms=(form,), weigh=False, margin=-9.0, **options
        )
        return float(np.square(run(result.model, unseen)["y"] - wanted).mean())

    blind = error(data=False, refit=False)
    seen, again = error(refit=False), error(refit=True)
    assert seen < 0.7 * blind
    assert again <= 1.02 * seen


def test_the_mean_of_the_outputs_is_kept():
    model = linear(normal(64, 64), bias=normal(64))
    samples = [{"x": normal(64, 64, seed=i) + 2} for i in range(16)]
    result = factorized(model, samples, rank=8, limit=9.0, **ALONE)
    means = [
        np.mean([run(m, sample)["y"].mean(0) for sample in samples], axis=0)
        for m in (model, result.model)
    ]
    # some of the samples are kept apart
    assert np.abs(means[0] - means[1]).max() < 0.35 * np.abs(means[0]).max()
    taught, apart = held_out(samples)
    assert len(taught) > len(apart) > 0
    means = [
        np.mean([run(m, sample)["y"].mean(0) for sample in taught], axis=0)
        for m in (model, result.model)
    ]
    assert np.abs(means[0] - means[1]).max() < 1e-4 * np.abs(means[0]).max()


# --- choosing ------------------------------------------------------------------------------------


def menu(whole: float, *options: tuple[float, float]) -> Menu:
    candidate = Candidate(Form.PRODUCT, (1,), ())
    site = find_sites(linear(normal(8, 8)))[0][0]
    made = [Option(candidate, Price(0, whole - gain), error, gain) for gain, error in options]
    return Menu(site, Price(0, whole), whole, tuple(made))


@QUICK
@given(st.data())
def test_the_share_is_reached_with_nearly_the_least_error(data):
    """Against all combinations: what is asked for is reached, and no hull step could be spared."""
    numbers = st.integers(1, 9)
    menus = []
    for _ in range(data.draw(st.integers(1, 4))):
        gains = data.draw(st.lists(numbers, min_size=0, max_size=3, unique=True))
        errors = sorted(data.draw(st.lists(numbers, min_size=len(gains), max_size=len(gains))))
        menus.append(menu(10.0, *zip(map(float, sorted(gains)), map(float, errors), strict=True)))
    share = data.draw(st.floats(0, 0.9))
    choice = by_share(menus, share)
    every = list(itertools.product(*[(None, *m.options) for m in menus]))
    most = max(removed(menus, c) for c in every)
    assert removed(menus, choice) >= min(share, most) - 1e-9
    error = sum(o.error for o in choice if o is not None)
    enough = [c for c in every if removed(menus, c) >= min(share, most) - 1e-9]
    best = min(sum(o.error for o in c if o is not None) for c in enough)
    largest = max((o.error for m in menus for o in m.options), default=0.0)
    assert best <= error <= best + largest + 1e-9


def test_layers_that_suffer_less_are_taken_first():
    tough, soft = menu(10.0, (5.0, 0.5)), menu(10.0, (5.0, 0.01))
    assert [o is not None for o in by_share([tough, soft], 0.2)] == [False, True]
    heavy = Menu(soft.site, soft.price, soft.whole, soft.options, weight=100.0)
    assert [o is not None for o in by_share([tough, heavy], 0.2)] == [True, False]


def test_by_energy_each_layer_keeps_what_is_asked_at_the_least_time():
    menus = [menu(10.0, (2.0, 0.01), (5.0, 0.04), (8.0, 0.2)), menu(10.0, (5.0, 0.5))]
    first, second = by_energy(menus, 0.95)
    assert first is not None
    assert first.gain == 5.0
    assert second is None


def deep(rows=128, size=96, layers=4) -> ir.Model:
    weights = {f"w{i}": low(size, size, 4 * (i + 1), seed=i) * 2 for i in range(layers)}
    weights |= {
        f"w{i}": weights[f"w{i}"] + 0.02 * normal(size, size, seed=i) for i in range(layers)
    }
    weights |= {f"b{i}": normal(size, seed=i) for i in range(layers)}
    nodes = []
    for i in range(layers):
        nodes += [
            ("MatMul", f"h{i} w{i}", f"p{i}", {}),
            ("Add", f"p{i} b{i}", f"s{i}", {}),
            ("Relu", f"s{i}", f"h{i + 1}", {}),
        ]
    return model_of(nodes, {"h0": [rows, size]}, {f"h{layers}": [rows, size]}, weights)


@pytest.mark.parametrize("measure", ["macs", "weights", "time"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_the_ratio_is_what_is_removed(measure, ratio):
    model = deep()
    macs, weights = graph_macs(model.graph), 4 * 96 * 96
    options = LowRank(ratio=ratio, measure=measure, **ALONE)
    context = Context(get_target("x86_64"))
    selection = options.select(model, context)
    result = options.run(model, context)
    before, after = {
        "macs": selection.macs, "weights": selection.weights, "time": selection.time
    }[measure]  # fmt: skip
    assert ratio <= 1 - after / before < ratio + 0.08
    left = sum(v.const_value.size for v in result.model.graph.initializers.values()) - 4 * 96
    assert (macs, weights) == (selection.macs[0], selection.weights[0])
    assert graph_macs(result.model.graph) == selection.macs[1]
    assert left == selection.weights[1]


def test_refitted_and_weighed_layers_lose_less():
    model = deep()
    samples = feeds_of(model, 24)
    unseen = feeds_of(model, 4, seed=500)
    lost = []
    for options in (ALONE, {"refit": True, "weigh": True}):
        result = factorized(model, samples, ratio=0.75, limit=9.0, **options)
        errors = [np.square(run(model, f)["h4"] - run(result.model, f)["h4"]).sum() for f in unseen]
        lost.append(sum(errors))
    assert lost[1] < lost[0]


def test_what_is_no_faster_stays_and_says_so():
    tiny = linear(low(32, 32, 4), rows=1)
    result = factorized(tiny, ratio=0.5)
    assert not result.modified
    assert any("no faster" in note for note in result.notes)
    narrow = linear(normal(8, 8))
    assert any("too narrow" in note for note in factorized(narrow).notes)
    forced = factorized(linear(low(32, 32, 4), rows=1), ratio=0.2, margin=-9.0, measure="weights")
    assert forced.modified


def test_ranks_are_multiples_of_what_vectors_hold():
    assert preferred_multiple(get_target("x86_64-avx512")) == 16
    assert preferred_multiple(get_target("x86_64")) == 8
    assert preferred_multiple(get_target("arm64")) in (4, 8)
    assert preferred_multiple(None) == 8
    assert round_width(19.0, 16, 64) == 16
    assert round_width(3.0, 16, 64) == 16
    assert round_width(90.0, 16, 72) == 72
    for target in ("x86_64", "x86_64-avx512", "arm64"):
        model = deep()
        selection = LowRank(ratio=0.4, **ALONE).select(model, Context(get_target(target)))
        ranks = [r for o in selection.choice if o is not None for r in o.candidate.ranks]
        assert ranks
        assert all(r % preferred_multiple(get_target(target)) == 0 for r in ranks)


def test_without_a_target_macs_and_bytes_decide():
    result = factorized(deep(), target=None, ratio=0.3, **ALONE)
    assert result.modified
    assert not any("ms" in note for note in result.notes)


def test_too_great_a_loss_is_held_back():
    """A matrix of full rank on inputs of full rank: half of it can't be taken away."""
    model = linear(np.linalg.qr(normal(96, 96))[0], bias=normal(96))
    samples = feeds_of(model, 16)
    free = factorized(model, samples, rank=8, limit=9.0, **ALONE)
    assert free.modified
    held = factorized(model, samples, rank=8, limit=0.1, **ALONE)
    assert not held.modified
    assert "variance" in held.notes[0] or "factorized 0" in held.notes[0]
    some = factorized(deep(), feeds_of(deep(), 16), ratio=0.8, limit=0.02, **ALONE)
    assert any("to stay within the limit" in n or "nothing factorized" in n for n in some.notes)


# --- what is left alone, and what is kept --------------------------------------------------------


def test_each_layer_left_alone_has_its_reason():
    weights = {
        **{name: normal(64, 64) for name in ("shared", "left", "t", "g", "plain", "given")},
        "grouped": normal(64, 32, 3, 3),
        "deconv": normal(64, 64, 3, 3),
        "q": np.ones((64, 64), np.int8),
        "scale": np.float32(0.1),
        "zero": np.int8(0),
    }
    nodes = [
        ("MatMul", "x shared", "a", {}),
        ("MatMul", "a shared", "b", {}),
        ("MatMul", "left b", "c", {}),
        ("Transpose", "t", "tt", {}),
        ("MatMul", "c tt", "d", {}),
        ("Gemm", "d g", "e", {"alpha": 0.5}),
        ("DequantizeLinear", "q scale zero", "dq", {}),
        ("MatMul", "e dq", "f", {}),
        ("MatMul", "f plain", "h", {}),
        ("MatMul", "h given", "y", {}),
        ("Conv", "i grouped", "j", {"group": 2}),
        ("ConvTranspose", "j deconv", "z", {}),
        ("MatMul", "x y", "two", {}),
    ]
    model = model_of(
        nodes,
        {"x": [64, 64], "i": [1, 64, 8, 8], "given": [64, 64]},
        {"y": [64, 64], "z": [1, 64, 8, 8], "two": [64, 64]},
        weights,
    )
    sites, refused = find_sites(model)
    assert [site.name for site in sites] == ["n8_MatMul"]
    assert dict(refused) == {
        "n0_MatMul": "its weight is used elsewhere too",
        "n1_MatMul": "its weight is used elsewhere too",
        "n2_MatMul": "its weight is on the left",
        "n4_MatMul": "its weight is computed by Transpose",
        "n5_Gemm": "it scales, or transposes its input",
        "n7_MatMul": "its weight is quantized already",
        "n9_MatMul": "its weight is an input that callers may replace",
        "n10_Conv": "its channels are in groups",
        "n11_ConvTranspose": "it is a transposed convolution",
    }
    assert find_sites(model, ["plain"])[0] == []
    notes = " ".join(factorized(model, margin=-9.0).notes)
    for reason in set(dict(refused).values()):
        assert reason in notes


def test_layers_in_branches_are_left_with_a_reason():
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["r"], name="inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, [64, 64])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="if")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [numpy_helper.from_array(low(64, 64, 4), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    result = factorized(ir.from_proto(proto))
    assert not result.modified
    assert any("in a branch or a loop" in note for note in result.notes)


def test_the_interface_the_names_and_the_source_lines_are_kept():
    model = linear(low(96, 96, 8))
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "net.py", line 7, in forward'
    result = factorized(model, energy=0.999, **ALONE)
    assert [v.name for v in result.model.graph.outputs] == ["y"]
    assert all(n.metadata_props == node.metadata_props for n in result.model.graph)
    assert [n.name for n in result.model.graph] == ["n0_MatMul/down", "n0_MatMul/up"]
    assert all(v.shape is not None for n in result.model.graph for v in n.outputs)
    assert ops(model) == ["MatMul"]  # what was given is as it was


def test_half_precision_stays():
    weight = low(96, 96, 8).astype(np.float16)
    nodes = [("Cast", "x", "h", {"to": TensorProto.FLOAT16}), ("MatMul", "h w", "m", {}),
             ("Cast", "m", "y", {"to": TensorProto.FLOAT})]  # fmt: skip
    model = model_of(nodes, {"x": [64, 96]}, {"y": [64, 96]}, {"w": weight})
    feed = feeds_of(model, 1)[0]
    before = run(model, feed)["y"]
    result = factorized(model, energy=0.999, **ALONE)
    assert result.modified
    assert {v.dtype for v in result.model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert relative(before, run(result.model, feed)["y"]) < 1e-2


def test_dynamic_sizes_are_priced_at_the_sizes_given():
    weight = low(96, 96, 8)
    nodes = [("MatMul", "x w", "y", {})]
    for rows, expected in ((1, False), (256, True)):
        model = model_of(nodes, {"x": ["n", 96]}, {"y": ["n", 96]}, {"w": weight})
        context = Context(get_target("x86_64"), None, {"n": rows})
        assert LowRank(energy=0.99, margin=0.3).run(model, context).modified is expected


def test_constants_and_the_result_of_a_layer_that_is_an_output():
    tensor = numpy_helper.from_array(low(96, 96, 8), "t")
    model = model_of(
        [
            ("Constant", "", "w", {"value": tensor}),
            ("MatMul", "x w", "y", {}),
            ("Relu", "y", "z", {}),
        ],
        {"x": [64, 96]},
        {"y": [64, 96], "z": [64, 96]},
        {},
    )
    feed = feeds_of(model, 1)[0]
    before = run(model, feed)
    result = factorized(model, energy=0.999, **ALONE)
    assert ops(result.model) == ["MatMul", "MatMul", "Relu"]
    after = run(result.model, feed)
    assert all(relative(before[n], after[n]) < 1e-4 for n in ("y", "z"))


@QUICK
@given(st.data())
def test_generated_chains_of_low_rank_keep_their_results(data):
    """Convolutions and products whose weights have low rank: factorized, and equal."""
    seed = data.draw(st.integers(0, 99))
    kernel = data.draw(st.sampled_from([1, 2, 3]))
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    into, out = (8 * data.draw(st.integers(4, 7)) for _ in range(2))
    weight = low(out, into * kernel * kernel, 8, seed).reshape(out, into, kernel, kernel)
    weights = {"w": weight, "m": low(out, 48, 8, seed), "b": normal(48)}
    attributes = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": pads}
    nodes = [
        ("Conv", "x w", "c", attributes),
        ("Relu", "c", "r", {}),
        ("GlobalAveragePool", "r", "p", {}),
        ("Flatten", "p", "f", {}),
        ("Gemm", "f m b", "y", {}),
    ]
    model = model_of(nodes, {"x": [2, into, 9, 9]}, {"y": [2, 48]}, weights)
    feed = feeds_of(model, 1)[0]
    result = factorized(model, energy=1 - 1e-6, margin=-50.0, **ALONE)
    assert result.modified
    assert len(ops(result.model)) > 5
    assert relative(run(model, feed)["y"], run(result.model, feed)["y"]) < 1e-3


# --- with the rest -------------------------------------------------------------------------------


def absent(model: ir.Model) -> ir.Model:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        value.const_value = AbsentTensor(value.name, tensor.dtype, tensor.shape)
    return model


def test_an_architecture_is_factorized_by_shape():
    model = absent(deep())
    result = factorized(model, ratio=0.4, **ALONE)
    assert result.modified
    assert all(is_absent(v.const_value) for v in result.model.graph.initializers.values())
    assert graph_macs(result.model.graph) <= 0.6 * graph_macs(model.graph)
    found = edgepass.estimate(absent(deep()), "arm64", ["fp32", "low_rank{ratio=0.4}"])
    assert not found.failed
    plain, small = found.rows
    assert small.macs <= 0.6 * plain.macs
    assert small.file_bytes < 0.7 * plain.file_bytes
    assert small.latency.ms < plain.latency.ms


def test_int8_and_fusion_follow():
    model = deep()
    samples = feeds_of(model, 16)
    compiled = edgepass.compile(
        ir.to_proto(model),
        "x86_64",
        recipe="low_rank{ratio=0.4},int8",
        calibration=samples,
        force=True,
        time_budget_s=0,
    )
    row = next(r for r in compiled.ledger.rows if r.name.startswith("low_rank"))
    assert row.after.macs <= 0.61 * row.before.macs
    assert not row.name.startswith("int8")
    quantized = next(r for r in compiled.ledger.rows if r.name.startswith("int8"))
    assert quantized.after.weight_bytes < 0.5 * quantized.before.weight_bytes


def test_batch_normalization_behind_is_folded_into_the_last_factor():
    weight = low(48, 32 * 9, 8).reshape(48, 32, 3, 3)
    weights = {"w": weight, "g": np.abs(normal(48)) + 0.1, "b": normal(48), "m": normal(48),
               "v": np.abs(normal(48, seed=4)) + 0.1}  # fmt: skip
    nodes = [("Conv", "x w", "c", {}), ("BatchNormalization", "c g b m v", "n", {}),
             ("Relu", "n", "y", {})]  # fmt: skip
    model = model_of(nodes, {"x": [1, 32, 20, 20]}, {"y": [1, 48, 18, 18]}, weights)
    feed = feeds_of(model, 1)[0]
    before = run(model, feed)["y"]
    passes = [LowRank(energy=0.999, forms=("pointwise",), **ALONE)]
    passes += parse_recipe("default")
    fused, _ = run_passes(model, passes, Context(get_target("x86_64"), feeds_of(model, 8)))
    assert sorted(ops(fused)) == ["Conv", "FusedConv"]
    assert relative(before, run(fused, feed)["y"]) < 1e-3


@pytest.mark.parametrize(
    "options",
    [{"ratio": 1.0}, {"ratio": -0.1}, {"energy": 2.0}, {"rank": -1}, {"rank": 4, "energy": 0.5},
     {"measure": "nodes"}, {"forms": ("cp",)}, {"margin": 1.0}, {"limit": 0.0}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(PassOptionError, match="low_rank"):
        LowRank(**options)


def test_candidates_have_fewer_weights_and_original_is_the_layer():
    site = find_sites(conv(normal(64, 32, 3, 3)))[0][0]
    found = candidates(site, 8)
    assert {c.form for c in found} == {Form.POINTWISE, Form.SPATIAL, Form.TUCKER}
    assert all(c.weights < site.weights for c in found)
    assert original(site).shape == (64, 32, 3, 3)
    assert [c.ranks for c in candidates(site, 8, rank=5) if c.form is Form.TUCKER] == [(5, 5)]
