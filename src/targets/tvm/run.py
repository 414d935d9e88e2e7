"""Running a library that TVM compiled, on the machine that calls.

Here: checking the inputs against the side file, and one virtual machine a library. Not here:
emulation of another CPU, and compiling. TVM is loaded when a runner is made.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArtifactError, CalibrationError, LoweringError, MissingDependencyError
from .crosscompile import ELF_MACHINES, elf_machine, host_architecture

SIDE_FILE_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output: name, shape (a string is a symbolic dimension), numpy dtype name."""

    name: str
    shape: tuple[int | str, ...] | None
    dtype: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorInfo:
        shape = entry["shape"]
        return cls(str(entry["name"]), None if shape is None else tuple(shape), entry["dtype"])

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ",".join(map(str, self.shape))
        return f"{self.name}: {self.dtype}[{dims}]"


def side_file(library: Path) -> Path:
    """The JSON file that belongs to a library: `model.so` -> `model.json`."""
    return library.with_suffix(".json")


def read_side_file(library: Path) -> tuple[list[TensorInfo], list[TensorInfo], dict[str, Any]]:
    """Inputs, outputs, and the whole side file of a library.

    Raises:
        ArtifactError: the side file is missing or not as `emit` writes it.
    """
    path = side_file(library)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        inputs = [TensorInfo.from_json(entry) for entry in data["inputs"]]
        outputs = [TensorInfo.from_json(entry) for entry in data["outputs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "The library's side file cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="compile the model again; the .so and the .json belong together",
        ) from error
    return inputs, outputs, data


class TvmRunner:
    """A compiled library with its virtual machine, on the host CPU.

    Raises on construction:
        MissingDependencyError: TVM is not installed.
        ArtifactError: library or side file missing, or built for another CPU.
    """

    def __init__(self, path: str | Path) -> None:
        library = Path(path)
        self.inputs, self.outputs, self.info = read_side_file(library)
        _check_architecture(library, self.info)
        try:
            import tvm
            from tvm import relax
        except ImportError as error:
            raise MissingDependencyError(
                "TVM is not installed", why=str(error), fix='pip install "edgepass[tvm]"'
            ) from error
        self._tvm = tvm
        try:
            self._vm = relax.VirtualMachine(_load(library), tvm.cpu())
        except Exception as error:  # TVM raises RuntimeError, and its own InternalError
            raise ArtifactError(
                "TVM cannot load the library",
                where=str(library),
                why=str(error).strip().splitlines()[-1] if str(error) else repr(error),
                fix="compile the model again with the TVM that runs it "
                f"(compiled with {self.info.get('tvm', 'an unknown version')})",
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. The same inputs give the same bits.

        Raises:
            CalibrationError: a name, shape or dtype is not what the model takes.
            LoweringError: the library failed while running.
        """
        arrays = check_inputs(self.inputs, inputs)
        device = self._tvm.cpu()
        try:
            tensors = [self._tvm.runtime.tensor(array, device) for array in arrays]
            result = self._vm["main"](*tensors)
        except Exception as error:  # shape checks in the compiled code raise several types
            raise LoweringError(
                "The compiled model failed while running",
                where=", ".join(map(str, self.inputs)),
                why=str(error).strip().splitlines()[-1] if str(error) else repr(error),
                fix="check that the input sizes agree with each other",
            ) from error
        values = [result] if hasattr(result, "numpy") else list(result)
        names = [info.name for info in self.outputs]
        return {name: np.array(value.numpy()) for name, value in zip(names, values, strict=True)}


_loaded: dict[Path, tuple[int, int]] = {}
# Path -> (inode, modification time) of the file that this process first loaded from there.


def _load(library: Path) -> Any:
    """Load a library, also one compiled anew since this process loaded it from the same path.

    The dynamic loader returns the library it already has for a path, whatever the file holds
    now, so a changed file is loaded from a copy under a new name.
    """
    import tvm

    path = library.resolve()
    status = path.stat()
    signature = (status.st_ino, status.st_mtime_ns)
    if _loaded.setdefault(path, signature) == signature:
        return tvm.runtime.load_module(str(path))
    with tempfile.TemporaryDirectory(prefix="edgepass-tvm-") as folder:
        copy = shutil.copy(path, Path(folder) / "model.so")
        return tvm.runtime.load_module(str(copy))


def check_inputs(expected: list[TensorInfo], given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays in the library's order, contiguous.

    Raises:
        CalibrationError: names, dtypes, ranks, static sizes, or two sizes of one symbol differ.
    """
    wanted = {info.name for info in expected}
    missing, extra = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
    if missing or extra:
        parts = [f"missing {missing}"] * bool(missing) + [f"unknown {extra}"] * bool(extra)
        raise CalibrationError(
            "The input names are not those of the model",
            why=" and ".join(parts),
            fix="give exactly: " + "; ".join(map(str, expected)),
        )
    symbols: dict[str, tuple[int, str]] = {}
    return [_checked(info, given[info.name], symbols) for info in expected]


def _checked(
    info: TensorInfo, value: np.ndarray, symbols: dict[str, tuple[int, str]]
) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.name != info.dtype:
        raise CalibrationError(
            f"The input {info.name!r} has dtype {array.dtype.name}",
            where=str(info),
            why=f"the model takes {info.dtype}, and nothing is cast silently",
            fix=f"pass {info.name}.astype({info.dtype!r})",
        )
    dims = info.shape
    if dims is None:
        return np.ascontiguousarray(array)
    reason = ""
    if len(dims) != array.ndim:
        reason = f"rank {array.ndim} instead of {len(dims)}"
    else:
        for axis, (dim, size) in enumerate(zip(dims, array.shape, strict=True)):
            if isinstance(dim, int):
                if dim != size:
                    reason = f"axis {axis} is {size} instead of {dim}"
                continue
            first = symbols.setdefault(dim, (size, f"{info.name}[{axis}]"))
            if first[0] != size:
                reason = f"axis {axis} ({dim}) is {size}, but {first[1]} is {first[0]}"
    if reason:
        raise CalibrationError(
            f"The input {info.name!r} has shape {list(array.shape)}",
            where=str(info),
            why=reason,
            fix="give an array of the shape above; equal names are equal sizes",
        )
    # ascontiguousarray would turn a scalar into a vector.
    return array if array.ndim == 0 else np.ascontiguousarray(array)


def _check_architecture(library: Path, info: Mapping[str, Any]) -> None:
    if not library.is_file():
        raise ArtifactError(
            "There is no such library", where=str(library), fix="compile the model first"
        )
    machine = elf_machine(library)
    if machine == ELF_MACHINES.get(host_architecture()):
        return
    names = {number: name for name, number in ELF_MACHINES.items()}
    raise ArtifactError(
        "The library is not for this machine",
        where=str(library),
        why=f"it is for {names.get(machine or 0, 'another CPU')}, this is {host_architecture()}",
        fix="run it on its device, or emulated where edgepass offers that "
        f"(compiled for {info.get('target', 'an unknown target')})",
    )
