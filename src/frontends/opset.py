"""Brings a model of any standard opset from 6 up to one that the passes are written for.

Here: which nodes need work, in which order, in the main graph, in subgraphs and in functions.
Not here: how each operator changed (`opset_adapters`); nodes of other domains, which pass
through untouched.

Why not `onnx.version_converter`: measured with onnx 1.23, it drops local functions and metadata,
and it serializes the model, weights included. In place on the graph none of that arises, and
absent weights don't matter.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from ..errors import InvalidGraphError, UnsupportedOpError, UsageError
from ..ir.graph import (
    ONNX_DOMAINS,
    all_nodes,
    describe_node,
    graphs,
    index_names,
    is_absent,
    opset_of,
)
from .opset_adapters import ADAPTERS, NEWEST_CONVERTIBLE, TYPE_DEPENDENT, WIDENED
from .opset_editor import NodeEditor

WORKING_OPSET = 18
"""The oldest opset passes see: from here on reductions, Squeeze and Split take axes as inputs."""

OLDEST_OPSET = 6
"""Promised is 7; 6 costs little, and the ONNX test suite has many models of it."""

_IR_VERSION_OF_OPSET = {18: 8, 19: 9, 20: 9, 21: 10}


def to_supported_opset(model: ir.Model, minimum: int = WORKING_OPSET) -> list[str]:
    """Convert the model in place to opset `minimum` unless it's there already; return notes.

    Inputs, outputs, names, metadata and nodes of other domains stay. A function whose body
    needs a rewrite that depends on the function's own parameters is inlined first.
    Raises `UnsupportedOpError` for a node without conversion or an opset outside 6..newest.
    """
    if not WORKING_OPSET <= minimum <= NEWEST_CONVERTIBLE:
        raise UsageError(
            f"Can't convert to opset {minimum}",
            why=f"conversion reaches opsets {WORKING_OPSET} to {NEWEST_CONVERTIBLE}",
        )
    _normalize_domain(model)
    current = _checked_opset(model, minimum)
    target = max(min(current, NEWEST_CONVERTIBLE), minimum)
    stale = [f for f in model.functions.values() if _function_opset(f, current) < target]
    if current >= minimum and not any(_function_opset(f, current) < minimum for f in stale):
        return []
    notes: list[str] = []
    same_opset = all(_function_opset(f, current) == current for f in model.functions.values())
    if same_opset and any(_needs_parameter(f, current, target) for f in stale):
        ir_passes.InlinePass()(model)
        notes.append("local functions inlined: their opset conversion depends on parameters")
    return [_convert(model, current, target), *notes]


def _convert(model: ir.Model, current: int, target: int) -> str:
    """Rewrite every node that needs it and set the new versions; one line that says so."""
    index_names(model)
    inferred = _inferred_values(model) if current < 7 or _needs_types(model) else {}
    editor = NodeEditor(model, inferred.get, target)
    rewritten: Counter[str] = Counter()
    versions = [current]
    for scope, version in _scopes(model, current):
        versions.append(version)
        # the list is taken first: nodes that adapters insert are of the target version already
        for graph in list(scope):
            for node in list(graph):
                if node.domain in ONNX_DOMAINS and version < target:
                    _convert_node(editor, node, version, target, rewritten)
    for function in model.functions.values():
        if _function_opset(function, current) < target:
            function.opset_imports[""] = target
    model.graph.opset_imports[""] = max(current, target)
    model.ir_version = max(model.ir_version or 0, _IR_VERSION_OF_OPSET[target])
    detail = ", ".join(f"{count} {op}" for op, count in sorted(rewritten.items()) if count)
    return f"opset {min(versions)} -> {target}" + (f": rewrote {detail}" if detail else "")


def _scopes(model: ir.Model, current: int) -> Iterator[tuple[list[ir.Graph], int]]:
    """(a graph with all those under it, the opset of its nodes), main graph first."""
    yield [model.graph, *model.graph.subgraphs()], current
    for function in model.functions.values():
        yield (
            [function.graph, *function.graph.subgraphs()],
            _function_opset(function, current),
        )


def _convert_node(
    editor: NodeEditor, node: ir.Node, version: int, target: int, rewritten: Counter[str]
) -> None:
    original, changed = node.op_type, False
    while True:
        later = [v for v in _changes(node.op_type) if version < v <= target]
        if not later:
            break
        version = later[0]
        adapter = ADAPTERS.get((node.op_type, version))
        if adapter is not None:
            adapter(editor, node)
            changed = True
        elif version not in WIDENED.get(node.op_type, ()):
            editor.refuse(node, f"{node.op_type} changed in opset {version}")
    rewritten[original] += changed


@functools.cache
def _history() -> dict[str, list[int]]:
    """Every standard operator -> the opsets in which it was introduced or changed, ascending."""
    history: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, set()).add(schema.since_version)
    return {name: sorted(versions) for name, versions in history.items()}


def _changes(op_type: str) -> list[int]:
    """The opsets that changed an operator, its introduction not counted."""
    return _history().get(op_type, [])[1:]


def _function_opset(function: ir.Function, model_opset: int) -> int:
    return function.opset_imports.get("", function.opset_imports.get("ai.onnx", model_opset))


def _needs_parameter(function: ir.Function, version: int, target: int) -> bool:
    """Whether a node that must be rewritten takes an attribute from the function's parameters."""
    nodes = [function.graph, *function.graph.subgraphs()]
    return any(
        node.domain in ONNX_DOMAINS
        and any(attribute.is_ref() for attribute in node.attributes.values())
        and any((node.op_type, v) in ADAPTERS for v in range(version + 1, target + 1))
        for graph in nodes
        for node in graph
    )


