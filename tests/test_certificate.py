"""Certificates of single rewrites: what is proved, what is run, what counts as a difference."""

import dataclasses

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.match import const, op, var
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.equality import Certifier
from edgepass.passes.equality.feeds import adversarial, assignments, exhaustive
from edgepass.passes.equality.judge import compare
from edgepass.passes.equality.wide import in_double
from edgepass.passes.registry import find_rule
from edgepass.passes.rules import RewriteRule, run_rules
from edgepass.targets.onnxruntime import OrtRunner

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def certify(text, *rules, **options):
    """The certificates of rules on a model in text form."""
    model = load_model(onnx.parser.parse_model(HEAD + text))
    infer_shapes(model)
    certifier = Certifier(keep=True, **options)
    run_rules(model, rules, Context(certify=certifier))
    verify(model)
    return certifier


def rule(pattern, rewrite, check=lambda m: None):
    """A rule made on the spot. It fires once in a run: what it writes may match again."""

    @dataclasses.dataclass(frozen=True)
    class Spot(RewriteRule):
        """Made for a test."""

        def pattern(self):
            return pattern

        def check(self, m, context):
            return check(m) or ("it is its own work" if m.root.name.startswith("made") else None)

        def rewrite(self, m, build):
            value = rewrite(m, build)
            for node in m.root.graph:
                if "/" in (node.name or ""):
                    node.name = f"made/{node.name}"
            return value

    return Spot()


TWICE = rule(op.Add(var("x"), var("x")), lambda m, b: b.Mul(m["x"], np.float32(2)))


def test_numeric_certificates_say_what_was_run():
    certifier = certify("g (float[n, 3] x) => (float[n, 3] y) { y = Add(x, x) }", TWICE)
    (found,) = certifier.certificates
    assert (found.verdict, found.method, found.holds) == ("equal", "numeric", True)
    assert found.cases > 40
    assert found.worst_error == 0
    assert "agrees on infinite inputs" in found.policy
    assert str(found).startswith("spot at y: equal (numeric, ")
    assert found.as_dict()["rule"] == "spot"
    assert certifier.differing == []


def test_a_wrong_rule_gets_a_certificate_that_says_so():
    wrong = rule(op.Add(var("x"), var("x")), lambda m, b: b.Mul(m["x"], np.float32(2.001)))
    (found,) = certify("g (float[n] x) => (float[n] y) { y = Add(x, x) }", wrong).differing
    assert found.verdict == "differs"
    assert "of the range" in found.detail


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        # right for positive numbers only
        (rule(op.Abs(var("x")), lambda m, b: b.Identity(m["x"])), "differs"),
        # right for all but zero
        (rule(op.Sign(var("x")), lambda m, b: b.Div(m["x"], b.Abs(m["x"]))), "NaN or infinite"),
        # right where the batch is 1
        (rule(op.Relu(var("x")), lambda m, b: b.Relu(b.ReduceMax(m["x"], i64(0)))), "shape"),
    ],
)
def test_adversarial_inputs_find_what_random_ones_might_not(wrong, says):
    operator = wrong.pattern().op_types[0]
    text = f"g (float[batch, 2] x) => (float[batch, 2] y) {{ y = {operator}(x) }}"
    (found,) = certify(text, wrong).certificates
    assert found.holds is False
    assert says in found.detail


def i64(*values):
    return np.array(values, np.int64)


def test_shape_arithmetic_is_proved_for_all_sizes():
    text = """g (float[n, c, 4] x) => (int64[1] y)
    <int64[1] zero = {0}, int64[1] two = {2}, int64[1] one = {1}>
    { s = Shape(x)  a = Slice(s, zero, one)  b = Mul(a, two)  y = Div(b, two) }"""
    halves = rule(
        op.Div(op.Mul(var("x"), const("a")), const("b")),
        lambda m, b: b.Identity(m["x"]),
    )
    (found,) = certify(text, halves).certificates
    assert (found.method, found.verdict) == ("symbolic", "equal")

    # n * 2 // 3 is no n: nothing is proved, and running finds it
    (found,) = certify(
        text.replace("two = {2}, int64[1] one", "two = {3}, int64[1] one"),
        rule(op.Div(op.Mul(var("x"), const("a")), const("b")), lambda m, b: b.Mul(m["x"], i64(1))),
    ).certificates
    assert found.method == "symbolic"
    wrong = rule(op.Mul(var("x"), const("a")), lambda m, b: b.Add(m["x"], i64(2)))
    (found,) = certify(text, wrong).certificates
    assert found.holds is False


