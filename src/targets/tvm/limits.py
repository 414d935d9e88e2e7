"""Where TVM 0.27 has a converter for an operator and it must not be used as it is.

Found by compiling every operator case of the ONNX backend test suite and comparing: each entry
stands for a wrong result or a failure deep in the compiler. Not here: operators without any
converter, which TVM's own map tells (`importer`).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ...ir.graph import attribute, constant_array, dims_of

Limit = Callable[[ir.Node], str | None]

NO_KERNELS = frozenset(
    {
        ir.DataType.STRING,
        ir.DataType.COMPLEX64,
        ir.DataType.COMPLEX128,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT8E8M0,
    }
)
"""Element types refused: no kernels (strings, complex, 2 and 4 bits), or wrong casts (float8)."""


def _only_first_output(node: ir.Node) -> str | None:
    for position, value in enumerate(node.outputs[1:], 1):
        if value.uses() or value.is_graph_output():
            return f"TVM computes only the first output, and output {position} is used"
    return None


def _is_inf(node: ir.Node) -> str | None:
    if attribute(node, "detect_negative", 1) == 1 and attribute(node, "detect_positive", 1) == 1:
        return None
    return "TVM ignores detect_negative and detect_positive"


def _mod(node: ir.Node) -> str | None:
    value = node.inputs[0]
    floating = value is not None and value.dtype is not None and value.dtype.is_floating_point()
    if floating and attribute(node, "fmod", 0) == 0:
        return "TVM's floating-point Mod differs in sign from ONNX's unless fmod=1"
    return None


def _pow(node: ir.Node) -> str | None:
    dtypes = [value.dtype for value in node.inputs[:2] if value is not None]
    if len(dtypes) == 2 and dtypes[0] is not None and not dtypes[0].is_floating_point():
        return "TVM has no integer power"
    if len(dtypes) == 2 and None not in dtypes and dtypes[0] != dtypes[1]:
        return "TVM's power takes base and exponent of one dtype only"
    return None


def _rms_normalization(node: ir.Node) -> str | None:
    dims = dims_of(node.inputs[0])
    axis = attribute(node, "axis", -1)
    if axis == -1 or (dims is not None and axis == len(dims) - 1):
        return None
    return "TVM normalizes over the last axis only"


def _roi_align(node: ir.Node) -> str | None:
    if attribute(node, "mode", "avg") == "avg":
        return None
    return "TVM's maximum RoiAlign takes maxima of other samples than ONNX's"


def _space_to_depth(node: ir.Node) -> str | None:
    return None if attribute(node, "mode", "DCR") == "DCR" else "TVM ignores mode"


def _conv_transpose(node: ir.Node) -> str | None:
    if attribute(node, "output_shape") is not None:
        return "TVM ignores output_shape; write pads and output_padding instead"
    if attribute(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return "TVM pads a transposed convolution with auto_pad differently; write pads"
    return None


def _max_pool(node: ir.Node) -> str | None:
    if attribute(node, "storage_order", 0) != 0:
        return "TVM has no column-major index output"
    return _only_first_output(node)


def _resize(node: ir.Node) -> str | None:
    if attribute(node, "antialias", 0) != 0 or attribute(node, "axes") is not None:
        return "TVM ignores antialias and axes"
    mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode == "half_pixel_symmetric":
        return f"TVM has no coordinate_transformation_mode {mode!r}"
    scales = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    for scale, size in zip(
        () if scales is None else scales.tolist(), dims_of(node.inputs[0]) or (), strict=False
    ):
        whole = float(scale * size if isinstance(size, int) else scale).is_integer()
        if not whole:
            return f"TVM rounds the scale {scale:.6g} to one that gives a whole number of pixels"
    return None


def _reduce(node: ir.Node) -> str | None:
    value = node.inputs[0]
    if value is not None and value.dtype == ir.DataType.BOOL:
        return "TVM does not reduce booleans"
    if 0 in (dims_of(value) or ()):
        return "TVM reduces an empty tensor to values that are not defined"
    return None


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

LIMITS: dict[str, Limit] = {
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS},
    "Resize": _resize,
    "BatchNormalization": _only_first_output,
    "ConvTranspose": _conv_transpose,
    "Dropout": _only_first_output,
    "IsInf": _is_inf,
    "LayerNormalization": _only_first_output,
    "MaxPool": _max_pool,
    "Mod": _mod,
    "Pow": _pow,
    "RMSNormalization": _rms_normalization,
    "RoiAlign": _roi_align,
    "SkipLayerNormalization": _only_first_output,
    "SpaceToDepth": _space_to_depth,
}
"""Operator -> why this node of it is refused, or None when it is not."""
