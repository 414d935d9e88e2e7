"""The last factor of each factorized layer, solved once more for the inputs that it really gets.

Here: `refit`. Layers before have changed, and the subspaces were chosen before that: least squares
against the original's outputs makes up for part of both, as He et al. 2017, "Channel pruning for
accelerating very deep neural networks", arXiv:1707.06168, do after pruning. Not here: the
arithmetic (`quantize.reconstruct`).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import constant_array
from ..base import Feed
from ..quantize.capture import Capture
from ..quantize.layers import LinearLayer, linear_layer
from ..quantize.moments import Moments
from ..quantize.reconstruct import MAX_INPUTS, reconstruct
from .write import set_bias

MAX_SAMPLES = 64
"""More calibration samples are thinned out evenly: every layer in a row runs them all again."""
_BUDGET = 1 << 28


@dataclasses.dataclass(frozen=True)
class Written:
    """The last step of a factorized layer, and where its bias is (see `Site`).

    `shift` is what was added to a bias behind the layer, so that the layer's own result lacks it.
    """

    node: ir.Node
    bias: tuple[ir.Node, int] | None
    shift: np.ndarray | None = None


def refit(
    model: ir.Model,
    reference: ir.Model,
    layers: Sequence[Written],
    samples: Sequence[Feed],
    progress: Callable[[int, int, str], None],
) -> int:
    """Solve the layers' weights and biases again, in graph order; how many changed.

    Their results are called as in `reference`, the model before.
    """
    step = -(-len(samples) // MAX_SAMPLES)
    results = {value.name: value for node in reference.graph for value in node.outputs}
    editor = Editor()
    changed = 0
    blocks = _blocks(model, layers)
    for done, block in enumerate(blocks):
        progress(done, len(blocks), "solving again")
        halves = [(Moments(layer), Moments(layer)) for _, layer in block]
        wanted = [results[layer.node.outputs[0].name] for _, layer in block]
        with (
            Capture(reference, wanted) as before,
            Capture(model, [layer.data for _, layer in block]) as now,
        ):
            for i in range(0, len(samples), step):
                expected, found = before.run(samples[i], i), now.run(samples[i], i)
                for (_, layer), half, result in zip(block, halves, wanted, strict=True):
                    x, y = found[layer.data.name or ""], expected[result.name or ""]
                    # by content: no order of the samples changes who teaches and who judges
                    side = zlib.crc32(np.ascontiguousarray(x).data) % 2
                    half[side].add(x.astype(np.float32), y.astype(np.float32))
        for (item, layer), half in zip(block, halves, strict=True):
            changed += _solve(item, layer, half, editor)
    return changed


def _solve(
    item: Written, layer: LinearLayer, halves: tuple[Moments, Moments], editor: Editor
) -> bool:
    if not all(half.rows for half in halves):
        return False
    stored = constant_array(layer.weight)
    assert stored is not None
    matrix = layer.matrix(stored.astype(np.float32))
    own = constant_array(layer.bias)
    groups, _, out = layer.shape
    bias = np.zeros(groups * out) if own is None else own.astype(np.float64).reshape(-1)
    bias = np.broadcast_to(bias, (groups * out,))
    if item.shift is not None:
        bias = bias + item.shift
    solved = reconstruct(halves, matrix, None if item.bias is not None else bias)
    if item.bias is not None:
        error = halves[0].union(halves[1]).mean_error(solved, bias)
        set_bias(item.bias, error.reshape(-1), editor)
    if solved is matrix:
        return False
    restored = layer.restore(solved).astype(stored.dtype)
    base = f"{layer.weight.name}"
    editor.replace_input(layer.node, 1, editor.initializer(layer.node, base, restored))
    return True


def _blocks(model: ir.Model, layers: Sequence[Written]) -> list[list[tuple[Written, LinearLayer]]]:
    """Layers none of which gets another's result, in order, whose sums fit in memory together."""
    of = {item.node: item for item in layers}
    depth: dict[ir.Node, int] = {}
    for node in model.graph:
        makers = [v.producer() for v in node.inputs if v is not None]
        depth[node] = max((depth.get(m, 0) for m in makers if m is not None), default=0)
        depth[node] += node in of
    found: list[list[tuple[Written, LinearLayer]]] = []
    level = held = 0
    for item in sorted(layers, key=lambda item: depth[item.node]):
        layer = linear_layer(item.node)
        if layer is None or layer.shape[1] > MAX_INPUTS:
            continue
        need = 2 * Moments.bytes(layer)
        if not found or depth[item.node] != level or held + need > _BUDGET:
            found.append([])
            level, held = depth[item.node], 0
        found[-1].append((item, layer))
        held += need
    return found
