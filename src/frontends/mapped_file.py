"""An ONNX file read without its weights: they stay on disk and are mapped when first read.

Here: taking the raw data of initializers out of the message. Not here: parsing (`onnx`).
A file of one GB is read in milliseconds, and no weight takes memory before something needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..ir import wire_format as wire
from ..ir.mapped import MappedFile, MappedTensor

MINIMUM_BYTES = 4096
"""Smaller tensors are read: shape inference wants some, and a page is mapped as a whole."""

_PLAIN = frozenset("biuf")


def without_weights(path: Path) -> tuple[bytes, Mapping[str, MappedTensor]] | None:
    """The file's message without big raw data, and that data as read-only maps by tensor name.

    None where the file isn't written in the usual way (a graph in two pieces, a name twice);
    the caller then reads it whole. The tensors show the file as it is when they are read.
    """
    file = MappedFile.open(path)
    content = memoryview(file.map)
    tensors: dict[str, MappedTensor] = {}
    try:
        top = list(wire.fields(content, 0, len(content)))
        graphs = [f for f in top if f.number == wire.MODEL_GRAPH]
        if len(graphs) != 1:
            return None
        graph = graphs[0]
        kept = bytearray()
        copied = graph.start
        for field in wire.fields(content, graph.start, graph.end):
            if field.number != wire.GRAPH_INITIALIZER or field.end - field.start < MINIMUM_BYTES:
                continue
            found = _tensor(content, field)
            if found is None:
                continue
            name, array, offset, rest = found
            if name in tensors:
                return None
            tensors[name] = MappedTensor(array, name=name, file=file, offset=offset)
            kept += content[copied : field.tag]
            kept += wire.bytes_field(wire.GRAPH_INITIALIZER, len(rest)) + rest
            copied = field.end
        kept += content[copied : graph.end]
    except (ValueError, IndexError):
        return None  # damaged: the ordinary way says how
    head = bytes(content[: graph.tag]) + wire.bytes_field(wire.MODEL_GRAPH, len(kept))
    return head + bytes(kept) + bytes(content[graph.end :]), tensors


def _tensor(content: memoryview, field: wire.Field) -> tuple[str, np.ndarray, int, bytes] | None:
    """Name, data, its offset, and the message without it, of an initializer; None if it stays."""
    raw = None
    rest = bytearray()
    for inner in wire.fields(content, field.start, field.end):
        if inner.number != wire.TENSOR_RAW_DATA:
            rest += content[inner.tag : inner.end]
        elif raw is not None:
            return None
        else:
            raw = inner
    if raw is None or raw.end - raw.start < MINIMUM_BYTES:
        return None
    tensor = onnx.TensorProto.FromString(bytes(rest))
    try:
        dtype = ir.DataType(tensor.data_type).numpy()
    except (TypeError, ValueError):
        return None
    size = math.prod(tensor.dims) * dtype.itemsize
    if dtype.kind not in _PLAIN or size != raw.end - raw.start or not tensor.name:
        return None
    array = np.frombuffer(content[raw.start : raw.end], dtype).reshape(tuple(tensor.dims))
    return tensor.name, array, raw.start, bytes(rest)
