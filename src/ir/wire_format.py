"""The protobuf wire format, as far as taking weights out of a message and putting them in needs it.

Here: walking the fields of a message without decoding them, and finding the raw data of a graph's
initializers. Not here: what a model means (frontends, `targets.onnx_file`).
Field numbers are those of onnx.proto; the encoding is that of protobuf's own documentation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

Buffer = bytes | memoryview

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, where its tag starts, and where its payload starts and ends."""

    number: int
    tag: int
    start: int
    end: int


def fields(content: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message at `content[start:end]`, in order.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    position = start
    while position < end:
        tag = position
        key, position = read_varint(content, position, end)
        kind = key & 7
        if kind == _BYTES:
            length, position = read_varint(content, position, end)
        elif kind == _VARINT:
            length = 0
            while content[position + length] & 0x80:
                length += 1
            length += 1
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {tag}")
        if position + length > end:
            raise ValueError(f"the field at byte {tag} ends after its message")
        yield Field(key >> 3, tag, position, position + length)
        position += length


def read_varint(content: Buffer, position: int, end: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"no number ends at byte {position}")


def varint(number: int) -> bytes:
    """A number that is not negative, encoded."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def bytes_field(number: int, length: int) -> bytes:
    """Tag and length of a field of bytes; the bytes follow."""
    return varint(number << 3 | _BYTES) + varint(length)
