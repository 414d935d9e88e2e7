"""A model run a part at a time, over all samples, with what the next parts need kept.

Here: `Stepwise`. Going through a model layer after layer, changing weights on the way, then costs
one run of each node, where running it anew up to each layer costs the square of that. Not here:
what is done at each stop (`repair`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import graph_tree, node_subgraphs
from ...targets.feed import check_feed, input_specs
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample


class Stepwise:
    """The values of a model's main graph on some samples, computed as they are asked for.

    Weights of nodes that have not run yet may be changed between calls. The graph's nodes must be
    in topological order. Memory: for each sample, the values that nodes not run yet read.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Feed]) -> None:
        self._model = model
        self._done: set[ir.Node] = set()
        specs, optional = input_specs(model), list(model.graph.initializers)
        self._held: list[dict[str, np.ndarray]] = []
        for i, sample in enumerate(samples):
            check_feed(
                specs, sample, where=f"calibration sample {i}", optional=optional, finite=True
            )
            self._held.append({name: np.asarray(array) for name, array in sample.items()})

    def advance(self, values: Sequence[ir.Value]) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of the values, by name, one sample after the other; to be used up.

        Raises:
            CalibrationError: the model fails on a sample.
        """
        part = self._missing(values)
        names = list(dict.fromkeys(value.name or "" for value in values))
        if not part:
            for held in self._held:
                yield {name: held[name] for name in names}
            self._forget()
            return
        self._done |= set(part)
        outputs = self._outputs(part, set(names))
        runner: OrtRunner | None = None
        needed: list[str] = []
        for i, held in enumerate(self._held):
            if runner is None:
                cut, needed = _part(self._model, part, outputs, held)
                runner = OrtRunner(cut, optimize=False)
            found = run_on_sample(
                runner, {name: held[name] for name in needed}, None, f"calibration sample {i}"
            )
            held.update(found)
            yield {name: held[name] for name in names}
        if runner is not None:
            runner.close()
        self._forget()

    def _missing(self, values: Sequence[ir.Value]) -> list[ir.Node]:
        """The nodes that have to run for the values, in graph order."""
        wanted: set[ir.Node] = set()
        stack = [value.producer() for value in values]
        while stack:
            node = stack.pop()
            if node is None or node in self._done or node in wanted:
                continue
            if node.graph is not self._model.graph:
                continue
            wanted.add(node)
            stack += [value.producer() for value in _reads(node)]
        return [node for node in self._model.graph if node in wanted]

    def _outputs(self, part: Sequence[ir.Node], names: set[str]) -> list[ir.Value]:
        """What of the part's results is asked for or read by nodes that have not run."""
        awaited = self._awaited()
        results = [value for node in part for value in node.outputs]
        return [v for v in results if v.name and (v.name in names or v.name in awaited)]

    def _awaited(self) -> set[str]:
        """The names of what the nodes that have not run read."""
        rest = [node for node in self._model.graph if node not in self._done]
        return {value.name or "" for node in rest for value in _reads(node)}

    def _forget(self) -> None:
        """Drop what nothing will read."""
        awaited = self._awaited()
        for held in self._held:
            for name in [name for name in held if name not in awaited]:
                del held[name]


def _reads(node: ir.Node) -> list[ir.Value]:
    """The values a node reads, those of its subgraphs' nodes included."""
    found = [value for value in node.inputs if value is not None]
    for subgraph in node_subgraphs(node):
        for graph in graph_tree(subgraph):
            found += [value for inner in graph for value in inner.inputs if value is not None]
            found += [value for value in graph.outputs if value is not None]
    return found


def _part(
    model: ir.Model,
    part: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    held: Mapping[str, np.ndarray],
) -> tuple[bytes, list[str]]:
    """A model of some nodes, whose inputs are what other nodes give them, and their names."""
    import onnx

    made = {value.name for node in part for value in node.outputs}
    read = dict.fromkeys(value.name or "" for node in part for value in _reads(node))
    names = [name for name in read if name in held and name not in made]
    graph = onnx.GraphProto(name="part")
    for name in names:
        kind = onnx.helper.np_dtype_to_tensor_dtype(held[name].dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * held[name].ndim))
    for name in read:
        weight = model.graph.initializers.get(name)
        if weight is not None and name not in held and weight.const_value is not None:
            tensor = ir.to_proto(weight.const_value)
            tensor.name = name
            graph.initializer.append(tensor)
    graph.node.extend(ir.to_proto(node) for node in part)
    graph.output.extend(ir.to_proto(value) for value in outputs)
    whole = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    for domain, version in model.opset_imports.items():
        whole.opset_import.append(onnx.helper.make_opsetid(domain, version))
    whole.functions.extend(ir.to_proto(function) for function in model.functions.values())
    return whole.SerializeToString(), names
