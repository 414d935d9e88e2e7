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
from .blocks import CONVOLUTION, POOLING, Block


def remove_blocks(model: ir.Model, blocks: Sequence[Block]) -> list[tuple[ir.Node, int]]:
    """Remove blocks that `find_blocks` found in this model, in place, and what only they needed.

        Add(x, f(x))  ->  Identity(x)

    Returns the Identities, in graph order, each with the axis of its channels. They have the sums'
    names: values of the same name hold what the rest of the model is to get, with and without the
    blocks. An Identity that is read by another only is left out.
    """
    cuts: dict[ir.Node, set[int]] = {}
    axes = {block.add: _channel_axis(block) for block in blocks}
    for block in blocks:
        ((user, slot),) = block.branch.uses()
        cuts.setdefault(user, set()).add(slot)
    editor = Editor()
    places = {}
    for node in list(model.graph):
        if node not in cuts:
            continue
        rest = [v for i, v in enumerate(node.inputs) if i not in cuts[node] and v is not None]
        if not rest:  # a term of a longer sum
            for user, slot in node.outputs[0].uses():
                cuts.setdefault(user, set()).add(slot)
                axes.setdefault(user, axes[node])
            continue
        op_type = "Identity" if len(rest) == 1 else "Sum"
        place = editor.insert_before(node, ir.Node("", op_type, rest, num_outputs=1))
        name = node.outputs[0].name
        editor.replace_node(node, place.outputs[0])
        place.outputs[0].name = name
        if op_type == "Identity":
            places[place] = axes[node]
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
