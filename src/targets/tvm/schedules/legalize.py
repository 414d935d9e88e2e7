"""Lowerings of ours for operators whose TVM default loses precision.

Here: softmax over long rows. Not here: rows of static shape, which have a kernel (`rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_LONG = 1024
"""Columns from which the sum is kept in float64. TVM adds one after the other in float32: over the
18,710 classes of a text recognizer the probabilities were off by 1e-4."""


def legalizations() -> Mapping[str, Callable[[Any, Any], Any]]:
    """For `relax.transform.LegalizeOps`, by operator."""
    return {"relax.nn.softmax": _softmax}


def _softmax(builder: Any, call: Any) -> Any:
    from tvm import tirx, topi

    data, axis = call.args[0], int(call.attrs.axis)
    info = data.ty
    shape = None if info.shape is None else list(info.shape)
    size = None if shape is None else shape[axis]
    if info.dtype != "float32" or not isinstance(size, tirx.IntImm) or int(size) < _LONG:
        return builder.call_te(topi.nn.softmax, data, axis)
    return builder.call_te(_wide_softmax, data, axis, primfunc_name_hint="softmax")


def _wide_softmax(data: Any, axis: int) -> Any:
    """exp(x - max) / sum, the sum in float64."""
    from tvm import te

    axis %= len(data.shape)
    columns = data.shape[axis]

    def at(indices: Any, column: Any) -> tuple[Any, ...]:
        return (*indices[:axis], column, *indices[axis:])

    rest = [dim for i, dim in enumerate(data.shape) if i != axis]
    k = te.reduce_axis((0, columns), name="k")
    top = te.compute(rest, lambda *i: te.max(data[at(i, k)], axis=k), name="T_softmax_maxelem")
    grown = te.compute(
        data.shape,
        lambda *i: te.exp(data[i] - top[(*i[:axis], *i[axis + 1 :])]),
        name="T_softmax_exp",
    )
    j = te.reduce_axis((0, columns), name="j")
    total = te.compute(
        rest,
        lambda *i: te.sum(grown[at(i, j)].astype("float64"), axis=j),
        name="T_softmax_expsum",
    )
    return te.compute(
        data.shape,
        lambda *i: grown[i] / total[(*i[:axis], *i[axis + 1 :])].astype("float32"),
        name="T_softmax_norm",
        tag="softmax_output",
    )
