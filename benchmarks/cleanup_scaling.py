"""Cleanup of generated graphs of 10k, 30k and 100k nodes: seconds, and how they grow.

python benchmarks/cleanup_scaling.py [NODES ...]
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import onnx_ir as ir
from host import describe_host

from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.pipelines import parse_recipe

PATTERN = ("Add", "Relu", "Mul", "Sigmoid", "Identity", "Neg", "Neg", "Tanh", "Transpose", "Exp")


def chain(count: int, branches: int = 8) -> ir.Model:
    """`count` nodes in `branches` parallel chains over [8, 8] that are summed at the end.

    A third of the nodes can be cleaned away; constants, duplicates and dead nodes are among them.
    """
    float32 = ir.TensorType(ir.DataType.FLOAT)
    shape = ir.Shape([8, 8])
    x = ir.Value(name="x", shape=shape, type=float32)
    bias = ir.Value(name="bias", shape=shape, type=float32)
    bias.const_value = ir.tensor(np.full((8, 8), 0.5, np.float32), name="bias")
    one = ir.Value(name="one", shape=ir.Shape([]), type=float32)
    one.const_value = ir.tensor(np.array(1, np.float32), name="one")
    nodes: list[ir.Node] = []
    ends = []

    def add(op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes))
        node.outputs[0].name = f"v{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    for branch in range(branches):
        value = x
        for i in range(max(0, count // branches - 2)):
            op = PATTERN[(i + branch) % len(PATTERN)]
            if op == "Add":
                value = add(op, value, bias)
            elif op == "Mul":
                value = add(op, value, one)
            elif op == "Transpose":
                value = add(op, value, perm=[1, 0])
            else:
                value = add(op, value)
            if i % 50 == 0:
                add("Abs", value)  # nothing uses it
        ends.append(value)
    total = ends[0]
    for value in ends[1:]:
        total = add("Add", total, value)
    total.shape, total.type = shape, float32
    graph = ir.Graph(
        [x], [total], nodes=nodes, initializers=[bias, one], opset_imports={"": 20}, name="chain"
    )
    return ir.Model(graph, ir_version=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", nargs="*", type=int, default=[10_000, 30_000, 100_000])
    sizes = parser.parse_args().nodes
    print(describe_host())
    seconds = []
    for size in sizes:
        model = chain(size)
        nodes = model.graph.num_nodes()
        started = time.perf_counter()
        _, ledger = run_passes(model, parse_recipe("cleanup,dead_code"), Context())
        seconds.append(time.perf_counter() - started)
        after = ledger.after.nodes if ledger.after is not None else 0
        print(
            f"{nodes:7} nodes > {after:7}: {seconds[-1]:6.2f} s, verification and ledger included"
        )
    if len(sizes) > 1:
        slope = math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])
        print(f"time grows as nodes^{slope:.2f}")


if __name__ == "__main__":
    main()
