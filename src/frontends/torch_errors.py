"""Errors of torch's exporter, said as edgepass says errors: the cause and the user's own line.

Here: finding in an exception chain the deepest frame that is the user's. Not here: exporting.
"""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

from ..errors import ArchitectureError

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_MACHINERY = frozenset(
    ["torch", "torchgen", "sympy", "mpmath", "numpy", "onnx", "onnx_ir", "onnxscript", "optree"]
)
"""Packages whose frames are the exporter at work, never the line to change."""
_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def export_failed(error: Exception, what: str, fix: str, program: Any = None) -> ArchitectureError:
    """The error to raise for `error`, which stays its cause.

    `program` is the ExportedProgram that couldn't be translated: its nodes know their lines.
    """
    where = _user_line(error) or _line_of_operator(error, program)
    return ArchitectureError(what, where=where, why=_reason(error), fix=fix)


def _line_of_operator(error: Exception, program: Any) -> str:
    """The line of the first node whose operator the error names (`aten.linalg_eig`)."""
    named = {name for link in _chain(error) for name in re.findall(r"'([a-z]\w*\.\w+)'", str(link))}
    nodes = () if program is None else program.graph.nodes
    for node in nodes:
        if any(str(node.target).startswith(name) for name in named):
            for path, line, function in reversed(
                _FRAME.findall(node.meta.get("stack_trace") or "")
            ):
                if _is_users(path):
                    code = linecache.getline(path, int(line)).strip()
                    return f"{path}:{line} in {function}: {code}"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _user_line(error: Exception) -> str:
    """`file.py:12 in forward: code`, or '' where no frame is the user's."""
    for link in reversed(list(_chain(error))):
        frames = traceback.extract_tb(link.__traceback__)
        for frame in reversed(frames):
            if _is_users(frame.filename):
                code = f": {frame.line}" if frame.line else ""
                return f"{frame.filename}:{frame.lineno} in {frame.name}{code}"
    for link in _chain(error):
        for path, line, function in reversed(_FRAME.findall(str(link))):
            if _is_users(path):
                return f"{path}:{line} in {function}"
    return ""


def _is_users(path: str) -> bool:
    """Whether a source file is neither torch's, nor Python's, nor ours."""
    if path.startswith("<"):
        return False
    parts = os.path.abspath(path).split(os.sep)
    if "site-packages" in parts and parts[parts.index("site-packages") + 1] in _MACHINERY:
        return False
    standard = sysconfig.get_path("stdlib")
    in_standard = path.startswith(standard) and "site-packages" not in parts
    return not in_standard and not os.path.abspath(path).startswith(_OWN_FOLDER + os.sep)


def _reason(error: Exception) -> str:
    """The beginning of the innermost error's text."""
    for link in reversed(list(_chain(error))):
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(link))
        lines = [line.strip(" -\t") for line in text.splitlines() if line.strip(" -\t")]
        if lines:
            return f"{type(link).__name__}: {' '.join(lines[:3])[:500]}"
    return type(error).__name__
