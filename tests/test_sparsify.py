"""Sparsification: patterns, methods, zeros that stay zero, and what is stored of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgepass
from edgepass.errors import CalibrationError, PassOptionError, UsageError
from edgepass.frontends import load_supported
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.passes.lower.pack_zeros import PackZeros
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.passes.quantize.zeros import solve_around, zeros_to_keep
from edgepass.passes.sparsify.patterns import Pattern, keep_of_run, smallest
from edgepass.passes.sparsify.sparsegpt import BLOCK, sparsegpt
from edgepass.passes.sparsify.sparsify import Sparsify
from edgepass.pipelines import parse_recipe
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import OrtRunner
from test_quantize import conv_net, graph_of, images, normal

QUIET = {"check_numerics": False}


def two_matrices(size: int = 32) -> ir.Model:
    return graph_of(
        [("MatMul", ["x", "v"], ["a"], {}), ("MatMul", ["a", "w"], ["y"], {})],
        {"x": ["n", size]},
        {"y": ["n", size]},
        {"v": normal(size, size, seed=1), "w": normal(size, size, seed=2, scale=0.01)},
    )


def mlp() -> ir.Model:
    """Two products with biases and a Relu between, 48 to 64 to 40 features."""
    return graph_of(
        [
            ("MatMul", ["x", "v"], ["p"], {}),
            ("Add", ["p", "b"], ["q"], {}),
            ("Relu", ["q"], ["r"], {}),
            ("Gemm", ["r", "w", "c"], ["y"], {"transB": 1}),
        ],
        {"x": ["n", 48]},
        {"y": ["n", 40]},
        {
            "v": normal(48, 64, seed=1, scale=0.2),
            "b": normal(64, seed=2),
            "w": normal(40, 64, seed=3, scale=0.2),
            "c": normal(40, seed=4),
        },
    )


def correlated(count: int, rows: int, features: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Samples whose features lie mostly in few directions, as those of real layers do."""
    generator = np.random.default_rng(99)
    strength = np.exp(-np.arange(features) / (features / 6))
    mix = generator.standard_normal((features, features)) * strength[:, None]
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        x = generator.standard_normal((rows, features)) @ mix
        found.append({"x": (x + 0.05 * generator.standard_normal(x.shape)).astype(np.float32)})
    return found


def array(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def zeros(model: ir.Model, name: str) -> float:
    return float((array(model, name) == 0).mean())


def error(model: ir.Model, reference: ir.Model, samples) -> float:
    """Mean squared difference of the first output over its variance."""
    made, wanted = OrtRunner(model), OrtRunner(reference)
    pairs = [(made.run(s)["y"], wanted.run(s)["y"]) for s in samples]
    a, b = (np.concatenate([p[i].reshape(-1) for p in pairs]) for i in (0, 1))
    return float(np.square(a - b).mean() / b.var())


# --- magnitudes ----------------------------------------------------------------------------------


@given(ratio=st.floats(0, 0.99), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_share_of_zeros_is_exact_and_the_largest_stay(ratio, seed):
    model = two_matrices()
    before = normal(32, 32, seed=seed)
    model.graph.initializers["v"].const_value = ir.tensor(before)
    result = Sparsify(ratio=ratio).run(model, Context())
    after = array(model, "v")
    count = round(ratio * before.size)
    assert (after == 0).sum() == count
    kept = after != 0
    np.testing.assert_array_equal(after[kept], before[kept])
    if 0 < count < before.size:
        assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()
    assert result.modified is (count > 0)


def test_global_scope_empties_the_small_tensor():
    model = two_matrices()
    Sparsify(ratio=0.5, scope="global").run(model, Context())
    assert zeros(model, "w") > 0.95
    assert zeros(model, "v") < 0.05


def test_ties_are_broken_by_position():
    model = two_matrices()
    model.graph.initializers["v"].const_value = ir.tensor(np.ones((32, 32), np.float32))
    Sparsify(ratio=0.25).run(model, Context())
    after = array(model, "v")
    assert (after.reshape(-1)[:256] == 0).all()
    assert (after.reshape(-1)[256:] == 1).all()


def test_biases_small_and_excluded_weights_stay_and_the_model_runs():
    model = conv_net()
    result = Sparsify(min_elements=100, exclude=("w5",)).run(model, Context())
    verify(model)
    assert zeros(model, "w1") == 0.5
    assert zeros(model, "w5") == 0
    assert zeros(model, "w2") == 0  # 72 elements
    assert zeros(model, "b1") == 0
    assert OrtRunner(model).run(images(1)[0])["y"].shape == (2, 10)
    assert result.notes[-1] == "no faster on this target, smaller only when compressed"


def test_a_second_run_changes_nothing():
    model = two_matrices()
    assert Sparsify().run(model, Context()).modified
    assert not Sparsify().run(model, Context()).modified


def test_nothing_to_sparsify_says_so():
    result = Sparsify(min_elements=10**6).run(two_matrices(), Context())
    assert not result.modified
    assert "nothing to sparsify" in result.notes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"scope": "layer"},
        {"min_elements": -1},
        {"pattern": "4:2"},
        {"pattern": "0:4"},
        {"pattern": "2:4x"},
        {"pattern": "block", "block": "4"},
        {"pattern": "2:4", "scope": "global"},
        {"method": "taylor"},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(PassOptionError):
        Sparsify(**options)


# --- patterns ------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    axis=st.integers(0, 3),
    keep=st.integers(1, 4),
    more=st.integers(1, 4),
    seed=st.integers(0, 50),
)
@settings(max_examples=80, deadline=None)
def test_n_of_m_holds_everywhere_ragged_ends_included(shape, axis, keep, more, seed):
    axis %= len(shape)
    scores = np.random.default_rng(seed).integers(0, 4, shape).astype(np.float32)
    run = keep + more
    rows = np.moveaxis(scores, axis, -1).reshape(-1, shape[axis])
    masks = np.moveaxis(keep_of_run(scores, axis, keep, run), axis, -1).reshape(rows.shape)
    for start in range(0, shape[axis], run):
        part, mask = rows[:, start : start + run], masks[:, start : start + run]
        assert ((~mask).sum(axis=1) == min(keep, part.shape[1])).all()
        best = np.sort(part, axis=1)[:, ::-1][:, :keep].sum(axis=1)
        np.testing.assert_array_equal(np.where(mask, 0, part).sum(axis=1), best)


