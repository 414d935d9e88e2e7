"""Small models with Q/DQ pairs, and faults to plant in them. Not here: what is asserted of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgepass.frontends import load_model
from edgepass.passes.base import Context
from edgepass.passes.quantize.static_int8 import StaticInt8

WEIGHTED = ("Conv", "Gemm", "MatMul")


def normal(*shape, seed=0, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def graph_of(nodes, inputs, outputs, weights) -> ir.Model:
    protos = [
        helper.make_node(op, ins, outs, name=f"n{i}_{op}", **attributes)
        for i, (op, ins, outs, attributes) in enumerate(nodes)
    ]
    infos = [
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in of.items()
        ]
        for of in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(protos, "g", *infos, tensors)
    return load_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )


def cnn() -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """Convolutions, one of them depthwise, a residual Add, a classifier."""
    nodes = [
        ("Conv", ["x", "w0", "b0"], ["c0"], {"pads": [1] * 4}),
        ("Relu", ["c0"], ["r0"], {}),
        ("Conv", ["r0", "w1", "b1"], ["c1"], {"pads": [1] * 4, "group": 16}),
        ("Relu", ["c1"], ["r1"], {}),
        ("Conv", ["r1", "w2", "b2"], ["c2"], {}),
        ("Add", ["c2", "r0"], ["a"], {}),
        ("Relu", ["a"], ["r2"], {}),
        ("Conv", ["r2", "w3", "b3"], ["c3"], {"strides": [2, 2]}),
        ("Relu", ["c3"], ["r3"], {}),
        ("GlobalAveragePool", ["r3"], ["g"], {}),
        ("Flatten", ["g"], ["f"], {}),
        ("Gemm", ["f", "w4", "b4"], ["y"], {"transB": 1}),
    ]
    shapes = [(16, 3, 3, 3), (16, 1, 3, 3), (16, 16, 1, 1), (32, 16, 3, 3), (10, 32)]
    weights = {
        f"w{i}": normal(*s, seed=i, scale=(2 / np.prod(s[1:])) ** 0.5) for i, s in enumerate(shapes)
    }
    weights |= {f"b{i}": normal(s[0], seed=50 + i, scale=0.5) for i, s in enumerate(shapes)}
    model = graph_of(nodes, {"x": ["n", 3, 12, 12]}, {"y": ["n", 10]}, weights)
    return model, [{"x": normal(2, 3, 12, 12, seed=100 + i)} for i in range(8)]


def mlp() -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """Four layers of 64."""
    nodes, weights, last = [], {}, "x"
    for i, (rows, columns) in enumerate([(30, 64), (64, 64), (64, 64), (64, 5)]):
        out = "y" if i == 3 else f"h{i}"
        nodes.append(("Gemm", [last, f"w{i}", f"b{i}"], [out], {}))
        weights[f"w{i}"] = normal(rows, columns, seed=i, scale=(2 / rows) ** 0.5)
        weights[f"b{i}"] = normal(columns, seed=20 + i, scale=0.5)
        if i < 3:
            nodes.append(("Relu", [out], [f"r{i}"], {}))
            last = f"r{i}"
    model = graph_of(nodes, {"x": ["n", 30]}, {"y": ["n", 5]}, weights)
    return model, [{"x": normal(16, 30, seed=100 + i)} for i in range(8)]


def transformer() -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """Two encoder layers of one head, in the pre-norm form of Xiong et al. 2020."""
    size, nodes, weights, last = 32, [], {}, "x"

    def linear(name: str, source: str, rows: int, columns: int, seed: int) -> str:
        weights[f"{name}_w"] = normal(rows, columns, seed=seed, scale=rows**-0.5)
        weights[f"{name}_b"] = normal(columns, seed=seed + 500, scale=0.3)
        nodes.append(("MatMul", [source, f"{name}_w"], [f"{name}_m"], {}))
        nodes.append(("Add", [f"{name}_m", f"{name}_b"], [name], {}))
        return name

    def norm(name: str, source: str, seed: int) -> str:
        weights[f"{name}_g"] = 1 + normal(size, seed=seed, scale=0.1)
        weights[f"{name}_o"] = normal(size, seed=seed + 1, scale=0.1)
        nodes.append(
            ("LayerNormalization", [source, f"{name}_g", f"{name}_o"], [name], {"axis": -1})
        )
        return name

    weights["root"] = np.array(size**-0.5, np.float32)
    for i in range(2):
        p, s = f"l{i}", 40 * i
        n = norm(f"{p}_n1", last, s + 1)
        q, k, v = (linear(f"{p}_{c}", n, size, size, s + 5 + j) for j, c in enumerate("qkv"))
        nodes += [
            ("Transpose", [k], [f"{p}_kt"], {"perm": [0, 2, 1]}),
            ("MatMul", [q, f"{p}_kt"], [f"{p}_qk"], {}),
            ("Mul", [f"{p}_qk", "root"], [f"{p}_s"], {}),
            ("Softmax", [f"{p}_s"], [f"{p}_p"], {"axis": -1}),
            ("MatMul", [f"{p}_p", v], [f"{p}_c"], {}),
        ]
        o = linear(f"{p}_o", f"{p}_c", size, size, s + 10)
        nodes.append(("Add", [last, o], [f"{p}_r1"], {}))
        n = norm(f"{p}_n2", f"{p}_r1", s + 12)
        h = linear(f"{p}_f1", n, size, 64, s + 15)
        nodes.append(("Relu", [h], [f"{p}_a"], {}))
        f = linear(f"{p}_f2", f"{p}_a", 64, size, s + 16)
        last = f"{p}_r2" if i == 0 else "y"
        nodes.append(("Add", [f"{p}_r1", f], [last], {}))
    model = graph_of(nodes, {"x": ["n", 10, size]}, {"y": ["n", 10, size]}, weights)
    return model, [{"x": normal(2, 10, size, seed=100 + i)} for i in range(8)]


MODELS: dict[str, Callable[[], tuple[ir.Model, list[dict[str, np.ndarray]]]]] = {
    "cnn": cnn,
    "mlp": mlp,
    "transformer": transformer,
}


def quantized(model: ir.Model, samples, **options) -> ir.Model:
    """Static int8, by default of all that can be, with pairs."""
    copy = model.clone()
    StaticInt8(**options).run(copy, Context(calibration=samples))
    return copy


# --- faults ----------------------------------------------------------------------------------


def layers_of(model: ir.Model) -> list[ir.Node]:
    """The nodes whose weight is behind a DequantizeLinear of a constant."""
    return [n for n in model.graph if n.op_type in WEIGHTED and stored_weight(n) is not None]


def stored_weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a node's weight."""
    maker = node.inputs[1].producer()
    constant = maker is not None and maker.op_type == "DequantizeLinear"
    return maker if constant and maker.inputs[0].const_value is not None else None


