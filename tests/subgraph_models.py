"""Random models with layers inside If, Loop and Scan, nested, for the quantization passes.

Here: `subgraph_model`, from a seed: convolutions and products on values of the graph itself and on
captured ones, weights of the body, of an outer graph, and shared by both branches, values of one
name in branches beside each other, results that are outputs of the whole model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
IMAGE, MATRIX = (2, 4, 6, 6), (2, 16)


@dataclasses.dataclass
class Scope:
    """One graph while it grows; `values` can be read here: its own and those of outer graphs."""

    prefix: str
    values: list[tuple[str, tuple[int, ...]]]
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    weights: list[onnx.TensorProto] = dataclasses.field(default_factory=list)


class Grower:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.integers(11, 22))
        self.count = 0
        self.main = Scope("", [("image", IMAGE), ("matrix", MATRIX)])
        self.shared: dict[tuple[int, ...], str] = {}

    def name(self, scope: Scope, stem: str) -> str:
        self.count += 1
        # Branches beside each other may use one name for two values.
        return f"{scope.prefix}{stem}{self.count}"

    def array(self, *shape: int) -> np.ndarray:
        fan_in = max(1, int(np.prod(shape[1:])))
        return (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def weight(self, scope: Scope, *shape: int) -> str:
        array = self.array(*shape)
        kind = int(self.rng.integers(4))
        if kind == 0 and shape in self.shared:
            return self.shared[shape]
        if kind <= 1:
            name = f"shared{len(self.main.weights)}"
            self.main.weights.append(numpy_helper.from_array(array, name))
            self.shared[shape] = name
            return name
        name = self.name(scope, "w")
        tensor = numpy_helper.from_array(array, name)
        if kind == 2:
            scope.weights.append(tensor)
        else:
            scope.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def pick(self, scope: Scope, rank: int) -> str:
        names = [name for name, shape in scope.values if len(shape) == rank]
        return str(names[-1] if self.rng.random() < 0.6 else self.rng.choice(names))

    def add(
        self, scope: Scope, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: object
    ) -> str:
        name = self.name(scope, "v")
        scope.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        scope.values.append((name, shape))
        return name

    def layer(self, scope: Scope, rank: int) -> None:
        """A layer with weights, then perhaps an activation."""
        data = self.pick(scope, rank)
        if rank == 4:
            kind = "ConvTranspose" if self.rng.random() < 0.2 else "Conv"
            inputs = [data, self.weight(scope, 4, 4, 3, 3)]
            if self.rng.random() < 0.5:
                inputs.append(self.weight(scope, 4))
            name = self.add(scope, kind, inputs, IMAGE, pads=[1, 1, 1, 1])
        elif self.rng.random() < 0.5:
            name = self.add(scope, "MatMul", [data, self.weight(scope, 16, 16)], MATRIX)
        else:
            inputs = [data, self.weight(scope, 16, 16), self.weight(scope, 16)]
            transposed = int(self.rng.integers(2))
            name = self.add(scope, "Gemm", inputs, MATRIX, transB=transposed)
        if self.rng.random() < 0.7:
            shape = IMAGE if rank == 4 else MATRIX
            self.add(scope, str(self.rng.choice(["Relu", "Tanh", "Sigmoid"])), [name], shape)

    def join(self, scope: Scope, rank: int) -> None:
        shape = IMAGE if rank == 4 else MATRIX
        names = [self.pick(scope, rank), self.pick(scope, rank)]
        self.add(scope, str(self.rng.choice(["Add", "Mul"])), names, shape)

    def fill(self, scope: Scope, depth: int, steps: int) -> None:
        for _ in range(steps):
            rank = int(self.rng.choice([2, 4]))
            kind = self.rng.random()
            if kind < 0.5:
                self.layer(scope, rank)
            elif kind < 0.65:
                self.join(scope, rank)
            elif depth < 2 or (depth == 2 and kind > 0.9):
                make = (self.branch, self.loop, self.scan)[int(self.rng.integers(3))]
                make(scope, rank, depth + 1)

    def body(self, scope: Scope, prefix: str, rank: int, depth: int) -> tuple[Scope, str]:
        inner = Scope(prefix, list(scope.values))
        self.layer(inner, rank)
        self.fill(inner, depth, int(self.rng.integers(1, 4)))
        self.layer(inner, rank)
        return inner, inner.values[-1][0]

    def branch(self, scope: Scope, rank: int, depth: int) -> None:
        shape = IMAGE if rank == 4 else MATRIX
        graphs, count = [], self.count
        for side in ("then", "else"):
            self.count = count  # the same names on both sides
            inner, result = self.body(scope, f"{scope.prefix}b{depth}_", rank, depth)
            info = helper.make_tensor_value_info(result, FLOAT, shape)
            graphs.append(helper.make_graph(inner.nodes, side, [], [info], inner.weights))
            count_after = max(self.count, count)
        self.count = max(count_after, self.count) + 100
        condition = str(self.rng.choice(["flag", "other"]))
        self.add(scope, "If", [condition], shape, then_branch=graphs[0], else_branch=graphs[1])

    def loop(self, scope: Scope, rank: int, depth: int) -> None:
        shape = IMAGE if rank == 4 else MATRIX
        prefix = f"{scope.prefix}l{self.count}_"
        state = f"{prefix}state"
        inner_scope = Scope(scope.prefix, [*scope.values, (state, shape)])
        inner, result = self.body(inner_scope, prefix, rank, depth)
        bounded = f"{prefix}bounded"
        inner.nodes.append(helper.make_node("Tanh", [result], [bounded]))
        inner.nodes.append(helper.make_node("Identity", [f"{prefix}c"], [f"{prefix}d"]))
        graph = helper.make_graph(
            inner.nodes,
            "body",
            [
                helper.make_tensor_value_info(f"{prefix}i", INT64, []),
                helper.make_tensor_value_info(f"{prefix}c", BOOL, []),
                helper.make_tensor_value_info(state, FLOAT, shape),
            ],
            [
                helper.make_tensor_value_info(f"{prefix}d", BOOL, []),
                helper.make_tensor_value_info(bounded, FLOAT, shape),
            ],
            inner.weights,
        )
        self.add(scope, "Loop", ["trips", "", self.pick(scope, rank)], shape, body=graph)

    def scan(self, scope: Scope, rank: int, depth: int) -> None:
        prefix = f"{scope.prefix}s{self.count}_"
        state, item = f"{prefix}state", f"{prefix}item"
        row = (1, 16)
        inner = Scope(prefix, [*scope.values, (item, (16,))])
        inner.nodes.append(helper.make_node("Reshape", [item, "row"], [f"{prefix}row"]))
        weight = self.weight(inner, 16, 16)
        inner.nodes += [
            helper.make_node("MatMul", [f"{prefix}row", weight], [f"{prefix}p"]),
            helper.make_node("Add", [f"{prefix}p", state], [f"{prefix}q"]),
            helper.make_node("Tanh", [f"{prefix}q"], [f"{prefix}next"]),
            helper.make_node(
                "MatMul", [f"{prefix}next", self.weight(inner, 16, 16)], [f"{prefix}m"]
            ),
            helper.make_node("Reshape", [f"{prefix}m", "flat"], [f"{prefix}y"]),
        ]
        graph = helper.make_graph(
            inner.nodes,
            "body",
            [
                helper.make_tensor_value_info(state, FLOAT, row),
                helper.make_tensor_value_info(item, FLOAT, (16,)),
            ],
            [
                helper.make_tensor_value_info(f"{prefix}next", FLOAT, row),
                helper.make_tensor_value_info(f"{prefix}y", FLOAT, (16,)),
            ],
            inner.weights,
        )
        last, name = self.name(scope, "v"), self.name(scope, "v")
        node = helper.make_node(
            "Scan", ["start", self.pick(scope, 2)], [last, name], body=graph, num_scan_inputs=1
        )
        scope.nodes.append(node)
        scope.values.append((name, MATRIX))


def subgraph_model(seed: int) -> onnx.ModelProto:
    """A model of inputs image, matrix, flag, other and trips."""
    grower = Grower(seed)
    scope = grower.main
    scope.weights += [
        numpy_helper.from_array(np.array([1, 16], np.int64), "row"),
        numpy_helper.from_array(np.array([16], np.int64), "flat"),
        numpy_helper.from_array(np.zeros((1, 16), np.float32), "start"),
    ]
    grower.fill(scope, 0, 2)
    (grower.branch, grower.loop)[seed % 2](scope, 4, 1)
    grower.fill(scope, 0, 2)
    grower.layer(scope, 4)
    results = [(n, s) for n, s in scope.values[2:]]
    chosen = dict([results[-1], results[int(grower.rng.integers(len(results)))]])
    made = {out for node in scope.nodes if node.op_type == "If" for out in node.output}
    chosen.update({n: s for n, s in results if n in made})
    graph = helper.make_graph(
        scope.nodes,
        "g",
        [
            helper.make_tensor_value_info("image", FLOAT, IMAGE),
            helper.make_tensor_value_info("matrix", FLOAT, MATRIX),
            helper.make_tensor_value_info("flag", BOOL, []),
            helper.make_tensor_value_info("other", BOOL, []),
            helper.make_tensor_value_info("trips", INT64, []),
        ],
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in chosen.items()],
        scope.weights,
    )
    opsets = [helper.make_opsetid("", grower.opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def feed(
    seed: int, flag: bool = True, other: bool = False, trips: int = 2
) -> dict[str, np.ndarray]:
    """One sample."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.standard_normal(IMAGE).astype(np.float32),
        "matrix": rng.standard_normal(MATRIX).astype(np.float32),
        "flag": np.array(flag),
        "other": np.array(other),
        "trips": np.array(trips, np.int64),
    }