@pytest.mark.parametrize(("block", "share"), [((4, 1), 0.5), ((1, 16), 0.5), ((3, 5), 0.25)])
def test_blocks_are_all_zero_or_all_there(block, share):
    scores = np.random.default_rng(0).random((18, 33)) + 0.1
    mask = Pattern(block=block).zeros(scores, 0, 1, share)
    full = [
        mask[i : i + block[0], j : j + block[1]]
        for i in range(0, 18, block[0])
        for j in range(0, 33, block[1])
    ]
    assert all(part.all() or not part.any() for part in full)
    assert sum(bool(part.all()) for part in full) == round(share * len(full))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:7"])
def test_n_of_m_runs_along_input_channels_of_every_operator(method, pattern):
    keep, run = map(int, pattern.split(":"))
    model = graph_of(
        [
            ("Conv", ["x", "k"], ["a"], {"pads": [1, 1, 1, 1]}),
            ("Relu", ["a"], ["r"], {}),
            ("Conv", ["r", "g"], ["b"], {"group": 2}),
            ("ConvTranspose", ["b", "t"], ["c"], {}),
            ("GlobalAveragePool", ["c"], ["d"], {}),
            ("Flatten", ["d"], ["e"], {}),
            ("Gemm", ["e", "w"], ["f"], {"transB": 1}),
            ("MatMul", ["f", "v"], ["y"], {}),
        ],
        {"x": ["n", 9, 6, 6]},
        {"y": ["n", 6]},
        {
            "k": normal(20, 9, 3, 3, seed=1, scale=0.2),
            "g": normal(12, 10, 1, 1, seed=2),
            "t": normal(12, 10, 2, 2, seed=3),
            "w": normal(18, 10, seed=4),
            "v": normal(18, 6, seed=5),
        },
    )
    generator = np.random.default_rng(0)
    samples = [{"x": generator.standard_normal((2, 9, 6, 6)).astype("f")} for _ in range(6)]
    Sparsify(pattern=pattern, method=method, min_elements=1).run(
        model, Context(calibration=samples)
    )
    verify(model)
    for name, axis in {"k": 1, "g": 1, "t": 0, "w": 1, "v": 0}.items():
        moved = np.moveaxis(array(model, name), axis, -1)
        for start in range(0, moved.shape[-1], run):
            part = moved[..., start : start + run]
            # the least a solution leaves is not zero by chance
            assert ((part != 0).sum(axis=-1) == min(keep, part.shape[-1])).all(), name
    assert np.isfinite(OrtRunner(model).run(samples[0])["y"]).all()


