"""Arrays by name on disk: `.npz` files, written byte-reproducibly and read without trust.

Here: `write_npz`, `read_npz`. Not here: what the arrays are for (`artifact`, `cli`).
numpy's own writer stamps the time; its reader allocates what a header claims before looking at
how much data there is, and both turn dtypes that numpy lacks (bfloat16) into raw bytes.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

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
            member, stored = _storable(name, np.asarray(array))
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
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    raise CalibrationError(
                        "The file is not an .npz of arrays",
                        where=f"{path}, member {info.filename!r}",
                        fix="write it with numpy.savez(path, name=array, ...)",
                    )
                name, array = _restored(info.filename[:-4], _read(archive, info, path))
                arrays[name] = array
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise CalibrationError(
            "The file is not a readable .npz",
            where=str(path),
            why=str(error),
            fix="write it with numpy.savez(path, name=array, ...)",
        ) from error
    return arrays


def _storable(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if array.dtype.kind == "O":
        return name, array.astype(np.str_)
    if array.dtype.kind == "V" or array.dtype.num >= 256 or not array.dtype.isbuiltin:
        bits = np.dtype(f"u{array.dtype.itemsize}")
        return f"{name}{_DTYPE_MARK}{array.dtype.name}", np.asarray(array, order="C").view(bits)
    return name, array


def _restored(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    base, mark, dtype = name.rpartition(_DTYPE_MARK)
    if mark and hasattr(ml_dtypes, dtype):
        return base, array.view(getattr(ml_dtypes, dtype))
    return name, array


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    data = archive.read(info)
    stream = io.BytesIO(data)
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
    size = math.prod(shape) * dtype.itemsize
    if size != len(data) - stream.tell():
        raise ValueError(f"{info.filename} says {size} bytes, has {len(data) - stream.tell()}")
    flat = np.frombuffer(data, dtype, offset=stream.tell()) if size else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy()
