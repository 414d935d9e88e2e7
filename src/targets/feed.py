"""What a compiled model takes and gives, and checking arrays against it before a runtime sees them.

Here: `TensorSpec`, reading specs from a graph, `check_feed`. Not here: running anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import CalibrationError


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one graph input or output.

    `dtype` is the numpy-style name (`float32`, `bfloat16`, `string`), or ONNX's own text for
    something that is not a tensor (`seq(tensor(float))`). In `shape` a static dimension is an int,
    a named dynamic one its name, an unnamed one None; `shape` is None when the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    @property
    def is_tensor(self) -> bool:
        return "(" not in self.dtype

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.dtype}[...]"
        dims = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"

    def as_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` reads it back."""
        shape = None if self.shape is None else list(self.shape)
        return {"name": self.name, "dtype": self.dtype, "shape": shape}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        shape = data["shape"]
        return cls(str(data["name"]), str(data["dtype"]), None if shape is None else tuple(shape))


def dtype_name(dtype: ir.DataType | None) -> str:
    """`float32`, `int8`, `bfloat16`, `bool`, `string`; `unknown` for None."""
    if dtype is None:
        return "unknown"
    if dtype == ir.DataType.STRING:
        return "string"
    return str(dtype.numpy())


def spec_of(value: ir.Value) -> TensorSpec:
    """The spec of a graph input or output."""
    shape = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape.dims)
    if value.type is None or isinstance(value.type, ir.TensorType):
        return TensorSpec(value.name or "", dtype_name(value.dtype), shape)
    return TensorSpec(value.name or "", _type_text(value.type), shape)


def _type_text(type_: ir.TypeProtocol) -> str:
    if isinstance(type_, ir.TensorType):
        return f"tensor({type_.dtype.name.lower()})"
    kind = {"SequenceType": "seq", "OptionalType": "optional"}.get(type(type_).__name__, "other")
    inner = getattr(type_, "elem_type", None)
    return f"{kind}({_type_text(inner) if isinstance(inner, ir.TypeProtocol) else inner})"


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs a caller must give: graph inputs that no initializer provides."""
    initializers = model.graph.initializers
    return tuple(spec_of(v) for v in model.graph.inputs if v.name not in initializers)


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The graph's outputs, in order."""
    return tuple(spec_of(value) for value in model.graph.outputs)


def check_feed(
    inputs: Sequence[TensorSpec],
    feed: Mapping[str, Any],
    *,
    where: str = "",
    optional: Iterable[str] = (),
    finite: bool = False,
) -> None:
    """Hold a feed against the inputs: names, then dtype, rank and static dimensions of each.

    Nothing is cast: a float64 array for a float32 input is an error that says how to cast.
    `where` says which sample it is. `optional` names may be there too. `finite` refuses NaN and
    infinity, which calibration cannot use.

    Raises:
        CalibrationError: on the first thing that is wrong.
    """
    wanted = ", ".join(str(spec) for spec in inputs) or "(no inputs)"
    names = {spec.name for spec in inputs}
    missing = [spec.name for spec in inputs if spec.name not in feed]
    extra = sorted(set(feed) - names - set(optional))
    if missing:
        hint = f"rename {extra[0]!r} to {missing[0]!r}" if len(missing) == len(extra) == 1 else ""
        raise CalibrationError(
            f"No array for the input {missing[0]!r}",
            where=where,
            why=f"the feed has {sorted(feed)}, the model takes {wanted}",
            fix=hint or "give an array for every input",
        )
    if extra:
        raise CalibrationError(
            f"The model has no input {extra[0]!r}",
            where=where,
            why=f"it takes {wanted}",
            fix=f"leave {extra[0]!r} out",
        )
    for spec in inputs:
        if spec.is_tensor:
            _check_array(spec, feed[spec.name], where, finite)


def _check_array(spec: TensorSpec, array: Any, where: str, finite: bool) -> None:
    place = f"input {spec}" + (f", {where}" if where else "")
    if not isinstance(array, np.ndarray | np.generic):
        raise CalibrationError(
            f"The input {spec.name!r} is a {type(array).__name__}, not a numpy array",
            where=place,
            fix=f"numpy.asarray(..., dtype={spec.dtype!r})",
        )
    _check_dtype(spec, array, place)
    _check_shape(spec, array, place)
    if finite and array.dtype.kind in "fV" and array.size:
        values = np.asarray(array, np.float32 if array.dtype.kind == "V" else array.dtype)
        bad = ~np.isfinite(values)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise CalibrationError(
                f"The input {spec.name!r} has {'NaN' if np.isnan(values[index]) else 'infinity'}",
                where=f"{place}, at index {list(index)}",
                why=f"{int(bad.sum())} of {array.size} values are not finite; no range holds them",
                fix="drop the sample, or repair what produces it",
            )


def _check_dtype(spec: TensorSpec, array: np.ndarray | np.generic, place: str) -> None:
    if spec.dtype == "unknown" or (spec.dtype == "string" and array.dtype.kind in "OSUT"):
        return
    if str(array.dtype) != spec.dtype:
        raise CalibrationError(
            f"The input {spec.name!r} is {spec.dtype}, the array is {array.dtype}",
            where=place,
            why="casting could lose values, so it is left to you",
            fix=f"feed[{spec.name!r}].astype({spec.dtype!r})",
        )


def _check_shape(spec: TensorSpec, array: np.ndarray | np.generic, place: str) -> None:
    if spec.shape is None:
        return
    if array.ndim != len(spec.shape):
        fix = "add the missing axis with array[None]" if array.ndim == len(spec.shape) - 1 else ""
        raise CalibrationError(
            f"The input {spec.name!r} has {len(spec.shape)} dimensions, the array {array.ndim}",
            where=place,
            why=f"the array's shape is {list(array.shape)}",
            fix=fix,
        )
    for axis, (want, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if isinstance(want, int) and want != got:
            raise CalibrationError(
                f"The input {spec.name!r} has {want} elements along axis {axis}, the array {got}",
                where=place,
                why=f"the array's shape is {list(array.shape)}",
            )