def _normalize_domain(model: ir.Model) -> None:
    """`ai.onnx` is another spelling of the standard domain: write it as the empty one."""
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    if not any("ai.onnx" in owner.opset_imports for owner in owners):
        return
    for owner in owners:
        version = owner.opset_imports.pop("ai.onnx", None)
        if version is not None:
            owner.opset_imports[""] = max(version, owner.opset_imports.get("", 0))
    for node in all_nodes(model):
        if node.domain == "ai.onnx":
            node.domain = ""


def _checked_opset(model: ir.Model, minimum: int) -> int:
    current = opset_of(model)
    if current == 0:
        first = next((n for n in all_nodes(model) if n.domain in ONNX_DOMAINS), None)
        if first is not None:
            raise InvalidGraphError(
                "The model imports no version of the standard operators but uses them",
                where=describe_node(first),
                fix="export the model again; its `opset_import` is incomplete",
            )
        model.graph.opset_imports[""] = minimum  # so that passes may add standard nodes
        return minimum
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= current <= newest:
        first = next((n for n in all_nodes(model) if n.domain in ONNX_DOMAINS), None)
        raise UnsupportedOpError(
            f"The model is of opset {current}",
            where=describe_node(first) if first is not None else "",
            why=f"opsets {OLDEST_OPSET} to {newest} (the newest of the installed onnx) are read",
            fix="export the model again with opset 18 or newer",
        )
    return current


def _needs_types(model: ir.Model) -> bool:
    """Whether an adapter will ask for a type or shape that the model doesn't state."""
    return any(
        node.op_type in TYPE_DEPENDENT
        and (value := node.inputs[0]) is not None
        and (value.dtype is None or value.shape is None)
        for node in all_nodes(model)
        if node.domain in ONNX_DOMAINS and node.inputs
    )


def _inferred_values(model: ir.Model) -> dict[str, ir.Value]:
    """Types and shapes by value name, from inference on a copy; empty where that fails."""
    scratch = model.clone()  # inference writes shapes, over those of the interface too
    for graph in graphs(scratch):
        for value in graph.initializers.values():
            if is_absent(value.const_value):
                value.const_value = None
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        ir_passes.ShapeInferencePass(check_type=False, strict_mode=False)(scratch)
    except Exception:  # whatever it is, the adapters have forms that need no shapes
        return {}
    finally:
        logger.setLevel(level)
    return {
        value.name: value
        for graph in graphs(scratch)
        for node in graph
        for value in node.outputs
        if value.name
    }
