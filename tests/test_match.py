"""Patterns: what matches, and the reason when it does not."""

import onnx_ir as ir
import pytest

from edgepass.ir.match import Match, Mismatch, any_of, const, match, op, var

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2,4] x) => (float[2,4] y)
<float two = {2.0}, float[4] bias = {1.0, 2.0, 3.0, 4.0}>
{
  s = Sigmoid(x)
  m = Mul(s, x)
  d = Div(m, two)
  y = Add(d, bias)
}
"""


def node(model: ir.Model, op_type: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op_type)


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def test_commutative_operators_match_in_either_order(model):
    x = var("x")
    for pattern in (op.Mul(x, op.Sigmoid(x)), op.Mul(op.Sigmoid(x), x)):
        found = match(pattern, node(model, "Mul"))
        assert isinstance(found, Match)
        assert found["x"].name == "x"
        assert [n.op_type for n in found.matched_nodes] == ["Mul", "Sigmoid"]


def test_division_does_not_commute(model):
    assert isinstance(match(op.Div(var("m"), 2.0), node(model, "Div")), Match)
    assert isinstance(match(op.Div(2.0, var("m")), node(model, "Div")), Mismatch)


def test_a_number_must_equal_the_constant(model):
    failure = match(op.Div(var("m"), 3.0), node(model, "Div"))
    assert isinstance(failure, Mismatch)
    assert "expected the constant 3, found 2" in failure.reason


def test_the_same_variable_must_be_the_same_value(model):
    a = var("a")
    failure = match(op.Add(a, a), node(model, "Add"))
    assert isinstance(failure, Mismatch)
    assert "'a' is 'd' in one place and 'bias' in another" in failure.reason


def test_the_deepest_reason_is_reported(model):
    failure = match(op.Add(op.Div(op.Relu(var("x")), 2.0), const("b")), node(model, "Add"))
    assert isinstance(failure, Mismatch)
    assert "expected Relu, found Mul" in failure.reason
    assert "node" in failure.where


def test_alternatives(model):
    pattern = op.Add(op.Div(any_of(op.Relu(var("x")), op.Mul(var("x"), var("y"))), 2.0), const("b"))
    assert isinstance(match(pattern, node(model, "Add")), Match)


def test_an_inner_value_used_elsewhere_is_a_mismatch():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y, float[2] z)
        { s = Sigmoid(x)  y = Mul(x, s)  z = Relu(s) }
        """
    )
    x = var("x")
    failure = match(op.Mul(x, op.Sigmoid(x)), node(model, "Mul"))
    assert isinstance(failure, Mismatch)
    assert "also used by Relu" in failure.reason
    assert isinstance(match(op.Mul(x, op.Sigmoid(x, _shared=True)), node(model, "Mul")), Match)


def test_an_inner_value_that_is_an_output_is_a_mismatch():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y, float[2] s)
        { s = Sigmoid(x)  y = Mul(x, s) }
        """
    )
    x = var("x")
    failure = match(op.Mul(x, op.Sigmoid(x)), node(model, "Mul"))
    assert isinstance(failure, Mismatch)
    assert "is an output of the graph" in failure.reason


def test_attributes_must_be_equal():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2,3] x) => (float[2,3] y) { y = Softmax<axis = 1>(x) }
        """
    )
    assert isinstance(match(op.Softmax(var("x"), axis=1), node(model, "Softmax")), Match)
    failure = match(op.Softmax(var("x"), axis=0), node(model, "Softmax"))
    assert isinstance(failure, Mismatch)
    assert "axis is 1, not 0" in failure.reason
