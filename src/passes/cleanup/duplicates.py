"""Common subexpressions and equal initializers, kept once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable
from typing import ClassVar

import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import ONNX_DOMAINS, graphs, is_absent, node_subgraphs
from ...ir.match import COMMUTATIVE
from ...ir.ops import is_deterministic, is_pure
from ..base import Context, Pass, PassResult, Stage

_PREFIX_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Duplicates(Pass):
    """Keeps one of several equal computations, and one of several equal initializers.

    The operands of an operator that commutes may come in any order. Only deterministic operators
    without subgraphs are merged. A subgraph may reuse what its outer graph has computed before it.

        a = Exp(x); b = Exp(x); return a + b   ->   a = Exp(x); return a + a
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        editor = Editor()
        weights = sum(_merge_initializers(graph, editor) for graph in graphs(model))
        nodes = _merge_nodes(model.graph, {}, editor, model)
        for function in model.functions.values():
            nodes += _merge_nodes(function.graph, {}, editor, model)
        found = ((nodes, "nodes"), (weights, "initializers"))
        notes = tuple(f"merged {count} {what}" for count, what in found if count)
        return PassResult(model, bool(notes), notes)


def _merge_nodes(
    graph: ir.Graph, seen: dict[Hashable, ir.Node], editor: Editor, model: ir.Model
) -> int:
    merged = 0
    added: list[Hashable] = []
    for node in graph:
        for subgraph in node_subgraphs(node):
            merged += _merge_nodes(subgraph, seen, editor, model)
        key = _key(node, model)
        if key is None:
            continue
        first = seen.get(key)
        if first is None:
            seen[key] = node
            added.append(key)
        elif _can_merge(first, node, editor):
            editor.replace_node(node, *first.outputs)
            merged += 1
    for key in added:
        del seen[key]
    return merged


def _can_merge(first: ir.Node, node: ir.Node, editor: Editor) -> bool:
    return all(
        editor.can_replace(old, new)
        # two graph outputs stay two: an Identity in place of the node would gain nothing
        and not (old.is_graph_output() and (new.is_graph_output() or first.graph is not node.graph))
        and (not old.uses() or new.name != "")
        for old, new in zip(node.outputs, first.outputs, strict=True)
    )


def _key(node: ir.Node, model: ir.Model) -> Hashable | None:
    if not node.outputs or not is_pure(node) or not is_deterministic(node):
        return None
    if node.op_identifier() in model.functions:
        return None
    attributes = []
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        text = _attribute_key(attribute)
        if text is None:
            return None
        attributes.append((name, text))
    inputs = [id(v) for v in node.inputs]
    if node.op_type in COMMUTATIVE and node.domain in ONNX_DOMAINS:
        inputs.sort()
    return (
        node.op_identifier(),
        tuple(inputs),
        tuple(attributes),
        tuple(bool(v.name) for v in node.outputs),
    )


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    if attribute.is_ref():
        return ("ref", attribute.ref_attr_name)
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return None
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        if is_absent(value) or value.dtype == ir.DataType.STRING:
            return None
        return (value.dtype, tuple(value.shape), hashlib.sha256(value.tobytes()).digest())
    if isinstance(value, int | float | str):
        return (attribute.type, repr(value))
    if isinstance(value, tuple | list) and all(isinstance(v, int | float | str) for v in value):
        return (attribute.type, repr(tuple(value)))
    return None


def _merge_initializers(graph: ir.Graph, editor: Editor) -> int:
    """Equal dtype, shape and bytes. Data is read only where dtype and shape coincide, and in full
    only where the first bytes do too."""
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is None
            or is_absent(tensor)
            or value.is_graph_input()
            or value.is_graph_output()
            or tensor.dtype == ir.DataType.STRING
        ):
            continue
        groups.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    merged = 0
    for values in groups.values():
        for same in _split(values, prefix=True) if len(values) > 1 else ():
            for equal in _split(same, prefix=False) if len(same) > 1 else ():
                for extra in equal[1:]:
                    editor.replace_value(extra, equal[0])
                    assert extra.name is not None
                    del graph.initializers[extra.name]
                    merged += 1
    return merged


def _split(values: list[ir.Value], *, prefix: bool) -> list[list[ir.Value]]:
    groups: dict[bytes, list[ir.Value]] = {}
    for value in values:
        tensor = value.const_value
        assert tensor is not None
        if prefix:
            array = tensor.numpy()
            step = array.reshape(-1)[: max(1, _PREFIX_BYTES // max(1, array.itemsize))]
            data = step.tobytes()
        else:
            data = tensor.tobytes()
        groups.setdefault(hashlib.sha256(data).digest(), []).append(value)
    return list(groups.values())
