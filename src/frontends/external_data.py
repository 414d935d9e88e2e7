"""External weight files of a model: where they may lie, whether they are there and long enough.

Here: containment in the model's folder, presence, sizes. Data stays on disk and is mapped when
first read. Not here: parsing the model file itself (`onnx`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

from ..errors import ModelFileError, UnsafePathError, WeightsAbsentError
from ..ir.graph import AbsentTensor, graphs
from .onnx_checks import tensor_bytes


def settle_external_data(
    model: ir.Model, folders: list[Path] | None, weights_required: bool
) -> None:
    """Check every external tensor and anchor it to its file; missing ones become `AbsentTensor`.

    `folders` are where data may lie (the model's own first); None when the model has no place
    on disk, so that all external data counts as missing. With `folders` empty each tensor's own
    base directory is taken.

    Raises:
        UnsafePathError: the location leaves the folder, whether or not the file exists.
        ModelFileError: the file is too short, or the declared length isn't that of the shape.
        WeightsAbsentError: files are missing and `weights_required`; names them.
    """
    missing: dict[str, int] = {}

    def settled(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        path = _safe_path(tensor, folders)
        size = _checked_size(tensor)
        if path is None or not path.is_file():
            missing[str(tensor.location)] = missing.get(str(tensor.location), 0) + 1
            return AbsentTensor(
                tensor.name, tensor.dtype, tensor.shape, f"the file {tensor.location} is missing"
            )
        _check_file(tensor, path, size)
        return ir.ExternalTensor(
            path.name,
            tensor.offset,
            size,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=path.parent,
        )

    for tensor, replace in list(_external_tensors(model)):
        replace(settled(tensor))
    if missing and weights_required:
        raise _weights_absent(missing, folders)


def _weights_absent(missing: dict[str, int], folders: list[Path] | None) -> WeightsAbsentError:
    count = sum(missing.values())
    files = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
    return WeightsAbsentError(
        f"The weights of the model are missing: {count} tensor{'s' * (count > 1)} in {files}",
        where=f"folder {str(folders[0]) or '.'!r}" if folders else "",
        why=""
        if folders is not None
        else "external data is found relative to the model's file, and this model came without one",
        fix="put the file next to the model"
        if folders is not None
        else "pass the path of the model file instead of its content",
    )


def _external_tensors(
    model: ir.Model,
) -> Iterator[tuple[ir.ExternalTensor, Callable[[ir.TensorProtocol], None]]]:
    """Every external tensor, and how to put another in its place."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value, _setter_of_value(value)
        for node in graph:
            for name, attribute in node.attributes.items():
                if isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value, _setter_of_attribute(node, name)


def _setter_of_value(value: ir.Value) -> Callable[[ir.TensorProtocol], None]:
    def replace(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return replace


def _setter_of_attribute(node: ir.Node, name: str) -> Callable[[ir.TensorProtocol], None]:
    def replace(tensor: ir.TensorProtocol) -> None:
        node.attributes[name] = ir.AttrTensor(name, tensor)

    return replace


def _safe_path(tensor: ir.ExternalTensor, folders: list[Path] | None) -> Path | None:
    """The data file with symbolic links resolved, or None without a folder to look in."""
    location = os.fspath(tensor.location)
    if (
        os.path.isabs(location)
        or "\0" in location
        or ".." in location.replace("\\", "/").split("/")
        or os.path.splitdrive(location)[0]
    ):
        raise _unsafe(tensor, "the location is absolute or has '..' in it")
    if folders is None:
        return None
    candidates = folders or [Path(os.fspath(tensor.base_dir) or ".")]
    real = Path(os.path.realpath(candidates[0] / location))
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in candidates):
        raise _unsafe(tensor, f"a symbolic link leads to {str(real)!r}, outside the folder")
    return real


def _checked_size(tensor: ir.ExternalTensor) -> int:
    size = tensor_bytes(tensor.dtype, tensor.shape.numpy())
    if tensor.length is not None and tensor.length != size:
        raise ModelFileError(
            "The model file contradicts itself about a tensor",
            where=_where(tensor),
            why=f"its shape takes {size} bytes, the declared length is {tensor.length}",
            fix="export the model again",
        )
    return size


def _check_file(tensor: ir.ExternalTensor, path: Path, size: int) -> None:
    status = path.stat()
    if status.st_nlink > 1:
        # onnx_ir refuses to read such a file; better said now than in the middle of a pass
        raise _unsafe(
            tensor, f"{path.name!r} has {status.st_nlink} hard links: it may be a file elsewhere"
        )
    end = (tensor.offset or 0) + size
    if end > status.st_size:
        raise ModelFileError(
            f"The weight file {path.name!r} is too short",
            where=_where(tensor),
            why=f"its data ends at byte {end}, the file has {status.st_size}",
            fix="get the file again: it was probably cut off",
        )


def _where(tensor: ir.ExternalTensor) -> str:
    dims = list(tensor.shape.numpy())
    return f"tensor {tensor.name!r}, {tensor.dtype.name} {dims}, in {os.fspath(tensor.location)!r}"


def _unsafe(tensor: ir.ExternalTensor, why: str) -> UnsafePathError:
    return UnsafePathError(
        "External data must lie in the model's folder",
        where=_where(tensor),
        why=why,
        fix="copy the weight file into the model's folder, and trust no model that asks otherwise",
    )
