"""Dependency groups of language models, detectors and recurrent nets: known answers, equality.

Graphs are written as exporters write them; weights are made from a seed.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from edgepass.ir.graph import attribute, static_shape
from edgepass.ir.verify import interface, verify
from edgepass.passes.prune.groups import Group, Groups, find_groups
from edgepass.passes.prune.labels import factor
from edgepass.passes.prune.remove import remove
from prune_graphs import choose, outputs, zeroed


def built(inputs: str, results: str, body: str, opset: int = 18, **weights: object) -> ir.Model:
    """A model from the text of its nodes; weights are arrays, or shapes of random ones."""
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({results}) {{{body}}}'
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        given = isinstance(value, np.ndarray)
        array = value if given else rng.normal(size=value).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def assert_removable(model: ir.Model, **options: object) -> None:
    groups = find_groups(model, **options)  # type: ignore[arg-type]
    chosen = choose(groups, 0.5, 1)
    assert chosen
    zeroed(groups, chosen, makers_only=False)
    signature = interface(model.graph.inputs), interface(model.graph.outputs)
    before = outputs(model)
    remove(model, groups, chosen)
    verify(model)
    assert (interface(model.graph.inputs), interface(model.graph.outputs)) == signature
    for x, y in zip(before, outputs(model), strict=True):
        assert np.abs(x).max() > 0
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max()


def group_of(groups: Groups, weight: str) -> Group:
    """The first group that can be pruned whose units a weight makes."""
    found = [g for g in groups.free if any(s.weight.name == weight for s in g.producers)]
    return found[0]


def makers(group: Group) -> set[str | None]:
    return {site.weight.name for site in group.producers}


# --- grouped queries, rotary pairs -------------------------------------------------------------


def decoder(*, opset: int, normed: bool = False, operators: bool = False, layers: int = 2):
    """Four heads of eight, two of keys; positions turn pairs by angles of one table."""
    turn = """
        {x}l, {x}r = Split <axis = 3, num_outputs = 2> ({x}h)
        {x}n = Neg({x}r)
        {x}o = Concat <axis = 3> ({x}n, {x}l)
        {x}c = Mul({x}h, cos)
        {x}s = Mul({x}o, sin)
        {x}t = Add({x}c, {x}s)
    """
    if operators:
        turn = "{x}t = RotaryEmbedding({x}h, cos, sin)"
    body = """
        angles = Mul(positions, frequencies)
        twice = Concat <axis = -1> (angles, angles)
        cos = Cos({table})
        sin = Sin({table})
        x0 = Gather(table, ids)
    """.format(table="angles" if operators else "twice")
    weights: dict[str, object] = {"table": (20, 16), "head": (16, 7)}
    for i in range(layers):
        p = f"L{i}"
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            x = p + name
            weights[f"{x}w"] = (16, 8 * heads)
            body += f"""
                {x}m = MatMul(x{i}, {x}w)
                {x}4 = Reshape({x}m, split{heads})
                {x}{"u" if normed and name != "v" else "h"} = Transpose <perm = [0,2,1,3]> ({x}4)
            """
            if normed and name != "v":
                body += f"""
                    {x}q = Mul({x}u, {x}u)
                    {x}e = ReduceMean({x}q, last)
                    {x}g = Add({x}e, epsilon)
                    {x}d = Sqrt({x}g)
                    {x}h = Div({x}u, {x}d)
                """
            if name != "v":
                body += turn.replace("{x}", x)
        for name in ("kt", "vh"):
            x = p + name
            body += f"""
                {x}5 = Unsqueeze({x}, two)
                {x}x = Expand({x}5, repeats)
                {x}y = Reshape({x}x, joined)
            """
        weights[f"{p}ow"] = (32, 16)
        body += f"""
            {p}b = Transpose <perm = [0,1,3,2]> ({p}kty)
            {p}s = MatMul({p}qt, {p}b)
            {p}p = Softmax <axis = -1> ({p}s)
            {p}a = MatMul({p}p, {p}vhy)
            {p}z = Transpose <perm = [0,2,1,3]> ({p}a)
            {p}f = Reshape({p}z, flat)
            {p}g = MatMul({p}f, {p}ow)
            x{i + 1} = Add(x{i}, {p}g)
        """
    body += f"y = MatMul(x{layers}, head)"
    sizes = {
        "split4": [0, 0, 4, 8], "split2": [0, 0, 2, 8], "two": [2], "repeats": [1, 2, 2, 5, 8],
        "joined": [1, 4, 5, 8], "flat": [0, 0, -1], "last": [3],
    }  # fmt: skip
    arrays = {name: np.array(value, np.int64) for name, value in sizes.items()}
    shape = (1, 5, 1) if operators else (1, 1, 5, 1)
    arrays["epsilon"] = np.full((), 1e-6, np.float32)
    arrays["positions"] = np.arange(5, dtype=np.float32).reshape(shape)
    weights["frequencies"] = (4,)
    return built("int64[1, 5] ids", "float[1, 5, 7] y", body, opset, **weights, **arrays)


@pytest.mark.parametrize("operators", [False, True], ids=["written out", "RotaryEmbedding"])
def test_rotary_pairs_go_from_all_heads_and_layers_that_share_the_table(operators):
    groups = find_groups(decoder(opset=23, operators=operators))
    pairs = group_of(groups, "L0qw")
    assert pairs.size == 4
    assert makers(pairs) >= {"L0qw", "L0kw", "L1qw", "L1kw"}
    # values are turned by nothing: dimensions of each of the two heads, in each layer
    values = group_of(groups, "L0vw")
    assert (values.size, values.rows.max() + 1, makers(values)) == (16, 2, {"L0vw"})


@pytest.mark.parametrize("operators", [False, True], ids=["written out", "RotaryEmbedding"])
def test_whole_heads_go_by_groups_of_queries_and_leave_the_table(operators):
    groups = find_groups(decoder(opset=23, operators=operators), heads="whole")
    for layer in ("L0", "L1"):
        heads = group_of(groups, f"{layer}qw")
        assert heads.size == 2  # two queries with each key
        assert makers(heads) == {f"{layer}qw", f"{layer}kw", f"{layer}vw"}


def test_heads_of_normalized_queries_go_whole_layer_by_layer():
    groups = find_groups(decoder(opset=18, normed=True))
    assert {group_of(groups, f"L{i}qw").size for i in range(2)} == {2}
    assert not makers(group_of(groups, "L0qw")) & {"L1qw"}


@pytest.mark.parametrize("heads", ["auto", "whole", "dimensions"])
@pytest.mark.parametrize("operators", [False, True], ids=["written out", "RotaryEmbedding"])
def test_decoders_give_the_same_without_units_of_zeros(operators, heads):
    assert_removable(decoder(opset=23, operators=operators), heads=heads)


def test_decoders_with_normalized_queries_give_the_same():
    assert_removable(decoder(opset=18, normed=True))


def test_a_fused_row_may_hold_a_unit_several_times():
    """Queries and keys share labels; in one row with values they are there twice."""
    body = """
        m = MatMul(x, w)
        r = Reshape(m, split)
        t = Transpose <perm = [0,2,1,3]> (r)
        q, k, v = Split <axis = 3, num_outputs = 3> (t)
        b = Transpose <perm = [0,1,3,2]> (k)
        s = MatMul(q, b)
        p = Softmax <axis = -1> (s)
        a = MatMul(p, v)
        z = Transpose <perm = [0,2,1,3]> (a)
        f = Reshape(z, flat)
        y = MatMul(f, o)
    """
    model = built(
        "float[2, 5, 12] x", "float[2, 5, 12] y", body, w=(12, 48), o=(16, 12),
        split=np.array([0, 0, 2, 24]), flat=np.array([0, 0, -1]),
    )  # fmt: skip
    queries, values = [g for g in find_groups(model).free if "w" in makers(g)]
    assert (queries.multiple, values.multiple, queries.size, values.size) == (2, 1, 16, 16)
    assert_removable(model)


# --- masks, positions, shapes ------------------------------------------------------------------


def biased(kind: str) -> ir.Model:
    """The operator Attention with a mask: repeated for heads, or of each head's own."""
    mask = {
        "repeated": "m = Expand(mask, to)",
        "own": "e = Gather(bias, places)\nm = Transpose <perm = [2,0,1]> (e)",
    }[kind]
    body = f"""
        {mask}
        qm = MatMul(x, q)
        km = MatMul(x, k)
        vm = MatMul(x, v)
        a = Attention <q_num_heads = 4, kv_num_heads = 4> (qm, km, vm, m)
        y = MatMul(a, o)
    """
    extra: dict[str, object] = {"to": np.array([2, 4, 5, 5])}
    if kind == "own":
        extra = {"bias": (3, 4), "places": np.arange(25).reshape(5, 5) % 3}
    return built(
        "float[2, 5, 12] x" + ", float[1, 1, 5, 5] mask" * (kind == "repeated"),
        "float[2, 5, 12] y", body, 23, q=(12, 32), k=(12, 32), v=(12, 32), o=(32, 12), **extra,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["repeated", "own"])