def test_small_domains_are_run_whole():
    text = "g (bool[2, 2] a, bool[2, 2] b) => (bool[2, 2] y) { c = And(a, b)  y = Not(c) }"
    de_morgan = rule(
        op.Not(op.And(var("a"), var("b"))),
        lambda m, b: b.Or(b.Not(m["a"]), b.Not(m["b"])),
    )
    (found,) = certify(text, de_morgan).certificates
    assert (found.method, found.verdict, found.cases) == ("exhaustive", "equal", 1)
    wrong = rule(op.Not(op.And(var("a"), var("b"))), lambda m, b: b.Xor(m["a"], m["b"]))
    assert certify(text, wrong).certificates[0].holds is False


def test_one_number_out_of_65536_is_found():
    text = "g (int8[256] a, int8[256] b) => (int8[256] y) { y = Max(a, b) }"
    by_difference = rule(
        op.Max(var("a"), var("b")),
        lambda m, b: b.Where(b.Less(m["b"], m["a"]), m["a"], m["b"]),
    )
    (found,) = certify(text, by_difference).certificates
    assert (found.method, found.verdict) == ("exhaustive", "equal")
    assert found.cases == 65536 // 256
    off = rule(
        op.Max(var("a"), var("b")),
        lambda m, b: b.Max(m["a"], b.Min(m["b"], np.int8(126))),
    )
    (found,) = certify(text, off).certificates
    assert found.holds is False


def test_integer_division_is_not_run_with_zero():
    text = "g (int64[n] a, int64[n] b) => (int64[n] y) { c = Div(a, b)  y = Mul(c, b) }"
    cancel = rule(op.Mul(op.Div(var("a"), var("b")), var("b")), lambda m, b: b.Identity(m["a"]))
    (found,) = certify(text, cancel).certificates
    assert found.holds is False  # integers truncate; and the process still lives


def test_nan_and_infinity_are_recorded_and_no_difference():
    zero = rule(op.Mul(var("x"), 0.0), lambda m, b: b.Sub(b.Relu(m["x"]), b.Relu(m["x"])))
    text = "g (float[n] x) => (float[n] y) <float c = {0}> { y = Mul(x, c) }"
    (found,) = certify(text, zero).certificates
    assert found.verdict == "equal"
    assert "differs on infinite inputs" in found.policy


def test_reordered_rounding_is_no_difference_but_lost_digits_are():
    # sums in another order, of numbers that cancel
    text = """g (float[n, 3] x) => (float[n, 3] y)
    <float[3] a = {0.1, 1000, -3}, float[3] b = {7, -999.9, 3}>
    { t = Add(x, a)  y = Add(t, b) }"""
    other = rule(
        op.Add(op.Add(var("x"), const("a")), const("b")),
        lambda m, b: b.Add(b.Add(m["x"], m["b"]), m["a"]),
    )
    assert certify(text, other).certificates[0].verdict == "equal"
    coarse = rule(
        op.Add(op.Add(var("x"), const("a")), const("b")),
        lambda m, b: b.Cast(b.Cast(b.Add(m["x"], m.array("a") + m.array("b")), to=16), to=1),
    )
    assert certify(text, coarse).certificates[0].holds is False


def test_what_feeds_a_match_is_taken_into_account():
    """Abs(x) -> x is right where x is a Relu's result, which the region alone does not show."""
    after_relu = rule(
        op.Abs(var("x")),
        lambda m, b: b.Identity(m["x"]),
        lambda m: None if m["x"].producer().op_type == "Relu" else "not known to be positive",
    )
    text = "g (float[n] x) => (float[n] y) { r = Relu(x)  y = Abs(r) }"
    (found,) = certify(text, after_relu).certificates
    assert found.verdict == "equal"
    assert "given the 2 layers of nodes above" in found.detail


