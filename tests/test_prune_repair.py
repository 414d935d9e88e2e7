"""What makes up for removed units: weights solved again, heads turned, and the pass `prune`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.errors import PassOptionError, UsageError
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.prune.divergence import Outputs, held_out, thinned
from edgepass.passes.prune.groups import find_groups
from edgepass.passes.prune.repair import repair
from edgepass.passes.prune.repair_heads import rotate_heads
from edgepass.passes.prune.statistics import collect
from edgepass.passes.prune.stepwise import Stepwise
from edgepass.passes.prune.structured import StructuredPrune
from edgepass.targets.onnxruntime import OrtRunner

F32 = np.float32


class Net:
    """A growing graph: `net.Op(...)` adds a node, arrays become weights, and names its result."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []  # noqa: F821
        self.weights: list[onnx.TensorProto] = []  # noqa: F821

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        fan = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        return (scale * self.rng.normal(size=shape) / np.sqrt(fan)).astype(F32)

    def __getattr__(self, op_type: str):
        def add(*operands, _name: str = "", **attributes) -> str:
            names = []
            for operand in operands:
                if isinstance(operand, np.ndarray):
                    name = f"w{len(self.weights)}"
                    self.weights.append(numpy_helper.from_array(operand, name))
                    operand = name
                names.append(operand)
            result = _name or f"v{len(self.nodes)}"
            self.nodes.append(helper.make_node(op_type, names, [result], name=result, **attributes))
            return result

        return add

    def model(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> ir.Model:
        def info(values):
            kind = TensorProto.FLOAT
            return [helper.make_tensor_value_info(n, kind, s) for n, s in values.items()]

        graph = helper.make_graph(self.nodes, "net", info(inputs), info(outputs), self.weights)
        opsets = [helper.make_opsetid("", 20)]
        model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
        infer_shapes(model)
        return model


def _samples(count: int, *shape: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=shape).astype(F32)} for _ in range(count)]


def _run(model: ir.Model, feed) -> np.ndarray:
    with OrtRunner(model, optimize=False) as runner:
        return runner.run(feed)["y"]


def _unexplained(model: ir.Model, other: ir.Model, samples) -> float:
    return Outputs(model, samples).divergence(other)


def convnet(seed: int = 0, copies: bool = False, residual: bool = False) -> ir.Model:
    """Two convolutions and a linear layer; with `copies`, half the channels repeat others."""
    net = Net(seed)
    w, v = net.normal(16, 3, 3, 3), net.normal(16, 16, 3, 3)
    if copies:
        w[8:] = w[:8] * np.linspace(0.5, 2, 8, dtype=F32)[:, None, None, None]
    a = net.Relu(net.Conv("x", w, pads=[1, 1, 1, 1]))
    b = net.Conv(a, v, net.normal(1, 16)[0], pads=[1, 1, 1, 1])
    if residual:
        c = net.Relu(b)
        b = net.Add(net.Conv(c, net.normal(16, 16, 1, 1)), a)
    b = net.GlobalAveragePool(net.Relu(b))
    net.Gemm(net.Flatten(b), net.normal(16, 5), _name="y")
    return net.model({"x": ("n", 3, 8, 8)}, {"y": ("n", 5)})


def attention(seed: int = 0, rank: int = 8, scale: bool = True) -> ir.Model:
    """Two heads of 8 dimensions; queries and keys, values and what follows, of that rank."""
    net = Net(seed)

    def low(inner: int) -> np.ndarray:
        return (net.rng.normal(size=(inner, rank)) / np.sqrt(inner)).astype(F32)

    def project(weight: np.ndarray, bias: np.ndarray, perm: list[int]) -> str:
        biased = net.Add(net.MatMul("x", weight), bias)
        split = net.Reshape(biased, np.array([0, 0, 2, 8]))
        return net.Transpose(split, perm=perm)

    turns = [(low(8), low(8)) for _ in range(4)]
    wq, wk, wv = net.normal(16, 16), net.normal(16, 16), net.normal(16, 16)
    bq, bk, bv = net.normal(1, 16)[0], net.normal(1, 16)[0], net.normal(1, 16)[0]
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        through = turns[head][0] @ turns[head][1].T
        wq[:, own], bq[own] = wq[:, own] @ through, bq[own] @ through
    wo = net.normal(16, 16)
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        wo[own] = turns[2 + head][0] @ turns[2 + head][1].T @ wo[own]
    scores = net.MatMul(project(wq, bq, [0, 2, 1, 3]), project(wk, bk, [0, 2, 3, 1]))
    scaled = net.Mul(scores, np.array(0.35, F32)) if scale else scores
    mixed = net.MatMul(net.Softmax(scaled, axis=-1), project(wv, bv, [0, 2, 1, 3]))
    joined = net.Reshape(net.Transpose(mixed, perm=[0, 2, 1, 3]), np.array([0, 0, 16]))
    net.Add(net.MatMul(joined, wo), "x", _name="y")
    return net.model({"x": ("n", "t", 16)}, {"y": ("n", "t", 16)})