def pairs_of(model: ir.Model) -> list[ir.Node]:
    """The QuantizeLinears of activations."""
    return [n for n in model.graph if n.op_type == "QuantizeLinear"]


def set_array(value: ir.Value, array: np.ndarray) -> None:
    """Another constant in place of one."""
    value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)


def scale_activation(pair: ir.Node, factor: float) -> None:
    """The scale of a Q/DQ pair, both halves, and the zero point as the same range scaled needs."""
    scale = pair.inputs[1]
    set_array(scale, (scale.const_value.numpy() * factor).astype(np.float32))


def scale_weight(node: ir.Node, factor: float, *, again: bool, channel: int | None = None) -> None:
    """A weight's scale, in all channels or one; `again`: its integers as they are with that scale
    (saturated or coarse), else the integers stay."""
    maker = stored_weight(node)
    integers, scale = maker.inputs[0].const_value.numpy(), maker.inputs[1].const_value.numpy()
    axis = channel_axis(node)
    shape = [-1 if scale.size > 1 and i == axis else 1 for i in range(integers.ndim)]
    changed = np.array(scale, np.float32)
    if channel is None:
        changed = changed * np.float32(factor)
    else:
        changed[channel] *= factor
    if again:
        floats = integers * scale.reshape(shape)
        set_array(
            maker.inputs[0],
            np.clip(np.rint(floats / changed.reshape(shape)), -127, 127).astype(integers.dtype),
        )
    set_array(maker.inputs[1], changed.astype(np.float32))


def channel_axis(node: ir.Node) -> int:
    """The axis of a weight's output channels."""
    if node.op_type == "Conv":
        return 0
    turned = node.attributes.get("transB")
    return 0 if turned is not None and turned.as_int() else 1


def zero_channel(node: ir.Node, channel: int) -> None:
    """The weights of one output channel."""
    maker = stored_weight(node)
    integers = maker.inputs[0].const_value.numpy().copy()
    np.moveaxis(integers, channel_axis(node), 0)[channel] = 0
    set_array(maker.inputs[0], integers)


def lose_bias(node: ir.Node) -> bool:
    """Zeros for a bias; whether there was one."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    value = node.inputs[2]
    while value.producer() is not None:
        value = value.producer().inputs[0]
    set_array(value, np.zeros_like(value.const_value.numpy()))
    return True
