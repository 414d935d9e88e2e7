"""What real models contain besides plain nodes comes through `compile` with interface and results.

Subgraphs with captures, model-local functions, contrib and unknown domains, sequences, empty
tensors, scalars, strings, and the odd ways in which a graph's interface can be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgepass
from backend_cases import difference, reference_outputs
from edgepass.errors import EdgepassError, UnsupportedOpError
from edgepass.frontends import load_model
from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.pipelines import parse_recipe
from edgepass.targets.onnxruntime import OrtRunner

I64 = np.int64
F32 = np.float32


def parse(graph: str, *, opset: int = 18, ir_version: int = 9, functions: str = "") -> Any:
    """A model from onnx's text form; com.microsoft and com.example are imported too."""
    domains = f'"" : {opset}, "com.microsoft" : 1, "com.example" : 1'
    text = f"<ir_version: {ir_version}, opset_import: [{domains}]>\n{graph}\n{functions}"
    return onnx.parser.parse_model(text)


def same(proto: onnx.ModelProto, *feeds: dict[str, Any], numerics: bool = True) -> Any:
    """Compile, and hold interface and results against the source's; returns the result."""
    before = proto.SerializeToString()
    compiled = edgepass.compile(proto, "host", check_numerics=numerics, time_budget_s=0)
    assert proto.SerializeToString() == before
    assert not [note for note in compiled.notes if "WARNING" in note]
    inputs = {i.name for i in proto.graph.input}
    if proto.ir_version < 4:
        inputs -= {i.name for i in proto.graph.initializer}
    graph = compiled.model.graph
    assert {v.name for v in graph.inputs} == inputs
    assert [v.name for v in graph.outputs] == [o.name for o in proto.graph.output]
    for feed in feeds:
        expected = reference_outputs(proto, list(feed.values()))
        actual = compiled.run(feed)
        for info, value in zip(proto.graph.output, expected, strict=True):
            assert difference(value, actual[info.name], 1e-5, 1e-6) == "", info.name
    return compiled


def vector(*values: float) -> np.ndarray:
    return np.array(values, F32)


# --- subgraphs -------------------------------------------------------------------------------


IF = """
g (float[N] x, bool flag) => (float[N] y, float[M] z)
<float[1] two = {2}>
{
    a = Add (x, two)
    b = Mul (a, two)
    y, z = If (flag) <
        then_branch = t () => (float[N] ty, float[M] tz) {
            again = Add (x, two)
            ty = Mul (again, b)
            tz = Identity (a)
        },
        else_branch = e () => (float[N] ey, float[M] ez) {
            again_e = Sub (x, two)
            ey = Identity (again_e)
            zeros = Constant <value = float[1] {0}> ()
            ez = Concat <axis = 0> (ey, zeros)
        }
    >
}
"""


def test_if_with_captures_and_branches_of_different_shapes():
    x = vector(1, -2, 3)
    compiled = same(parse(IF), *({"x": x, "flag": np.array(f)} for f in (True, False)))
    assert any(node.op_type == "If" for node in compiled.model.graph)


def test_nested_ifs_capture_through_two_levels():
    proto = parse("""
    g (float[3] x, bool p, bool q) => (float[3] y) {
        s = Exp (x)
        y = If (p) <
            then_branch = t () => (float[3] o1) {
                s2 = Exp (x)
                inner = If (q) <
                    then_branch = tt () => (float[3] o2) { m = Mul (s, s2)
                                                           o2 = Exp (m) },
                    else_branch = te () => (float[3] o3) { o3 = Identity (s2) }
                >
                o1 = Identity (inner)
            },
            else_branch = e () => (float[3] o4) { o4 = Identity (x) }
        >
    }""")
    bits = [np.array(False), np.array(True)]
    same(proto, *({"x": vector(0.1, -0.2, 0.3), "p": p, "q": q} for p in bits for q in bits))


