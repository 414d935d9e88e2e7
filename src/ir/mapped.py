"""Weights that lie in a file and are mapped into memory.

Here: `MappedTensor`, which knows its place, so that a runtime can map the same bytes itself instead
of being handed a copy. Not here: finding that place (frontends).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import ModelFileError


class MappedTensor(ir.Tensor[np.ndarray]):
    """A tensor over `array`, a map of `array.nbytes` bytes of `path` from `offset` on.

    `stamp` is the file's as `file_stamp` gave it when it was mapped.
    """

    __slots__ = ("offset", "path", "stamp")

    def __init__(
        self, array: np.ndarray, *, name: str, path: Path, offset: int, stamp: tuple[int, int]
    ) -> None:
        super().__init__(array, dtype=ir.DataType.from_numpy(array.dtype), name=name)
        self.path = path
        self.offset = offset
        self.stamp = stamp

    def renamed(self, name: str) -> MappedTensor:
        """Another tensor over the same bytes."""
        return MappedTensor(
            self.raw, name=name, path=self.path, offset=self.offset, stamp=self.stamp
        )

    def check_unchanged(self) -> None:
        """Raises `ModelFileError` when the file is no longer the one that was mapped."""
        if file_stamp(self.path) != self.stamp:
            raise ModelFileError(
                f"{str(self.path)!r} changed while its weights were in use",
                where=f"tensor {self.name!r}",
                why="weights are read from the file when they are needed",
                fix="start again, and leave the file as it is until the result is saved",
            )


def file_stamp(path: Path) -> tuple[int, int]:
    """Time of the last change in nanoseconds, and size; zeros where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
