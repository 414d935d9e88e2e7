"""Arrays by name on disk: `.npz` files, written byte-reproducibly and read without trust.

Here: `write_npz`, `read_npz`, and `open_npz`, which reads the arrays piece by piece. Not here: what
the arrays are for (`artifact`, `cli`, `samples`).
numpy's own writer stamps the time; its reader allocates what a header claims before looking at
how much data there is, and both turn dtypes that numpy lacks (bfloat16) into raw bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from .errors import CalibrationError

_EPOCH = (1980, 1, 1, 0, 0, 0)
_DTYPE_MARK = ".dtype="


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, uncompressed; the same arrays give the same bytes.

    `numpy.load` reads the file too. A dtype that numpy lacks is stored as unsigned integers of
    its width under `name.dtype=bfloat16`. Object arrays must hold text.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            member, stored = storable(name, np.asarray(array))
            info = zipfile.ZipInfo(f"{member}.npy", _EPOCH)
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=stored.nbytes > 1 << 30) as file:
                np.lib.format.write_array(file, stored, allow_pickle=False)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name, in the file's order. Nothing is unpickled.

    Raises:
        CalibrationError: there is no such file, it is damaged, or it holds Python objects.
    """
    arrays: dict[str, np.ndarray] = {}
    if not path.is_file():
        raise CalibrationError(f"There is no file {str(path)!r}", where=str(path))
    with _translated(path), zipfile.ZipFile(path) as archive:
        for info in _members(archive, path):
            name, array = restored(info.filename[:-4], _read(archive, info, path))
            arrays[name] = array
    return arrays


def storable(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A member's name and the array as numpy's format holds it."""
    if array.dtype.kind == "O":
        return name, array.astype(np.str_)
    if array.dtype.kind == "V" or array.dtype.num >= 256 or not array.dtype.isbuiltin:
        bits = np.dtype(f"u{array.dtype.itemsize}")
        return f"{name}{_DTYPE_MARK}{array.dtype.name}", np.asarray(array, order="C").view(bits)
    return name, array


def restored(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What `storable` was given."""
    base, mark, dtype = name.rpartition(_DTYPE_MARK)
    if mark and hasattr(ml_dtypes, dtype):
        return base, array.view(getattr(ml_dtypes, dtype))
    return name, array


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    data = archive.read(info)
    stream = io.BytesIO(data)
    shape, fortran, dtype = _header(stream, info, path)
    size = math.prod(shape) * dtype.itemsize
    flat = np.frombuffer(data, dtype, offset=stream.tell()) if size else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def _header(
    stream: IO[bytes], info: zipfile.ZipInfo, path: Path
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of a member, whose data must be as long as they say."""
    version = np.lib.format.read_magic(stream)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
        raise ValueError(f"{info.filename} has array format {version}")
    shape, fortran, dtype = reader(stream)
    if dtype.hasobject:
        raise CalibrationError(
            f"The array {info.filename[:-4]!r} holds Python objects",
            where=str(path),
            why="reading them would unpickle, which runs code from the file",
            fix="save text as array.astype(str), numbers in a numeric dtype",
        )
    size, there = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
    if size != there:
        raise ValueError(f"{info.filename} says {size} bytes, has {there}")
    return shape, fortran, dtype


# --- piece by piece ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ArrayStream:
    """An array of an `.npz` file, read from its first entry on. `fortran` ones can't be."""

    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    file: IO[bytes]

    def read(self, entries: int) -> np.ndarray:
        """The next entries along the first axis; of an array without axes, all.

        Raises:
            ValueError, BadZipFile: the file ends early or is damaged.
        """
        shape = (entries, *self.shape[1:]) if self.shape else ()
        size = math.prod(shape) * self.dtype.itemsize
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.name!r} ends early")
        flat = np.frombuffer(data, self.dtype) if size else np.empty(0, self.dtype)
        return restored(self.name, flat.reshape(shape).copy())[1]


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[dict[str, ArrayStream]]:
    """The arrays of an `.npz` file by name, each at its beginning. Nothing is unpickled.

    Raises:
        CalibrationError: there is no such file, it is damaged, or it holds Python objects.
    """
    if not path.is_file():
        raise CalibrationError(f"There is no file {str(path)!r}", where=str(path))
    with _translated(path), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        streams = {}
        for info in _members(archive, path):
            file = stack.enter_context(archive.open(info))
            name = info.filename[:-4]
            stream = ArrayStream(name, *_header(file, info, path), file)
            streams[restored(name, np.empty(0, np.uint8))[0]] = stream
        yield streams


def _members(archive: zipfile.ZipFile, path: Path) -> Iterator[zipfile.ZipInfo]:
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            raise CalibrationError(
                "The file is not an .npz of arrays",
                where=f"{path}, member {info.filename!r}",
                fix="write it with numpy.savez(path, name=array, ...)",
            )
        yield info


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError) as error:
        raise CalibrationError(
            "The file is not a readable .npz",
            where=str(path),
            why=str(error),
            fix="write it with numpy.savez(path, name=array, ...)",
        ) from error