LOOP = """
g (float[2] x, int64 trips) => (float[2] last, float[T,2] all)
<float[2] step = {1, 2}, int64 start = {3}, bool yes = {1}>
{
    unused, last, all = Loop (trips, yes, start, x) <
        body = b (int64 i, bool go, int64 count, float[2] v)
            => (bool keep, int64 next, float[2] out, float[2] seen) {
            one = Constant <value = int64 {1}> ()
            next = Add (count, one)
            scale = Cast <to = 1> (next)
            grown = Mul (step, scale)
            outer = Add (x, step)
            out0 = Add (v, grown)
            out = Sub (out0, outer)
            seen = Identity (out)
            keep = Identity (go)
        }
    >
}
"""


def test_loop_counter_starts_at_a_constant_but_is_none():
    same(parse(LOOP), *({"x": vector(1, 5), "trips": np.array(t)} for t in (0, 1, 4)))


def test_loop_whose_state_changes_shape():
    proto = parse("""
    g (float[2] x, int64 trips) => (float[K] y, int64[1] n) <bool yes = {1}> {
        y = Loop (trips, yes, x) <
            body = b (int64 i, bool go, float[A] v) => (bool keep, float[B] out) {
                shape = Shape (v)
                half = Cast <to = 1> (shape)
                out = Concat <axis = 0> (v, half)
                keep = Identity (go)
            }
        >
        n = Shape (y)
    }""")
    same(proto, *({"x": vector(1, 5), "trips": np.array(t)} for t in (0, 1, 3)))


def test_scan_with_a_capture_and_two_outputs():
    proto = parse("""
    g (float[2] start, float[S,2] xs) => (float[2] final, float[S,2] sums, float[S] firsts)
    <float[2] w = {0.5, 2}, int64[1] zero = {0}, int64[1] one = {1}>
    {
        final, sums, firsts = Scan <num_scan_inputs = 1, body = b (float[2] acc, float[2] x)
            => (float[2] acc_out, float[2] total, float first) {
            weighted = Mul (x, w)
            weighted_again = Mul (x, w)
            acc_out = Add (acc, weighted)
            total = Add (acc_out, weighted_again)
            picked = Slice (total, zero, one)
            first = Squeeze (picked, zero)
        }> (start, xs)
    }""")
    rows = np.arange(8, dtype=F32).reshape(4, 2)
    same(proto, {"start": vector(1, 1), "xs": rows}, {"start": vector(0, 0), "xs": rows[:1]})


def test_a_branch_names_a_value_like_the_other_branch_does():
    """Siblings may use one name for two things; so may a branch and a later outer node."""
    proto = parse("""
    g (float[2] x, bool p) => (float[2] y) {
        r = If (p) <
            then_branch = t () => (float[2] o) { h = Exp (x)
                                                 o = Neg (h) },
            else_branch = e () => (float[2] o) { h = Neg (x)
                                                 o = Exp (h) }
        >
        y = Relu (r)
    }""")
    same(proto, *({"x": vector(0.5, -1), "p": np.array(p)} for p in (True, False)))


def test_a_subgraph_returns_captures_and_constants():
    proto = parse("""
    g (float[2] x, bool p) => (float[2] y, float[2] k) {
        a = Relu (x)
        y, k = If (p) <
            then_branch = t () => (float[2] o, float[2] c) {
                o = Identity (a)
                c = Constant <value = float[2] {7, 8}> () },
            else_branch = e () => (float[2] o2, float[2] c2) {
                o2 = Identity (x)
                c2 = Identity (a) }
        >
    }""")
    same(proto, *({"x": vector(0.5, -1), "p": np.array(p)} for p in (True, False)))


def test_constant_condition_with_a_wrong_shape_in_the_dead_branch():
    proto = parse("""
    g (float[2,1] x) => (float[A] y) <int64 rank = {2}> {
        shape = Shape (x)
        n = Size (shape)
        p = Equal (n, rank)
        y = If (p) <
            then_branch = t () => (float[B] o) <int64[1] one = {1}> { o = Squeeze (x, one) },
            else_branch = e () => (float[C,D] o2) { o2 = Identity (x) }
        >
    }""")
    same(proto, {"x": vector(1, 2).reshape(2, 1)})


