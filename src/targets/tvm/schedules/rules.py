"""The rules: for each Relax operator, when a kernel of ours applies and with what configuration.

A rule returns an empty string if it took the node, else the reason why not; the node then goes to
TVM's own lowering and the generic schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .conv import Conv, conv_kernel
from .depthwise import Channelwise, channelwise_kernel
from .epilogue import NO_EPILOGUE, Access
from .fusion import BlockedDomain, Group, PlainDomain, grow, spatial_rank4
from .graph import Node, static_type
from .layout import Elementwise, GlobalPool, blocked_access, elementwise_kernel, global_pool_kernel
from .matmul import Matmul, matmul_kernel
from .pack import block_channels, pack_columns, pack_conv
from .report import Kind
from .rewrite import FunctionWriter, as_float32, blocked_group, blocked_output
from .rows import Rows, rows_kernel
from .views import View, contiguous_strides, view_of
from .window import Window

Rule = Callable[[FunctionWriter, Node], str]


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


# Convolution -----------------------------------------------------------------------------------
def _conv(writer: FunctionWriter, node: Node) -> str:
    attrs = node.attrs
    data, weight_expr = node.inputs[:2]
    in_shape, _ = static_type(data)
    weight = writer.graph.constant(weight_expr)
    if weight is None:
        return "weights are not constant"
    if in_shape is None or node.shape is None:
        return "dynamic shape"
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
    if layouts not in (("NCHW", "OIHW"), ("NCW", "OIW")):
        return f"layouts {layouts}"
    rank = len(in_shape)
    n, c, h, w = spatial_rank4(in_shape, rank)
    _, oc, oh, ow = spatial_rank4(node.shape, rank)
    kernel = as_float32(weight if rank == 4 else weight[:, :, None, :])
    lift = (1,) * (4 - rank)
    pads = _ints(attrs.padding)
    window = Window(
        input=(h, w),
        output=(oh, ow),
        kernel=(kernel.shape[2], kernel.shape[3]),
        strides=(*lift, *_ints(attrs.strides)),  # type: ignore[arg-type]
        dilations=(*lift, *_ints(attrs.dilation)),  # type: ignore[arg-type]
        pads=(pads[0], pads[1]) if rank == 4 else (0, pads[0]),
    )
    groups = int(attrs.groups)
    if groups == c == oc and groups > 1:
        return _depthwise(writer, node, window, kernel)
    return _dense_conv(writer, node, window, kernel, (n, c, h, w), groups)


def _dense_conv(
    writer: FunctionWriter,
    node: Node,
    window: Window,
    kernel: Any,
    in_shape: tuple[int, int, int, int],
    groups: int,
) -> str:
    lanes = writer.spec.lanes
    data, weight_expr = node.inputs[:2]
    shape = node.shape
    assert shape is not None
    n, c, h, w = in_shape
    oc = shape[1]
    if groups > 1 and (c // groups % lanes or oc // groups % lanes):
        return f"groups of {c // groups} channels, not whole blocks of {lanes}"
    # A stem's few channels would mostly be padding; plain input needs no conversion.
    blocked_input = groups > 1 or c >= lanes or writer.has_blocked(data)
    flat = window.pointwise
    group = blocked_group(writer, node, shape, flat=flat)
    if flat:
        unflat = blocked_group(writer, node, shape)
        if len(unflat.nodes) > len(group.nodes):
            group, flat = unflat, False
    if flat:
        window = window.flattened()
    config = Conv(
        batch=n,
        in_channels=c,
        out_channels=oc,
        groups=groups,
        window=window,
        blocked_input=blocked_input,
        epilogue=group.epilogue,
    )
    out = blocked_output(shape, lanes, flat)
    data_shape = (n, -(-c // lanes), h, w, lanes) if blocked_input else (n, c, h, w)

    def emit() -> None:
        vectors = config.tile(writer.spec).vectors
        key = ("conv", vectors, groups, blocked_input)
        packed = writer.packed(
            weight_expr,
            key,
            lambda: pack_conv(
                kernel, lanes=lanes, vectors=vectors, groups=groups, blocked_input=blocked_input
            ),
        )
        source = writer.blocked(data) if blocked_input else _plain_rank4(writer, data)
        kh, kw = window.kernel
        function = writer.library.get(
            writer.bb,
            (config, data_shape, out),
            f"conv2d_{kh}x{kw}",
            "conv",
            f"{'blocked' if blocked_input else 'plain'} input, tile {config.tile(writer.spec)}",
            lambda name: conv_kernel(config, writer.spec, name, data_shape, out),
        )
        args = [source, packed, *writer.operands(group.sources)]
        writer.define(group.result, blocked=writer.call(function, args, out.shape))

    writer.place(node, group, emit)
    return ""


def _plain_rank4(writer: FunctionWriter, expr: Any) -> Any:
    shape, _ = static_type(expr)
    assert shape is not None
    source = writer.plain(expr)
    if len(shape) == 3:
        source = writer.reshape(source, spatial_rank4(shape, 3))
    return source


def _depthwise(writer: FunctionWriter, node: Node, window: Window, kernel: Any) -> str:
    lanes = writer.spec.lanes
    shape = node.shape
    assert shape is not None
    group = blocked_group(writer, node, shape)
    config = Channelwise(
        kind="depthwise",
        batch=shape[0],
        blocks=-(-shape[1] // lanes),
        window=window,
        epilogue=group.epilogue,
    )

    def emit() -> None:
        packed = writer.packed(
            node.inputs[1], "depthwise", lambda: block_channels(kernel[:, 0], lanes, 0)
        )
        _emit_channelwise(writer, node, config, group, [packed])

    writer.place(node, group, emit)
    return ""


def _emit_channelwise(
    writer: FunctionWriter, node: Node, config: Channelwise, group: Any, weights: list[Any]
) -> None:
    assert node.shape is not None
    out = blocked_output(node.shape, writer.spec.lanes, flat=False)
    kh, kw = config.window.kernel
    kind: Kind = "depthwise" if config.kind == "depthwise" else "pool"
    function = writer.library.get(
        writer.bb,
        (config, out),
        f"{kind}_{kh}x{kw}",
        kind,
        f"{config.kind}, blocked",
        lambda name: channelwise_kernel(config, writer.spec, name, out),
    )
    args = [writer.blocked(node.inputs[0]), *weights, *writer.operands(group.sources)]
    writer.define(group.result, blocked=writer.call(function, args, out.shape))


# Pooling ---------------------------------------------------------------------------------------
def _pool(writer: FunctionWriter, node: Node) -> str:
    attrs = node.attrs
    in_shape, _ = static_type(node.inputs[0])
    if in_shape is None or node.shape is None:
        return "dynamic shape"
    if str(attrs.layout) not in ("NCHW", "NCW"):
        return f"layout {attrs.layout}"
    if not writer.has_blocked(node.inputs[0]):
        return "input is not channel-blocked"
    average = node.op.startswith("avg")
    pads = _ints(attrs.padding)
    if average and bool(attrs.ceil_mode):
        return "average with ceil_mode"
    rank = len(in_shape)
    lift = (1,) * (4 - rank)
    _, _, h, w = spatial_rank4(in_shape, rank)
    _, _, oh, ow = spatial_rank4(node.shape, rank)
    window = Window(
        input=(h, w),
        output=(oh, ow),
        kernel=(*lift, *_ints(attrs.pool_size)),  # type: ignore[arg-type]
        strides=(*lift, *_ints(attrs.strides)),  # type: ignore[arg-type]
        dilations=(*lift, *_ints(attrs.dilation)),  # type: ignore[arg-type]
        pads=(pads[0], pads[1]) if rank == 4 else (0, pads[0]),
    )
    inside = average and any(pads) and not bool(attrs.count_include_pad)
    group = blocked_group(writer, node, node.shape)
    config = Channelwise(
        kind=("average_inside" if inside else "average_all") if average else "max",
        batch=node.shape[0],
        blocks=-(-node.shape[1] // writer.spec.lanes),
        window=window,
        epilogue=group.epilogue,
    )
    writer.place(node, group, lambda: _emit_channelwise(writer, node, config, group, []))
    return ""


def _global_pool(writer: FunctionWriter, node: Node, mean: bool) -> str:
    data = node.inputs[0]
    shape, _ = static_type(data)
    assert shape is not None
    assert node.shape is not None
    full = spatial_rank4(shape, len(shape))
    # Without keepdims the result is not blocked, so that nothing may be fused behind it.
    keeps = len(node.shape) == len(shape)
    kept = node.shape if keeps else (*shape[:2], *(1,) * (len(shape) - 2))
    claimed = writer.claimed if keeps else set(writer.graph.nodes)
    domain = BlockedDomain(kept, writer.spec.lanes)
    group = grow(writer.graph, node.var, domain, kept, claimed)
    config = GlobalPool(mean=mean, shape=full, epilogue=group.epilogue)

    def emit() -> None:
        from tvm import relax

        lanes = writer.spec.lanes
        function = writer.library.get(
            writer.bb,
            config,
            "global_pool",
            "reduction",
            "blocked global pooling",
            lambda name: global_pool_kernel(config, writer.spec, name),
        )
        args = [writer.blocked(data), *writer.operands(group.sources)]
        n, c, _, _ = full
        blocks = -(-c // lanes)
        result = writer.call(function, args, (n, blocks, 1, 1, lanes))
        if keeps:
            writer.define(group.result, blocked=result)
            return
        flat = writer.reshape(result, (n, blocks * lanes))
        if c % lanes:
            flat = writer.bb.emit(relax.op.strided_slice(flat, [1], [0], [c]))
        writer.define(group.result, plain=flat)

    writer.place(node, group, emit)
    return ""


def _adaptive_pool(writer: FunctionWriter, node: Node) -> str:
    if node.shape is None or any(extent != 1 for extent in node.shape[2:]):
        return "adaptive pooling to more than one pixel"
    if static_type(node.inputs[0])[0] is None or not writer.has_blocked(node.inputs[0]):
        return "input is not channel-blocked"
    return _global_pool(writer, node, mean=True)


# Rows ------------------------------------------------------------------------------------------
def _reduction(writer: FunctionWriter, node: Node) -> str:
    shape, _ = static_type(node.inputs[0])
    if shape is None or node.shape is None or 0 in shape:
        return "dynamic or empty shape"
    rank = len(shape)
    given = node.attrs.axis
    axes = sorted(axis % rank for axis in _ints(given)) if given else list(range(rank))
    trailing = axes == list(range(rank - len(axes), rank))
    spatial = rank in (3, 4) and axes == list(range(2, rank))
    if spatial and node.op in ("mean", "max") and writer.has_blocked(node.inputs[0]):
        return _global_pool(writer, node, mean=node.op == "mean")
    if not trailing or not axes:
        return f"reduced axes {axes} are not the last ones"
    outer = shape[: axes[0]]
    columns = 1
    for extent in shape[axes[0] :]:
        columns *= extent
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


def _softmax(writer: FunctionWriter, node: Node) -> str:
    shape = node.shape
    assert shape is not None
    if not shape or int(node.attrs.axis) % len(shape) != len(shape) - 1 or 0 in shape:
        return "not over the last axis"
    config = Rows(kind="softmax", outer=shape[:-1], columns=shape[-1])
    _emit_rows(writer, node, config, shape, [], Access(shape, contiguous_strides(shape)))
    return ""


def _layer_norm(writer: FunctionWriter, node: Node) -> str:
    shape, attrs = node.shape, node.attrs
    assert shape is not None
    axes = sorted(axis % len(shape) for axis in _ints(attrs.axes))
    if axes != list(range(axes[0], len(shape))) or 0 in shape:
        return "not over the last axes"
    columns = 1
    for axis in axes:
        columns *= shape[axis]
    if len(axes) > 1:
        return "over several axes"
    if any(static_type(item)[1] != "float32" for item in node.inputs):
        return "mixed dtypes"
    config = Rows(
        kind="layer_norm",
        outer=shape[:-1],
        columns=columns,
        epsilon=float(attrs.epsilon),
        scale=bool(attrs.scale),
        center=bool(attrs.center),
    )
    extra = [writer.plain(item) for item in node.inputs[1:3]]
    _emit_rows(writer, node, config, shape, extra, Access(shape, contiguous_strides(shape)))
    return ""


# Matrix products -------------------------------------------------------------------------------
def _matmul(writer: FunctionWriter, node: Node) -> str:
    left, right = node.inputs
    types = [static_type(item) for item in node.inputs]
    if any(dtype != "float32" for _, dtype in types):
        return "not float32"
    shapes = [shape for shape, _ in types]
    if any(shape is None or len(shape) < 2 or 0 in shape for shape in shapes):
        return "dynamic, empty or one-dimensional operand"
    weight = writer.graph.constant(right)
    b_shape = shapes[1]
    assert b_shape is not None
    shared = all(extent == 1 for extent in b_shape[:-2])
    if shared and b_shape[:-2] and node.shape is not None and len(node.shape) < len(b_shape):
        shared = False
    a = view_of(writer.graph, left, writer.materialized)
    if shared:
        rows = a.reshaped((_product(a.shape[:-1]), a.shape[-1]))
        if rows is None:
            shape = shapes[0]
            assert shape is not None
            plain = View(left, shape, contiguous_strides(shape))
            rows = plain.reshaped((_product(shape[:-1]), shape[-1]))
        assert rows is not None
        if weight is not None:
            return _emit_matmul(writer, node, rows, None, as_float32(weight.reshape(b_shape[-2:])))
        b = view_of(writer.graph, right, writer.materialized)
        b_rows = b.reshaped(b_shape[-2:])
        assert b_rows is not None
        return _emit_matmul(writer, node, rows, b_rows, None)
    b = view_of(writer.graph, right, writer.materialized)
    return _emit_matmul(writer, node, a, b, None)


def _product(extents: tuple[int, ...]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result


def _broadcast_access(view: View, base_shape: tuple[int, ...], rank: int) -> Access:
    """A view addressed by `rank` coordinates; extents of one are broadcast."""
    strides = tuple(
        0 if extent == 1 else stride
        for extent, stride in zip(view.shape, view.strides, strict=True)
    )
    return Access(base_shape, (0,) * (rank - len(strides)) + strides)


def _emit_matmul(writer: FunctionWriter, node: Node, a: View, b: View | None, weight: Any) -> str:
    shape = node.shape
    assert shape is not None
    flat = len(a.shape) == 2 and (b is None or len(b.shape) == 2)
    batch = () if flat else shape[:-2]
    m, k = a.shape[-2:]
    n = shape[-1]
    scale = a.scale * (b.scale if b is not None else 1.0)
    group = grow(
        writer.graph, node.var, PlainDomain(shape, rows=flat), shape, writer.claimed, scale=scale
    )
    permutation, result = _absorbed_transpose(writer, group.result, shape)
    out_shape = tuple(shape[axis] for axis in permutation)
    by_axis = dict(zip(permutation, contiguous_strides(out_shape), strict=True))
    out_strides = tuple(by_axis[axis] for axis in range(len(shape)))
    if flat:
        if permutation == tuple(range(len(shape))):
            out_strides = (n, 1)
        else:
            # Rows are one coordinate here, which a transposed output can't be addressed by.
            permutation, result = tuple(range(len(shape))), group.result
            out_shape, out_strides = shape, (n, 1)
    if result is not group.result:
        group.nodes.append(writer.graph.producer[result])
        group.result = result
    rank = len(batch) + 2
    a_base = static_type(a.base)[0]
    b_base = static_type(b.base)[0] if b is not None else None
    assert a_base is not None
    config = Matmul(
        batch=batch,
        m=m,
        n=n,
        k=k,
        a=_broadcast_access(a, a_base, rank),
        b=None if b is None or b_base is None else _b_access(b, b_base, rank),
        out=Access(out_shape, out_strides),
        epilogue=group.epilogue,
    )

    def emit() -> None:
        tile = config.tile(writer.spec)
        if b is not None:
            second = writer.plain(b.base)
        else:
            second = writer.packed(
                node.inputs[1],
                ("matmul", tile.vectors),
                lambda: pack_columns(weight, writer.spec.lanes, tile.vectors),
            )
        function = writer.library.get(
            writer.bb,
            config,
            "batch_matmul" if batch else "matmul",
            "matmul",
            f"{'packed' if b is None else 'run-time'} right side, tile {tile}",
            lambda name: matmul_kernel(config, writer.spec, name),
        )
        args = [writer.plain(a.base), second, *writer.operands(group.sources)]
        writer.define(group.result, plain=writer.call(function, args, out_shape))

    writer.place(node, group, emit)
    return ""


def _b_access(view: View, base_shape: tuple[int, ...], rank: int) -> Access:
    """As `_broadcast_access`, but a single column still counts as contiguous."""
    access = _broadcast_access(view, base_shape, rank)
    if view.shape[-1] == 1:
        return Access(access.shape, (*access.strides[:-1], 1))
    return access


def _absorbed_transpose(
    writer: FunctionWriter, value: Any, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Any]:
    """A `permute_dims` that is the value's only use and keeps the last axis: written directly."""
    identity = tuple(range(len(shape)))
    users = writer.graph.users.get(value, [])
    if len(users) != 1 or value in writer.graph.results or users[0] in writer.claimed:
        return identity, value
    user = users[0]
    if user.op != "permute_dims" or not user.attrs.axes:
        return identity, value
    axes = tuple(axis % len(shape) for axis in _ints(user.attrs.axes))
    if axes[-1] != len(shape) - 1:
        return identity, value
    return axes, user.var


