"""What the outputs lose when residual blocks are left out, measured on samples.

Here: `Skipping`, one session of a model with a switch for each block, and `influence`, the cheap
ranking. Not here: the blocks (`depth_blocks`), which of them to leave out (`depth_choice`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import add_initializer, fresh_name, index_names
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample
from ..quantize.capture import Progress, iterate
from ..quantize.switched import divergence_over
from .blocks import CONVOLUTION, POOLING, Block

_GATES = "depth/present"


class Skipping:
    """One session for every subset of the blocks of a model; a context manager.

    A block that is skipped has its branch replaced by zeros before the sum: what the model
    computes without it, for blocks within blocks and terms of one sum too. The model is not
    changed.
    """

    def __init__(self, model: ir.Model, blocks: Sequence[Block]) -> None:
        self.count = len(blocks)
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._runner = OrtRunner(_gated(model, blocks))

    def run(self, feed: Feed, present: np.ndarray, where: str = "") -> list[np.ndarray]:
        """The outputs, in order, with the blocks of a mask [blocks] bool present.

        Raises:
            CalibrationError: the model fails on the sample.
        """
        given = {**feed, _GATES: present}
        found = run_on_sample(self._runner, given, self._outputs, where or "sample")
        return [found[name] for name in self._outputs]

    def __enter__(self) -> Skipping:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.close()


class Harm:
    """The divergence of outputs (`divergence_over`) from those with all blocks, over samples."""

    def __init__(self, skipping: Skipping, samples: Sequence[Feed]) -> None:
        self._skipping = skipping
        self._samples = samples
        every = np.ones(skipping.count, bool)
        self._references = [
            skipping.run(sample, every, f"calibration sample {i}")
            for i, sample in enumerate(samples)
        ]

    def without(self, present: np.ndarray) -> float:
        """Error power over signal power with the blocks of a mask present; infinite where a
        result is not finite."""
        return divergence_over(
            (reference, self._skipping.run(sample, present))
            for reference, sample in zip(self._references, self._samples, strict=True)
        )


def influence(
    model: ir.Model,
    blocks: Sequence[Block],
    samples: Sequence[Feed],
    progress: Progress = lambda done, total, what: None,
) -> np.ndarray:
    """How much each block turns what passes it: 1 - cosine of x and x + f(x), the mean over
    positions and samples, [blocks]. Men et al. 2024, "ShortGPT: Layers in Large Language Models
    are More Redundant Than You Expect", arXiv:2403.03853 (Block Influence). One run a sample.
    """
    total = np.zeros(len(blocks))
    values = {v for block in blocks for v in (block.branch, block.result)}
    for arrays in iterate(model, values, samples, progress):
        for i, block in enumerate(blocks):
            result, branch = arrays[block.result.name or ""], arrays[block.branch.name or ""]
            axis = 1 if block.kind in (CONVOLUTION, POOLING) and result.ndim > 2 else -1
            total[i] += _turned(result.astype(np.float64), branch, axis)
    return total / max(1, len(samples))


def _turned(result: np.ndarray, branch: np.ndarray, axis: int) -> float:
    before = result - branch
    product = np.sum(before * result, axis)
    sizes = np.sqrt(np.sum(before * before, axis) * np.sum(result * result, axis))
    cosine = np.divide(product, sizes, out=np.ones_like(product), where=sizes > 0)
    return float(np.mean(1.0 - cosine)) if cosine.size else 0.0


def _gated(model: ir.Model, blocks: Sequence[Block]) -> ir.Model:
    """A copy with one more input, [blocks] bool: which branches are added."""
    copy = model.clone()
    index_names(copy)
    graph = copy.graph
    made = {v.name: v for node in graph for v in node.outputs}
    present = ir.Value(
        name=_GATES, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(blocks)])
    )
    first = next(iter(graph))
    insert = functools.partial(_insert, graph)
    for i, block in enumerate(blocks):
        which = add_initializer(graph, f"{_GATES}/{i}", np.array(i, np.int64))
        gate = insert(first, "Gather", present, which)
        branch = made[block.branch.name]
        ((user, slot),) = branch.uses()
        assert branch.dtype is not None
        zero = add_initializer(graph, f"{_GATES}/zero", np.zeros((), branch.dtype.numpy()))
        user.replace_input_with(slot, insert(user, "Where", gate, branch, zero))
    graph.inputs.append(present)
    return copy


def _insert(graph: ir.Graph, anchor: ir.Node, op_type: str, *inputs: ir.Value) -> ir.Value:
    node = ir.Node("", op_type, inputs, num_outputs=1)
    node.name = node.outputs[0].name = fresh_name(graph, f"{_GATES}/{op_type}")
    graph.insert_before(anchor, node)
    return node.outputs[0]