def test_a_rule_that_looks_beyond_its_pattern_has_a_larger_region():
    looks = rule(
        op.Neg(var("x")),
        lambda m, b: b.Identity(m["x"].producer().inputs[0]),
        lambda m: None if m["x"].producer() and m["x"].producer().op_type == "Neg" else "no",
    )
    certifier = certify("g (float[n] x) => (float[n] y) { a = Neg(x)  y = Neg(a) }", looks)
    (found,) = certifier.certificates
    assert found.verdict == "equal"
    assert [n.op_type for n in certifier.regions[0].before.graph] == ["Neg", "Neg", "Identity"]
    assert [v.name for v in certifier.regions[0].after.graph.inputs] == ["x"]


def test_what_is_replaced_beside_the_match_is_certified_too():
    text = """g (float[n, 4] x) => (float[n, 2] a, float[n, 2] b)
    <int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] axis = {1}>
    { p = Slice(x, zero, two, axis)  q = Slice(x, two, four, axis)  a = Relu(p)  b = Neg(q) }"""
    certifier = certify(text, find_rule("slices_to_split")())
    (found,) = certifier.certificates
    assert found.verdict == "equal"
    assert len(certifier.regions[0].before.graph.outputs) == 2


def test_a_result_that_the_runtime_refuses_differs():
    unknown = rule(op.Relu(var("x")), lambda m, b: b.BitwiseNot(m["x"]))
    model = load_model(
        onnx.parser.parse_model(HEAD + "g (float[n] x) => (float[n] y) { y = Relu(x) }")
    )
    certifier = Certifier()
    run_rules(model, (unknown,), Context(certify=certifier))
    (found,) = certifier.certificates
    assert found.holds is False
    assert "the result is invalid" in found.detail


def test_absent_weights_are_filled_where_they_stay_and_not_judged_where_they_change():
    text = """g (float[n, 4] x) => (float[n, 3] y)
    <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
    { t = Transpose<perm = [1, 0]>(x)  u = Transpose<perm = [1, 0]>(t)  y = MatMul(u, w) }"""
    keeps = rule(
        op.MatMul(op.Transpose(op.Transpose(var("x"))), const("w", data=False)),
        lambda m, b: b.MatMul(m["x"], m["w"]),
    )
    folds = rule(
        op.MatMul(var("x"), const("w", data=False)),
        lambda m, b: b.Relu(b.MatMul(m["x"], m["w"])),
    )
    found = []
    for item in (keeps, folds):
        model = load_model(onnx.parser.parse_model(HEAD + text))
        model.graph.initializers["w"].const_value = AbsentTensor("w", ir.DataType.FLOAT, [4, 3])
        infer_shapes(model)
        certifier = Certifier()
        run_rules(model, (item,), Context(certify=certifier))
        found += certifier.certificates
    assert found[0].verdict == "equal"
    assert found[1].holds is None
    assert "no data" in found[1].detail


def test_inside_a_branch_captured_values_are_inputs():
    text = """g (bool c, float[n] x) => (float[n] y)
    { y = If (c) <then_branch = t () => (float[n] a) { a = Add(x, x) },
                  else_branch = e () => (float[n] b) { b = Neg(x) }> }"""
    (found,) = certify(text, TWICE).certificates
    assert found.verdict == "equal"


def test_certificates_are_off_by_default_and_change_nothing():
    text = "g (float[n, 3] x) => (float[n, 3] y) { a = Neg(x)  b = Neg(a)  y = Add(b, b) }"
    models = []
    for certifier in (None, Certifier()):
        model = load_model(onnx.parser.parse_model(HEAD + text))
        infer_shapes(model)
        rules = (find_rule("remove_inverse_pair")(), TWICE)
        run_rules(model, rules, Context(certify=certifier))
        models.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert models[0] == models[1]


