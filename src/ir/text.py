"""The stable text form of a graph, for `edgepass show`, goldens, differences and messages.

Here: `format_model` (the same model gives the same text on every machine) and `diff_models`. Long
constants are shown by dtype, shape and a hash. Not here: reading text back (`onnx_ir` does).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import ONNX_DOMAINS, constant_tensor, describe_value, is_absent, source_line

_SHORT = 8


def format_model(model: ir.Model, *, sources: bool = False) -> str:
    """The whole model as text: opsets, interface, initializers, nodes, functions.

    `sources` adds the user's source line to each node that has one.
    """
    opsets = sorted(model.opset_imports.items())
    lines = ["opset " + ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in opsets)]
    lines += _format_graph(model.graph, "", sources, "graph")
    for function in model.functions.values():
        lines.append("")
        title = f"function {function.domain}.{function.name}"
        lines += _format_graph(function.graph, "", sources, title)
    return "\n".join(lines) + "\n"


def format_node(node: ir.Node) -> str:
    """One node on one line, constants inline where short."""
    domain = "" if node.domain in ONNX_DOMAINS else f"{node.domain}."
    outputs = ", ".join(describe_value(v) for v in node.outputs)
    inputs = ", ".join(_operand(v) for v in node.inputs)
    attributes = ", ".join(
        f"{a.name}={_attribute(a)}"
        for a in sorted(node.attributes.values(), key=lambda a: a.name)
        if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or a.is_ref()
    )
    braces = f"{{{attributes}}}" if attributes else ""
    return f"{outputs} = {domain}{node.op_type}{braces}({inputs})"


def diff_models(before: ir.Model, after: ir.Model, *, context: int = 2) -> str:
    """A unified difference of the two text forms; '' when they are equal."""
    return "\n".join(
        difflib.unified_diff(
            format_model(before).splitlines(),
            format_model(after).splitlines(),
            "before",
            "after",
            lineterm="",
            n=context,
        )
    )


def _format_graph(graph: ir.Graph, indent: str, sources: bool, title: str) -> Iterator[str]:
    yield f"{indent}{title} {graph.name or ''}".rstrip()
    inner = indent + "  "
    for value in graph.inputs:
        yield f"{inner}input {describe_value(value)}"
    for name in sorted(graph.initializers):
        value = graph.initializers[name]
        yield f"{inner}weight {describe_value(value)} = {_tensor(value.const_value)}"
    for node in graph:
        line = source_line(node) if sources else ""
        yield f"{inner}{format_node(node)}{f'  # {line}' if line else ''}"
        for attribute in sorted(node.attributes.values(), key=lambda a: a.name):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _format_graph(
                    attribute.as_graph(), inner + "  ", sources, attribute.name
                )
            elif attribute.type == ir.AttributeType.GRAPHS:
                for i, sub in enumerate(attribute.as_graphs()):
                    yield from _format_graph(sub, inner + "  ", sources, f"{attribute.name}[{i}]")
    for value in graph.outputs:
        yield f"{inner}output {describe_value(value)}"


def _operand(value: ir.Value | None) -> str:
    if value is None:
        return "_"
    tensor = constant_tensor(value)
    if tensor is not None and not is_absent(tensor) and tensor.size == 1 and len(tensor.shape) == 0:
        return f"{value.name}={_tensor(tensor)}"
    return str(value.name)


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    value: Any = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor(value)
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
        return f"[{', '.join(_number(v) for v in value)}]"
    if isinstance(value, float):
        return _number(value)
    return repr(value) if isinstance(value, str) else str(value)


def _tensor(tensor: ir.TensorProtocol | None) -> str:
    if tensor is None:
        return "?"
    if is_absent(tensor):
        return "absent"
    if tensor.size <= _SHORT:
        values = np.asarray(tensor.numpy()).reshape(-1).tolist()
        text = ", ".join(_number(v) for v in values)
        return text if len(tensor.shape) == 0 else f"[{text}]"
    digest = hashlib.sha256(tensor.tobytes()).hexdigest()[:12]
    return f"sha256:{digest}"


def _number(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
