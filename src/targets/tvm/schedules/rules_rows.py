"""Rules for softmax, layer normalization and reductions.

Each rule returns an empty string if it took the node, else the reason why not (see `rules.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .epilogue import NO_EPILOGUE, Access
from .fusion import Group, PlainDomain, grow
from .graph import Node, int_tuple, static_type
from .rewrite import FunctionWriter
from .rows import Rows, rows_kernel
from .rules_blocked import global_pooling
from .views import contiguous_strides


def reduction(writer: FunctionWriter, node: Node) -> str:
    shape, _ = static_type(node.inputs[0])
    if shape is None or node.shape is None or 0 in shape:
        return "dynamic or empty shape"
    rank = len(shape)
    given = node.attrs.axis
    axes = sorted(axis % rank for axis in int_tuple(given)) if given else list(range(rank))
    trailing = axes == list(range(rank - len(axes), rank))
    spatial = rank in (3, 4) and axes == list(range(2, rank))
    if spatial and node.op in ("mean", "max") and writer.has_blocked(node.inputs[0]):
        return global_pooling(writer, node, mean=node.op == "mean")
    if not trailing or not axes:
        return f"reduced axes {axes} are not the last ones"
    outer = shape[: axes[0]]
    columns = math.prod(shape[axes[0] :])
    config = Rows(kind=node.op, outer=outer, columns=columns)  # type: ignore[arg-type]
    out = Access(node.shape, (*contiguous_strides(outer), 0))
    _emit_rows(writer, node, config, shape, [], out)
    return ""


def _emit_rows(
    writer: FunctionWriter,
    node: Node,
    config: Rows,
    data_shape: tuple[int, ...],
    extra: list[Any],
    out: Access,
) -> None:
    group = Group([], node.var, NO_EPILOGUE, [])
    if config.kind in ("softmax", "layer_norm"):
        group = grow(writer.graph, node.var, PlainDomain(data_shape), data_shape, writer.claimed)
        config = dataclasses.replace(config, epilogue=group.epilogue)

    def emit() -> None:
        function = writer.library.get(
            writer.bb,
            (config, data_shape, out),
            config.kind,
            "reduction",
            "vectorized rows",
            lambda name: rows_kernel(config, writer.spec, name, data_shape, out),
        )
        args = [writer.plain(node.inputs[0]), *extra, *writer.operands(group.sources)]
        writer.define(group.result, plain=writer.call(function, args, out.shape))

    writer.place(node, group, emit)


def softmax(writer: FunctionWriter, node: Node) -> str:
    shape = node.shape
    assert shape is not None
    if not shape or int(node.attrs.axis) % len(shape) != len(shape) - 1 or 0 in shape:
        return "not over the last axis"
    config = Rows(kind="softmax", outer=shape[:-1], columns=shape[-1])
    _emit_rows(writer, node, config, shape, [], Access(shape, contiguous_strides(shape)))
    return ""


def layer_norm(writer: FunctionWriter, node: Node) -> str:
    shape, attrs = node.shape, node.attrs
    assert shape is not None
    axes = sorted(axis % len(shape) for axis in int_tuple(attrs.axes))
    if axes != list(range(axes[0], len(shape))) or 0 in shape:
        return "not over the last axes"
    if len(axes) > 1:
        return "over several axes"
    if any(static_type(item)[1] != "float32" for item in node.inputs):
        return "mixed dtypes"
    config = Rows(
        kind="layer_norm",
        outer=shape[:-1],
        columns=shape[-1],
        epsilon=float(attrs.epsilon),
        scale=bool(attrs.scale),
        center=bool(attrs.center),
    )
    extra = [writer.plain(item) for item in node.inputs[1:3]]
    _emit_rows(writer, node, config, shape, extra, Access(shape, contiguous_strides(shape)))
    return ""