def test_heads_go_with_their_masks(kind):
    heads = group_of(find_groups(biased(kind), heads="whole"), "q")
    assert (heads.size, makers(heads) >= {"q", "k", "v"}) == (4, True)
    model = biased(kind)
    assert_removable(model, heads="whole")
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert attribute(node, "q_num_heads") == attribute(node, "kv_num_heads") == 2
    if kind == "own":
        assert static_shape(model.graph.initializers["bias"]) == (3, 2)


def test_what_is_computed_with_a_number_of_channels_goes_on_with_the_old_one():
    """The sizes of one tensor reshape another one, whose channels must stay."""
    body = """
        a = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu(a)
        s = Shape(r)
        c = Conv <pads = [1,1,1,1]> (x, u)
        f = Flatten <axis = 1> (c)
        p = Softmax(f)
        g = Reshape(p, s)
        d = Conv(r, v)
        e = Conv(g, z)
        y = Add(d, e)
    """
    model = built(
        "float[2, 3, h, h] x", "float[2, 4, h, h] y", body,
        w=(8, 3, 3, 3), u=(8, 3, 3, 3), v=(4, 8, 1, 1), z=(4, 8, 1, 1),
    )  # fmt: skip
    assert [makers(g) for g in find_groups(model).free] == [{"w"}]
    assert_removable(model)


