"""Making `.ort` files byte-reproducible: one table in them is written in hash-map order.

Here: `canonicalize`. Not here: writing the file, which ONNX Runtime does (`onnxruntime.emit`).
The file is a flatbuffer. Its root has three fields: version, model, and for builds without operator
schemas a table from operator to its type constraints, taken from an unordered map: seen with
1.32, two runs differ there and nowhere else. That table is rebuilt in sorted order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

_IDENTIFIER = b"ORTM"
_RESOLVER_FIELD = 3

Arguments = list[tuple[int, int]]
"""(kind: input or output, index) of each argument under a type constraint."""
Resolver = dict[bytes, dict[bytes, Arguments]]
"""Operator -> type constraint -> arguments."""


def canonicalize(data: bytes) -> bytes:
    """The same model with its operator table sorted, appended; the old one is zeroed.

    Data that is not in the form expected is returned as it is.
    """
    if data[4:8] != _IDENTIFIER:
        return data
    reader = _Reader(data)
    root = reader.reference(0)
    field = reader.field(root, _RESOLVER_FIELD)
    if field is None:
        return data
    resolver = reader.resolver(reader.reference(field))
    start, end = reader.extent(above=root)
    table, blob = _build(resolver)
    patched = bytearray(data)
    patched[start:end] = bytes(end - start)
    patched += bytes(-len(patched) % 16)
    struct.pack_into("<I", patched, field, len(patched) + table - field)
    return bytes(patched + blob)


class _Reader:
    """Reads the table and remembers what bytes it and its parts occupy."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._seen: list[tuple[int, int]] = []
        self._layouts: list[tuple[int, int]] = []

    def resolver(self, table: int) -> Resolver:
        self._visit_table(table)
        found: Resolver = {}
        for entry in self._tables(self.field(table, 0)):
            name = self._string(self.field(entry, 0))
            found[name] = {
                self._string(self.field(item, 0)): [
                    (self._byte(self.field(a, 0)), self._number(self.field(a, 1)))
                    for a in self._tables(self.field(item, 1))
                ]
                for item in self._tables(self.field(entry, 1))
            }
        return found

    def extent(self, above: int) -> tuple[int, int]:
        """First and last byte of all that was read; it lies together, after the root table."""
        end = max(end for _, end in self._seen)
        root_end = above + self._layout(above)[1]
        layouts = [span for span in self._layouts if root_end <= span[0] < end]
        return min(start for start, _ in (*self._seen, *layouts)), end

    def reference(self, position: int) -> int:
        return position + self._number(position)

    def field(self, table: int, index: int) -> int | None:
        """Where a field of a table is; None when it has its default."""
        layout, _ = self._layout(table)
        if 4 + 2 * index >= self._short(layout):
            return None
        offset = self._short(layout + 4 + 2 * index)
        return table + offset if offset else None

    def _layout(self, table: int) -> tuple[int, int]:
        """The position of a table's layout, and the table's own size."""
        layout = table - int(struct.unpack_from("<i", self._data, table)[0])
        return layout, self._short(layout + 2)

    def _visit_table(self, table: int) -> None:
        layout, size = self._layout(table)
        self._seen.append((table, table + size))
        self._layouts.append((layout, layout + self._short(layout)))

    def _tables(self, field: int | None) -> Iterator[int]:
        if field is None:
            return
        vector = self.reference(field)
        count = self._number(vector)
        self._seen.append((vector, vector + 4 + 4 * count))
        for i in range(count):
            table = self.reference(vector + 4 + 4 * i)
            self._visit_table(table)
            yield table

    def _string(self, field: int | None) -> bytes:
        if field is None:
            return b""
        text = self.reference(field)
        length = self._number(text)
        self._seen.append((text, text + 4 + length + 1))
        return self._data[text + 4 : text + 4 + length]

    def _number(self, position: int | None) -> int:
        return 0 if position is None else int(struct.unpack_from("<I", self._data, position)[0])

    def _short(self, position: int) -> int:
        return int(struct.unpack_from("<H", self._data, position)[0])

    def _byte(self, position: int | None) -> int:
        return 0 if position is None else int(struct.unpack_from("<b", self._data, position)[0])


def _build(resolver: Resolver) -> tuple[int, bytes]:
    """The table sorted, as a flatbuffer of its own: where in it the table is, and its bytes."""
    import flatbuffers  # type: ignore[import-untyped]  # a dependency of onnxruntime itself

    builder = flatbuffers.Builder(1024)
    entries = []
    for operator, constraints in sorted(resolver.items()):
        items = []
        for constraint, arguments in sorted(constraints.items()):
            tables = []
            for kind, index in arguments:
                builder.StartObject(2)
                builder.PrependInt8Slot(0, kind, 0)
                builder.PrependUint32Slot(1, index, 0)
                tables.append(builder.EndObject())
            items.append(_pair(builder, constraint, tables))
        entries.append(_pair(builder, operator, items))
    vector = _vector(builder, entries)
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    blob = bytes(builder.Output())
    return int(struct.unpack_from("<I", blob)[0]), blob


def _pair(builder: Any, name: bytes, tables: list[int]) -> int:
    vector = _vector(builder, tables)
    text = builder.CreateString(name)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, text, 0)
    builder.PrependUOffsetTRelativeSlot(1, vector, 0)
    return int(builder.EndObject())


def _vector(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
