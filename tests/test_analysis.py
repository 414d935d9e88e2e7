"""Order, liveness, critical path, cycles, partition."""

import onnx_ir as ir
import pytest

from edgepass.ir.analysis import critical_path, find_cycle, live_bytes, partition, to_networkx
from edgepass.ir.shapes import infer_shapes

DIAMOND = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[4] x) => (float[4] y)
{ a = Relu(x)  b = Exp(a)  c = Neg(a)  d = Sin(c)  y = Add(b, d) }
"""


@pytest.fixture
def graph():
    model = ir.from_onnx_text(DIAMOND)
    infer_shapes(model)
    return model.graph


def ops(nodes):
    return [n.op_type for n in nodes]


def test_edges_follow_values_into_subgraphs(graph):
    assert sorted(to_networkx(graph).edges) == [(0, 1), (0, 2), (1, 4), (2, 3), (3, 4)]
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
    assert list(to_networkx(model.graph).edges) == [(0, 1)]


def test_the_critical_path_is_the_heaviest_chain(graph):
    assert ops(critical_path(graph, lambda node: 1)) == ["Relu", "Neg", "Sin", "Add"]
    heavy = critical_path(graph, lambda node: 5 if node.op_type == "Exp" else 1)
    assert ops(heavy) == ["Relu", "Exp", "Add"]


def test_live_bytes(graph):
    # 16 bytes a value: x and a; a and b; a, b, c; b, c, d; b, d, y
    assert live_bytes(graph, lambda value: 16) == [32, 32, 48, 48, 48]


def test_a_cycle_is_found():
    a = ir.Value(name="a")
    b = ir.Value(name="b")
    nodes = [ir.Node("", "Relu", [b], outputs=[a]), ir.Node("", "Exp", [a], outputs=[b])]
    graph = ir.Graph([], [b], nodes=nodes, opset_imports={"": 18})
    assert sorted(ops(find_cycle(graph))) == ["Exp", "Relu"]


def test_an_acyclic_graph_has_no_cycle(graph):
    assert find_cycle(graph) == []


def test_a_partition_never_encloses_what_is_left_out(graph):
    # Neg is unsupported: Relu and Exp may go together, but not with Add, which waits for Neg
    parts = [ops(part) for part in partition(graph, lambda node: node.op_type != "Neg")]
    assert sorted(map(sorted, parts)) == [["Add", "Sin"], ["Exp", "Relu"]]


def test_everything_supported_is_one_part(graph):
    assert len(partition(graph, lambda node: True)) == 1