def test_a_branch_never_taken_that_contradicts_what_inference_knows():
    """Only integer division tells that `b` has 4 rows: ONNX Runtime can't, and takes the model."""
    proto = parse("""
    g (float[8,3] x) => (float[R,C] y)
    <int64[1] two = {2}, int64 one = {1}, int64[1] zero = {0}, int64[1] first = {0}, int64 at = {0},
     int64[1] rest = {-1}>
    {
        s = Shape (x)
        rows = Gather (s, first)
        half = Div (rows, two)
        target = Concat <axis = 0> (half, rest)
        b = Reshape (x, target)
        t = Shape (b)
        n = Gather (t, at)
        p = Equal (n, one)
        y0 = If (p) <
            then_branch = t1 () => (float[C1] o) { c = Squeeze (b, zero)
                                                   o = Exp (c) },
            else_branch = e1 () => (float[R2,C2] o2) { c = Neg (b)
                                                       o2 = Exp (c) }
        >
        y1 = If (p) <
            then_branch = t2 () => (float[C3] o3) { c = Squeeze (b, zero)
                                                    o3 = Abs (c) },
            else_branch = e2 () => (float[R4,C4] o4) { c = Neg (b)
                                                       w = Constant <value_float = 3.0> ()
                                                       d = Mul (c, w)
                                                       o4 = Identity (b) }
        >
        y = Add (y0, y1)
    }""")
    compiled = same(proto, {"x": np.linspace(-1, 1, 24, dtype=F32).reshape(8, 3)})
    assert not any(node.op_type == "If" for node in compiled.model.graph)


def test_an_open_branch_that_does_not_fit_the_size_of_the_input():
    """A branch for each size of input, and the size fixed: the other branch is left as it is."""
    proto = parse("""
    g (float[8] x, int64 mode) => (float[A] y) <int64 one = {1}, int64[1] two = {2},
     float[5] w = {0, 1, 2, 3, 4}>
    {
        p = Equal (mode, one)
        y = If (p) <
            then_branch = t1 () => (float[A1] o) { o = Neg (x) },
            else_branch = e1 () => (float[A2] o2) { s = Shape (x)
                                                    half = Div (s, two)
                                                    m = Slice (x, two, half)
                                                    n = Div (half, two)
                                                    k = Expand (m, n)
                                                    o2 = Add (k, w) }
        >
    }""")
    # with its optimizations on, ONNX Runtime folds the shapes and refuses even the source
    model, _ = run_passes(load_model(proto), parse_recipe("default"), Context())
    x = np.arange(8, dtype=F32)
    result = OrtRunner(model, optimize=False).run({"x": x, "mode": np.array(1)})
    np.testing.assert_array_equal(result["y"], -x)


# --- functions -------------------------------------------------------------------------------

FUNCTIONS = """
<domain: "com.example", opset_import: ["" : 18]>
scaled <factor> (x) => (y) {
    f = Constant <value_float: float = @factor> ()
    unused = Exp (x)
    same = Identity (x)
    y = Mul (same, f)
}
<domain: "com.example", opset_import: ["" : 18, "com.example" : 1]>
twice (x) => (y) {
    a = com.example.scaled <factor = 3.0> (x)
    y = com.example.scaled <factor = 0.5> (a)
}
"""


def test_functions_called_several_times_are_inlined():
    proto = parse(
        """
        g (float[N] x) => (float[N] y, float[N] z) {
            a = com.example.twice (x)
            b = com.example.twice (a)
            y = com.example.scaled <factor = 2.0> (b)
            z = com.example.scaled <factor = 2.0> (b)
        }""",
        functions=FUNCTIONS,
    )
    compiled = same(proto, {"x": vector(1, -2, 3)})
    assert not compiled.model.functions
    assert not [n.op_type for n in compiled.model.graph if n.domain == "com.example"]


def test_a_function_called_from_a_subgraph():
    proto = parse(
        """
        g (float[N] x, bool p) => (float[N] y) {
            y = If (p) <
                then_branch = t () => (float[N] o) { o = com.example.twice (x) },
                else_branch = e () => (float[N] o2) { o2 = Neg (x) }
            >
        }""",
        functions=FUNCTIONS,
    )
    same(proto, *({"x": vector(1, -2), "p": np.array(p)} for p in (True, False)))