# --- running step by step -------------------------------------------------------------------------


def test_values_step_by_step_are_those_of_one_run():
    model = convnet(residual=True)
    samples = _samples(3, 2, 3, 8, 8)
    names = [node.outputs[0] for node in model.graph]
    step = Stepwise(model, samples)
    for value in names:
        found = [arrays[value.name] for arrays in step.advance([value])]
        assert len(found) == 3
    for sample, last in zip(samples, found, strict=True):
        assert np.allclose(last, _run(model, sample), atol=1e-5)


def test_weights_of_what_has_not_run_may_change():
    model = convnet()
    samples = _samples(2, 1, 3, 8, 8)
    step = Stepwise(model, samples)
    middle = model.graph[2].inputs[0]
    assert len(list(step.advance([middle]))) == 2
    weight = model.graph[2].inputs[1]
    weight.const_value = ir.Tensor(0.0 * weight.const_value.numpy(), name=weight.name)
    results = [arrays["y"] for arrays in step.advance([model.graph.outputs[0]])]
    assert np.allclose(results[0], _run(model, samples[0]), atol=1e-6)


# --- repair ---------------------------------------------------------------------------------------


def test_repair_finds_the_weights_again():
    model = convnet(1)
    spoilt = model.clone()
    layers = [node for node in spoilt.graph if node.op_type in ("Conv", "Gemm")][1:]
    for node in layers:
        weight = node.inputs[1]
        array = weight.const_value.numpy()
        noise = 0.3 * np.random.default_rng(0).normal(size=array.shape) * array.std()
        weight.const_value = ir.Tensor((array + noise).astype(F32), name=weight.name)
    samples, fresh = _samples(64, 1, 3, 8, 8), _samples(8, 1, 3, 8, 8, seed=9)
    before = _unexplained(model, spoilt, fresh)
    done = repair(spoilt, model, {}, samples)
    after = _unexplained(model, spoilt, fresh)
    assert (done.layers, done.solved) == (3, 3)
    assert after < 0.02 * before


def test_a_product_without_bias_gets_one_where_the_mean_is_lost():
    net = Net(3)
    hidden = net.Relu(net.MatMul("x", net.normal(8, 32)))
    net.MatMul(hidden, net.normal(32, 4), _name="y")
    model = net.model({"x": ("n", 8)}, {"y": ("n", 4)})
    samples = _samples(40, 16, 8)
    result = StructuredPrune(ratio=0.5).run(model.clone(), Context(calibration=samples))
    verify(result.model)
    biased = [node for node in result.model.graph if node.op_type == "Add"]
    assert biased[-1].outputs[0] is result.model.graph.outputs[0]
    feed = _samples(1, 500, 8, seed=9)[0]
    error = _run(result.model, feed) - _run(model, feed)
    assert np.abs(error.mean(0)).max() < 0.2 * error.std()


def test_channels_that_repeat_others_cost_nothing():
    model = convnet(copies=True)
    samples, fresh = _samples(64, 1, 3, 8, 8), _samples(8, 1, 3, 8, 8, seed=9)
    options = {"ratio": 0.5, "only": (find_groups(model).free[0].name,), "multiple": 1}
    repaired = StructuredPrune(**options).run(model.clone(), Context(calibration=samples))
    plain = StructuredPrune(**options, importance="l2", repair=False).run(model.clone(), Context())
    lost, theirs = (_unexplained(model, r.model, fresh) for r in (repaired, plain))
    assert lost < 0.01 * theirs


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_repair_beats_magnitude(ratio, residual):
    model = convnet(5, residual=residual)
    samples, fresh = _samples(64, 1, 3, 8, 8), _samples(16, 1, 3, 8, 8, seed=9)
    options = {"ratio": ratio, "multiple": 1, "limit": 1e9}
    context = Context(calibration=samples)
    ours = StructuredPrune(**options).run(model.clone(), context)
    peer = StructuredPrune(**options, importance="l1", repair=False).run(model.clone(), context)
    verify(ours.model)
    assert ours.model.graph.outputs[0].shape == model.graph.outputs[0].shape
    lost, theirs = (_unexplained(model, r.model, fresh) for r in (ours, peer))
    assert lost < 0.5 * theirs


# --- heads ----------------------------------------------------------------------------------------


def _turned(model: ir.Model, samples) -> int:
    groups = find_groups(model)
    found = collect(groups.free, samples, model, lambda *_: None)
    return len(rotate_heads(groups.free, found))


