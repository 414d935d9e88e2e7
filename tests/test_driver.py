"""The driver: order, ledger, and what it says when a pass misbehaves."""

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import pytest

from edgepass import Context, Pass, PassResult, Stage
from edgepass.errors import InvalidGraphError, PassFailedError, ShapeError, WeightsAbsentError
from edgepass.ir.graph import AbsentTensor, add_initializer
from edgepass.passes.bisect import bisect_passes
from edgepass.passes.driver import run_passes
from edgepass.passes.probe import Probe, numeric_error, sample_inputs
from edgepass.pipelines import parse_recipe

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2,3] x) => (float[2,3] y)
<float[3,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0}, float zero = {0.0}>
{ a = Add(x, zero)  b = MatMul(a, w)  c = Tanh(b)  y = Identity(c) }
"""


@pytest.fixture
def model():
    return ir.from_onnx_text(TEXT)


def a_pass(action, **attributes):
    """A pass that does `action(model)` and says that it modified the model."""

    @dataclasses.dataclass(frozen=True)
    class Made(Pass):
        """Made for a test."""

        def run(self, model, context):
            action(model)
            return PassResult(model, True)

    for name, value in attributes.items():
        setattr(Made, name, value)
    return Made()


def test_the_ledger_has_a_line_a_pass_with_counts_and_error(model):
    probe = Probe(sample_inputs(model))
    _, ledger = run_passes(model, parse_recipe("cleanup"), probe=probe)
    names = [row.name for row in ledger.rows]
    assert names[:3] == ["inline_functions", "fold_branches", "fold_shapes"]
    row = next(row for row in ledger.rows if row.name == "identities")
    assert (row.before.nodes, row.after.nodes) == (4, 2)
    assert row.error.relative == 0
    assert ledger.before.macs == 2 * 3 * 3
    assert ledger.before.weight_bytes == 40
    assert ledger.total_error.relative == 0
    assert "4 > 2" in str(ledger)
    json.dumps(ledger.as_dict(), allow_nan=False)


def test_an_error_is_measured_against_the_model_before(model):
    def double(model):
        w = model.graph.initializers["w"]
        w.const_value = ir.tensor(w.const_value.numpy() * np.float32(2), name="w")

    probe = Probe({"x": np.ones((2, 3), np.float32) * 0.01})
    _, ledger = run_passes(model, [a_pass(double)], probe=probe)
    assert ledger.rows[0].error.relative > 0.1


def test_stages_order_passes_whatever_order_they_are_given_in(model):
    seen = []
    late = a_pass(lambda m: seen.append("late"), stage=Stage.QUANTIZE)
    early = a_pass(lambda m: seen.append("early"), stage=Stage.CLEANUP)
    run_passes(model, [late, early])
    assert seen == ["early", "late"]


def test_a_pass_that_raises_is_named(model):
    def fail(model):
        raise RuntimeError("boom")

    with pytest.raises(PassFailedError, match="'made' raised RuntimeError: boom") as caught:
        run_passes(model, [*parse_recipe("dead_code,"), a_pass(fail, stage=Stage.FUSE)])
    assert "after dead_code" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_pass_that_leaves_an_unsound_graph_is_named(model):
    def cut(model):
        node = model.graph[2]
        node.replace_input_with(0, ir.Value(name="nowhere"))

    with pytest.raises(PassFailedError, match="left an unsound graph.*'nowhere'"):
        run_passes(model, [a_pass(cut)])


def test_a_pass_that_changes_the_interface_is_named(model):
    def rename(model):
        model.graph.inputs[0].name = "z"

    with pytest.raises(PassFailedError, match="changed the model's interface") as caught:
        run_passes(model, [a_pass(rename)])
    assert "['x']" in str(caught.value)


def test_a_pass_must_return_a_result(model):
    @dataclasses.dataclass(frozen=True)
    class Forgetful(Pass):
        """Forgets."""

        def run(self, model, context):
            return None

    with pytest.raises(PassFailedError, match="returned NoneType"):
        run_passes(model, [Forgetful()])


def test_unsound_and_ill_shaped_models_are_refused_before_the_first_pass(model):
    model.graph[1].replace_input_with(1, add_initializer(model.graph, "v", np.ones((4, 4), "f")))
    with pytest.raises(ShapeError, match="MatMul"):
        run_passes(model, [])
    model.graph.remove(model.graph[1])
    with pytest.raises(InvalidGraphError):
        run_passes(model, [])


def test_a_pass_that_needs_weights_is_refused_without(model):
    absent = AbsentTensor("w", ir.DataType.FLOAT, [3, 3])
    model.graph.initializers["w"].const_value = absent
    with pytest.raises(WeightsAbsentError, match="'sparsify' needs weights, and 1 have no data"):
        run_passes(model, parse_recipe("sparsify,dead_code"))


def test_a_probe_that_cannot_run_says_so_and_compilation_goes_on(model):
    _, ledger = run_passes(
        model, parse_recipe("cleanup"), probe=Probe({"x": np.ones((5, 5), np.float32)})
    )
    assert ledger.total_error is None
    assert ledger.rows[2].error_note.startswith("not checked")


def test_bisect_names_the_guilty_pass_and_writes_a_reproducer(model, tmp_path):
    def spoil(model):
        for node in model.graph:
            if node.op_type == "MatMul":
                w = node.inputs[1]
                w.const_value = ir.tensor(w.const_value.numpy() + np.float32(1), name=w.name)

    guilty = a_pass(spoil, name="spoiler", stage=Stage.FUSE)
    feed = {"x": np.full((2, 3), 0.01, np.float32)}
    passes = [*parse_recipe("cleanup,fuse"), guilty]
    result = bisect_passes(model, passes, Context(), feed, out=tmp_path / "r")
    assert result.guilty == "spoiler"
    assert result.nodes[0] < 4  # only what leads to the MatMul
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["pass"] == "spoiler"
    small = ir.load(tmp_path / "r" / "before.onnx")
    arrays = dict(np.load(tmp_path / "r" / "input.npz"))
    before = Probe(arrays).run(small)
    spoil(small)
    assert numeric_error(before, Probe(arrays).run(small)).relative > 1e-4
    assert [n.op_type for n in model.graph] == ["Add", "MatMul", "Tanh", "Identity"]


def test_bisect_finds_nothing_where_nothing_is_wrong(model):
    result = bisect_passes(model, parse_recipe("default"), Context(), sample_inputs(model))
    assert result.guilty is None
    assert "no pass exceeds" in str(result)


@pytest.mark.parametrize(
    ("expected", "actual", "relative"),
    [
        ([0.0, 1.0], [0.0, 1.0], 0.0),
        ([0.0, 2.0], [0.0, 1.0], 0.5),
        ([5.0, 5.0], [5.0, 4.0], 0.2),
        ([0.0, np.nan], [0.0, np.nan], 0.0),
        ([0.0, np.nan], [0.0, 1.0], np.inf),
        ([0.0, np.inf], [0.0, -np.inf], np.inf),
        ([0.0, 1.0], [0.0, 1.0, 2.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_numeric_error(expected, actual, relative):
    error = numeric_error({"y": np.array(expected)}, {"y": np.array(actual)})
    assert error.relative == pytest.approx(relative)