def test_a_function_with_a_name_of_a_standard_operator():
    """`com.example.Identity` adds one: only the domain tells it from the operator."""
    proto = parse(
        "g (float[2] x) => (float[2] y) { a = com.example.Identity (x)  y = Relu (a) }",
        functions="""
        <domain: "com.example", opset_import: ["" : 18]>
        Identity (x) => (y) { one = Constant <value = float {1}> ()  y = Add (x, one) }
        """,
    )
    same(proto, {"x": vector(1, -3)})


# --- other domains ---------------------------------------------------------------------------


def test_contrib_nodes_come_through():
    proto = parse("""
    g (float[N,4] x) => (float[N,4] y) <float[4] bias = {0, 1, 2, 3}> {
        a = Identity (x)
        b = com.microsoft.BiasGelu (a, bias)
        c = Dropout (b)
        y = com.microsoft.QuickGelu <alpha = 1.5> (c)
    }""")
    compiled = same(proto, {"x": np.linspace(-2, 2, 8, dtype=F32).reshape(2, 4)})
    kept = [(n.domain, n.op_type) for n in compiled.model.graph]
    assert kept == [("com.microsoft", "BiasGelu"), ("com.microsoft", "QuickGelu")]


def test_an_unknown_operator_is_named():
    proto = parse("g (float[2] x) => (float[2] y) { a = Relu (x)  y = com.example.Magic (a) }")
    with pytest.raises(UnsupportedOpError) as caught:
        edgepass.compile(proto, "host", time_budget_s=0)
    assert "Magic" in str(caught.value)
    assert "com.example" in caught.value.diagnostic.where
    assert caught.value.diagnostic.fix


def test_an_unknown_operator_in_a_branch_is_named():
    proto = parse("""
    g (float[2] x, bool p) => (float[2] y) {
        y = If (p) <
            then_branch = t () => (float[2] o) { o = com.example.Magic (x) },
            else_branch = e () => (float[2] o2) { o2 = Neg (x) }
        >
    }""")
    with pytest.raises(UnsupportedOpError, match="Magic"):
        edgepass.compile(proto, "host", time_budget_s=0)


# --- sequences, optionals, strings -----------------------------------------------------------


def test_sequences_inside_and_at_the_interface():
    proto = parse("""
    g (seq(float[N]) items, float[N] x, int64 at) => (seq(float[N]) longer, float[N] one, int64 n)
    {
        doubled = Add (x, x)
        doubled_too = Add (x, x)
        a = SequenceInsert (items, doubled)
        longer = SequenceInsert (a, doubled_too)
        one = SequenceAt (longer, at)
        n = SequenceLength (a)
    }""")
    feed = {"items": [vector(1, 2), vector(3, 4)], "x": vector(5, 6), "at": np.array(2, I64)}
    same(proto, feed)


def test_a_sequence_made_and_taken_apart():
    proto = parse("""
    g (float[N] x) => (float[M] y) <int64 one = {1}> {
        empty = SequenceEmpty <dtype = 1> ()
        a = SequenceInsert (empty, x)
        e = Exp (x)
        b = SequenceInsert (a, e)
        c = SequenceConstruct (x, e)
        d = SequenceErase (c, one)
        all = ConcatFromSequence <axis = 0> (b)
        more = ConcatFromSequence <axis = 0> (d)
        y = Concat <axis = 0> (all, more)
    }""")
    same(proto, {"x": vector(0.5, 1)})


def test_optionals():
    proto = parse("""
    g (float[2] x) => (float[2] y, bool there) {
        some = Optional (x)
        none = Optional <type = float[2]> ()
        y0 = OptionalGetElement (some)
        y = Exp (y0)
        there = OptionalHasElement (none)
    }""")
    same(proto, {"x": vector(0.5, 1)})


