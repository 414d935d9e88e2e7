"""How many units each group loses: what that costs, what the outputs mind, how it is shared out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgepass
from edgepass.ir.ops import graph_macs, node_cost
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.probe import sample_inputs
from edgepass.passes.prune.alone import Alone, weighed, weighed_together
from edgepass.passes.prune.choice import (
    MOST,
    Allocation,
    Choosing,
    Ranked,
    choose,
    foreseen,
    rank,
    together,
)
from edgepass.passes.prune.divergence import Outputs
from edgepass.passes.prune.groups import Group, find_groups
from edgepass.passes.prune.importance import Importance
from edgepass.passes.prune.price import Held, Price, node_times
from edgepass.passes.prune.remove import remove
from edgepass.passes.prune.statistics import collect
from edgepass.passes.prune.structured import StructuredPrune
from prune_graphs import sequence_network

WIDTHS = (16, 32, 24)


def _network(seed: int = 0, scale: float = 1.0) -> ir.Model:
    """Convolutions one after another; the last but one block adds little (by `scale`) to a sum."""
    rng = np.random.default_rng(seed)
    a, b, c = WIDTHS
    shapes = {"w0": (a, 3, 3, 3), "w1": (b, a, 3, 3), "w2": (c, b, 3, 3), "v1": (b, c, 1, 1),
              "v2": (c, b, 1, 1), "w3": (10, c, 1, 1)}  # fmt: skip
    weights = {}
    for name, shape in shapes.items():
        size = np.prod(shape[1:])
        weights[name] = (rng.normal(size=shape) * np.sqrt(2.0 / size)).astype(np.float32)
    weights["v2"] *= np.float32(scale)
    kernel = {"w0": [1] * 4, "w1": [1] * 4, "w2": [1] * 4}
    nodes = []

    def conv(x: str, weight: str, y: str, act: bool = True) -> None:
        pads = kernel.get(weight, [0] * 4)
        made = f"{y}_" if act else y
        nodes.append(helper.make_node("Conv", [x, weight], [made], name=weight, pads=pads))
        if act:
            nodes.append(helper.make_node("Relu", [made], [y]))

    conv("x", "w0", "h0")
    conv("h0", "w1", "h1")
    conv("h1", "w2", "h2")
    conv("h2", "v1", "b1")
    conv("b1", "v2", "b2", act=False)
    nodes.append(helper.make_node("Add", ["h2", "b2"], ["s"]))
    conv("s", "w3", "y", act=False)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 10, 8, 8))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(proto)


def _samples(count: int = 24) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(9)
    mix = rng.normal(size=(3, 3))
    return [
        {"x": np.einsum("ij,bjhw->bihw", mix, rng.normal(size=(1, 3, 8, 8))).astype(np.float32)}
        for _ in range(count)
    ]


def _group(name: str, size: int, cluster: int, parameters: int = 1) -> Group:
    return Group(name, "channels", size, np.zeros(size, int), cluster, (), 1, parameters)


def _ranked(name: str, size: int, slope: float, cluster: int, parameters: int = 1) -> Ranked:
    """Errors grow with the square."""
    errors = slope * (np.arange(size + 1) / size) ** 2
    return Ranked(_group(name, size, cluster, parameters), np.arange(size), errors)


def _how(ratio: float, **options) -> Choosing:
    given = {"allocation": Allocation.SENSITIVITY, "multiple": 4, **options}
    return Choosing(ratio=ratio, importance=Importance.L2, **given)


# --- what is left ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_price_foresees_macs_and_parameters_exactly(ratio):
    model = _network()
    groups = find_groups(model)
    ranked = rank(groups.free, {}, Importance.L2, 0.9)
    price = Price([[item.group for item in part] for part in together(ranked)])
    chosen = choose(ranked, _how(ratio, allocation=Allocation.UNIFORM))
    lost = np.array(
        [len(chosen.get(part[0].group, ())) / part[0].group.size for part in together(ranked)]
    )
    units, macs, weights = price.left(lost)
    before = graph_macs(model.graph), sum(v.const_value.size for v in _weights(model))
    remove(model, groups, chosen)
    after = graph_macs(model.graph), sum(v.const_value.size for v in _weights(model))
    assert units == pytest.approx(1 - sum(map(len, chosen.values())) / sum(
        g.size for g in groups.free))  # fmt: skip
    assert macs == pytest.approx(after[0] / before[0])
    assert weights == pytest.approx(after[1] / before[1])


def _weights(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.initializers.values() if len(v.const_value.shape) > 1]


def test_cost_takes_from_where_time_is_spent():
    """Two groups that mind alike, as large as each other: the one whose layers take time leaves."""
    model = _network()
    groups = [g for g in find_groups(model).free if g.name in ("w1", "v1")]
    ranked = [Ranked(g, np.arange(g.size), (np.arange(g.size + 1) / g.size) ** 2) for g in groups]
    nodes = {node.name: node for node in model.graph}
    times = {nodes[name]: 1.0 for name in ("w1", "w2")} | {nodes[n]: 0.01 for n in ("v1", "v2")}
    price = Price([[g] for g in groups], None, times)
    chosen = choose(ranked, _how(0.4, allocation=Allocation.COST), price)
    lost = {g.name: len(chosen.get(g, ())) / g.size for g in groups}
    assert lost["w1"] > lost["v1"]
    left = price.left(np.array([lost[g.name] for g in groups]))
    uniform = price.left(np.array([0.4, 0.4]))
    assert left[1] <= max(0.6, uniform[1]) + 1e-9


def test_node_times_are_those_of_the_target():
    model = _network()
    find_groups(model)
    times = node_times(model, edgepass.get_target("x86_64-avx512"))
    convolutions = {node for node in model.graph if node.op_type == "Conv"}
    assert set(times) == convolutions
    widest = max(convolutions, key=lambda node: node_cost(node).macs)
    assert times[widest] == max(times.values())


def test_the_pass_by_cost_removes_and_keeps_the_interface():
    model = _network()
    infer_shapes(model)
    macs = graph_macs(model.graph)
    context = Context(target=edgepass.get_target("x86_64-avx512"), calibration=_samples())
    result = StructuredPrune(ratio=0.4, allocation="cost", multiple=2).run(model, context)
    verify(result.model)
    assert result.modified
    assert graph_macs(result.model.graph) < 0.8 * macs


def test_gain_is_the_difference_of_what_is_left():
    groups = find_groups(_network()).free
    price = Price([[group] for group in groups])
    lost = np.linspace(0.1, 0.4, len(groups))
    for part in range(len(groups)):
        after = lost.copy()
        after[part] = 0.6
        gain = price.gain(part, 0.6, lost)
        assert gain == pytest.approx(price.left(lost) - price.left(after))
        # what others lose makes units worth less: the greedy choice relies on it
        assert (price.gain(part, 0.6, lost + 0.1 * (np.arange(len(lost)) != part)) <= gain).all()


# --- sharing out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.8])
def test_as_much_leaves_as_asked_for_and_no_group_is_emptied(ratio):
    items = [_ranked(str(i), 32 * (i + 1), 10.0**-i, i, 9 - i) for i in range(6)]
    chosen = choose(items, _how(ratio))
    total = sum(item.group.size for item in items)
    assert sum(map(len, chosen.values())) >= ratio * total
    assert sum(map(len, chosen.values())) <= (ratio + 0.1) * total
    for group, units in chosen.items():
        assert len(units) <= MOST * group.size + 4
    equal = choose(items, _how(ratio, allocation=Allocation.UNIFORM))
    whole = sum(i.group.parameters * i.group.size for i in items)
    assert _held(chosen) >= min(ratio * whole, _held(equal))


def _held(chosen: dict[Group, list[int]]) -> int:
    return sum(group.parameters * len(units) for group, units in chosen.items())


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_equal_shares(seed):
    rng = np.random.default_rng(seed)
    items = [
        _ranked(str(i), int(rng.integers(2, 20)) * 4, float(10 ** rng.uniform(-3, 0)), i,
                int(rng.integers(1, 50)))
        for i in range(8)
    ]  # fmt: skip
    for ratio in (0.25, 0.5):
        equal = _how(ratio, allocation=Allocation.UNIFORM)
        assert foreseen(items, _how(ratio)) <= foreseen(items, equal) + 1e-12


def test_two_like_groups_share_by_the_slope_of_their_errors():
    """Errors a s^2 and 4 a s^2, equal costs: the least sum has shares of 4 to 1."""
    items = [_ranked("cheap", 200, 0.1, 0), _ranked("dear", 200, 0.4, 1)]
    counts = {g.name: len(u) for g, u in choose(items, _how(0.25, multiple=1)).items()}
    assert counts["cheap"] == pytest.approx(80, abs=4)
    assert counts["dear"] == pytest.approx(20, abs=4)


def test_no_share_is_further_from_the_ratio_than_spread():
    items = [_ranked("cheap", 100, 1e-6, 0), _ranked("dear", 100, 1.0, 1)]
    counts = {g.name: len(u) for g, u in choose(items, _how(0.4, multiple=1, spread=0.2)).items()}
    assert counts == {"cheap": 60, "dear": 20}


@pytest.mark.parametrize("width", [4, 8, 16, 24, 32, 64, 100])
def test_narrow_groups_lose_some_channels_but_not_all(width):
    for allocation in (Allocation.UNIFORM, Allocation.SENSITIVITY):
        how = _how(0.5, multiple=16, allocation=allocation)
        (units,) = choose([_ranked("g", width, 1.0, 0)], how).values()
        left = width - len(units)
        assert 0.3 * width <= left <= 0.7 * width
        assert left % min(4, max(1, width // 4)) == 0


# --- what the outputs mind ------------------------------------------------------------------------


def test_errors_alone_are_those_of_the_model_without_the_units():
    model, samples = _network(), _samples()
    groups = find_groups(model)
    statistics = collect(groups.free, samples, model, lambda done, total, what: None)
    before = Outputs(model, samples)
    alone = Alone(model, samples, len(groups))
    ranked = rank(groups.free, statistics, Importance.RECONSTRUCTION, 0.9)
    for item in ranked:
        found = weighed(item, alone, statistics)
        count = item.group.size // 2
        copy = model.clone()
        own = find_groups(copy)
        place = groups.index(item.group)
        remove(copy, own, {own[place]: item.first(count)})
        plain = before.divergence(copy)
        # solved again, it is less than by removal alone
        assert 0 < found.error(count) < plain
        assert (np.diff(found.errors) >= 0).all()
        together_ = weighed_together([item], alone, [place])[0]
        assert together_.error(count) == pytest.approx(plain, rel=1e-3)
    # nothing of the model itself has changed
    assert before.divergence(model) < 1e-12


def test_a_block_whose_branch_hardly_counts_loses_most():
    model, samples = _network(scale=0.02), _samples(32)
    sizes = {}
    for allocation in ("sensitivity", "uniform"):
        result = StructuredPrune(ratio=0.4, allocation=allocation, limit=9).run(
            model.clone(), Context(calibration=samples)
        )
        sizes[allocation] = {
            node.name: node.inputs[1].const_value.shape.numpy()[0]
            for node in result.model.graph
            if node.op_type == "Conv"
        }
        before, after = Outputs(model, samples), result.model
        sizes[allocation]["lost"] = before.divergence(after)
    assert sizes["sensitivity"]["v1"] <= 0.25 * WIDTHS[1]
    assert sizes["sensitivity"]["v1"] < sizes["uniform"]["v1"]
    assert sizes["sensitivity"]["lost"] < 0.8 * sizes["uniform"]["lost"]


def test_auto_is_sensitivity_with_samples_and_uniform_without():
    def widths(calibration, **options):
        result = StructuredPrune(ratio=0.4, limit=9, **options).run(
            _network(scale=0.02), Context(calibration=calibration)
        )
        return [tuple(v.const_value.shape.numpy()) for v in _weights(result.model)]

    samples = _samples()
    assert widths(samples) == widths(samples, allocation="sensitivity")
    assert widths(None) == widths(None, allocation="uniform")
    peers = {"importance": "l1", "repair": False}
    assert widths(samples, **peers) == widths(samples, allocation="uniform", **peers)


def test_what_lost_too_much_is_pruned_less_but_not_more_often_than_needed():
    samples = _samples(32)
    model = _network()
    freely = StructuredPrune(ratio=0.6, limit=9).run(model.clone(), Context(calibration=samples))
    lost = Outputs(model, samples).divergence(freely.model)
    held = StructuredPrune(ratio=0.6, limit=lost / 3).run(
        model.clone(), Context(calibration=samples)
    )
    assert Outputs(model, samples).divergence(held.model) < 0.6 * lost
    assert any("over the limit" in note for note in held.notes)
    assert graph_macs(held.model.graph) > graph_macs(freely.model.graph)


def test_held_counts_every_unit_alike():
    price = Held([[_group("a", 10, 0, 3)], [_group("b", 30, 1, 1)]])
    assert price.left(np.array([1.0, 0.0])) == pytest.approx([0.75, 0.5, 0.5])
    assert price.gain(1, 0.5, np.zeros(2)) == pytest.approx([0.375, 0.25, 0.25])


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
@pytest.mark.parametrize("seed", [9, 10])
def test_heads_lose_as_many_dimensions_as_each_other(seed, allocation):
    """Orders that end early and complete ones meet in one cluster."""
    model = sequence_network(seed)
    samples = [sample_inputs(model, seed=i) for i in range(16)]
    item = StructuredPrune(ratio=0.4, allocation=allocation, limit=1e9)
    result = item.run(model.clone(), Context(calibration=samples))
    verify(result.model)
    assert np.isfinite(Outputs(model, samples).divergence(result.model))