# --- the parts -----------------------------------------------------------------------------------


def test_compare_follows_the_policy():
    a = np.float32([0, 1, np.nan, np.inf])
    assert compare([a], [np.float32([0, 1, np.nan, np.inf])]).error == 0
    other = compare([a], [np.float32([0, 1, 5, np.nan])])
    assert (other.acceptable, other.other_kind) == (True, 2)
    lost = compare([a], [np.float32([np.nan, 1, np.nan, np.inf])])
    assert (lost.acceptable, lost.lost) == (False, 1)
    assert not compare([np.float32([0, 1])], [np.float32([0, 1.0001])]).acceptable
    assert compare([np.float32([0, 1])], [np.float32([0, 1.000005])]).acceptable
    assert not compare([i64(1, 2)], [i64(1, 3)]).acceptable
    assert not compare([a], [a[:2]]).acceptable
    assert not compare([a], [a.astype(np.float64)]).acceptable
    # next to no range: a rounding step of the magnitude is no difference
    near = np.float32([0.5, 0.5 + 2**-24])
    assert compare([near], [near + np.float32(2**-24)]).acceptable
    assert compare([np.float32([0, 1e-44])], [np.float32([1e-45, 0])]).acceptable


def test_sizes_cover_distinct_equal_one_and_zero_and_keep_what_is_fixed():
    shape = ir.Shape(["n", "m", ir.SymbolicDim(None), 3, ir.SymbolicDim("2*n")])
    value = ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    found = assignments([value], {})
    assert {"n", "m", "?-3"} == set(found[0])
    assert len(set(found[0].values())) == 3
    assert any(set(sizes.values()) == {0} for sizes in found)
    assert any(set(sizes.values()) == {1} for sizes in found)
    assert all(sizes["n"] == 9 for sizes in assignments([value], {"n": 9}))
    cases = list(adversarial([value], found[0], 0))
    assert all(case.feed["x"].shape[4] == 2 * case.feed["x"].shape[0] for case in cases)
    kinds = {case.kind: case.feed["x"] for case in cases}
    assert np.isnan(kinds["nan"]).any()
    assert np.isinf(kinds["infinite"]).any()
    assert (kinds["negative"] < 0).all()
    assert np.abs(kinds["huge"]).max() > 1e36
    tiny = np.abs(kinds["denormal"][kinds["denormal"] != 0])
    assert tiny.min() < np.finfo(np.float32).tiny


def test_exhaustive_covers_all_pairs_or_declines():
    make = lambda name, dtype, dims: ir.Value(  # noqa: E731
        name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype)
    )
    a, b = (make(n, ir.DataType.UINT8, [4096]) for n in "ab")
    feeds = exhaustive([a, b], True)
    pairs = {p for f in feeds for p in zip(f["a"].tolist(), f["b"].tolist(), strict=True)}
    assert len(pairs) == 65536
    assert exhaustive([make("x", ir.DataType.FLOAT, [2])], True) is None
    assert exhaustive([make("x", ir.DataType.INT8, ["n"])], True) is None
    whole = exhaustive([make("x", ir.DataType.BOOL, [3])], False)
    assert sorted(tuple(f["x"].tolist()) for f in whole) == sorted(
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
    )


def test_the_double_twin_computes_the_same_more_exactly():
    text = """g (float[2, 3, 4] x) => (float[2, 3, 4] y)
    <float[3] s = {1, 2, 3}, float[3] b = {0, 1, 2}>
    { n = InstanceNormalization(x, s, b)  c = Cast<to = 1>(n)  y = Exp(c) }"""
    model = load_model(onnx.parser.parse_model(HEAD + text))
    infer_shapes(model)
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    narrow = OrtRunner(model, optimize=False).run({"x": x})["y"]
    wide = OrtRunner(in_double(model), optimize=False).run({"x": x.astype(np.float64)})["y"]
    assert wide.dtype == np.float64
    assert 0 < np.abs(narrow / wide - 1).max() < 1e-5