def test_a_batch_norm_is_folded_first_so_that_acting_weights_are_compared():
    weight = np.ones((2, 200, 1, 1), np.float32)
    model = graph_of(
        [
            ("Conv", ["x", "k"], ["a"], {}),
            ("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["y"], {}),
        ],
        {"x": ["n", 200, 2, 2]},
        {"y": ["n", 2, 2, 2]},
        {
            "k": weight,
            "scale": np.array([0.1, 10], "f"),
            "shift": np.zeros(2, "f"),
            "mean": np.zeros(2, "f"),
            "var": np.ones(2, "f"),
        },
    )
    Sparsify(ratio=0.5).run(model, Context())
    (conv,) = model.graph
    after = conv.inputs[1].const_value.numpy()
    assert (after[0] == 0).all()
    assert (after[1] != 0).all()


# --- methods that see data -----------------------------------------------------------------------


def test_sparsegpt_has_the_exact_share_and_less_error_than_magnitudes_on_other_inputs():
    x = correlated(1, 600, 256)[0]["x"].astype(np.float64)
    other = correlated(1, 300, 256, seed=5)[0]["x"].astype(np.float64)
    weight = normal(256, 32).astype(np.float64)
    runs = [(i, i + BLOCK) for i in range(0, 256, BLOCK)]
    found, mask = sparsegpt(
        weight,
        x.T @ x,
        runs,
        lambda s: smallest(s.reshape(-1), s.size // 2).reshape(s.shape),
    )
    assert mask.mean() == 0.5
    assert (found[mask] == 0).all()

    def loss(matrix):
        return np.square(other @ (matrix - weight)).sum()

    threshold = np.median(np.abs(weight))
    assert loss(found) < 0.5 * loss(np.where(np.abs(weight) < threshold, 0, weight))
    solved = solve_around(mask[None], (x.T @ x)[None], (x.T @ x @ weight)[None], weight[None], 1e-3)
    assert (solved[0][mask] == 0).all()
    assert loss(solved[0]) < loss(found)


def test_solving_around_zeros_is_least_squares_within_each_column():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 12))
    weight = generator.standard_normal((12, 5))
    target = x @ weight
    mask = generator.random((12, 5)) < 0.4
    a, b = x.T @ x, x.T @ target
    found = solve_around(mask[None], a[None], b[None], weight[None], 1e-9)[0]
    for column in range(5):
        free = ~mask[:, column]
        exact = np.linalg.lstsq(x[:, free], target[:, column], rcond=None)[0]
        np.testing.assert_allclose(found[free, column], exact, atol=1e-4)
    assert (found[mask] == 0).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block"])
def test_with_data_the_model_is_nearer_than_by_magnitude(pattern):
    samples, other = correlated(8, 40, 48), correlated(4, 40, 48, seed=7)
    errors = {}
    for name, options in {
        "magnitude": {"method": "magnitude"},
        "wanda": {"method": "wanda", "solve": False},
        "sparsegpt": {"method": "sparsegpt", "solve": False},
        "auto": {},
    }.items():
        model = mlp()
        result = Sparsify(pattern=pattern, **options).run(model, Context(calibration=samples))
        assert zeros(model, "v") == zeros(model, "w") == 0.5
        errors[name] = error(model, mlp(), other)
    assert "sparsegpt in 2 layers, 2 solved again, 2 biases corrected" in result.notes
    assert errors["wanda"] < errors["magnitude"]
    assert errors["auto"] < 0.5 * errors["magnitude"]
    if pattern != "block":  # zeros of blocks are chosen at once, and nothing is made up for
        assert errors["auto"] < errors["sparsegpt"] < errors["magnitude"]


@given(ratio=st.floats(0.05, 0.95))
@settings(max_examples=8, deadline=None)
def test_the_share_is_exact_with_data_too(ratio):
    samples = correlated(4, 30, 48)
    for method in ("wanda", "sparsegpt"):
        model = mlp()
        Sparsify(ratio=ratio, method=method).run(model, Context(calibration=samples))
        for name in ("v", "w"):
            weight = array(model, name)
            assert (weight == 0).sum() == pytest.approx(ratio * weight.size, abs=1)


