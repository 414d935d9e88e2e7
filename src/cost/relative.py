"""Kernels in a number format that a device's profile lacks, from what it knows of float32.

Here: `relative_ms`: the profile's own time of the same kernel in float32, times what the roofline
says of both formats on the device's hardware. It is assumed, not fitted; but what the device and
its runtime take beyond the roofline is in it. Not here: the roofline (`latency`), fitted classes
(`profile`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from .features import Features
from .kernel import Kernel
from .profile import Setting
from .runtime_graph import Tensor

RATIO_SPREAD = 2.0
"""The interval around such a time is from a half to twice."""
_NARROW = frozenset(
    {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)


def relative_ms(
    kernel: Kernel,
    setting: Setting,
    describe: Callable[[Kernel], Features | None],
    roofline: Callable[[Kernel], float | None],
) -> float | None:
    """Milliseconds of a kernel from its twin in float32; None where that has no class either.

    `describe`, `roofline`: what a profile asks about a kernel, and its assumed milliseconds.
    """
    twin = dataclasses.replace(
        kernel,
        dtype="float32",
        inputs=tuple(None if tensor is None else _wide(tensor) for tensor in kernel.inputs),
        outputs=tuple(_wide(tensor) for tensor in kernel.outputs),
    )
    found = describe(twin)
    name = setting.find(found)[0] if found is not None else ""
    if found is None or not name or found.dtype != "float32":
        return None
    moved = found.amounts["read"] + found.amounts["weights"], found.amounts["written"]
    twin = dataclasses.replace(twin, bytes_read=int(moved[0]), bytes_written=int(moved[1]))
    narrow, wide = roofline(kernel), roofline(twin)
    if narrow is None or not wide:
        return None
    ms, _ = setting.classes[name].predict([found])
    return float(setting.in_a_run(ms)[0]) * narrow / wide


def _wide(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _NARROW:
        return tensor
    return dataclasses.replace(tensor, dtype=ir.DataType.FLOAT)