def test_strings():
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", "ß".encode()])
    nodes = [
        helper.make_node("Identity", ["s"], ["i"]),
        helper.make_node("Concat", ["i", "words"], ["c"], axis=0),
        helper.make_node("Constant", [], ["k"], value_strings=[b"x", b"y"]),
        helper.make_node("Concat", ["c", "k"], ["joined"], axis=0),
        helper.make_node("Equal", ["s", "s"], ["equal"]),
        helper.make_node("LabelEncoder", ["joined"], ["codes"], domain="ai.onnx.ml",
                         keys_strings=["a", "x"], values_int64s=[1, 2], default_int64=-1),
    ]  # fmt: skip
    infos = [
        helper.make_tensor_value_info("joined", TensorProto.STRING, ["M"]),
        helper.make_tensor_value_info("equal", TensorProto.BOOL, ["N"]),
        helper.make_tensor_value_info("codes", TensorProto.INT64, ["M"]),
    ]
    inputs = [helper.make_tensor_value_info("s", TensorProto.STRING, ["N"])]
    graph = helper.make_graph(nodes, "g", inputs, infos, [words])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("ai.onnx.ml", 3)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    same(proto, {"s": np.array(["a", "z", "€"], object)})


# --- shapes ----------------------------------------------------------------------------------


def test_tensors_without_elements():
    proto = parse("""
    g (float[N,3] x, float[0,3] none) => (float[M,3] y, int64[2] s, float[3] sum, float[K] flat)
    <float[0] nothing = {}, int64[2] shape = {-1, 3}>
    {
        a = Add (x, nothing_row)
        nothing_row = Constant <value = float[1,3] {0, 0, 0}> ()
        b = Concat <axis = 0> (a, none)
        y = Reshape (b, shape)
        s = Shape (none)
        axes = Constant <value = int64[1] {0}> ()
        sum = ReduceSum <keepdims = 0> (none, axes)
        f = Constant <value = int64[1] {0}> ()
        flat = Identity (nothing)
    }""".replace("a = Add (x, nothing_row)\n        nothing_row", "nothing_row").replace(
        "b = Concat", "a = Add (x, nothing_row)\n        b = Concat"
    ))  # fmt: skip
    none = np.zeros((0, 3), F32)
    same(proto, {"x": np.ones((2, 3), F32), "none": none}, {"x": none, "none": none})


def test_an_empty_constant_is_not_neutral():
    """x of one element + a constant of none has no element: broadcasting empties it."""
    proto = parse(
        "g (float[1] x) => (float[0] y) <float[0] c = {}> { a = Add (x, c)  y = Exp (a) }"
    )
    same(proto, {"x": vector(1)})


def test_scalars():
    proto = parse("""
    g (float x, int64 i) => (float y, int64 j, float[1] z, int64 r)
    <float one = {1}, int64[1] zero = {0}, float[1] row = {0}, float half = {0.5}>
    {
        a = Mul (x, one)
        y = Sub (a, half)
        z = Add (x, row)
        j = Identity (i)
        s = Shape (x)
        r = Size (s)
    }""")
    same(proto, {"x": np.array(3, F32), "i": np.array(4, I64)})


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (x, three)  b = Clip (a, zero, six)  y = Div (b, six1)",
        "a = Add (x, three1)  b = Clip (a, zero, six)  y = Div (b, six)",
        "a = Add (x, three1)  b = Clip (a, zero, six)  c = Mul (x, b)  y = Div (c, six)",
        "a = Add (x, three)  b = Clip (a, zero, six)  c = Mul (x, b)  y = Mul (c, sixth1)",
        "a = Max (x, zero1)  y = Min (a, six)",
    ],
)
def test_a_number_of_rank_two_raises_the_rank_of_a_vector(body: str):
    proto = parse(f"""
    g (float[3] x) => (float[A,3] y)
    <float three = {{3}}, float zero = {{0}}, float six = {{6}}, float sixth = {{0.16666667}},
     float[1,1] three1 = {{3}}, float[1,1] six1 = {{6}}, float[1,1] sixth1 = {{0.16666667}},
     float[1,1] zero1 = {{0}}>
    {{ {body} }}""")
    same(proto, {"x": vector(-4, 1, 7)})


