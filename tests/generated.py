"""Random models for property tests: sound, runnable, with the oddities that real graphs have.

Values of a few fixed shapes are combined by unary, binary, convolution, matrix, shape-computation,
transposing and normalizing operators; some inputs are constants, some results unused, some used
twice, some intermediate values are graph outputs too, and some lie inside an If.
"""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

UNARY = ["Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Identity", "Softplus", "Dropout", "Erf"]
BINARY = ["Add", "Mul", "Sub", "Max", "Min"]


class Builder:
    """Grows one graph; `values` are (name, shape) of what can be used next."""

    def __init__(self, draw, dynamic: bool):
        self.draw = draw
        self.batch = "batch" if dynamic else 2
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: list[tuple[str, tuple]] = [
            ("image", (self.batch, 4, 6, 6)),
            ("matrix", (self.batch, 8)),
        ]
        self.count = 0
        self.generator = np.random.default_rng(draw(st.integers(0, 2**16)))

    def name(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def add(self, op: str, inputs: list[str], shape: tuple, outputs: int = 1, **attributes) -> str:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=self.name("n"), **attributes))
        self.values.append((names[0], shape))
        return names[0]

    def weight(self, *shape: int, low: float = -1.0, high: float = 1.0) -> str:
        array = self.generator.uniform(low, high, shape).astype(np.float32)
        return self.constant(array)

    def constant(self, array: np.ndarray) -> str:
        name = self.name("w")
        if self.draw(st.booleans()):
            self.initializers.append(numpy_helper.from_array(array, name))
        else:
            tensor = numpy_helper.from_array(array, name)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def pick(self, rank: int | None = None) -> tuple[str, tuple]:
        choices = [v for v in self.values if rank is None or len(v[1]) == rank]
        return self.draw(st.sampled_from(choices))

    def step(self) -> None:
        kinds = ["unary", "unary", "binary", "neutral", "conv", "gemm", "transpose", "reshape"]
        kinds += ["shape", "constant", "spelled", "if", "duplicate", "batch_norm", "clip"]
        getattr(self, f"step_{self.draw(st.sampled_from(kinds))}")()

    def step_unary(self) -> None:
        name, shape = self.pick()
        self.add(self.draw(st.sampled_from(UNARY)), [name], shape)

    def step_binary(self) -> None:
        name, shape = self.pick()
        same = [v for v in self.values if v[1] == shape]
        other = self.draw(st.sampled_from(same))[0]
        self.add(self.draw(st.sampled_from(BINARY)), [name, other], shape)

    def step_neutral(self) -> None:
        name, shape = self.pick()
        op, value = self.draw(st.sampled_from([("Add", 0), ("Mul", 1), ("Div", 1), ("Mul", 2)]))
        self.add(op, [name, self.constant(np.array(value, np.float32))], shape)

    def step_duplicate(self) -> None:
        name, shape = self.pick()
        first = self.add("Sigmoid", [name], shape)
        second = self.add("Sigmoid", [name], shape)
        self.add("Add", [first, second], shape)

    def step_conv(self) -> None:
        name, shape = self.pick(4)
        if shape[1] != 4 or shape[2:] != (6, 6):
            return
        kernel = self.draw(st.sampled_from([1, 3]))
        group = self.draw(st.sampled_from([1, 4]))
        inputs = [name, self.weight(4, 4 // group, kernel, kernel)]
        if self.draw(st.booleans()):
            inputs.append(self.weight(4))
        pads = [kernel // 2] * 4
        out = self.add("Conv", inputs, shape, pads=pads, group=group)
        after = self.draw(st.sampled_from(["none", "norm", "relu-norm", "scale", "bias"]))
        if after == "relu-norm":
            out = self.add("Relu", [out], shape)
        if after.endswith("norm"):
            self.norm(out, shape)
        elif after in ("scale", "bias"):
            constant = self.weight(4, 1, 1)
            self.add("Mul" if after == "scale" else "Add", [out, constant], shape)

    def step_batch_norm(self) -> None:
        self.norm(*self.pick(4))

    def norm(self, name: str, shape: tuple) -> None:
        channels = shape[1]
        if not isinstance(channels, int):
            return
        parts = [self.weight(channels) for _ in range(3)]
        variance = self.weight(channels, low=0.5, high=2.0)
        self.add("BatchNormalization", [name, *parts, variance], shape)

    def step_gemm(self) -> None:
        name, shape = self.pick(2)
        if shape[1] != 8:
            return
        if self.draw(st.booleans()):
            out = self.add("MatMul", [name, self.weight(8, 8)], shape)
            self.add("Add", [out, self.weight(8)], shape)
        else:
            out = self.add("Gemm", [name, self.weight(8, 8)], shape, transB=1)

    def step_transpose(self) -> None:
        name, shape = self.pick(4)
        perm = self.draw(st.permutations(range(4)))
        turned = self.add("Transpose", [name], tuple(shape[i] for i in perm), perm=list(perm))
        if self.draw(st.booleans()):
            back = [list(perm).index(i) for i in range(4)]
            self.add("Transpose", [turned], shape, perm=back)

    def step_reshape(self) -> None:
        name, shape = self.pick(4)
        if not all(isinstance(d, int) for d in shape[1:]):
            return
        total = int(np.prod(shape[1:]))
        target = self.constant(np.array([-1, total], np.int64))
        flat = self.add("Reshape", [name, target], (shape[0], total))
        back = self.constant(np.array([-1, *shape[1:]], np.int64))
        self.add("Reshape", [flat, back], shape)

    def step_shape(self) -> None:
        name, shape = self.pick()
        self.nodes.append(helper.make_node("Shape", [name], [size := self.name("s")]))
        self.add("Reshape", [name, size], shape)

    def step_constant(self) -> None:
        name, shape = self.pick()
        a, b = (self.constant(np.array(v, np.float32)) for v in (1.5, -0.25))
        self.nodes.append(helper.make_node("Add", [a, b], [total := self.name("c")]))
        self.nodes.append(helper.make_node("Exp", [total], [grown := self.name("c")]))
        self.add("Mul", [name, grown], shape)

    def step_clip(self) -> None:
        name, shape = self.pick()
        low, high = (self.constant(np.array(v, np.float32)) for v in (-0.5, 0.5))
        out = self.add("Max", [name, low], shape)
        self.add("Min", [out, high], shape)

    def step_spelled(self) -> None:
        """x * Clip(x + 3, 0, 6) / 6, or GELU, as exporters write them."""
        name, shape = self.pick()
        number = lambda v: self.constant(np.array(v, np.float32))  # noqa: E731
        if self.draw(st.booleans()):
            shifted = self.add("Add", [name, number(3)], shape)
            clipped = self.add("Clip", [shifted, number(0), number(6)], shape)
            product = self.add("Mul", [name, clipped], shape)
            self.add("Div", [product, number(6)], shape)
        else:
            scaled = self.add("Div", [name, number(np.sqrt(2))], shape)
            gate = self.add("Add", [self.add("Erf", [scaled], shape), number(1)], shape)
            product = self.add("Mul", [name, gate], shape)
            self.add("Mul", [product, number(0.5)], shape)

    def step_if(self) -> None:
        name, shape = self.pick()
        branches = []
        for op in self.draw(st.permutations(["Relu", "Neg", "Tanh"]))[:2]:
            inner, out = self.name("i"), self.name("b")
            nodes = [helper.make_node("Identity", [name], [inner])]
            nodes.append(helper.make_node(op, [inner], [out]))
            info = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
            branches.append(helper.make_graph(nodes, self.name("branch"), [], [info]))
        # sometimes the condition is a constant, and one branch is never taken
        flag = "flag" if self.draw(st.booleans()) else self.constant(np.array(True))
        self.add("If", [flag], shape, then_branch=branches[0], else_branch=branches[1])


@st.composite
def models(draw, *, max_steps: int = 12, opset: int | None = None) -> onnx.ModelProto:
    """A model with inputs image [batch,4,6,6], matrix [batch,8], flag [], and 1 to 3 outputs."""
    builder = Builder(draw, dynamic=draw(st.booleans()))
    for _ in range(draw(st.integers(1, max_steps))):
        builder.step()
    made = builder.values[2:] or builder.values
    picked = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    outputs = []
    for i, (name, shape) in enumerate(picked):
        # an output of its own, so that an input is never one
        builder.nodes.append(helper.make_node("Identity", [name], [f"out{i}"]))
        outputs.append(helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, list(shape)))
    if draw(st.booleans()):
        name, shape = made[0]
        if name not in ("image", "matrix"):
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [builder.batch, 4, 6, 6]),
        helper.make_tensor_value_info("matrix", TensorProto.FLOAT, [builder.batch, 8]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(builder.nodes, "generated", inputs, outputs, builder.initializers)
    version = opset if opset is not None else draw(st.sampled_from([18, 20, 21, 22]))
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10
    )
    onnx.checker.check_model(model)
    return model


def feed_for(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a generated model."""
    generator = np.random.default_rng(seed)
    return {
        "image": generator.standard_normal((2, 4, 6, 6)).astype(np.float32),
        "matrix": generator.standard_normal((2, 8)).astype(np.float32),
        "flag": np.array(bool(seed % 2)),
    }