def test_the_order_of_samples_changes_nothing():
    samples = correlated(6, 30, 48)
    found = []
    for order in (samples, samples[::-1]):
        model = mlp()
        Sparsify(method="sparsegpt").run(model, Context(calibration=order))
        found.append(array(model, "w"))
    np.testing.assert_array_equal(found[0] == 0, found[1] == 0)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_global_scope_with_data_spares_what_matters_and_keeps_the_total():
    samples = correlated(4, 60, 48)
    model = mlp()
    Sparsify(scope="global", ratio=0.6).run(model, Context(calibration=samples))
    counts = {name: (array(model, name) == 0).sum() for name in ("v", "w")}
    total = sum(array(model, name).size for name in counts)
    assert sum(counts.values()) == pytest.approx(0.6 * total, abs=2)
    assert zeros(model, "v") != pytest.approx(0.6, abs=1e-3)
    assert max(zeros(model, "v"), zeros(model, "w")) <= 0.8 + 1e-3


def test_shared_weights_go_by_magnitude_and_say_so():
    model = graph_of(
        [("MatMul", ["x", "v"], ["a"], {}), ("Relu", ["a"], ["b"], {}),
         ("MatMul", ["b", "v"], ["c"], {}), ("MatMul", ["c", "w"], ["y"], {})],
        {"x": ["n", 32]}, {"y": ["n", 32]},
        {"v": normal(32, 32, seed=1), "w": normal(32, 32, seed=2)},
    )  # fmt: skip
    before = array(model, "v")
    samples = [{"x": normal(20, 32, seed=i)} for i in range(4)]
    result = Sparsify().run(model, Context(calibration=samples))
    kept = array(model, "v") != 0
    np.testing.assert_array_equal(array(model, "v")[kept], before[kept])
    assert any("1 weights by magnitude" in note for note in result.notes)


def test_methods_that_need_data_ask_for_it():
    with pytest.raises(UsageError, match="sparsify"):
        Sparsify(method="sparsegpt").run(mlp(), Context())
    with pytest.raises(CalibrationError):
        Sparsify(method="wanda").run(mlp(), Context(calibration=[]))


def test_a_target_with_sparse_kernels_is_told_apart():
    target = edgepass.get_target("x86_64")
    assert target.sparse_patterns == ()
    fast = target.replace(name="sparse", sparse_patterns=("2:4",))
    for pattern, text in (("2:4", "2:4 is multiplied by sparse kernels"), ("1:4", "no faster")):
        result = Sparsify(pattern=pattern).run(two_matrices(), Context(target=fast))
        assert result.notes[-1].startswith(text)


# --- zeros stay zero -----------------------------------------------------------------------------


def test_zeros_of_a_weight_are_its_mask():
    weight = normal(20, 20)
    assert zeros_to_keep(weight) is None
    weight[:, :10] = 0
    np.testing.assert_array_equal(zeros_to_keep(weight), weight == 0)


@pytest.mark.parametrize(
    "recipe",
    [
        "int8",
        "int8{reconstruct=true,bias_correction=true}",
        "int8{rounding=adaround}",
        "smooth_quant,int8",
        "equalize,int8{reconstruct=true,rounding=adaround}",
    ],
)
def test_static_int8_keeps_zeros(recipe):
    samples = correlated(8, 40, 48)
    model = mlp()
    Sparsify(pattern="2:4").run(model, Context(calibration=samples))
    masks = {name: array(model, name) == 0 for name in ("v", "w")}
    context = Context(target=edgepass.get_target("x86_64"), calibration=samples)
    model, _ = run_passes(model, parse_recipe(f"dead_code,{recipe}"), context)
    found = 0
    for name, value in model.graph.initializers.items():
        integers = value.const_value.numpy()
        for weight, mask in masks.items():
            if name.startswith(weight) and integers.dtype == np.int8 and integers.ndim == 2:
                assert (integers[mask] == 0).all()
                assert (integers != 0).mean() > 0.4
                found += 1
    assert found == 2


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4, "method": "rtn"},
        {"bits": 4, "method": "gptq"},
        {"bits": 4, "method": "gptq", "zero_points": True},
        {"bits": 4, "method": "gptq", "act_order": False, "rounds": 0},
        {"bits": 3, "method": "awq-gptq", "sequential": True},
        {"bits": 4, "method": "hqq"},
    ],
    ids=str,
)
def test_weights_in_few_bits_keep_zeros(options):
    samples = correlated(6, 60, 64)
    samples = [{"x": s["x"]} for s in samples]
    model = two_matrices(64)
    Sparsify(pattern="2:4").run(model, Context(calibration=samples))
    sparse = {name: array(model, name).copy() for name in ("v", "w")}
    WeightOnly(**options, block=32 if options["bits"] < 8 else 0, float_inputs=True).run(
        model, Context(calibration=samples)
    )
    stored = OrtRunner(model)
    one_hot = np.eye(64, dtype=np.float32)
    # the first product of unit vectors is the stored matrix itself
    name = model.graph[-1].inputs[0].name
    graph = model.clone()
    graph.graph.outputs[0] = next(v for n in graph.graph for v in n.outputs if v.name == name)
    restored = OrtRunner(graph).run({"x": one_hot})[name]
    # an 8-bit kernel takes zero points off its sums, which rounds
    assert np.abs(restored[sparse["v"] == 0]).max() <= (1e-6 if options["bits"] == 8 else 0)
    assert (restored != 0).mean() > 0.3
    assert np.isfinite(stored.run({"x": one_hot})["y"]).all()


