"""Ranges from calibration: each observer, order, branches and loops, notes on the samples."""

from __future__ import annotations

import math
import weakref

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgepass.errors import CalibrationError, PassOptionError
from edgepass.frontends import load_model
from edgepass.ir.graph import graph_tree
from edgepass.ir.shapes import infer_shapes
from edgepass.passes.base import Context
from edgepass.passes.quantize import seeing
from edgepass.passes.quantize.calibrate import NOT_TAKEN, ObserverOptions, observe
from edgepass.passes.quantize.clipping import entropy_range, mse_range, percentile_range
from edgepass.passes.quantize.histogram import SIDE, Histogram
from edgepass.passes.quantize.numbers import Range, activation_affine, integer_range
from edgepass.passes.quantize.observers import Observer
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.samples import as_feeds
from edgepass.targets.feed import input_specs

U8, S8, S16 = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT16
SCHEMES = [(U8, False), (S8, True)]


def histogram(*arrays: np.ndarray) -> Histogram:
    made = Histogram()
    for array in arrays:
        made.add(np.asarray(array, np.float32))
    return made


def squared_error(x: np.ndarray, seen: Range, dtype: ir.DataType, symmetric: bool) -> float:
    """Of quantizing and dequantizing, element by element."""
    affine = activation_affine(seen, dtype, symmetric)
    scale, middle = float(affine.scale), int(affine.zero_point)
    integers = np.clip(np.rint(x / scale) + middle, *integer_range(dtype))
    return float(np.mean((x - (integers - middle) * scale) ** 2))


