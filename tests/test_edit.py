"""Edits keep names of outputs, metadata, shapes, and tell listeners."""

import onnx_ir as ir
import pytest

from edgepass.ir.edit import Builder, Editor
from edgepass.ir.verify import verify


def load(body: str, outputs: str = "float[2] y") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => ({outputs}) {{ {body} }}'
    )


class Log:
    def __init__(self):
        self.events = []

    def inserted(self, node):
        self.events.append(("inserted", node.op_type))

    def erased(self, node):
        self.events.append(("erased", node.op_type))

    def changed(self, node):
        self.events.append(("changed", node.op_type))


def test_replacing_a_graph_output_keeps_its_name_and_the_metadata():
    model = load("a = Relu(x)  y = Identity(a)")
    identity = model.graph[1]
    identity.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "m.py", line 3, in forward'
    log = Log()
    editor = Editor(log)
    build = Builder(editor, identity)
    value = build.Sigmoid(identity.inputs[0])
    editor.replace_node(identity, value)
    verify(model)
    assert model.graph.outputs[0] is value
    assert value.name == "y"
    assert value.shape == ir.Shape([2])
    assert value.dtype == ir.DataType.FLOAT
    assert value.producer().metadata_props["pkg.torch.onnx.stack_trace"].startswith("File")
    assert ("inserted", "Sigmoid") in log.events
    assert ("erased", "Identity") in log.events


def test_a_graph_input_can_not_become_an_output_without_an_identity():
    model = load("y = Relu(x)")
    editor = Editor()
    relu = model.graph[0]
    editor.replace_node(relu, model.graph.inputs[0])
    verify(model)
    assert [n.op_type for n in model.graph] == ["Identity"]
    assert model.graph.outputs[0].name == "y"
    assert model.graph.inputs[0].name == "x"


def test_two_outputs_stay_two():
    model = load("y = Relu(x)  z = Relu(x)", "float[2] y, float[2] z")
    editor = Editor()
    first, second = list(model.graph)
    editor.replace_node(second, first.outputs[0])
    verify(model)
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert [n.op_type for n in model.graph] == ["Relu", "Identity"]


def test_erasing_what_is_used_is_refused():
    model = load("a = Relu(x)  y = Exp(a)")
    with pytest.raises(ValueError, match="used"):
        Editor().erase(model.graph[0])


def test_fresh_names_do_not_collide():
    model = load("a = Relu(x)  y = Exp(a)")
    build = Builder(Editor(), model.graph[1])
    names = {build.Neg(model.graph.inputs[0]).name for _ in range(5)}
    assert len(names) == 5