def test_groups_of_channels_before_axes_of_unknown_size():
    """GroupNormalization as exporters write it, for any height and width."""
    body = """
        a = Conv <pads = [1,1,1,1]> (x, w)
        s = Shape(a)
        g = Reshape(a, groups)
        n = InstanceNormalization(g, one, zero)
        b = Reshape(n, s)
        y = Conv(b, v)
    """
    model = built(
        "float[2, 3, h, w0] x", "float[2, 4, h, w0] y", body, w=(16, 3, 3, 3), v=(4, 16, 1, 1),
        groups=np.array([0, 4, -1]), one=np.ones(4, np.float32), zero=np.zeros(4, np.float32),
    )  # fmt: skip
    group = group_of(find_groups(model), "w")
    assert (group.size, group.multiple) == (4, 4)
    assert_removable(model)


def test_a_tied_table_has_one_width_for_embedding_and_head():
    body = """
        x = Gather(table, ids)
        n = LayerNormalization(x, scale)
        t = Transpose <perm = [1,0]> (table)
        y = MatMul(n, t)
    """
    model = built("int64[2, 5] ids", "float[2, 5, 9] y", body, table=(9, 16), scale=(16,))
    (blocked,) = [g for g in find_groups(model) if g.size == 16]
    assert (bool(blocked.blocked), blocked.wish) == (True, "widths")
    (width,) = find_groups(model, widths=True).free
    assert (width.size, {s.role for s in width.sites}) == (16, {"table", "norm", "in"})
    assert_removable(model, widths=True)