def test_integers_divide_with_truncation_in_a_gate_too():
    proto = parse("""
    g (int32[N] x) => (int32[N] y, int32[N] z)
    <int32 three = {3}, int32 zero = {0}, int32 six = {6}>
    {
        a = Add (x, three)
        b = Clip (a, zero, six)
        y = Div (b, six)
        c = Mul (x, b)
        z = Div (c, six)
    }""")
    same(proto, {"x": np.arange(-5, 6, dtype=np.int32)})


@pytest.mark.parametrize(
    "body",
    [
        # the file says that y has as many rows as x; it has one less, or they are others
        "a = Slice (x, one, last)  y = Exp (a)",
        "a = Slice (x, one, last)  b = Slice (a, zero, last)  y = Exp (b)",
        "s = Shape (x)  r = Sub (s, one)  a = Expand (first, r)  y = Exp (a)",
    ],
)
def test_a_dimension_name_that_the_file_uses_wrongly(body: str):
    """Exporters give an output the input's dimension name whether or not the sizes are equal."""
    proto = parse(f"""
    g (float[N] x) => (float[N] y)
    <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[1] last = {{9999}}, float[1] first = {{2}},
     float[N] a, float[N] b>
    {{ {body} }}""")
    same(proto, {"x": vector(1, 2, 3)}, {"x": vector(1, 2, 3, 4, 5)})


# --- interfaces ------------------------------------------------------------------------------


def test_an_input_that_is_an_output():
    proto = parse("g (float[2] x) => (float[2] x, float[2] y) { y = Exp (x) }")
    same(proto, {"x": vector(1, 2)})


def test_one_computation_under_two_output_names():
    proto = parse("""
    g (float[2] x) => (float[2] y, float[2] z, float[2] w) {
        y = Exp (x)
        z = Exp (x)
        w = Identity (y)
    }""")
    same(proto, {"x": vector(1, 2)})


def test_outputs_that_are_identities_of_one_input():
    proto = parse("""
    g (float[2] x) => (float[2] y, float[2] z) { y = Identity (x)  a = Identity (x)
                                                 z = Dropout (a) }""")
    same(proto, {"x": vector(1, 2)})


def test_an_initializer_that_is_an_output():
    proto = parse("""
    g (float[2] x) => (float[2] y, float[2] w, float[2] v, float[2] k) <float[2] w = {3, 4}> {
        y = Mul (x, w)
        v = Identity (w)
        k = Constant <value = float[2] {5, 6}> ()
    }""")
    same(proto, {"x": vector(1, 2)})


def test_a_constant_output_that_folding_makes():
    proto = parse("""
    g (float[2] x) => (float[2] y, float[2] k) <float[2] w = {3, 4}> {
        k = Exp (w)
        y = Mul (x, k)
    }""")
    same(proto, {"x": vector(1, 2)})


def test_unused_inputs_stay():
    proto = parse("g (float[2] x, float[N,3] unused, bool flag) => (float[2] y) { y = Exp (x) }")
    feed = {"x": vector(1, 2), "unused": np.zeros((4, 3), F32), "flag": np.array(True)}
    same(proto, feed)


def test_a_model_without_inputs():
    proto = parse("g () => (float[2] y) { k = Constant <value = float[2] {5, 6}> ()  y = Exp (k) }")
    same(proto, {})


def test_a_model_without_nodes():
    same(parse("g (float[2] x) => (float[2] x) { }"), {"x": vector(1, 2)})


