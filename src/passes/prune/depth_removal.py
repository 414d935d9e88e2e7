"""Taking residual blocks out of a graph.

Here: `remove_blocks`, which leaves a place where each sum was, and `close_places`. Not here: which
blocks (`depth_choice`), what is put in their place (`depth_repair`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ...ir.edit import Editor
from ..base import Context
from ..cleanup.dead_code import DeadCode
from .depth_blocks import CONVOLUTION, POOLING, Block


def remove_blocks(model: ir.Model, blocks: Sequence[Block]) -> list[tuple[ir.Node, int]]:
    """Remove blocks that `find_blocks` found in this model, in place, and what only they needed.

        Add(x, f(x))  ->  Identity(x)

    Returns the Identities, in graph order, each with the axis of its channels. They have the sums'
    names: values of the same name hold what the rest of the model is to get, with and without the
    blocks. An Identity that is read by another only is left out.
    """
    editor = Editor()
    places = {}
    for block in blocks:
        uses = list(block.branch.uses())
        if len(uses) != 1 or uses[0].node.graph is None:
            continue  # it lay within a block that is gone
        user, slot = uses[0].node, uses[0].idx
        rest = [v for i, v in enumerate(user.inputs) if i != slot and v is not None]
        op_type = "Identity" if len(rest) == 1 else "Sum"
        place = editor.insert_before(user, ir.Node("", op_type, rest, num_outputs=1))
        name = user.outputs[0].name
        editor.replace_node(user, place.outputs[0])
        place.outputs[0].name = name
        if op_type == "Identity":
            places[place] = _channel_axis(block)
        _sweep(block.branch)
    DeadCode().run(model, Context())
    left = [(node, places[node]) for node in model.graph if node in places]
    last = [(node, axis) for node, axis in left if not _read_by_place_only(node, places)]
    close_places([node for node, _ in left if node not in {kept for kept, _ in last}])
    return last


def close_places(places: Sequence[ir.Node]) -> None:
    """Let what an Identity passes on take its place, and its name where it may."""
    editor = Editor()
    for place in places:
        value, name = place.inputs[0], place.outputs[0].name
        assert value is not None
        is_output = place.outputs[0].is_graph_output()
        editor.replace_node(place, value)
        producer = value.producer()
        inner = producer is not None and isinstance(producer.graph, ir.Graph)
        if inner and not is_output and not value.is_graph_output():
            value.name = name


def _channel_axis(block: Block) -> int:
    shape = block.result.shape
    convolved = block.kind in (CONVOLUTION, POOLING) and shape is not None and len(shape) > 2
    return 1 if convolved else -1


def _read_by_place_only(node: ir.Node, places: dict[ir.Node, int]) -> bool:
    value = node.outputs[0]
    uses = list(value.uses())
    return not value.is_graph_output() and len(uses) == 1 and uses[0].node in places


def _sweep(value: ir.Value) -> None:
    """Remove what makes a value that nothing uses any more, so that it counts as gone."""
    stack = [value.producer()]
    while stack:
        node = stack.pop()
        if node is None or not isinstance(node.graph, ir.Graph):
            continue
        if any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        inputs = [v for v in node.inputs if v is not None]
        node.graph.remove(node, safe=True)
        stack += [v.producer() for v in inputs]
