"""A tensor at a kernel's edge: all that the features of a kernel need to know of it."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """A tensor at a kernel's edge. `dtype` is a name as numpy has it ("float32"), or "int4"."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    constant: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes, sub-byte elements packed."""
        return self.elements * _BYTES.get(self.dtype, 4.0)


_BYTES = {
    "float64": 8.0,
    "int64": 8.0,
    "uint64": 8.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "int16": 2.0,
    "uint16": 2.0,
    "int8": 1.0,
    "uint8": 1.0,
    "bool": 1.0,
    "int4": 0.5,
    "uint4": 0.5,
    "int2": 0.25,
    "uint2": 0.25,
}


def log_size(value: float) -> float:
    """The logarithm to base 2, 0 for what is below one."""
    return math.log2(max(1.0, value))
