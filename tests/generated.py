"""Random models for property tests: sound, runnable, with the oddities that real graphs have.

Values of a few fixed shapes are combined by unary, binary, convolution, matrix, shape-computation,
transposing, slicing, joining and normalizing operators, on integers and in 8 bits too; some inputs
are constants, some results unused, some used twice, some intermediate values are graph outputs too,
and some lie inside an If or a Loop. Any opset from 7 on can be asked for.
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

    def __init__(self, draw, dynamic: bool, opset: int):
        self.draw = draw
        self.opset = opset
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
        kinds += ["ends", "join", "integer"]
        if self.opset >= 11:
            kinds += ["loop", "quantized"]
        getattr(self, f"step_{self.draw(st.sampled_from(kinds))}")()

    def step_unary(self) -> None:
        name, shape = self.pick()
        known = [op for op in UNARY if op != "Erf" or self.opset >= 9]
        self.add(self.draw(st.sampled_from(known)), [name], shape)

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
            bias = [self.weight(8)] if self.opset < 11 else []  # optional since opset 11
            self.add("Gemm", [name, self.weight(8, 8), *bias], shape, transB=1)

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

    def clip(self, name: str, shape: tuple, low: float, high: float) -> str:
        if self.opset < 11:
            return self.add("Clip", [name], shape, min=float(low), max=float(high))
        bounds = [self.constant(np.array(v, np.float32)) for v in (low, high)]
        return self.add("Clip", [name, *bounds], shape)

    def axes(self, op: str, name: str, axis: int, result: str) -> None:
        """Squeeze or Unsqueeze, whose axes became an input in opset 13."""
        if self.opset < 13:
            node = helper.make_node(op, [name], [result], axes=[axis])
        else:
            axes = self.constant(np.array([axis], np.int64))
            node = helper.make_node(op, [name, axes], [result])
        self.nodes.append(node)

    def step_ends(self) -> None:
        """A dimension put in and taken out again; or a slice that takes everything, or less."""
        name, shape = self.pick()
        if self.draw(st.booleans()):
            axis = self.draw(st.integers(0, len(shape)))
            self.axes("Unsqueeze", name, axis, wide := self.name("u"))
            self.axes("Squeeze", wide, axis, out := self.name())
            self.values.append((out, shape))
            return
        start = self.draw(st.integers(0, 1)) if isinstance(shape[-1], int) else 0
        size = shape[-1] - start if isinstance(shape[-1], int) else shape[-1]
        if size == 0:
            return
        if self.opset < 10:
            last = len(shape) - 1
            self.add("Slice", [name], (*shape[:-1], size), axes=[last], starts=[start], ends=[999])
            return
        numbers = [self.constant(np.array([v], np.int64)) for v in (start, 2**31 - 1, -1)]
        self.add("Slice", [name, *numbers], (*shape[:-1], size))

    def step_join(self) -> None:
        """Concat, of one tensor too, and a Split of what was joined."""
        name, shape = self.pick()
        if not isinstance(shape[-1], int):
            return
        count = self.draw(st.integers(1, 2))
        last = len(shape) - 1
        joined = self.name("j")
        self.nodes.append(helper.make_node("Concat", [name] * count, [joined], axis=last))
        parts = [self.name() for _ in range(count)]
        options = {"num_outputs": count} if self.opset >= 18 else {}
        self.nodes.append(helper.make_node("Split", [joined], parts, axis=last, **options))
        self.values += [(part, shape) for part in parts]

    def step_integer(self) -> None:
        """Integer arithmetic on an input: its division truncates, so it may not become float's."""
        name, shape = self.values[self.draw(st.integers(0, 1))]
        kind = self.draw(
            st.sampled_from([(TensorProto.INT32, np.int32), (TensorProto.INT64, np.int64)])
        )
        tens = self.name("s")
        self.nodes.append(helper.make_node("Mul", [name, self.constant(np.float32([10]))], [tens]))
        whole = self.name("i")
        self.nodes.append(helper.make_node("Cast", [tens], [whole], to=kind[0]))
        for op in self.draw(st.permutations(["Div", "Mul", "Add", "Sub"]))[:2]:
            factor = self.constant(np.array(self.draw(st.sampled_from([1, 3, 6])), kind[1]))
            self.nodes.append(helper.make_node(op, [whole, factor], [after := self.name("i")]))
            whole = after
        self.add("Cast", [whole], shape, to=TensorProto.FLOAT)

    def step_quantized(self) -> None:
        """An input through 8 bits; others would show an error of rounding as a whole step."""
        name, shape = self.values[self.draw(st.integers(0, 1))]
        dtype = self.draw(st.sampled_from([np.int8, np.uint8]))
        scale, zero = self.constant(np.float32(0.05)), self.constant(np.array(3, dtype))
        small = self.name("q")
        self.nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [small]))
        if self.draw(st.booleans()):
            self.nodes.append(helper.make_node("Identity", [small], [same := self.name("q")]))
            small = same
        self.add("DequantizeLinear", [small, scale, zero], shape)

    def step_loop(self) -> None:
        """Three trips that add a captured value and a constant computed in the body."""
        name, shape = self.pick()
        capture = self.draw(st.sampled_from([v for v in self.values if v[1] == shape]))[0]
        i, go, v, keep, out = (self.name("l") for _ in range(5))
        once, twice, grown = (self.name("l") for _ in range(3))
        half = numpy_helper.from_array(np.float32(0.5), "")
        nodes = [
            helper.make_node("Constant", [], [once], value=half),
            helper.make_node("Mul", [once, once], [twice]),
            helper.make_node("Mul", [v, twice], [grown]),
            helper.make_node("Add", [grown, capture], [out]),
            helper.make_node("Identity", [go], [keep]),
        ]
        kinds = [(i, TensorProto.INT64), (go, TensorProto.BOOL), (v, TensorProto.FLOAT)]
        inputs = [helper.make_tensor_value_info(n, t, [] if n != v else None) for n, t in kinds]
        outputs = [
            helper.make_tensor_value_info(keep, TensorProto.BOOL, []),
            helper.make_tensor_value_info(out, TensorProto.FLOAT, None),
        ]
        body = helper.make_graph(nodes, self.name("body"), inputs, outputs)
        trips = self.constant(np.array(3))
        self.add("Loop", [trips, self.constant(np.array(True)), name], shape, body=body)

    def step_clip(self) -> None:
        name, shape = self.pick()
        if self.opset < 8:  # Max and Min broadcast since opset 8
            self.clip(name, shape, -0.5, 0.5)
            return
        low, high = (self.constant(np.array(v, np.float32)) for v in (-0.5, 0.5))
        out = self.add("Max", [name, low], shape)
        self.add("Min", [out, high], shape)

    def step_spelled(self) -> None:
        """x * Clip(x + 3, 0, 6) / 6, or GELU, as exporters write them."""
        name, shape = self.pick()
        number = lambda v: self.constant(np.array(v, np.float32))  # noqa: E731
        if self.opset < 9 or self.draw(st.booleans()):
            shifted = self.add("Add", [name, number(3)], shape)
            clipped = self.clip(shifted, shape, 0, 6)
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
    version = opset if opset is not None else draw(st.sampled_from([18, 20, 21, 22]))
    builder = Builder(draw, draw(st.booleans()), version)
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
