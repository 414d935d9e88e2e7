"""Rules: applied to a fixpoint, explained when they do not apply, failures named."""

import dataclasses

import onnx_ir as ir
import pytest

from edgepass import RewriteRule, explain, op, var
from edgepass.errors import PassFailedError
from edgepass.ir.match import const
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.fuse.affine import FoldBatchNorm
from edgepass.passes.rules import explain_all


@dataclasses.dataclass(frozen=True)
class DoubleNegation(RewriteRule):
    """Neg(Neg(x)) -> x."""

    def pattern(self):
        return op.Neg(op.Neg(var("x"), _shared=True))

    def rewrite(self, m, build):
        return m["x"]


def chain(count: int) -> ir.Model:
    body = "a0 = Relu(x) " + " ".join(f"a{i + 1} = Neg(a{i})" for i in range(count))
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y)'
        f"{{ {body} y = Relu(a{count}) }}"
    )


@pytest.mark.parametrize(("count", "left"), [(2, 0), (3, 1), (40, 0), (41, 1)])
def test_a_rule_is_applied_until_nothing_matches(count, left):
    model = chain(count)
    result = DoubleNegation().run(model, Context())
    verify(model)
    assert result.modified
    assert sum(n.op_type == "Neg" for n in model.graph) == left
    assert result.notes == (f"double_negation x{count // 2}",)
    assert not DoubleNegation().run(model, Context()).modified


def test_a_rule_works_inside_subgraphs():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (bool c, float[2] x) => (float[2] y)
        {
          y = If(c) <then_branch = t () => (float[2] p) { a = Neg(x) b = Neg(a) p = Exp(b) },
                     else_branch = e () => (float[2] q) { q = Neg(x) }>
        }
        """
    )
    assert DoubleNegation().run(model, Context()).modified
    verify(model)
    branch = model.graph[0].attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["Exp"]


def test_explain_names_what_stands_between():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <float[2,2,1,1] w = {1.0, 0.0, 0.0, 1.0}, float[2] s = {1.0, 1.0}, float[2] b = {0.0, 0.0},
         float[2] m = {0.0, 0.0}, float[2] v = {1.0, 1.0}>
        { c = Conv(x, w)  r = Relu(c)  y = BatchNormalization(r, s, b, m, v) }
        """
    )
    norm = model.graph[2]
    answer = explain(FoldBatchNorm(), norm)
    assert not answer.matched
    assert "expected Conv or ConvTranspose, found Relu" in answer.reason
    assert not FoldBatchNorm().run(model, Context()).modified
    (only,) = explain_all(FoldBatchNorm(), model)
    assert only == answer
    assert "does not match" in str(answer)


def test_a_rule_that_raises_is_named_with_its_node():
    @dataclasses.dataclass(frozen=True)
    class Broken(RewriteRule):
        """Breaks."""

        def pattern(self):
            return op.Relu(var("x"))

        def rewrite(self, m, build):
            raise KeyError("oops")

    with pytest.raises(PassFailedError, match="'broken' raised KeyError") as caught:
        Broken().run(chain(1), Context())
    assert "Relu" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_check_that_refuses_leaves_the_graph_alone():
    @dataclasses.dataclass(frozen=True)
    class Never(RewriteRule):
        """Refuses."""

        def pattern(self):
            return op.Neg(var("x"))

        def check(self, m, context):
            return "not today"

        def rewrite(self, m, build):
            raise AssertionError

    model = chain(2)
    assert not Never().run(model, Context()).modified
    assert explain(Never(), model.graph[1]).reason == "not today"


def test_const_binds_by_name():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y) <float k = {3.0}> { y = Mul(x, k) }
        """
    )

    @dataclasses.dataclass(frozen=True)
    class Halve(RewriteRule):
        """Mul(x, k) -> Div(x, k)."""

        def pattern(self):
            return op.Mul(var("x"), const("k"))

        def rewrite(self, m, build):
            return build.Div(m["x"], m.array("k"))

    Halve().run(model, Context())
    verify(model)
    assert model.graph[0].op_type == "Div"
    assert model.graph.outputs[0].name == "y"
