"""Every structural rule catches what it is for, and names it."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.errors import InvalidGraphError
from edgepass.ir.graph import add_initializer
from edgepass.ir.verify import check, verify


def graph(*nodes, inputs=None, outputs=None, initializers=(), opset=18):
    return ir.Model(
        ir.Graph(
            inputs or [],
            outputs or [],
            nodes=nodes,
            initializers=initializers,
            opset_imports={"": opset},
            name="g",
        ),
        ir_version=10,
    )


def value(name):
    return ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))


def test_a_sound_graph_has_no_finding():
    x = value("x")
    relu = ir.Node("", "Relu", [x], outputs=[value("y")])
    assert list(check(graph(relu, inputs=[x], outputs=relu.outputs))) == []


def test_a_use_that_nothing_defines():
    lost = value("lost")
    relu = ir.Node("", "Relu", [lost], outputs=[value("y")], name="r")
    with pytest.raises(InvalidGraphError, match="'lost'.*not defined before its use") as caught:
        verify(graph(relu, outputs=relu.outputs))
    assert "node 'r' (Relu)" in str(caught.value)
    assert "no node, input or initializer in reach defines it" in str(caught.value)


def test_a_cycle_or_wrong_order():
    a, b = value("a"), value("b")
    first = ir.Node("", "Relu", [b], outputs=[a], name="first")
    second = ir.Node("", "Exp", [a], outputs=[b], name="second")
    with pytest.raises(InvalidGraphError, match="out of order or form a cycle"):
        verify(graph(first, second, outputs=[b]))


def test_an_output_that_nothing_produces():
    x = value("x")
    with pytest.raises(
        InvalidGraphError, match="Output 0 \\('y'\\) of graph 'g' is produced by no"
    ):
        verify(graph(inputs=[x], outputs=[value("y")]))


def test_two_values_of_one_name():
    x = value("x")
    a = ir.Node("", "Relu", [x], outputs=[value("same")])
    b = ir.Node("", "Exp", [x], outputs=[value("same")])
    with pytest.raises(InvalidGraphError, match="Two values are called 'same'"):
        verify(graph(a, b, inputs=[x], outputs=b.outputs))


def test_an_operator_that_the_opset_lacks():
    x = value("x")
    node = ir.Node("", "Gelu", [x], outputs=[value("y")])
    with pytest.raises(InvalidGraphError, match="no operator 'Gelu' in opset 18"):
        verify(graph(node, inputs=[x], outputs=node.outputs))
    x = value("x")
    node = ir.Node("", "Gelu", [x], outputs=[value("y")])
    verify(graph(node, inputs=[x], outputs=node.outputs, opset=20))


def test_wrong_number_of_inputs_and_missing_attribute():
    x = value("x")
    node = ir.Node("", "Add", [x], outputs=[value("y")])
    with pytest.raises(InvalidGraphError, match="Add has 1 inputs"):
        verify(graph(node, inputs=[x], outputs=node.outputs))
    x = value("x")
    node = ir.Node("", "Concat", [x], outputs=[value("y")])
    with pytest.raises(InvalidGraphError, match="Concat lacks the attribute 'axis'"):
        verify(graph(node, inputs=[x], outputs=node.outputs))


def test_an_attribute_of_another_opset():
    x = value("x")
    axes = {"axes": ir.AttrInt64s("axes", [0])}
    node = ir.Node("", "Unsqueeze", [x, x], axes, outputs=[value("y")])
    with pytest.raises(InvalidGraphError, match="has an attribute 'axes'"):
        verify(graph(node, inputs=[x], outputs=node.outputs))


def test_a_foreign_domain_needs_an_import():
    x = value("x")
    node = ir.Node("com.example", "Magic", [x], outputs=[value("y")])
    with pytest.raises(InvalidGraphError, match=r"no version of the domain 'com.example'"):
        verify(graph(node, inputs=[x], outputs=node.outputs))


def test_a_use_of_a_removed_node():
    x = value("x")
    a = ir.Node("", "Relu", [x], outputs=[value("a")], name="gone")
    b = ir.Node("", "Exp", [a.outputs[0]], outputs=[value("b")])
    model = graph(a, b, inputs=[x], outputs=b.outputs)
    model.graph.remove(a)
    with pytest.raises(InvalidGraphError, match="'gone' was removed from the graph"):
        verify(model)


def test_subgraphs_see_outer_values_but_not_the_other_way_round():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        g (bool c, float[2] x) => (float[2] y)
        {
          a = Relu(x)
          y = If(c) <then_branch = t () => (float[2] p) { p = Exp(a) },
                     else_branch = e () => (float[2] q) { q = Neg(x) }>
        }
        """
    )
    verify(model)
    inner = model.graph[1].attributes["then_branch"].as_graph()[0].outputs[0]
    neg = ir.Node("", "Neg", [inner], outputs=[value("leak")])
    model.graph.append(neg)
    with pytest.raises(InvalidGraphError, match="'p'.*not defined before its use"):
        verify(model)


def test_an_initializer_without_data_or_shape():
    model = graph(inputs=[value("x")])
    add_initializer(model.graph, "w", np.zeros(3, np.float32)).const_value = None
    with pytest.raises(InvalidGraphError, match="neither data nor a stated shape"):
        verify(model)