def default_input(ir_version: int) -> onnx.ModelProto:
    """x and w are inputs, and w has a default."""
    x, w, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xwy")
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["w", "w"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    weight = numpy_helper.from_array(np.ones(2, F32), "w")
    graph = helper.make_graph(nodes, "g", [x, w], [y], [weight])
    opsets = [helper.make_opsetid("", 18 if ir_version > 3 else 8)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def test_a_default_input_can_still_be_overridden(tmp_path: Path):
    """From IR version 4 on an initializer among the inputs is a default, no constant."""
    proto = default_input(8)
    x, w = vector(1, 2), vector(3, 4)
    compiled = same(proto)
    assert [v.name for v in compiled.model.graph.inputs] == ["x", "w"]
    np.testing.assert_array_equal(compiled.run({"x": x})["y"], x + 2)
    np.testing.assert_array_equal(compiled.run({"x": x, "w": w})["y"], x * w + 2 * w)
    artifact = edgepass.load(compiled.save(tmp_path / "out"))
    np.testing.assert_array_equal(artifact.run({"x": x})["y"], x + 2)
    np.testing.assert_array_equal(artifact.run({"x": x, "w": w})["y"], x * w + 2 * w)


def test_before_version_4_every_initializer_is_a_constant():
    proto = default_input(3)
    compiled = same(proto)
    np.testing.assert_array_equal(compiled.run({"x": vector(1, 2)})["y"], vector(3, 4))


OUTPUTS = ("y", "big", "h", "cell")


def test_optional_inputs_and_outputs_left_out():
    nodes = [
        helper.make_node("Clip", ["x", "", "six"], ["c"]),
        helper.make_node("Resize", ["image", "", "scales"], ["big"], mode="nearest"),
        helper.make_node("LSTM", ["seq", "w", "r", "", "", "h0"], ["", "h"], hidden_size=2),
        helper.make_node("Dropout", ["c"], ["y", ""]),
        helper.make_node("LSTM", ["seq", "w", "r"], ["", "", "cell"], hidden_size=2),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "six": np.array(6, F32),
        "scales": np.array([1, 1, 2, 2], F32),
        "w": rng.standard_normal((1, 8, 3)).astype(F32),
        "r": rng.standard_normal((1, 8, 2)).astype(F32),
    }
    shapes = {"x": ["N"], "image": [1, 1, "H", "W"], "seq": ["T", 1, 3], "h0": [1, 1, 2]}
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in shapes.items()]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in OUTPUTS]
    initializers = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    feed = {
        "x": vector(-1, 7, 3),
        "image": rng.standard_normal((1, 1, 2, 3)).astype(F32),
        "seq": rng.standard_normal((4, 1, 3)).astype(F32),
        "h0": rng.standard_normal((1, 1, 2)).astype(F32),
    }
    same(proto, feed)


def test_metadata_and_doc_strings_survive():
    proto = parse("g (float[2] x) => (float[2] y) { a = Identity (x)  y = Exp (a) }")
    proto.doc_string = "what it is"
    proto.producer_name = "an exporter"
    helper.set_model_props(proto, {"license": "MIT"})
    proto.graph.node[1].metadata_props.add(key="module", value="head")
    result = ir.to_proto(same(proto, {"x": vector(1, 2)}).model)
    assert result.doc_string == "what it is"
    assert {p.key: p.value for p in result.metadata_props}["license"] == "MIT"
    assert result.producer_name == "an exporter"
    assert [(p.key, p.value) for p in result.graph.node[0].metadata_props] == [("module", "head")]


def test_every_refusal_is_an_error_of_ours():
    """No kernel takes the dtype: refused with the node's name, not deep in a session."""
    proto = parse("g (uint16[2] x) => (uint16[2] y) { y = Sin (x) }", opset=22)
    with pytest.raises(EdgepassError) as caught:
        edgepass.compile(proto, "host", time_budget_s=0)
    assert "Sin" in str(caught.value)


def test_a_model_that_no_random_input_fits_is_compiled_and_saved(tmp_path):
    """A Reshape's target among the inputs: random sizes do not multiply to the right number."""
    proto = parse("""
    g (float[2,3] x, int64[2] shape, seq(float[N]) s) => (float[A,B] y, int64 n)
    { y = Reshape (x, shape)  n = SequenceLength (s) }""")
    compiled = edgepass.compile(proto, "host")
    assert any("none of the random inputs" in note for note in compiled.notes)
    artifact = edgepass.load(compiled.save(tmp_path / "out"))
    assert artifact.golden is None
    feed = {"x": np.ones((2, 3), F32), "shape": np.array([3, 2], I64), "s": [vector(1)]}
    assert artifact.run(feed)["y"].shape == (3, 2)
