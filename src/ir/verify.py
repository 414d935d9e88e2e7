"""Structural invariants of a model, as a table of rules; run before and after every pass.

Here: what must hold of any graph edgepass touches (names, definitions before uses, no dangling use,
operator arity and required attributes, opset imports). Not here: shapes and types (`shapes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

from ..errors import Diagnostic, InvalidGraphError
from .graph import ONNX_DOMAINS, RUNTIME_OWN, describe_node, node_subgraphs

Finding = Diagnostic


def verify(model: ir.Model) -> None:
    """Check every rule over the whole model, subgraphs and functions included.

    Raises:
        InvalidGraphError: for the first broken rule, naming the node and the value. The number
            of further findings is in the message.
    """
    findings = []
    for finding in check(model):
        findings.append(finding)
        if len(findings) >= 20:
            break
    if findings:
        first = findings[0]
        more = f" ({len(findings) - 1} more finding(s) follow from it or beside it)"
        raise InvalidGraphError(
            first.what + (more if len(findings) > 1 else ""),
            where=first.where,
            why=first.why,
            fix=first.fix,
        )


def check(model: ir.Model) -> Iterator[Finding]:
    """All findings, lazily, in graph order; none for a sound model."""
    for rule in MODEL_RULES:
        yield from rule(model)
    yield from _check_graph(model.graph, {}, model.opset_imports, model)
    for function in model.functions.values():
        yield from _check_graph(function.graph, {}, function.opset_imports, model)


def _finding(what: str, where: str, why: str, fix: str) -> Finding:
    return Diagnostic(code=InvalidGraphError.code, what=what, where=where, why=why, fix=fix)


def _has_opset(model: ir.Model) -> Iterator[Finding]:
    if not any(d in model.opset_imports for d in ("", "ai.onnx")) and any(
        node.domain in ONNX_DOMAINS for node in model.graph
    ):
        yield _finding(
            "The model imports no version of the standard operator set",
            "model.opset_imports",
            "the meaning of its nodes depends on that version",
            'set `model.opset_imports[""]`',
        )


def _interface_is_named(model: ir.Model) -> Iterator[Finding]:
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        seen: set[str] = set()
        for i, value in enumerate(values):
            if not value.name:
                yield _finding(
                    f"Graph {kind} {i} has no name",
                    f"graph {model.graph.name!r}",
                    "inputs and outputs are addressed by name",
                    "name it",
                )
            elif value.name in seen:
                yield _finding(
                    f"Two graph {kind}s are called {value.name!r}",
                    f"graph {model.graph.name!r}",
                    "inputs and outputs are addressed by name",
                    "rename one; where the values are the same, put an Identity between",
                )
            seen.add(value.name or "")


MODEL_RULES: tuple[Callable[[ir.Model], Iterator[Finding]], ...] = (
    _has_opset,
    _interface_is_named,
)


def _check_graph(
    graph: ir.Graph,
    outer: dict[str, ir.Value],
    opsets: dict[str, int],
    model: ir.Model,
) -> Iterator[Finding]:
    """Names, order and uses of one graph, then of the subgraphs of its nodes.

    `outer` maps the names visible from enclosing graphs to their values; it is extended in place
    while the graph is walked and cut back at the end, so that the whole check is linear.
    """
    scope = outer
    added: list[str] = []
    shadowed: list[tuple[str, ir.Value]] = []

    def define(value: ir.Value, place: str | ir.Node) -> Iterator[Finding]:
        name = value.name
        if name is not None and scope.get(name) is None:
            added.append(name)
            scope[name] = value
            return
        where = place if isinstance(place, str) else describe_node(place)
        if name is None:
            yield _finding(
                "A value has no name", where, "it could not be saved", "name every node output"
            )
            return
        present = scope.get(name)
        if present is value:
            return
        yield _finding(
            f"Two values are called {name!r}",
            where,
            "a use of that name would be ambiguous",
            "give values unique names, over subgraphs too",
        )
        shadowed.append((name, scope[name]))
        scope[name] = value

    for value in graph.inputs:
        yield from define(value, f"input of graph {graph.name!r}")
    for name, value in graph.initializers.items():
        yield from define(value, f"initializer {name!r} of graph {graph.name!r}")
        if value.const_value is None:
            yield _finding(
                f"The initializer {name!r} has neither data nor a stated shape",
                f"graph {graph.name!r}",
                "even a weight without data says its dtype and shape",
                "attach a tensor, or an AbsentTensor for an architecture without weights",
            )
    for node in graph:
        yield from _check_uses(node, scope, graph)
        yield from _check_signature(node, opsets, model)
        for subgraph in node_subgraphs(node):
            yield from _check_graph(subgraph, scope, opsets, model)
        for output in node.outputs:
            if output.name == "":
                continue
            yield from define(output, node)
    for i, value in enumerate(graph.outputs):
        if value.name is not None and scope.get(value.name) is not value:
            yield _finding(
                f"Output {i} ({value.name!r}) of graph {graph.name!r} is produced by nothing",
                f"graph {graph.name!r}",
                "no node, input or initializer in reach defines it",
                "connect the output, or remove it",
            )
    for name in added:
        scope.pop(name, None)
    for name, value in shadowed:
        scope[name] = value


def _check_uses(node: ir.Node, scope: dict[str, ir.Value], graph: ir.Graph) -> Iterator[Finding]:
    for i, value in enumerate(node.inputs):
        if value is None or value.name == "":
            continue
        if value.name is not None and scope.get(value.name) is value:
            continue
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            why = (
                f"it is produced by {producer.op_type} {producer.name!r}, which comes later: "
                "the nodes are out of order or form a cycle"
            )
            fix = "sort the graph; if that fails there is a cycle, which no runtime can execute"
        elif producer is not None and producer.graph is None:
            why = f"its producer {producer.op_type} {producer.name!r} was removed from the graph"
            fix = "replace the uses of a node's outputs before erasing it"
        else:
            why = "no node, input or initializer in reach defines it"
            fix = "add the missing node, input or initializer"
        yield _finding(
            f"Input {i} ({value.name!r}) of {node.op_type} is not defined before its use",
            describe_node(node),
            why,
            fix,
        )


def _check_signature(node: ir.Node, opsets: dict[str, int], model: ir.Model) -> Iterator[Finding]:
    if node.domain not in ONNX_DOMAINS:
        if node.domain not in opsets and node.op_identifier() not in model.functions:
            yield _finding(
                f"The model imports no version of the domain {node.domain!r}",
                describe_node(node),
                "the node's operator belongs to it",
                f"set `model.opset_imports[{node.domain!r}]`",
            )
        return
    version = opsets.get("", opsets.get("ai.onnx", 1))
    signature = _signature(node.op_type, version)
    if signature is None:
        if node.op_identifier() not in model.functions and node.op_type not in RUNTIME_OWN:
            yield _finding(
                f"There is no operator {node.op_type!r} in opset {version}",
                describe_node(node),
                "the standard does not define it at that version",
                "correct the op type, or convert the model to an opset that has it",
            )
        return
    minimum, maximum, required, known = signature
    count = len(node.inputs)
    while count and node.inputs[count - 1] is None:
        count -= 1
    if count < minimum or count > maximum:
        span = f"{minimum}" if minimum == maximum else f"{minimum} to {maximum}"
        yield _finding(
            f"{node.op_type} has {count} inputs",
            describe_node(node),
            f"opset {version} defines it with {span}",
            "correct the node's inputs",
        )
    for name in required:
        if name not in node.attributes:
            yield _finding(
                f"{node.op_type} lacks the attribute {name!r}",
                describe_node(node),
                f"opset {version} requires it",
                "set the attribute",
            )
    for name in node.attributes:
        if name not in known:
            yield _finding(
                f"{node.op_type} has an attribute {name!r} that it does not know",
                describe_node(node),
                f"opset {version} defines: {', '.join(sorted(known)) or 'none'}",
                "remove the attribute, or convert the node from the opset that has it",
            )


@functools.lru_cache(maxsize=4096)
def _signature(
    op_type: str, version: int
) -> tuple[int, int, tuple[str, ...], frozenset[str]] | None:
    """(least inputs, most inputs, required attributes, known attributes) by `onnx.defs`."""
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    required = tuple(sorted(n for n, a in schema.attributes.items() if a.required))
    return schema.min_input, schema.max_input, required, frozenset(schema.attributes)


Signature = tuple[tuple[str | None, ir.DataType | None, tuple[object, ...] | None], ...]


def interface(values: Iterable[ir.Value]) -> Signature:
    """Name, dtype and dimensions of each value, as plain data that survives in-place edits."""
    return tuple((v.name, v.dtype, None if v.shape is None else v.shape.dims) for v in values)


def interface_difference(kind: str, old: Signature, new: Signature) -> str:
    """How two signatures differ, or ''. A shape that became better known is no difference."""
    if [o[0] for o in old] != [n[0] for n in new]:
        return f"the {kind}s were {[o[0] for o in old]} and are {[n[0] for n in new]}"
    for (name, old_dtype, old_dims), (_, new_dtype, new_dims) in zip(old, new, strict=True):
        if old_dtype is not None and old_dtype != new_dtype:
            return f"{kind} {name!r} was {old_dtype} and is {new_dtype}"
        if old_dims is None:
            continue
        if new_dims is None or len(old_dims) != len(new_dims):
            return f"{kind} {name!r} had shape {old_dims} and has {new_dims}"
        for a, b in zip(old_dims, new_dims, strict=True):
            if isinstance(a, int) and a != b:
                return f"{kind} {name!r} had shape {old_dims} and has {new_dims}"
    return ""
