"""Making a graph legal for its target: opset, IR version, dtypes.

Here: `Legalize`, which either makes every node one that the target runs or raises. Not here: which
nodes those are (`targets.support`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ..errors import UnsupportedOpError, UsageError
from ..ir.edit import Builder, Editor
from ..ir.graph import describe_node, graph_tree, has_subgraphs, opset_of
from ..targets.support import Support
from ..targets.target import No, Runtime, Target
from .base import Context, Pass, PassResult, Stage

_MAX_IR_VERSION = 13
"""The newest ONNX IR version that nothing of ours needs more than; every runtime named takes it."""

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Legalize(Pass):
    """Makes the graph legal for the target: its opset, its IR version, and the dtypes of each node.

    A node that the target runs in float32 but not in half precision gets Casts around it. A
    node that it runs in no way is an error that names it.

        Sin(x: bfloat16)   ->   Cast(Sin(Cast(x, float32)), bfloat16)
    """

    stage: ClassVar[Stage] = Stage.LEGALIZE
    idempotent: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        target = context.target
        if target is None:
            raise UsageError(
                "legalize needs a target",
                where="Context.target",
                fix="run it through compile(model, target=...), or give Context(target=...)",
            )
        notes = []
        opset = opset_of(model)
        if opset > target.opset:
            raise UnsupportedOpError(
                f"The model is of opset {opset}; {target.name} takes up to {target.opset}",
                where=f"model {model.graph.name!r}",
                why=f"{target.runtime} does not know the operators of that version",
                fix=f"export the model with opset {target.opset}",
            )
        if model.ir_version > _MAX_IR_VERSION:
            notes.append(f"IR version {model.ir_version} to {_MAX_IR_VERSION}")
            model.ir_version = _MAX_IR_VERSION
        wrapped = _wrap_half(model, target) if target.runtime is Runtime.ONNXRUNTIME else 0
        if wrapped:
            notes.append(f"{wrapped} nodes run in float32 between casts")
        return PassResult(model, bool(notes), tuple(notes))


def _wrap_half(model: ir.Model, target: Target) -> int:
    editor = Editor()
    support = Support(target, model)
    wrapped = 0
    for graph in graph_tree(model.graph):
        for node in list(graph):
            answer = support.of(node)
            if not isinstance(answer, No):
                continue
            if has_subgraphs(node) or not any(
                v is not None and v.dtype in _HALF for v in (*node.inputs, *node.outputs)
            ):
                raise UnsupportedOpError(
                    f"{target.name} can't run {node.op_type}",
                    where=describe_node(node),
                    why=answer.reason,
                    fix="choose another target or runtime, or a custom pass that rewrites the node",
                )
            _in_float32(node, editor)
            wrapped += 1
    return wrapped


def _in_float32(node: ir.Node, editor: Editor) -> None:
    """Casts around one node: half inputs to float32 before, float32 results back after."""
    build = Builder(editor, node)
    for i, value in enumerate(node.inputs):
        if value is not None and value.dtype in _HALF:
            wide = build.Cast(value, to=int(ir.DataType.FLOAT))
            wide.dtype, wide.shape = ir.DataType.FLOAT, value.shape
            editor.replace_input(node, i, wide)
    for value in list(node.outputs):
        dtype = value.dtype
        if dtype not in _HALF or dtype is None:
            continue
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], num_outputs=1)
        editor.insert_after(node, cast)
        narrow = cast.outputs[0]
        narrow.dtype, narrow.shape = dtype, value.shape
        for user, index in list(value.uses()):
            if user is not cast:
                editor.replace_input(user, index, narrow)
        if value.is_graph_output() and (graph := value.graph) is not None:
            name = value.name
            value.name, narrow.name = f"{name}/float32", name
            for i, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[i] = narrow
        value.dtype = ir.DataType.FLOAT