# Elementwise in the blocked layout ---------------------------------------------------------------
def _elementwise(writer: FunctionWriter, node: Node) -> str:
    shape = node.shape
    if shape is None or len(shape) not in (3, 4):
        return "not a feature map"
    start = next(
        (
            item
            for item in node.inputs
            if writer.has_blocked(item) and static_type(item)[0] == shape
        ),
        None,
    )
    if start is None:
        return "no channel-blocked input"
    domain = BlockedDomain(shape, writer.spec.lanes)
    group = grow(writer.graph, start, domain, shape, writer.claimed, roots=(node,))
    if not group.nodes:
        return "an operand can't be read in blocks"
    full = spatial_rank4(shape, len(shape))
    data = blocked_access(full, writer.spec.lanes, broadcast=False)
    config = Elementwise(shape=full, data=data, epilogue=group.epilogue)

    def emit() -> None:
        function = writer.library.get(
            writer.bb,
            config,
            "blocked_" + node.op,
            "elementwise",
            "blocked",
            lambda name: elementwise_kernel(config, writer.spec, name),
        )
        args = [writer.blocked(start), *writer.operands(group.sources)]
        writer.define(group.result, blocked=writer.call(function, args, data.shape))

    writer.place(node, group, emit)
    return ""


RULES: dict[str, Rule] = {
    "conv2d": _conv,
    "conv1d": _conv,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "max_pool1d": _pool,
    "avg_pool1d": _pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _reduction,
    "sum": _reduction,
    "max": _reduction,
    "min": _reduction,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "matmul": _matmul,
    "elementwise": _elementwise,
}