# --- what is stored ------------------------------------------------------------------------------


def saved(model: ir.Model, tmp_path) -> int:
    path = tmp_path / "m.onnx"
    write_onnx(model, path)
    return path.stat().st_size


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(64, 64), (37, 41)])
def test_packed_weights_are_smaller_and_the_same(dtype, shape, tmp_path):
    depth, width = shape
    kind = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}[dtype]
    model = two_matrices(64)
    weight = normal(*shape, seed=3)
    weight[np.abs(weight) < 0.9] = 0
    model = graph_of(
        [("MatMul", ["x", "v"], ["y"], {})],
        {"x": ["n", depth]},
        {"y": ["n", width]},
        {"v": weight},
    )
    if dtype is np.float16:
        model.graph.initializers["v"].const_value = ir.tensor(weight.astype(dtype))
        for value in (*model.graph.inputs, *model.graph.outputs, model.graph.initializers["v"]):
            value.dtype = kind
    feed = {"x": normal(3, depth).astype(dtype)}
    wanted, before = OrtRunner(model).run(feed)["y"], saved(model, tmp_path)
    result = PackZeros().run(model, Context())
    verify(model)
    assert result.modified
    assert "1 weights stored without their zeros" in result.notes[0]
    after = saved(model, tmp_path)
    kept = np.count_nonzero(weight)
    dense = weight.size * np.dtype(dtype).itemsize
    assert after - before < -(dense - kept * np.dtype(dtype).itemsize - weight.size / 8) + 1600
    for optimize in (True, False):
        np.testing.assert_array_equal(OrtRunner(model, optimize=optimize).run(feed)["y"], wanted)
    assert not PackZeros().run(model, Context()).modified


def test_dense_weights_are_not_packed():
    result = PackZeros().run(two_matrices(64), Context())
    assert not result.modified


@pytest.mark.parametrize("recipe", ["sparsify50", "sparsify{pattern=1:4}+int8", "sparsify50+fp16"])
def test_the_artifact_is_smaller_and_stays_so_when_compiled_again(recipe, tmp_path):
    samples = [{"x": s["x"]} for s in correlated(6, 4, 128)]
    source = two_matrices(128)
    dense = recipe.partition("+")[2] or "fp32"
    made = edgepass.compile(source, recipe=recipe, calibration=samples, target="x86_64", **QUIET)
    whole = edgepass.compile(source, recipe=dense, calibration=samples, target="x86_64", **QUIET)
    folder, other = made.save(tmp_path / "sparse"), whole.save(tmp_path / "dense")
    small, large = ((f / "model.onnx").stat().st_size for f in (folder, other))
    assert small < 0.8 * large
    assert edgepass.load(folder).manifest["cost"]["file_bytes"] == small
    again = load_supported(folder / "model.onnx")
    loaded = edgepass.compile(again, recipe="default", target="x86_64", **QUIET)
    feed = samples[0]
    np.testing.assert_allclose(loaded.run(feed)["y"], made.run(feed)["y"], atol=1e-4)
    assert saved(loaded.model, tmp_path) <= small


def test_estimates_know_the_packed_size(tmp_path):
    source = two_matrices(128)
    (row,) = edgepass.estimate(source, "x86_64", ["sparsify50"]).rows
    made = edgepass.compile(source, recipe="sparsify50", target="x86_64", **QUIET)
    assert row.file_bytes == pytest.approx(saved(made.model, tmp_path), rel=0.01)
    assert made.cost["parameters"] == pytest.approx(128 * 128, abs=4)


def test_a_whole_recipe_packs_and_a_list_is_taken_as_written():
    whole = [p.name for p in parse_recipe("sparsify50+int8")]
    assert whole[-1] == "pack_zeros"
    assert "pack_zeros" not in [p.name for p in parse_recipe("int8")]
    assert [p.name for p in parse_recipe("sparsify,dead_code")] == ["dead_code", "sparsify"]