def test_turning_heads_changes_no_result():
    model = attention()
    samples = _samples(12, 1, 9, 16)
    expected = [_run(model, sample) for sample in samples]
    assert _turned(model, samples) == 2
    for sample, wanted in zip(samples, expected, strict=True):
        assert np.allclose(_run(model, sample), wanted, atol=2e-4)


def test_heads_of_low_rank_lose_their_other_dimensions_for_nothing():
    model = attention(rank=4)
    samples, fresh = _samples(64, 2, 9, 16), _samples(8, 1, 9, 16, seed=9)
    options = {"ratio": 0.5, "multiple": 1}
    pruned = StructuredPrune(**options).run(model.clone(), Context(calibration=samples))
    plain = StructuredPrune(**options, repair=False, limit=100.0).run(
        model.clone(), Context(calibration=samples)
    )
    shapes = [v.shape for v in pruned.model.graph.initializers.values() if len(v.shape) == 2]
    assert sorted(map(tuple, shapes)) == [(8, 16), (16, 8), (16, 8), (16, 8)]
    assert _unexplained(model, pruned.model, fresh) < 1e-4
    assert _unexplained(model, plain.model, fresh) > 1e-2


def test_heads_with_something_between_are_not_turned():
    net = Net(0)
    hidden = net.Relu(net.MatMul("x", net.normal(16, 16)))
    net.MatMul(hidden, net.normal(16, 16), _name="y")
    model = net.model({"x": ("n", 9, 16)}, {"y": ("n", 9, 16)})
    assert _turned(model, _samples(4, 1, 9, 16)) == 0


# --- the pass -------------------------------------------------------------------------------------


def test_zeroed_channels_leave_without_a_trace():
    model = convnet(7)
    weight = model.graph[0].inputs[1]
    array = np.array(weight.const_value.numpy())
    array[::2] = 0.0
    weight.const_value = ir.Tensor(array, name=weight.name)
    name = find_groups(model).free[0].name
    feed = _samples(1, 2, 3, 8, 8)[0]
    expected = _run(model, feed)
    result = StructuredPrune(ratio=0.5, only=(name,), multiple=1).run(model, Context())
    assert tuple(result.model.graph[0].inputs[1].shape) == (8, 3, 3, 3)
    assert np.allclose(_run(result.model, feed), expected, atol=1e-5)
    assert any("not repaired" in note for note in result.notes)


def test_over_the_limit_less_is_pruned_and_it_says_so():
    model = convnet(5)
    context = Context(calibration=_samples(32, 1, 3, 8, 8))
    free = StructuredPrune(ratio=0.8, multiple=1, limit=100.0).run(model.clone(), context)
    held = StructuredPrune(ratio=0.8, multiple=1, limit=0.02).run(model.clone(), context)
    assert any("over the limit of 2%" in note for note in held.notes)

    def weights(result) -> int:
        return sum(v.const_value.size for v in result.model.graph.initializers.values())

    assert weights(free) < weights(held) <= weights_of(model)


def weights_of(model: ir.Model) -> int:
    return sum(v.const_value.size for v in model.graph.initializers.values())


def test_excluded_kinds_and_names_stay():
    model = convnet(2)
    result = StructuredPrune(ratio=0.5, exclude=("channels",)).run(model, Context())
    assert not result.modified
    assert "nothing to prune" in result.notes[0]


def test_samples_held_out_are_not_learnt_from():
    samples = [{"x": np.full(1, i, F32)} for i in range(16)]
    learn, judge = held_out(samples)
    numbers = [int(s["x"][0]) for s in judge]
    assert len(numbers) == 2
    assert numbers[0] < 8 <= numbers[1]
    assert [int(s["x"][0]) for s in learn] == [i for i in range(16) if i not in numbers]
    assert held_out(samples[:4]) == (samples[:4], samples[:4])
    assert thinned(samples[:4], 4) == samples[:4]


@pytest.mark.parametrize("period", [2, 4, 8])
def test_samples_of_two_kinds_that_take_turns_are_both_held_out_and_kept(period):
    samples = [{"x": np.full(1, i % period == 0, F32)} for i in range(256)]
    for part in (held_out(samples)[1], thinned(samples, 32)):
        assert len(part) == 32
        assert 0 < sum(int(s["x"][0]) for s in part) < 32


@pytest.mark.parametrize(
    ("option", "value"),
    [("ratio", 1.0), ("importance", "taylor"), ("allocation", "x"), ("limit", 0), ("heads", "x"),
     ("multiple", -1), ("spread", 1.5)],
)  # fmt: skip
def test_options_that_do_not_fit(option, value):
    with pytest.raises(PassOptionError, match=f"'{option}'"):
        StructuredPrune(**{option: value})


def test_activations_need_samples():
    with pytest.raises(UsageError, match="calibration"):
        StructuredPrune(importance="activation").run(convnet(), Context())
