"""Cleanup passes on small graphs: what goes, what stays and why."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.errors import PassOptionError
from edgepass.ir.graph import AbsentTensor, is_absent
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.cleanup.dead_code import DeadCode
from edgepass.passes.cleanup.duplicates import Duplicates
from edgepass.passes.cleanup.folding import FoldConstants
from edgepass.passes.cleanup.identities import Identities
from edgepass.passes.cleanup.shape_folding import FoldShapes


def load(text: str, opset: int = 18) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    infer_shapes(model)
    return model


def apply(item, model: ir.Model):
    result = item.run(model, Context())
    verify(result.model)
    return result


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_constants_are_folded():
    model = load(
        """
        g (float[2] x) => (float[2] y) <float two = {2.0}, float three = {3.0}>
        { a = Mul(two, three)  b = Sqrt(a)  y = Add(x, b) }
        """
    )
    apply(FoldConstants(), model)
    assert ops(model) == ["Add"]
    (weight,) = model.graph.initializers.values()
    assert weight.const_value.numpy() == pytest.approx(np.sqrt(6))


def test_an_expansion_is_not_folded_unless_something_small_comes_of_it():
    text = """
        g (float[1000,1000] x) => (float[1000,1000] y)
        <float one = {1.0}, int64[2] shape = {1000, 1000}>
        { big = Expand(one, shape)  y = Add(x, big) }
    """
    model = load(text)
    assert not apply(FoldConstants(), model).modified
    apply(FoldConstants(max_growth=4_000_000), model)
    assert ops(model) == ["Add"]

    model = load(
        """
        g (float[1] x) => (float[1] y) <float one = {1.0}, int64[2] shape = {1000, 1000}>
        { big = Expand(one, shape)  s = ReduceSum<keepdims = 0>(big)  y = Add(x, s) }
        """
    )
    apply(FoldConstants(), model)
    assert ops(model) == ["Add"]


def test_a_shared_weight_is_not_folded_twice():
    rows = ", ".join(["0.5"] * 2304)
    model = load(
        f"""
        g (float[48,48] x) => (float[48,48] y) <float[48,48] w = {{{rows}}}>
        {{ t = Transpose<perm = [1, 0]>(w)  a = MatMul(x, t)  y = MatMul(a, w) }}
        """
    )
    assert not apply(FoldConstants(), model).modified


def test_absent_weights_stay_absent():
    model = load(
        """
        g (float[2,3] x) => (float[2,4] y)
        { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }
        """.replace("=> (float[2,4] y)", "=> (float[2,4] y) <float[4,3] w = {"
                    + ", ".join(["0.0"] * 12) + "}>")
    )  # fmt: skip
    model.graph.initializers["w"].const_value = AbsentTensor("w", ir.DataType.FLOAT, [4, 3])
    apply(FoldConstants(), model)
    assert ops(model) == ["MatMul"]
    (weight,) = model.graph.initializers.values()
    assert is_absent(weight.const_value)
    assert weight.shape == ir.Shape([3, 4])


def test_random_and_quantized_constants_stay():
    model = load(
        """
        g (float[2] x) => (float[2] y)
        <int8[2] q = {1, 2}, float s = {0.5}, int8 z = {0}>
        { r = RandomUniform<shape = [2]>()  w = DequantizeLinear(q, s, z)  a = Add(r, w)
          y = Add(a, x) }
        """
    )
    assert not apply(FoldConstants(), model).modified


def test_a_negative_bound_is_refused():
    with pytest.raises(PassOptionError, match="max_growth"):
        FoldConstants(max_growth=-1)


def test_shapes_that_are_known_are_folded_and_dynamic_ones_stay():
    model = load(
        """
        g (float[N,4,5] x) => (float[N,20] y) <int64 zero = {0}, int64[1] axes = {0},
          int64[1] rest = {20}>
        { s = Shape(x)  n = Gather<axis = 0>(s, zero)  u = Unsqueeze(n, axes)
          t = Concat<axis = 0>(u, rest)  y = Reshape(x, t) }
        """
    )
    apply(FoldShapes(), model)
    apply(DeadCode(), model)
    assert ops(model) == ["Reshape"]
    target = model.graph[0].inputs[1]
    assert target.const_value.numpy().tolist() == [-1, 20]


def test_identities_go():
    model = load(
        """
        g (float[2,3] x) => (float[2,3] y) <float zero = {0.0}, float[1,1] one = {1.0}>
        {
          a = Identity(x)  b = Add(a, zero)  c = Mul(one, b)  d = Dropout(c)
          e = Transpose<perm = [1, 0]>(d)  f = Transpose<perm = [1, 0]>(e)
          g1 = Cast<to = 1>(f)  h = Neg(g1)  i = Neg(h)  j = Relu(i)  k = Relu(j)
          y = Identity(k)
        }
        """
    )
    apply(Identities(), model)
    assert ops(model) == ["Relu"]
    assert model.graph.outputs[0].name == "y"


def test_a_constant_that_broadcasts_stays():
    model = load(
        """
        g (float[3] x) => (float[2,3] y) <float[2,1] zero = {0.0, 0.0}> { y = Add(x, zero) }
        """
    )
    assert not apply(Identities(), model).modified


def test_a_cast_that_converts_stays():
    model = load("g (float[3] x) => (int64[3] y) { y = Cast<to = 7>(x) }")
    assert not apply(Identities(), model).modified


def test_duplicates_are_merged_and_outputs_kept():
    model = load(
        """
        g (float[2] x) => (float[2] y, float[2] z)
        <float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}>
        { p = Add(x, a)  q = Add(x, b)  y = Exp(p)  z = Exp(q) }
        """
    )
    apply(Duplicates(), model)
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert sorted(ops(model)) == ["Add", "Exp", "Exp"]
    assert len(model.graph.initializers) == 1


def test_random_nodes_are_no_duplicates():
    model = load(
        """
        g (float[2] x) => (float[2] y)
        { a = RandomNormalLike(x)  b = RandomNormalLike(x)  y = Sub(a, b) }
        """
    )
    assert not apply(Duplicates(), model).modified


def test_dead_code_goes_with_what_it_alone_used():
    model = load(
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
        {
          a = Add(x, w)
          dead = If(c) <then_branch = t () => (float[2] p) { p = Exp(a) },
                        else_branch = e () => (float[2] q) { q = Neg(a) }>
          y = Relu(x)
        }
        """
    )
    apply(DeadCode(), model)
    assert ops(model) == ["Relu"]
    assert not model.graph.initializers
    assert [v.name for v in model.graph.inputs] == ["c", "x"]
