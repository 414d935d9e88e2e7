"""Pruning where layers are in branches, loops, recurrent layers and transposed convolutions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.ir.graph import graphs
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.prune.branches import flattened, paths
from edgepass.passes.prune.divergence import Outputs
from edgepass.passes.prune.groups import find_groups
from edgepass.passes.prune.remove import remove
from edgepass.passes.prune.repair import kept_outputs, lost_inputs, repair
from edgepass.passes.prune.statistics import collect
from edgepass.passes.prune.structured import StructuredPrune
from edgepass.passes.prune.views import linear_view
from edgepass.targets.onnxruntime import OrtRunner

F32 = np.float32
WIDE, HIDDEN = 12, 32


def value(name: str, shape, kind=TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def whole(nodes, inputs, outputs, weights) -> ir.Model:
    graph = helper.make_graph(
        nodes, "net", inputs, outputs, [numpy_helper.from_array(w, n) for n, w in weights.items()]
    )
    opsets = [helper.make_opsetid("", 20)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    infer_shapes(model)
    return model


def run(model: ir.Model, feed) -> dict[str, np.ndarray]:
    with OrtRunner(model, optimize=False) as runner:
        return runner.run(feed)


def error(model: ir.Model, other: ir.Model, feeds) -> float:
    """The squared error of all outputs by the squared outputs."""
    wrong = power = 0.0
    for feed in feeds:
        wanted, given = run(model, feed), run(other, feed)
        for name, array in wanted.items():
            wrong += float(np.square(array - given[name]).sum())
            power += float(np.square(array).sum())
    return wrong / power


# --- branches ------------------------------------------------------------------------------------


def network(prefix: str, source: str, result: str, rng: np.random.Generator, weights: dict):
    """Two layers with hidden units that hang together: a third of them can be made up for."""
    few = rng.normal(size=(WIDE, HIDDEN // 2))
    first = np.concatenate([few, few + 0.1 * rng.normal(size=few.shape)], axis=1)
    weights[f"{prefix}first"] = first.astype(F32) / 3
    weights[f"{prefix}shift"] = np.linspace(0, 1, HIDDEN, dtype=F32)
    weights[f"{prefix}second"] = rng.normal(size=(HIDDEN, 6)).astype(F32)
    return [
        helper.make_node(
            "MatMul", [source, f"{prefix}first"], [f"{prefix}product"], f"{prefix}one"
        ),
        helper.make_node("Add", [f"{prefix}product", f"{prefix}shift"], [f"{prefix}sum"]),
        helper.make_node("Relu", [f"{prefix}sum"], [f"{prefix}hidden"]),
        helper.make_node(
            "MatMul", [f"{prefix}hidden", f"{prefix}second"], [result], f"{prefix}two"
        ),
    ]


def chosen_by_input(*, same_names: bool = False, nested: bool = False) -> ir.Model:
    """if mode > 0: one network of x; else: another (or, nested, by mode < -1 a third)."""
    rng = np.random.default_rng(5)

    def branch(prefix: str, name: str, inner=None) -> onnx.GraphProto:
        weights: dict[str, np.ndarray] = {}
        own = "" if same_names else prefix
        nodes = network(own, "x", f"{prefix}y", rng, weights)
        if inner is not None:
            nodes.append(helper.make_node("Less", ["mode", "below"], [f"{prefix}less"]))
            nodes.append(
                helper.make_node("If", [f"{prefix}less"], [f"{prefix}z"], f"{prefix}if", **inner)
            )
            nodes.append(helper.make_node("Add", [f"{prefix}y", f"{prefix}z"], [f"{prefix}all"]))
        last = f"{prefix}all" if inner is not None else f"{prefix}y"
        tensors = [numpy_helper.from_array(w, n) for n, w in weights.items()]
        return helper.make_graph(nodes, name, [], [value(last, [None, 6])], tensors)

    inner = None
    if nested:
        inner = {"then_branch": branch("c", "c"), "else_branch": branch("d", "d")}
    nodes = [
        helper.make_node("Greater", ["mode", "zero"], ["positive"]),
        helper.make_node(
            "If",
            ["positive"],
            ["y"],
            "choice",
            then_branch=branch("a", "a"),
            else_branch=branch("b", "b", inner),
        ),
    ]
    weights = {"zero": np.zeros((), F32), "below": np.full((), -1, F32)}
    return whole(
        nodes, [value("x", [None, WIDE]), value("mode", [])], [value("y", [None, 6])], weights
    )


def feeds(mode: float, count: int = 48, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.normal(size=(8, WIDE)).astype(F32), "mode": np.array(mode, F32)}
        for _ in range(count)
    ]


def pruned(model: ir.Model, samples, **options):
    options = {"ratio": 0.4, "multiple": 1, "limit": 9.0, **options}
    return StructuredPrune(**options).run(model, Context(calibration=samples))


def hidden_widths(model: ir.Model) -> list[int]:
    return [w.shape[0] for name, w in _weights(model).items() if name.endswith("second")]


def _weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        f"{g.name}/{n}": v.const_value.numpy()
        for g in graphs(model)
        for n, v in g.initializers.items()
    }


@pytest.mark.parametrize("same_names", [False, True])
def test_the_branch_that_samples_take_is_pruned_and_repaired(same_names):
    model = chosen_by_input(same_names=same_names)
    result = pruned(model.clone(), feeds(1.0))
    verify(result.model)
    assert error(model, result.model, feeds(1.0, seed=9)) < 0.02
    plain = pruned(model.clone(), feeds(1.0), repair=False, importance="l2")
    assert error(model, plain.model, feeds(1.0, seed=9)) > 0.05
    # and the branch that no sample takes is what it was, with a note that says so
    assert error(model, result.model, feeds(-0.5, seed=9)) == 0
    assert sorted(hidden_widths(result.model))[0] < sorted(hidden_widths(result.model))[1] == HIDDEN
    assert any("no calibration sample takes the branch" in note for note in result.notes)


def test_both_branches_are_repaired_when_samples_take_both():
    model = chosen_by_input()
    samples = [f for pair in zip(feeds(1.0), feeds(-0.5, seed=1), strict=True) for f in pair]
    result = pruned(model.clone(), samples)
    verify(result.model)
    assert max(hidden_widths(result.model)) < HIDDEN
    for mode in (1.0, -0.5):
        assert error(model, result.model, feeds(mode, seed=9)) < 0.02
    assert not any("no calibration sample" in note for note in result.notes)


def test_branches_inside_branches():
    model = chosen_by_input(nested=True)
    samples = [*feeds(-0.5), *feeds(-2.0, seed=1)]
    found = paths(model, samples)
    assert [len(path.samples) for path in found] == [48, 48]
    for path in found:
        flat = flattened(model, path.taken)
        assert not any(node.op_type == "If" for node in flat.model.graph)
        for feed in path.samples[:3]:
            np.testing.assert_allclose(run(flat.model, feed)["y"], run(model, feed)["y"], rtol=1e-6)
    result = pruned(model.clone(), samples)
    verify(result.model)
    for mode in (-0.5, -2.0):
        assert error(model, result.model, feeds(mode, seed=9)) < 0.02
    assert error(model, result.model, feeds(1.0, seed=9)) == 0


def test_a_collapse_in_a_branch_is_caught():
    model = chosen_by_input()
    for options in ({}, {"repair": False}, {"importance": "random", "repair": False}):
        result = pruned(model.clone(), feeds(1.0), ratio=0.7, limit=0.02, **options)
        lost = Outputs(model, feeds(1.0, seed=9)).divergence(result.model)
        assert lost < 0.06  # the limit is on other samples
        assert any("over the limit of 2%" in note for note in result.notes)


def test_weights_that_branches_share_stay_in_step():
    rng = np.random.default_rng(6)
    weights: dict[str, np.ndarray] = {}
    one = network("s", "x", "sy", rng, weights)
    other = [helper.make_node(n.op_type, list(n.input), [f"t{o}" for o in n.output]) for n in one]
    for node in other[1:]:
        node.input[0] = f"t{node.input[0]}"
    other.append(helper.make_node("Neg", ["tsy"], ["neg"]))
    branches = {
        "then_branch": helper.make_graph(one, "one", [], [value("sy", [None, 6])]),
        "else_branch": helper.make_graph(other, "other", [], [value("neg", [None, 6])]),
    }
    nodes = [
        helper.make_node("Greater", ["mode", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], "choice", **branches),
    ]
    weights["zero"] = np.zeros((), F32)
    inputs = [value("x", [None, WIDE]), value("mode", [])]
    model = whole(nodes, inputs, [value("y", [None, 6])], weights)
    samples = [*feeds(1.0), *feeds(-0.5, seed=1)]
    result = pruned(model.clone(), samples, ratio=0.2)
    verify(result.model)
    up, down = feeds(1.0, 1)[0], feeds(-0.5, 1)[0]
    np.testing.assert_allclose(run(result.model, up)["y"], -run(result.model, down)["y"], rtol=1e-5)


def test_what_is_inside_a_loop_stays_and_says_so():
    rng = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {}
    body_nodes = network("l", "state", "made", rng, weights)
    weights["lsecond"] = rng.normal(size=(HIDDEN, WIDE)).astype(F32) / 8
    body_nodes.append(helper.make_node("Identity", ["going"], ["go"]))
    tensors = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    body = helper.make_graph(
        body_nodes,
        "body",
        [
            value("i", [], TensorProto.INT64),
            value("going", [], TensorProto.BOOL),
            value("state", [None, WIDE]),
        ],
        [value("go", [], TensorProto.BOOL), value("made", [None, WIDE])],
        tensors,
    )
    outer: dict[str, np.ndarray] = {}
    nodes = [
        helper.make_node("Loop", ["times", "", "x"], ["end"], "loop", body=body),
        *network("o", "end", "y", rng, outer),
    ]
    outer["times"] = np.array(2, np.int64)
    model = whole(nodes, [value("x", [None, WIDE])], [value("y", [None, 6])], outer)
    samples = [{"x": feed["x"]} for feed in feeds(1.0)]
    result = pruned(model.clone(), samples)
    verify(result.model)
    widths = {n: w.shape for n, w in _weights(result.model).items() if n.endswith("second")}
    assert widths["body/lsecond"] == (HIDDEN, WIDE)
    assert widths["net/osecond"][0] < HIDDEN
    assert any("inside the Loop 'loop'" in note for note in result.notes)
    assert error(model, result.model, [{"x": f["x"]} for f in feeds(1.0, seed=9)]) < 0.02


# --- recurrent layers ----------------------------------------------------------------------------

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(kind: str, directions: int, result: int, *, linear: int = 0, start: bool = False):
    """x -> MatMul -> recurrent layer of 8 units of which the last 3 are copies -> MatMul."""
    rng = np.random.default_rng(8)
    gates, units, inputs = GATES[kind], 8, 10
    copies = np.r_[0:5, 0:3]

    def twice(array: np.ndarray) -> np.ndarray:
        """Rows of copied units are copies."""
        parts = array.reshape(directions, gates, units, -1)[:, :, copies]
        return parts.reshape(directions, gates * units, -1)

    w = twice(rng.normal(size=(directions, gates * units, inputs)) / 3)
    r = twice(rng.normal(size=(directions, gates * units, units)) / 2)
    b = np.concatenate([twice(rng.normal(size=(directions, gates * units, 1)))[..., 0]] * 2, 1) / 4
    weights = {"w": w.astype(F32), "r": r.astype(F32), "b": b.astype(F32)}
    weights["in"] = rng.normal(size=(6, inputs)).astype(F32)
    weights["out"] = rng.normal(size=(units * directions, 4)).astype(F32)
    way = "bidirectional" if directions == 2 else "forward"
    names = ["", "", ""]
    names[result] = "states"
    operands = ["xs", "w", "r", "b"]
    if start:
        first = np.tile(rng.normal(size=(directions, 1, units))[:, :, copies], (1, 3, 1))
        weights["h0"] = first.astype(F32)
        operands += ["", "h0"]
    options = {"linear_before_reset": linear} if kind == "GRU" else {}
    nodes = [
        helper.make_node("MatMul", ["x", "in"], ["xs"], "first"),
        helper.make_node(
            kind, operands, names[: result + 1], "cell", hidden_size=units, direction=way, **options
        ),
    ]
    if result == 0:  # [steps, directions, batch, units]
        nodes.append(helper.make_node("Transpose", ["states"], ["t"], perm=[0, 2, 1, 3]))
        weights["shape"] = np.array([0, 0, -1])
    else:  # [directions, batch, units]
        nodes.append(helper.make_node("Transpose", ["states"], ["t"], perm=[1, 0, 2]))
        weights["shape"] = np.array([0, -1])
    nodes.append(helper.make_node("Reshape", ["t", "shape"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "out"], ["y"], "last"))
    shape = [5, 3, 4] if result == 0 else [3, 4]
    return whole(nodes, [value("x", [5, 3, 6])], [value("y", shape)], weights)


CELLS = [
    ("LSTM", 1, 0, {}),
    ("LSTM", 2, 0, {}),
    ("LSTM", 1, 1, {}),
    ("LSTM", 2, 0, {"start": True}),
    ("GRU", 1, 0, {}),
    ("GRU", 2, 1, {"linear": 1}),
    ("RNN", 2, 0, {}),
]


@pytest.mark.parametrize(("kind", "directions", "result", "options"), CELLS, ids=str)
def test_hidden_units_that_are_copies_can_go_without_loss(kind, directions, result, options):
    model = recurrent(kind, directions, result, **options)
    rng = np.random.default_rng(9)
    samples = [{"x": rng.normal(size=(5, 3, 6)).astype(F32)} for _ in range(60)]
    copy = model.clone()
    groups = find_groups(copy)
    chosen = {}
    for group in groups.free:
        if group.kind == "hidden units":
            length = group.size // (int(group.rows.max()) + 1)
            assert length == 8
            chosen[group] = [row * 8 + u for row in range(group.size // 8) for u in (5, 6, 7)]
    assert chosen
    kept = kept_outputs(chosen)
    remove(copy, groups, chosen)
    spoilt = error(model, copy, samples[:8])
    done = repair(copy, model, kept, samples, only=lost_inputs(copy, model))
    assert done.solved == done.layers == 3  # the gates' inputs, the states, the last product
    assert all(v.name != "repair/nameless0" for n in model.graph for v in n.outputs)
    verify(copy)
    assert spoilt > 1e-2
    assert error(model, copy, samples[:8]) < 1e-6


def test_inputs_of_a_recurrent_layer_are_chosen_and_repaired():
    model = recurrent("LSTM", 2, 0)
    rng = np.random.default_rng(10)
    samples = [{"x": rng.normal(size=(5, 3, 6)).astype(F32)} for _ in range(60)]
    groups = find_groups(model)
    group = next(g for g in groups.free if g.kind == "features")
    known = collect([group], samples, model, lambda done, total, what: None)
    (site,) = group.consumers
    assert known[site].covariance().shape == (2, 10, 10)
    # ten inputs are linear in six: four can go without loss
    result = pruned(model.clone(), samples, ratio=0.4, only=("features",))
    assert "1 of 1 layers that lost inputs solved again" in " ".join(result.notes)
    assert error(model, result.model, samples[:8]) < 1e-5


# --- models that carry a state -------------------------------------------------------------------


def integrator(gain: float, leak: float = 0.99) -> ir.Model:
    """s' = leak s + gain x; y = s' w."""
    nodes = [
        helper.make_node("Mul", ["s", "leak"], ["left"]),
        helper.make_node("Mul", ["x", "gain"], ["more"]),
        helper.make_node("Add", ["left", "more"], ["sN"]),
        helper.make_node("MatMul", ["sN", "w"], ["y"]),
    ]
    weights = {
        "leak": np.array(leak, F32),
        "gain": np.array(gain, F32),
        "w": np.eye(4, 2, dtype=F32),
    }
    inputs, outputs = [value("x", [1, 4]), value("s", [1, 4])], [value("y", [1, 2])]
    return whole(nodes, inputs, [*outputs, value("sN", [1, 4])], weights)


def test_errors_that_add_up_over_calls_are_seen():
    rng = np.random.default_rng(14)
    samples = [
        {"x": rng.normal(size=(1, 4)).astype(F32), "s": rng.normal(size=(1, 4)).astype(F32) * 3}
        for _ in range(32)
    ]
    # x and s, y and sN: of two inputs of one form it can't be told which is the state
    assert Outputs(integrator(0.1), samples).states == {}
    named = [{"s": s["s"], "x": s["x"][:, :3]} for s in samples]
    model = integrator(0.1)
    outputs = Outputs(_narrow(model), named)
    assert outputs.states == {"s": "sN"}
    assert outputs.allowance < 1
    assert "carries a state" in outputs.why_less
    other = _narrow(integrator(0.1, leak=1.01))
    once = max(error(_narrow(model), other, named[:8]), 0)
    assert once < 1e-3
    assert outputs.divergence(other) > 0.5


def _narrow(model: ir.Model) -> ir.Model:
    """The integrator with three inputs, and a fourth that is zero."""
    proto = ir.to_proto(model)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    pad = helper.make_node("Pad", ["x", "pads"], ["x4"])
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, 1]), "pads"))
    proto.graph.node[1].input[0] = "x4"
    proto.graph.node.insert(0, pad)
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


# --- transposed convolutions ---------------------------------------------------------------------

TRANSPOSED = [
    {"kernel": (2, 2), "strides": [2, 2]},
    {"kernel": (4, 3), "strides": [2, 3], "group": 2, "pads": [1, 0, 1, 1]},
    {"kernel": (3, 3), "strides": [2, 1], "dilations": [1, 2], "output_padding": [1, 0]},
]


def transposed(kernel, **attributes) -> ir.Model:
    rng = np.random.default_rng(11)
    group = attributes.get("group", 1)
    few = rng.normal(size=(8, 3, 1, 1))
    weights = {
        "first": few[np.r_[0:8, 0:8]].astype(F32),
        "w": rng.normal(size=(16, 6 // group, *kernel)).astype(F32),
        "b": rng.normal(size=6).astype(F32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["c"], "first"),
        helper.make_node("Tanh", ["c"], ["h"]),
        helper.make_node("ConvTranspose", ["h", "w", "b"], ["y"], "up", **attributes),
    ]
    return whole(nodes, [value("x", [2, 3, 5, 6])], [value("y", [None] * 4)], weights)


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_a_transposed_convolution_is_rows_times_a_matrix(options):
    model = transposed(**options)
    layer = linear_view(model.graph.node("up"))
    rng = np.random.default_rng(12)
    feed = {"x": rng.normal(size=(2, 3, 5, 6)).astype(F32)}
    graph = model.graph
    hidden = next(n.outputs[0] for n in graph if n.op_type == "Tanh")
    graph.outputs.append(hidden)
    found = run(model, feed)
    weight, bias = (_weights(model)[f"net/{name}"] for name in ("w", "b"))
    positions = layer.positions(found["h"])
    made = layer.inputs(found["h"], positions) @ layer.matrix(weight)
    wanted = layer.outputs(found["y"], positions) - bias.reshape(layer.groups, 1, -1)
    np.testing.assert_allclose(made, wanted, atol=1e-5)
    assert found["y"].size == wanted.size
    np.testing.assert_array_equal(layer.restore(layer.matrix(weight)), weight)


@pytest.mark.parametrize("options", [TRANSPOSED[0], TRANSPOSED[2]], ids=str)
def test_a_transposed_convolution_makes_up_for_lost_channels(options):
    model = transposed(**options)
    rng = np.random.default_rng(13)
    samples = [{"x": rng.normal(size=(2, 3, 5, 6)).astype(F32)} for _ in range(40)]
    # half of the channels are copies of the others
    result = pruned(model.clone(), samples, ratio=0.25)
    verify(result.model)
    assert "1 of 1 layers that lost inputs solved again" in " ".join(result.notes)
    assert error(model, result.model, samples[:8]) < 1e-3
