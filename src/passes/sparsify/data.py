"""Sparsification that looks at what weights are multiplied by: Wanda and SparseGPT.

Here: `Layers`, which goes through the layers of a model in graph order, those side by side at once,
each with its inputs as the layers sparsified so far make them and the float model's results to
come near to. Not here: weights of which no data is known (`sparsify`), the arithmetic (`sparsegpt`,
`quantize.zeros`).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import add_initializer, constant_array
from ..base import Feed
from ..quantize.bias_correction import corrected_bias
from ..quantize.capture import Capture, Progress, iterate
from ..quantize.corrections import MAX_SAMPLES, bias_place, levels_of, own_bias
from ..quantize.layers import LinearLayer, linear_layer
from ..quantize.moments import Moments, excess
from ..quantize.qdq import drop_unused_constant
from ..quantize.zeros import solve_around
from .patterns import Pattern, keep_of_run, smallest
from .sparsegpt import BLOCK, saliency, sparsegpt
from .weights import Weight

MAX_INPUTS = 4608
"""Wider layers get Wanda's scores: a matrix of all pairs of inputs is too much."""
_RIDGES = (1.0, 0.1, 0.01, 0.001)
_TRIAL_STEPS = 25
_BUDGET = 1 << 28


def layers_with_data(model: ir.Model, weights: Sequence[Weight]) -> dict[Weight, LinearLayer]:
    """The weights that one linear layer of the main graph reads, and nothing else."""
    found = {}
    for weight in weights:
        layer = linear_layer(weight.nodes[0])
        if layer is None or layer.weight is not weight.value or layer.node.graph is not model.graph:
            continue
        if len(weight.value.uses()) == 1 and not weight.value.is_graph_output():
            found[weight] = layer
    return found


def ratios_by_error(
    model: ir.Model,
    layers: Mapping[Weight, LinearLayer],
    samples: Sequence[Feed],
    ratio: float,
) -> dict[Weight, float]:
    """The share of zeros of each weight by one threshold for all of them.

    What counts is the squared error of removing a weight, in units of the variance of its layer's
    results. No weight gets more than halfway from the ratio to all.
    """
    values = [layer.data for layer in layers.values()]
    values += [layer.node.outputs[0] for layer in layers.values()]
    sums = {weight: Moments(layer, products=False) for weight, layer in layers.items()}
    power = dict.fromkeys(layers, 0.0)
    for arrays in iterate(model, values, _thinned(samples)):
        for weight, layer in layers.items():
            y = arrays[layer.node.outputs[0].name or ""]
            sums[weight].add(arrays[layer.data.name or ""], y)
            power[weight] += float(np.square(y, dtype=np.float64).mean()) * y.size
    cap = (1 + ratio) / 2
    scores = []
    for weight, layer in layers.items():
        loss = np.square(_matrix(layer)) * sums[weight].squares[:, :, None]
        worth = (loss / max(power[weight], 1e-30)).reshape(-1)
        within = round(cap * worth.size)
        scores.append(np.sort(worth)[:within].astype(np.float32))
    total = round(ratio * sum(weight.size for weight in layers))
    chosen = smallest(np.concatenate(scores), total)
    parts = np.split(chosen, np.cumsum([len(s) for s in scores])[:-1])
    return {
        weight: float(part.sum()) / weight.size for weight, part in zip(layers, parts, strict=True)
    }


