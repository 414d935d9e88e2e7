"""Arrays of the dtypes that numpy itself lacks (bfloat16, float8, 4 and 2 bits) as OrtValues.

Here: making one and reading one. Not here: which inputs need it (`onnxruntime`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx_ir as ir

from .feed import dtype_name

_EXOTIC = {
    dtype_name(dtype): dtype
    for dtype in (
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
    )
}


def exotic_dtype(name: str) -> ir.DataType | None:
    """The dtype of this numpy-style name if arrays of it must go through OrtValues, else None."""
    return _EXOTIC.get(name)


def ort_value(array: np.ndarray, dtype: ir.DataType) -> Any:
    """An OrtValue over the array's own memory, which it keeps alive; below 8 bits, a packed copy.

    `array` has one element an item, as `ml_dtypes` has it; packing is ONNX's `raw_data`.
    """
    import onnxruntime as ort

    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if dtype.bitwidth >= 8:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, int(dtype))
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), int(dtype))
    packed = ir.Tensor(contiguous, dtype=dtype).tobytes()
    ctypes.memmove(value.data_ptr(), packed, len(packed))
    return value


def to_numpy(value: Any) -> Any:
    """What an OrtValue holds: an array, unpacked to one element an item, or a list of arrays."""
    dtype = ir.DataType(value.element_type()) if value.is_tensor() else None
    if dtype is None or dtype_name(dtype) not in _EXOTIC:
        return value.numpy()
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    shape = tuple(value.shape())
    if dtype.bitwidth >= 8:
        return np.frombuffer(raw, dtype.numpy()).reshape(shape).copy()
    import onnx

    proto = onnx.TensorProto(data_type=int(dtype), dims=shape, raw_data=raw)
    return onnx.numpy_helper.to_array(proto)
