"""Weights that lie in a file and are mapped into memory.

Here: `MappedTensor`, which knows its place, so that a runtime can map the same bytes itself instead
of being handed a copy. Not here: finding that place (frontends).
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import ModelFileError


@dataclasses.dataclass(frozen=True)
class MappedFile:
    """A file's path, its map, and what `file_stamp` gave when it was mapped."""

    path: Path
    map: mmap.mmap
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a whole file, read-only."""
        real = path.resolve()
        stamp = file_stamp(real)
        with open(real, "rb") as file:
            return cls(real, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), stamp)

    def check_unchanged(self) -> None:
        """Raises `ModelFileError` when the file is no longer the one that was mapped."""
        if file_stamp(self.path) != self.stamp:
            raise ModelFileError(
                f"{str(self.path)!r} changed while its weights were in use",
                why="weights are read from the file when they are needed",
                fix="start again, and leave the file as it is until the result is saved",
            )

    def release(self) -> None:
        """Give back the memory of all pages read so far; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


class MappedTensor(ir.Tensor[np.ndarray]):
    """A tensor over `array`, the bytes of `file` from `offset` on."""

    __slots__ = ("file", "offset")

    def __init__(self, array: np.ndarray, *, name: str, file: MappedFile, offset: int) -> None:
        super().__init__(array, dtype=ir.DataType.from_numpy(array.dtype), name=name)
        self.file = file
        self.offset = offset

    def renamed(self, name: str) -> MappedTensor:
        """Another tensor over the same bytes."""
        return MappedTensor(self.raw, name=name, file=self.file, offset=self.offset)

    def release(self) -> None:
        """The same for the pages of this tensor."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.file.map.madvise(mmap.MADV_DONTNEED, start, self.offset + self.nbytes - start)


def file_stamp(path: Path) -> tuple[int, int]:
    """Time of the last change in nanoseconds, and size; zeros where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