class Layers:
    """The layers whose inputs are known, to be sparsified in turn.

    `pattern`, `method` and `solve` are the pass's options; `ratios` the share of zeros by weight.
    """

    def __init__(
        self,
        model: ir.Model,
        layers: Mapping[Weight, LinearLayer],
        ratios: Mapping[Weight, float],
        pattern: Pattern,
        *,
        method: str,
        solve: bool,
    ) -> None:
        self.model = model
        self.layers = layers
        self.ratios = ratios
        self.pattern = pattern
        self.method = method
        self.resolve = solve
        self.solved = self.wide = self.biases = 0

    def run(self, samples: Sequence[Feed], progress: Progress) -> None:
        """Sparsify all of them, in place.

        Raises:
            CalibrationError: a sample does not fit the model.
        """
        reference = self.model.clone()
        by_name = {v.name: v for node in reference.graph for v in node.outputs}
        blocks = list(self._blocks())
        for done, block in enumerate(blocks):
            progress(done, len(blocks), "sparsifying")
            halves = [self._moments(weight) for weight in block]
            layers = [self.layers[weight] for weight in block]
            results = [by_name[layer.node.outputs[0].name] for layer in layers]
            inputs = [layer.data for layer in layers]
            with Capture(reference, results) as as_float, Capture(self.model, inputs) as sparse:
                for i, sample in enumerate(_thinned(samples)):
                    wanted, found = as_float.run(sample, i), sparse.run(sample, i)
                    for half, value, result in zip(halves, inputs, results, strict=True):
                        x, y = found[value.name or ""], wanted[result.name or ""]
                        # by content: no order of the samples changes who teaches and who judges
                        half[zlib.crc32(np.ascontiguousarray(x).data) % len(half)].add(x, y)
            for weight, half in zip(block, halves, strict=True):
                self._sparsify(weight, half)
        progress(len(blocks), len(blocks), "sparsifying")

    def _blocks(self) -> Iterator[list[Weight]]:
        """Layers none of which gets another's result, whose sums fit in memory together."""
        levels = levels_of(self.model.graph, {layer.node for layer in self.layers.values()})
        level = {weight: levels[layer.node] for weight, layer in self.layers.items()}
        for _, group in itertools.groupby(sorted(self.layers, key=level.__getitem__), level.get):
            block: list[Weight] = []
            size = 0
            for weight in group:
                need = 2 * Moments.bytes(self.layers[weight]) if self._pairs(weight) else 0
                if block and size + need > _BUDGET:
                    yield block
                    block, size = [], 0
                block.append(weight)
                size += need
            yield block

    def _pairs(self, weight: Weight) -> bool:
        """Whether products of all pairs of inputs are summed."""
        needed = self.resolve or self.method == "sparsegpt"
        return needed and self.layers[weight].shape[1] <= MAX_INPUTS

    def _moments(self, weight: Weight) -> tuple[Moments, Moments]:
        pairs, layer = self._pairs(weight), self.layers[weight]
        return Moments(layer, products=pairs), Moments(layer, products=pairs)

    # --- one layer -------------------------------------------------------------------------------

    def _sparsify(self, weight: Weight, halves: tuple[Moments, Moments]) -> None:
        layer = self.layers[weight]
        both = halves[0].union(halves[1])
        place = bias_place(layer.node) if self.resolve else None
        bias = own_bias(layer)
        matrix = _matrix(layer)
        fixed = None if place is not None else bias
        self.wide += self.method == "sparsegpt" and not self._pairs(weight)
        if self.method == "sparsegpt" and both.xx is not None:
            pruned, zeros = self._by_surgeon(weight, matrix, both.problem(fixed)[0])
        else:
            zeros = self._by_inputs(weight, matrix, both)
            pruned = np.where(zeros, 0, matrix)
        if self.resolve and both.xx is not None:
            pruned = self._solved(halves, both, matrix, pruned, zeros, fixed)
        tensor = weight.value.const_value
        assert tensor is not None
        array = layer.restore(pruned).astype(tensor.dtype.numpy())
        weight.value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=weight.value.name)
        if place is not None and both.rows:
            self._correct_bias(place, both.mean_error(pruned, bias))

    def _by_inputs(self, weight: Weight, matrix: np.ndarray, both: Moments) -> np.ndarray:
        """Zeros where |w| |x| is least.

        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023): x
        over all samples; unstructured weights of one output are compared with each other.
        """
        scores = np.square(matrix) * both.squares[:, :, None]
        ratio = self.ratios[weight]
        if not self.pattern.is_free:
            return self._in_pattern(weight, scores, ratio)
        return _least_of_each(scores, ratio)

    def _by_surgeon(
        self, weight: Weight, matrix: np.ndarray, moments: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """SparseGPT; where channels are in groups, or zeros in blocks, by saliency at once."""
        layer, ratio = self.layers[weight], self.ratios[weight]
        groups, depth, out = layer.shape
        pattern = self.pattern
        if groups > 1 or not (pattern.is_free or pattern.is_fixed):
            zeros = self._in_pattern(weight, saliency(matrix, moments), ratio)
            return np.where(zeros, 0, matrix), zeros
        choose: Callable[[np.ndarray], np.ndarray]
        if pattern.is_free:
            choose = _Exactly(round(ratio * depth * out), depth * out)
            order = np.arange(depth)
            runs = [(i, min(depth, i + BLOCK)) for i in range(0, depth, BLOCK)]
        else:
            choose = _keep(pattern)
            order, runs = _runs(layer, pattern.run)
        found, chosen = sparsegpt(matrix[0][order], moments[0][np.ix_(order, order)], runs, choose)
        pruned, zeros = np.empty_like(found), np.empty_like(chosen)
        pruned[order], zeros[order] = found, chosen
        return pruned[None], zeros[None]

    def _in_pattern(self, weight: Weight, scores: np.ndarray, ratio: float) -> np.ndarray:
        """The pattern's zeros for scores [groups, in, out]."""
        layer = self.layers[weight]
        shaped = layer.restore(scores)
        return layer.matrix(self.pattern.zeros(shaped, weight.out_axis, weight.in_axis, ratio))

    def _solved(
        self,
        halves: tuple[Moments, Moments],
        both: Moments,
        matrix: np.ndarray,
        pruned: np.ndarray,
        zeros: np.ndarray,
        fixed: np.ndarray | None,
    ) -> np.ndarray:
        """What is left solved again, as firmly as one half of the samples allows the other."""
        if min(half.rows for half in halves) < 2:
            return pruned
        problems = [half.problem(fixed) for half in halves]
        masked = np.where(zeros, 0, matrix)
        best, least = 0.0, sum(float(excess(a, b, masked).sum()) for a, b in problems)
        for ridge in _RIDGES:
            loss = 0.0
            for own, other in (problems, problems[::-1]):
                found = solve_around(zeros, *own, matrix, ridge, steps=_TRIAL_STEPS)
                loss += float(excess(*other, found).sum())
            if not loss < least:
                break
            best, least = ridge, loss
        if not best:
            return masked
        self.solved += 1
        return solve_around(zeros, *both.problem(fixed), matrix, best, pruned)

    def _correct_bias(self, place: tuple[ir.Node, int], error: np.ndarray) -> None:
        node, index = place
        value = node.inputs[index]
        array = constant_array(value)
        if value is None or array is None:
            return
        fixed = corrected_bias(array, error).astype(array.dtype)
        node.replace_input_with(
            index, add_initializer(self.model.graph, f"{value.name}/corrected", fixed)
        )
        drop_unused_constant(value)
        self.biases += 1


class _Exactly:
    """Chooses the least of each output in a run so that the runs together have that many zeros.

    Not of all outputs together, as in the paper: that empties the outputs of little variance, and
    the layers behind a normalization miss them (stories260k: perplexity 13.6 against 10.2).
    """

    def __init__(self, zeros: int, total: int) -> None:
        self.zeros, self.total = zeros, total

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        count = round(self.zeros * scores.size / max(1, self.total))
        self.zeros -= count
        self.total -= scores.size
        found: np.ndarray = _least_of_each(scores[None], count / max(1, scores.size))[0]
        return found


def _keep(pattern: Pattern) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scores: keep_of_run(scores, 0, pattern.keep, pattern.run)


def _runs(layer: LinearLayer, run: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """An order of the inputs in which channels are neighbours, and runs of channels in it."""
    depth = layer.shape[1]
    assert layer.weight.shape is not None
    channels = layer.weight.shape.numpy()[1] if layer.node.op_type == "Conv" else depth
    order = np.arange(depth).reshape(channels, -1).T.reshape(-1)
    runs = [
        (start + i, start + min(channels, i + run))
        for start in range(0, depth, channels)
        for i in range(0, channels, run)
    ]
    return order, runs


def _least_of_each(scores: np.ndarray, ratio: float) -> np.ndarray:
    """A mask of the least of each column [groups, in, out]; the total is exact up to rounding."""
    groups, depth, out = scores.shape
    order = np.argsort(scores, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(depth)[None, :, None], axis=1)
    # columns take turns in rounding up
    ends = np.round(ratio * depth * np.arange(groups * out + 1)).astype(int)
    counts = np.diff(ends).reshape(groups, 1, out)
    mask: np.ndarray = rank < counts
    return mask


def _matrix(layer: LinearLayer) -> np.ndarray:
    weight = constant_array(layer.weight)
    assert weight is not None
    return layer.matrix(weight.astype(np.float32))


def _thinned(samples: Sequence[Feed]) -> list[Feed]:
    step = max(1, -(-len(samples) // MAX_SAMPLES))
    return [samples[i] for i in range(0, len(samples), step)]
