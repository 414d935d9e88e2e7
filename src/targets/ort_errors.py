"""ONNX Runtime's exceptions as errors of edgepass, with the node its message names.

Here: `translate`. The messages are matched as text (seen with 1.32); what matches nothing becomes a
`LoweringError` with the message as its reason.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from ..errors import (
    EdgepassError,
    LoweringError,
    ModelFileError,
    UnsafePathError,
    UnsupportedOpError,
)
from ..ir.graph import all_nodes, describe_node

_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ")
_SOURCE_FILE = re.compile(r"/onnxruntime_src/\S+?:\d+ .*?\) (?=[A-Z\"])")
_NODE_NAMES = (
    re.compile(r"node with name '([^']+)'"),
    re.compile(r"In Node, \(\"([^\"]+)\""),
    re.compile(r"Name:'([^']+)'"),
    re.compile(r"Node ?\(([^()\s]+)\)"),
    re.compile(r"same node name \(([^)]+)\)"),
    re.compile(r"\bnode:\s*'?([^\s',()]+)", re.IGNORECASE),
)


def translate(error: Exception, model: ir.Model | None, what: str) -> EdgepassError:
    """ONNX Runtime's exception as one of ours, the node described where its message names one."""
    text = str(error)
    status = match.group(1) if (match := _STATUS.match(text)) else ""
    why = _SOURCE_FILE.sub("", _STATUS.sub("", text)).strip()
    where = _where(text, model)
    if status == "NOT_IMPLEMENTED" or "No Op registered for" in text:
        return UnsupportedOpError(
            f"ONNX Runtime has no kernel for {_operator(text) or 'an operator'}",
            where=where,
            why=why,
            fix="replace the operator, or change its dtype or opset to one that has a kernel "
            "(`edgepass explain` and the placement table list them)",
        )
    if status in ("INVALID_PROTOBUF", "NO_MODEL", "NO_SUCHFILE"):
        return ModelFileError("The file is not a readable ONNX model", where=where, why=why)
    if "escapes model directory" in text:
        return UnsafePathError(
            "The model's external data lies outside its folder",
            why=why,
            fix="put the data file beside the model; do not trust a model that reads elsewhere",
        )
    return LoweringError(what, where=where, why=why)


def _operator(text: str) -> str:
    for pattern in (r"implementation for (\S+)\(", r"No Op registered for (\S+)"):
        if match := re.search(pattern, text):
            return match.group(1)
    return ""


def _where(text: str, model: ir.Model | None) -> str:
    candidates = [match.group(1) for regex in _NODE_NAMES if (match := regex.search(text))]
    if model is not None:
        named = {node.name: node for node in all_nodes(model) if node.name}
        for name in candidates:
            if name in named:
                return describe_node(named[name])
        return ""
    return f"node {candidates[0]!r}" if candidates else ""