# --- recurrence --------------------------------------------------------------------------------


def recurrent(op: str, gates: int, *, zeros: bool) -> ir.Model:
    """Two directions; states of zeros are made for any batch, or left out."""
    state = ", , h" + (", h" if op == "LSTM" else "") if zeros else ""
    body = f"""
        s = Shape <start = 1, end = 2> (x)
        n = Concat <axis = 0> (two, s, six)
        h = ConstantOfShape(n)
        r = {op} <hidden_size = 6, direction = "bidirectional"> (x, w, u, b{state})
        t = Transpose <perm = [0,2,1,3]> (r)
        f = Reshape(t, flat)
        y = MatMul(f, o)
    """
    return built(
        "float[5, batch, 4] x", "float[5, batch, 3] y", body,
        w=(2, 6 * gates, 4), u=(2, 6 * gates, 6), b=(2, 12 * gates), o=(12, 3),
        two=np.array([2]), six=np.array([6]), flat=np.array([0, 0, -1]),
    )  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True], ids=["no state", "zeros"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_hidden_units_go_with_all_gates_of_their_direction(op, gates, zeros):
    model = recurrent(op, gates, zeros=zeros)
    (group,) = find_groups(model).free
    assert (group.kind, group.size, group.rows.max() + 1) == ("hidden units", 12, 2)
    # gates of inputs, states and two biases; the rows of the layer behind; columns of states
    assert group.parameters == gates * (4 + 6 + 2) + 6 * gates - gates * 6 + 3 + gates * 6
    assert_removable(model)
    assert static_shape(model.graph.initializers["u"]) == (2, 3 * gates, 3)


def test_a_state_that_comes_in_keeps_its_size_and_the_reason_names_it():
    body = """
        a = MatMul(x, v)
        c = Relu(a)
        r, g = GRU <hidden_size = 6> (c, w, u, , , h)
        t = Squeeze(r, one)
        y = MatMul(t, o)
    """
    model = built(
        "float[5, 2, 4] x, float[1, 2, 6] h", "float[5, 2, 3] y, float[1, 2, 6] g", body,
        v=(4, 8), w=(1, 18, 8), u=(1, 18, 6), o=(6, 3), one=np.array([1]),
    )  # fmt: skip
    groups = find_groups(model)
    assert [g.size for g in groups.free] == [8]  # what comes in may lose channels
    assert any("'h'" in g.blocked for g in groups if g.kind == "hidden units")
    assert_removable(model)


def test_a_squeeze_says_that_a_size_is_one():
    """[batch, 8, time] -> [1, batch, 8]: as many elements, so there is one time step."""
    assert factor(("b", 8, "t"), (1, "b", 8)) == [
        ((), (0,)),
        ((0,), (1,)),
        ((1,), (2,)),
        ((2,), ()),
    ]
    body = """
        a = Conv(x, v)
        c = Relu(a)
        q = Squeeze(c, last)
        z = Unsqueeze(q, first)
        r = GRU <hidden_size = 6> (z, w, u)
        t = Squeeze(r, two)
        y = MatMul(t, o)
    """
    model = built(
        "float[batch, 3, n] x", "float[1, batch, 3] y", body,
        v=(8, 3, 3), w=(1, 18, 8), u=(1, 18, 6), o=(6, 3),
        last=np.array([-1]), first=np.array([0]), two=np.array([1]),
    )  # fmt: skip
    assert {g.size for g in find_groups(model).free} == {8, 6}
    assert_removable(model)
