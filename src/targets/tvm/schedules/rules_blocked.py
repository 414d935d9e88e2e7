"""Rules for what runs channel-blocked: convolutions, poolings, elementwise work between them.

Each rule returns an empty string if it took the node, else the reason why not (see `rules.py`).
"""

from __future__ import annotations

from typing import Any

from .conv import Conv, conv_kernel
from .depthwise import Channelwise, channelwise_kernel
from .fusion import BlockedDomain, grow, spatial_rank4
from .graph import Node, int_tuple, static_type
from .layout import Elementwise, GlobalPool, blocked_access, elementwise_kernel, global_pool_kernel
from .pack import block_channels, pack_conv
from .report import Kind
from .rewrite import FunctionWriter, as_float32, blocked_group, blocked_output
from .window import Window


def convolution(writer: FunctionWriter, node: Node) -> str:
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
    pads = int_tuple(attrs.padding)
    window = Window(
        input=(h, w),
        output=(oh, ow),
        kernel=(kernel.shape[2], kernel.shape[3]),
        strides=(*lift, *int_tuple(attrs.strides)),  # type: ignore[arg-type]
        dilations=(*lift, *int_tuple(attrs.dilation)),  # type: ignore[arg-type]
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


def pooling(writer: FunctionWriter, node: Node) -> str:
    attrs = node.attrs
    in_shape, _ = static_type(node.inputs[0])
    if in_shape is None or node.shape is None:
        return "dynamic shape"
    if str(attrs.layout) not in ("NCHW", "NCW"):
        return f"layout {attrs.layout}"
    if not writer.has_blocked(node.inputs[0]):
        return "input is not channel-blocked"
    average = node.op.startswith("avg")
    pads = int_tuple(attrs.padding)
    if average and bool(attrs.ceil_mode):
        return "average with ceil_mode"
    rank = len(in_shape)
    lift = (1,) * (4 - rank)
    _, _, h, w = spatial_rank4(in_shape, rank)
    _, _, oh, ow = spatial_rank4(node.shape, rank)
    window = Window(
        input=(h, w),
        output=(oh, ow),
        kernel=(*lift, *int_tuple(attrs.pool_size)),  # type: ignore[arg-type]
        strides=(*lift, *int_tuple(attrs.strides)),  # type: ignore[arg-type]
        dilations=(*lift, *int_tuple(attrs.dilation)),  # type: ignore[arg-type]
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


def global_pooling(writer: FunctionWriter, node: Node, mean: bool) -> str:
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


def adaptive_pooling(writer: FunctionWriter, node: Node) -> str:
    if node.shape is None or any(extent != 1 for extent in node.shape[2:]):
        return "adaptive pooling to more than one pixel"
    if static_type(node.inputs[0])[0] is None or not writer.has_blocked(node.inputs[0]):
        return "input is not channel-blocked"
    return global_pooling(writer, node, mean=True)


def blocked_elementwise(writer: FunctionWriter, node: Node) -> str:
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