def draws(size: int = 20_000) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(size)
    return {
        "normal": normal,
        "outliers": np.r_[normal, 30, -20, 45],
        "relu": np.maximum(normal, 0),
        "relu outliers": np.r_[np.maximum(normal, 0), 25, 60],
        "negative": -rng.exponential(size=size),
        "skewed": np.r_[rng.exponential(size=size), -0.2 * rng.random(size // 5), -8],
        "heavy tails": rng.standard_t(3, size=size),
        "tiny": 1e-15 * normal,
        "huge": 1e36 * normal,
        "constant": np.full(100, 3.25),
        "bounded": np.clip(normal, -1, 1),
    }


# --- histograms --------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(FLOATS, max_size=6), max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_counts_do_not_depend_on_order_or_grouping(arrays, random):
    one = histogram(*map(np.array, arrays))
    flat = [x for array in arrays for x in array]
    random.shuffle(flat)
    for other in (histogram(np.array(flat)), histogram(*(np.array([x]) for x in flat))):
        assert (other.exponent, other.zeros, other.low, other.high) == (
            one.exponent,
            one.zeros,
            one.low,
            one.high,
        )
        np.testing.assert_array_equal(other.bins()[0], one.bins()[0])
        assert other.bins()[1] == one.bins()[1]
    assert one.count == len(flat)


@given(st.lists(FLOATS, min_size=1, max_size=40))
@settings(deadline=None)
def test_every_value_is_in_its_bin(numbers):
    made = histogram(np.array(numbers))
    counts, zero = made.bins()
    expected = np.zeros_like(counts)
    for x in np.array(numbers, np.float32).astype(np.float64):
        if x:
            expected[math.floor(x / made.width) + zero] += 1
    np.testing.assert_array_equal(counts, expected)
    if made.width:
        assert SIDE / 2 <= max(abs(made.low), abs(made.high)) / made.width < SIDE
    assert made.magnitudes().sum() == counts.sum()


# --- the least squared error -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "symmetric"), SCHEMES)
@pytest.mark.parametrize("name", list(draws(2)))
def test_mse_is_as_good_as_trying_every_clip(name, dtype, symmetric):
    x = draws()[name].astype(np.float32).astype(np.float64)
    full = Range(float(x.min()), float(x.max()))
    found = mse_range(histogram(x), dtype, symmetric)
    grid = np.linspace(0.02, 1, 50)
    peak = max(-full.low, full.high)
    if symmetric:
        tried = [Range(-peak * b, peak * b) for b in np.linspace(0.02, 1, 400)]
    else:
        lows = grid if full.low < 0 else [1.0]
        highs = grid if full.high > 0 else [1.0]
        tried = [Range(full.low * a, full.high * b) for a in lows for b in highs]
    best = min(squared_error(x, seen, dtype, symmetric) for seen in tried)
    error = squared_error(x, found, dtype, symmetric)
    assert error <= best * 1.02
    assert error <= squared_error(x, full, dtype, symmetric) * 1.001
    assert full.low <= found.low <= found.high <= full.high


def test_mse_of_a_gaussian_clips_where_theory_says():
    """16 levels, sigma 1: the optimal clip is 2.55 (Banner et al. 2019, section 3)."""
    x = np.random.default_rng(1).standard_normal(400_000)
    found = mse_range(histogram(x), ir.DataType.UINT4, False)
    assert found == pytest.approx((-2.55, 2.55), abs=0.05)


def test_sixteen_bits_need_no_clip():
    x = draws()["outliers"]
    found = mse_range(histogram(x), S16, True)
    assert found.high == pytest.approx(45, rel=0.01)
    assert entropy_range(histogram(x), S16, True) == (-20, 45)


# --- entropy -----------------------------------------------------------------------------------


def divergence(counts: list[int], stop: int, levels: int) -> float:
    """KL of the first `stop` bins against their `levels` levels, in loops, as in Migacz' talk."""
    inside = counts[:stop]
    reference = [float(c) for c in inside]
    reference[max(i for i in range(stop) if inside[i])] += sum(counts[stop:])
    mass, used = [0] * levels, [0] * levels
    for i, count in enumerate(inside):
        mass[i * levels // stop] += count
        used[i * levels // stop] += count > 0
    found, p, q = 0.0, sum(reference), sum(inside)
    for i, a in enumerate(reference):
        if a > 0:
            level = i * levels // stop
            found += a / p * math.log(a / p / (mass[level] / used[level] / q))
    return found


def test_entropy_finds_the_least_divergence_of_a_known_histogram():
    rng = np.random.default_rng(3)
    x = np.abs(rng.standard_normal(50_000)) + 0.01
    made = histogram(x, [6.5, 9.1, 15.9])
    found = entropy_range(made, S8, True)
    counts = made.magnitudes()
    wide = np.pad(counts, (0, -counts.size % 4)).reshape(-1, 4).sum(axis=1).tolist()
    assert 1024 < len(wide) <= 2048  # 2048 for 128 levels
    width = 4 * made.width
    tried = {stop: divergence(wide, stop, 128) for stop in range(128, len(wide) + 1, 8)}
    best = min(tried, key=tried.__getitem__)
    assert 136 < best < 1600  # the outliers are cut, and not at the first window
    assert divergence(wide, round(found.high / width), 128) <= tried[best]
    assert found.high == pytest.approx(best * width, rel=0.15)


@pytest.mark.parametrize(("dtype", "symmetric"), SCHEMES)
def test_entropy_cuts_outliers_and_keeps_what_has_none(dtype, symmetric):
    rng = np.random.default_rng(4)
    normal = rng.standard_normal(200_000)
    cut = entropy_range(histogram(np.r_[normal, 40, -40]), dtype, symmetric)
    assert 3 < cut.high < 8
    assert 3 < -cut.low < 8
    level = entropy_range(histogram(rng.uniform(-1, 1, 200_000)), dtype, symmetric)
    assert level.high > 0.97
    assert level.low < -0.97


@pytest.mark.parametrize("observer", [entropy_range, mse_range])
@pytest.mark.parametrize(("dtype", "symmetric"), SCHEMES)
@pytest.mark.parametrize("spike", [0.0, 1e-7])
def test_a_spike_at_zero_says_nothing(observer, dtype, symmetric, spike):
    x = np.abs(np.random.default_rng(5).standard_normal(20_000))
    plain = observer(histogram(x), dtype, symmetric)
    spiked = observer(histogram(x, np.full(2_000_000, spike)), dtype, symmetric)
    assert spiked.high == pytest.approx(plain.high, rel=0.02)


@pytest.mark.parametrize(
    "observer", [o.value for o in Observer if o.needs_values and o != Observer.PERCENTILE]
)
def test_ranges_scale_with_the_values(observer):
    options = ObserverOptions(observer=observer)
    for name, x in draws(2000).items():
        if name in ("tiny", "huge"):
            continue
        ranges = []
        for scale in (1.0, 2.0**-60, 2.0**100):
            made = options.accumulator()
            made.add(Range(0, 0), (x.astype(np.float32) * np.float32(scale)))
            seen = made.range()
            ranges.append((seen.low / scale, seen.high / scale))
        assert ranges[2] == ranges[0], name
        if observer == "entropy":  # mse counts ranges below `MIN_SCALE` as zero
            assert ranges[1] == ranges[0], name


# --- percentiles -------------------------------------------------------------------------------


def test_percentiles_are_those_of_the_values():
    x = draws(200_000)["normal"]
    both = percentile_range(histogram(x), 99.0, False)
    assert both.low == pytest.approx(np.percentile(x, 0.5), abs=2e-3)
    assert both.high == pytest.approx(np.percentile(x, 99.5), abs=2e-3)
    even = percentile_range(histogram(x), 99.0, True)
    assert even.high == -even.low == pytest.approx(np.percentile(np.abs(x), 99.0), abs=2e-3)
    relu = np.maximum(x, 0)
    one = percentile_range(histogram(relu), 99.0, False)
    assert one.low == 0.0
    assert one.high == pytest.approx(np.percentile(relu[relu > 0], 99.0), abs=2e-3)
    negative = percentile_range(histogram(-relu), 99.0, False)
    assert negative == (pytest.approx(-one.high, abs=2e-3), 0.0)
    assert percentile_range(histogram(x), 100.0, False) == (
        np.float32(x.min()),
        np.float32(x.max()),
    )


@pytest.mark.parametrize("observer", [o.value for o in Observer])
@pytest.mark.parametrize(("dtype", "symmetric"), SCHEMES)
@pytest.mark.parametrize(
    "values", [[0.0], [0.0, -0.0], [3.0], [-3.0], [1e-45], [3.4e38, -3.4e38], [5.0, 5.0, 0.0]]
)
def test_degenerate_tensors(observer, dtype, symmetric, values):
    array = np.array(values, np.float32)
    options = ObserverOptions(observer=observer, dtype=dtype, symmetric=symmetric)
    made = options.accumulator()
    low, high = float(array.min()), float(array.max())
    made.add(Range(low, high), array)
    found = made.range()
    assert low <= found.low <= found.high <= high
    assert max(-found.low, found.high) >= 0.98 * max(-low, high)
    assert np.isfinite(activation_affine(found, dtype, symmetric).scale)


# --- models ------------------------------------------------------------------------------------


def tensor(name, shape=(1, 4), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(name, nodes, outputs, inputs=(), constants=()):
    made = [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes]
    return helper.make_graph(made, name, list(inputs), list(outputs), list(constants))


def model_of(main, opset=17) -> ir.Model:
    proto = helper.make_model(main, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    model = load_model(proto)
    infer_shapes(model)
    return model


def nested(opset: int) -> ir.Model:
    """Branches in a branch, which share names, and a loop with a branch inside."""
    yes = graph(
        "yes", [("Mul", ["r", "two"], ["m"], {}), ("Relu", ["m"], ["q"], {})], [tensor("q")]
    )
    no = graph("no", [("Neg", ["r"], ["m"], {}), ("Abs", ["m"], ["p"], {})], [tensor("p")])
    then = graph(
        "then",
        [
            ("Add", ["x", "two"], ["r"], {}),
            ("If", ["g"], ["o"], {"then_branch": yes, "else_branch": no}),
        ],
        [tensor("o")],
    )
    other = graph("else", [("Exp", ["x"], ["e"], {})], [tensor("e")])
    sqrt = graph("sqrt", [("Sqrt", ["d"], ["sq"], {})], [tensor("sq")])
    absolute = graph("abs", [("Abs", ["d"], ["ab"], {})], [tensor("ab")])
    body = graph(
        "body",
        [
            ("Add", ["s", "x"], ["s2"], {}),
            ("Mul", ["s2", "two"], ["d"], {}),
            ("Identity", ["c"], ["c2"], {}),
            ("If", ["g"], ["z"], {"then_branch": sqrt, "else_branch": absolute}),
        ],
        [tensor("c2", (), TensorProto.BOOL), tensor("s2"), tensor("z")],
        [tensor("i", (), TensorProto.INT64), tensor("c", (), TensorProto.BOOL), tensor("s")],
    )
    main = graph(
        "main",
        [
            ("If", ["f"], ["y"], {"then_branch": then, "else_branch": other}),
            ("Loop", ["n", "", "x"], ["fin", "zs"], {"body": body}),
        ],
        [tensor("y"), tensor("fin"), tensor("zs", (None, 1, 4))],
        [
            tensor("x"),
            tensor("f", (), TensorProto.BOOL),
            tensor("g", (), TensorProto.BOOL),
            tensor("n", (), TensorProto.INT64),
        ],
        [numpy_helper.from_array(np.array(2, np.float32), "two")],
    )
    return model_of(main, opset)


def feed(x, f, g, n):
    return {
        "x": np.array([x], np.float32),
        "f": np.array(f),
        "g": np.array(g),
        "n": np.array(n, np.int64),
    }


def floats(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for inner in graph_tree(model.graph)
        for value in [*inner.inputs, *(v for node in inner for v in node.outputs)]
        if value.dtype == ir.DataType.FLOAT
    ]


def expected(samples) -> dict[str, list[np.ndarray]]:
    """What each value of `nested` is on each sample, in numpy; `m` of both branches apart."""
    found: dict[str, list[np.ndarray]] = {}

    def put(**values):
        for name, array in values.items():
            found.setdefault(name, []).append(np.asarray(array, np.float32))

    for sample in samples:
        x, f, g, n = sample["x"], sample["f"], sample["g"], int(sample["n"])
        put(x=x)
        if f:
            r = x + 2
            put(r=r)
            if g:
                put(m_yes=2 * r, q=np.maximum(2 * r, 0), o=np.maximum(2 * r, 0))
            else:
                put(m_no=-r, p=np.abs(r), o=np.abs(r))
            put(y=found["o"][-1])
        else:
            put(e=np.exp(x), y=np.exp(x))
        s = x
        for _ in range(n):
            put(s=s, s2=s + x, d=2 * (s + x))
            s = s + x
            inner = np.sqrt(2 * s) if g else np.abs(2 * s)
            put(**{"sq" if g else "ab": inner}, z=inner, zs=inner)
        put(fin=s)
    return found


def key_of(value: ir.Value) -> str:
    name = value.name or ""
    return name if name != "m" else f"m_{value.graph.name}"


ALL = [
    feed([1, 2, 3, 4], True, True, 3),
    feed([0.5, 1, 7, 2], True, False, 1),
    feed([1, -2, 3, -1], False, False, 0),
    feed([-1, -2, -3, -4], False, False, 2),
]


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_values_in_branches_and_loops_are_seen(opset, count):
    model = nested(opset)
    samples = ALL[:count]
    values = floats(model)
    ranges = observe(model, values, samples)
    truth = expected(samples)
    for value in values:
        key = key_of(value)
        if key not in truth:
            assert ranges.unseen[value] == NOT_TAKEN
            assert value not in ranges.by_value
            continue
        everything = np.concatenate([array.reshape(-1) for array in truth.pop(key)])
        seen = ranges.by_value[value]
        assert seen.low == pytest.approx(everything.min(), rel=1e-6), key
        assert seen.high == pytest.approx(everything.max(), rel=1e-6), key
    assert not truth
    assert bool(ranges.unseen) == any("no range" in note for note in ranges.notes)
    both = [ranges.by_value[v] for v in values if v.name == "m" and v in ranges.by_value]
    assert ranges["m"] == (min(r.low for r in both), max(r.high for r in both))


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse"])
def test_elements_in_branches_and_loops_are_counted(observer):
    model = nested(17)
    values = floats(model)
    options = ObserverOptions(observer=observer, percentile=80.0)
    ranges = observe(model, values, ALL, options=options)
    truth = expected(ALL)
    for value in values:
        arrays = truth[key_of(value)]
        if value.name in ("sq", "ab"):  # in a branch in a loop
            low, high = min(a.min() for a in arrays), max(a.max() for a in arrays)
            assert ranges.by_value[value] == pytest.approx((low, high))
            continue
        alone = options.accumulator()
        for array in arrays:
            alone.add(Range(float(array.min()), float(array.max())), array)
        assert ranges.by_value[value] == pytest.approx(alone.range(), rel=1e-5), value.name
    assert any("rounds of a loop" in note and "'sq'" in note for note in ranges.notes)


def test_values_of_a_scan_are_seen():
    body = graph(
        "body",
        [("Add", ["s", "row"], ["s2"], {}), ("Mul", ["s2", "s2"], ["sq"], {})],
        [tensor("s2", (4,)), tensor("sq", (4,))],
        [tensor("s", (4,)), tensor("row", (4,))],
    )
    attributes = {
        "body": body,
        "num_scan_inputs": 1,
        "scan_output_axes": [1],
        "scan_output_directions": [1],
    }
    main = graph(
        "main",
        [("Scan", ["s0", "rows"], ["last", "squares"], attributes)],
        [tensor("last", (4,)), tensor("squares", (4, 5))],
        [tensor("s0", (4,)), tensor("rows", (5, 4))],
    )
    model = model_of(main)
    rows = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    sums = np.cumsum(rows, axis=0)
    values = [v for v in floats(model) if v.name in ("s2", "sq")]
    sample = {"s0": np.zeros(4, np.float32), "rows": rows}
    for observer in ("minmax", "percentile"):
        options = ObserverOptions(observer=observer, percentile=100.0)
        ranges = observe(model, values, [sample], options=options)
        assert ranges["s2"] == pytest.approx((sums.min(), sums.max()), rel=1e-5)
        assert ranges["sq"] == pytest.approx(((sums**2).min(), (sums**2).max()), rel=1e-5)


@pytest.mark.parametrize("observer", [o.value for o in Observer])
def test_nothing_depends_on_the_order_of_samples(observer):
    model = nested(17)
    values = floats(model)
    rng = np.random.default_rng(7)
    samples = [
        feed(10.0 ** rng.integers(-3, 2) * np.abs(rng.standard_normal(4)), i % 2 > 0, i % 3 > 0, 2)
        for i in range(12)
    ]
    options = ObserverOptions(observer=observer)
    first = observe(model, values, samples, options=options)
    for _ in range(3):
        rng.shuffle(samples)
        again = observe(model, values, samples, options=options)
        assert again == first
        assert again.by_value == first.by_value
        assert again.notes == first.notes


def test_groups_of_values_make_no_difference(monkeypatch):
    model = nested(17)
    values = floats(model)
    options = ObserverOptions(observer="mse")
    whole = observe(model, values, ALL, options=options)
    monkeypatch.setattr(seeing, "GROUP_BYTES", 32)
    assert observe(model, values, ALL, options=options).by_value == whole.by_value


def test_average_is_the_mean_of_the_samples_ranges():
    model = nested(17)
    value = next(v for v in floats(model) if v.name == "r")
    found = observe(model, [value], ALL, options=ObserverOptions(observer="average"))
    assert found["r"] == ((3 + 2.5) / 2, (6 + 9) / 2)  # of the two samples that take the branch


def test_a_nan_in_a_branch_is_named():
    model = nested(17)
    bad = feed([-1, 1, 1, 1], False, True, 1)  # the root of a negative number
    for observer in ("minmax", "mse"):
        with pytest.raises(CalibrationError, match="'(sq|z|zs)' is NaN"):
            observe(model, floats(model), [bad], options=ObserverOptions(observer=observer))


def test_empty_tensors_do_not_stop_calibration():
    main = graph(
        "main",
        [("Relu", ["x"], ["y"], {})],
        [tensor("y", ("n", 4))],
        [tensor("x", ("n", 4))],
    )
    model = model_of(main)
    empty, full = ({"x": np.ones((n, 4), np.float32)} for n in (0, 2))
    for observer in ("minmax", "entropy"):
        options = ObserverOptions(observer=observer)
        assert observe(model, floats(model), [empty, full], options=options)["y"] == (1, 1)
        assert observe(model, floats(model), [empty], options=options)["y"] == (0, 0)


# --- samples -----------------------------------------------------------------------------------


class Living:
    """Makes samples and counts those that are still referred to."""

    def __init__(self, count: int) -> None:
        self.count, self.now, self.most = count, 0, 0

    def __iter__(self):
        rng = np.random.default_rng(0)
        for _ in range(self.count):
            array = rng.standard_normal((1, 4)).astype(np.float32)
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(array, self._gone)
            yield {"x": array}

    def _gone(self) -> None:
        self.now -= 1


def small_net() -> ir.Model:
    weights = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    nodes = [("MatMul", ["x", "w"], ["h"], {}), ("Relu", ["h"], ["y"], {})]
    constants = [numpy_helper.from_array(weights, "w")]
    return model_of(
        graph("main", nodes, [tensor("y", ("n", 4))], [tensor("x", ("n", 4))], constants)
    )


@pytest.mark.parametrize("observer", [o.value for o in Observer])
def test_as_many_samples_live_of_many_as_of_few(observer):
    most = []
    for count in (10, 400):
        model = small_net()
        living = Living(count)
        feeds = as_feeds(living, input_specs(model))
        ranges = observe(model, floats(model), feeds, options=ObserverOptions(observer=observer))
        assert ranges.samples == count == len(feeds)
        most.append(living.most)
    assert most[0] == most[1] <= 3


def test_few_samples_are_noted_and_many_are_not():
    model = small_net()
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (64, 4)).astype(np.float32)
    rows[:, 0] = 1.0
    samples = [{"x": row[None]} for row in rows]
    few = observe(model, floats(model), samples[:2])
    assert any("few calibration samples (2)" in note for note in few.notes)
    assert observe(model, floats(model), samples).notes == ()
    batch = observe(model, floats(model), [{"x": rows}])  # one feed of 64 samples
    assert batch.notes == ()


@pytest.mark.parametrize("seed", range(3))
def test_digits_are_representative_and_an_outlier_is_not(seed):
    datasets = pytest.importorskip("sklearn.datasets")
    images = (datasets.load_digits().images / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    kernels = rng.standard_normal((16, 1, 3, 3)).astype(np.float32)
    dense = rng.standard_normal((576, 10)).astype(np.float32)
    nodes = [
        ("Conv", ["x", "k"], ["c"], {}),
        ("Relu", ["c"], ["r"], {}),
        ("Flatten", ["r"], ["f"], {}),
        ("MatMul", ["f", "d"], ["y"], {}),
    ]
    constants = [numpy_helper.from_array(kernels, "k"), numpy_helper.from_array(dense, "d")]
    main = graph("main", nodes, [tensor("y", (1, 10))], [tensor("x", (1, 1, 8, 8))], constants)
    model = model_of(main)
    chosen = rng.choice(len(images), 32, replace=False)
    samples = [{"x": images[i][None, None]} for i in chosen]
    assert observe(model, floats(model), samples).notes == ()
    samples[rng.integers(32)] = {"x": 5 * images[0][None, None]}
    (note,) = observe(model, floats(model), samples).notes
    assert "do not agree on the ranges" in note
    assert "'c'" in note or "'x'" in note


def test_samples_that_are_all_the_same_are_noted():
    model = small_net()
    samples = [{"x": np.ones((1, 4), np.float32)}] * 20
    assert any("all the same" in note for note in observe(model, floats(model), samples).notes)


# --- the pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", [o.value for o in Observer])
@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
def test_the_pass_takes_any_observer(observer, scheme):
    model = small_net()
    feeds = as_feeds(lambda: iter(Living(20)), input_specs(model))
    item = StaticInt8(observer=observer, scheme=scheme, percentile=99.0)
    notes = item.run(model, Context(calibration=feeds)).notes
    assert f"calibrated on 20 samples, {observer}" in notes
    scale = next(n for n in model.graph if n.op_type == "QuantizeLinear").inputs[1].const_value
    x = np.concatenate([feed["x"] for feed in feeds])
    widest = activation_affine(Range(float(x.min()), float(x.max())), U8, False).scale
    if observer == "minmax" and scheme == "u8s8":
        assert scale.numpy() == widest
    elif scheme == "u8s8":
        assert scale.numpy() < widest or observer in ("mse", "entropy")


def test_options_that_can_not_be():
    for options in ({"observer": "median"}, {"percentile": 0.9999}, {"percentile": 101.0}):
        with pytest.raises(PassOptionError):
            ObserverOptions(**options)
        with pytest.raises(PassOptionError):
            StaticInt8(**options)
