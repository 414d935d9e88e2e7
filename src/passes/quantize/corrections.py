"""Corrections of static int8 against calibration data: weights solved again, rounding, biases.

Here: `correct`, which goes through the layers of an int8 layout in graph order, those side by side
at once, with inputs as the layers corrected so far make them, and `add_missing_biases`. Not here:
the arithmetic of each method (`reconstruct`, `adaround`, `bias_correction`), writing (`qdq`).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import add_initializer, constant_array, constant_tensor, is_absent, is_onnx_op
from .adaround import adaround
from .bias_correction import corrected_bias
from .capture import Capture, Progress
from .layers import LinearLayer, linear_layer
from .moments import Moments
from .numbers import (
    Affine,
    Range,
    integer_range,
    quantize,
    raise_for_bias,
    spread,
    weight_affine,
)
from .plan import Int8Layout, Weighted
from .qdq import Ready, drop_unused_constant, input_affines, write_qdq
from .reconstruct import MAX_INPUTS, reconstruct
from .zeros import zeros_to_keep

MAX_SAMPLES = 128
"""More calibration samples are thinned out evenly: every layer in a row runs them all again."""
_BUDGET = 1 << 28


class Rounding(enum.StrEnum):
    """How weights become integers: to the nearest, or by the layer's result."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrections:
    """Which methods to use; any of them together."""

    bias: bool = False
    rounding: Rounding = Rounding.NEAREST
    reconstruct: bool = False

    def __bool__(self) -> bool:
        return self.bias or self.reconstruct or self.rounding is not Rounding.NEAREST

    @property
    def needs_products(self) -> bool:
        """Whether means of inputs and results are not enough."""
        return self.reconstruct or self.rounding is not Rounding.NEAREST


def add_missing_biases(model: ir.Model) -> None:
    """Give every Conv and Gemm without a bias one of zeros, for the correction to go to."""
    for node in model.graph:
        layer = linear_layer(node)
        if layer is None or layer.bias is not None or not is_onnx_op(node, "Conv", "Gemm"):
            continue
        groups, _, out = layer.shape
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        base = f"{layer.weight.name}/bias"
        zeros = np.zeros(groups * out, np.float32)
        node.replace_input_with(2, add_initializer(model.graph, base, zeros))


def correct(
    model: ir.Model,
    layout: Int8Layout,
    ranges: Mapping[str, Range],
    samples: Sequence[Mapping[str, np.ndarray]],
    chosen: Corrections,
    plan: Callable[[ir.Model], Int8Layout],
    progress: Progress = lambda done, total, what: None,
) -> tuple[dict[str, Ready], tuple[str, ...]]:
    """Integers for `write_qdq`, by the name of their weight, and notes; biases change in place.

    `plan` makes the same layout of a copy of the model.

    Raises:
        CalibrationError: a sample does not fit the model.
    """
    reference = model.clone()
    step = -(-len(samples) // MAX_SAMPLES)
    work = _Work(model, layout, ranges, chosen)
    blocks = list(work.blocks())
    for done, block in enumerate(blocks):
        progress(done, len(blocks), "correcting")
        twin = model.clone()
        twin_layout = plan(twin)
        places = {node.outputs[0].name: node for node in twin.graph}
        write_qdq(twin, twin_layout, ranges, work.ready)
        inputs = [places[item.node.outputs[0].name].inputs[0] for item in block]
        results = _same(reference, [item.node.outputs[0] for item in block])
        halves = [work.moments(item) for item in block]
        with Capture(reference, results) as as_float, Capture(twin, _given(inputs)) as as_int:
            for i in range(0, len(samples), step):
                sample = samples[i]
                wanted, found = as_float.run(sample, i), as_int.run(sample, i)
                for half, value, result in zip(halves, inputs, results, strict=True):
                    assert value is not None
                    x, y = found[value.name or ""], wanted[result.name or ""]
                    # by content: no order of the samples changes who teaches and who judges
                    half[zlib.crc32(np.ascontiguousarray(x).data) % len(half)].add(x, y)
        for item, half in zip(block, halves, strict=True):
            work.correct(item, half)
    progress(len(blocks), len(blocks), "correcting")
    return work.ready, work.notes()


def levels_of(graph: ir.Graph, layers: set[ir.Node]) -> dict[ir.Node, int]:
    """How many of the layers lie on the longest way to each node."""
    levels: dict[ir.Node, int] = {}
    for node in graph:
        before = [v.producer() for v in node.inputs if v is not None]
        depth = max((levels[p] for p in before if p in levels), default=0)
        levels[node] = depth + (node in layers)
    return levels


def _same(model: ir.Model, values: Sequence[ir.Value]) -> list[ir.Value]:
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    return [by_name[value.name] for value in values]


def _given(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None]


class _Work:
    """The layers that can be corrected, and what has been done to them."""

    def __init__(
        self,
        model: ir.Model,
        layout: Int8Layout,
        ranges: Mapping[str, Range],
        chosen: Corrections,
    ) -> None:
        self.model = model
        self.chosen = chosen
        self.reduce_range = layout.scheme.reduce_range
        self.input_affines = input_affines(layout, ranges)
        self.ready: dict[str, Ready] = {}
        self.items = [item for item in layout.weighted if item.node.graph is model.graph]
        self.layers: dict[Weighted, LinearLayer] = {}
        for item in self.items:
            layer = linear_layer(item.node)
            if layer is not None and not is_absent(constant_tensor(layer.weight)):
                self.layers[item] = layer
        self.skipped = len(layout.weighted) - len(self.layers)
        self.changed = {"bias": 0, "weights": 0, "rounding": 0}
        self.wide = 0

    def blocks(self) -> Iterator[list[Weighted]]:
        """Layers none of which gets another's result, in order, whose sums fit in memory together.

        Were one behind another, both would make up for the same error.
        """
        levels = levels_of(self.model.graph, {item.node for item in self.items})
        ordered = sorted(self.layers, key=lambda item: levels[item.node])
        for _, level in itertools.groupby(ordered, key=lambda item: levels[item.node]):
            block: list[Weighted] = []
            size = 0
            for item in level:
                need = Moments.bytes(self.layers[item]) if self.chosen.needs_products else 0
                if block and size + need > _BUDGET:
                    yield block
                    block, size = [], 0
                block.append(item)
                size += need
            yield block

    def moments(self, item: Weighted) -> tuple[Moments, ...]:
        """Empty sums; two halves where the one is to judge what the other teaches."""
        products = self.chosen.needs_products and self._owns_weight(item)
        count = 2 if self.chosen.reconstruct and products else 1
        return tuple(Moments(self.layers[item], products=products) for _ in range(count))

    def _owns_weight(self, item: Weighted) -> bool:
        weight = self.layers[item].weight
        return len(weight.uses()) == 1 and not weight.is_graph_output()

    def correct(self, item: Weighted, halves: tuple[Moments, ...]) -> None:
        layer = self.layers[item]
        place = bias_place(item.node)
        bias = own_bias(layer)
        free = self.chosen.bias and place is not None
        weight = constant_array(layer.weight)
        assert weight is not None
        matrix = layer.matrix(weight)
        zeros = zeros_to_keep(matrix)
        fixed = None if free else bias
        both = halves[0] if len(halves) == 1 else halves[0].union(halves[1])
        if len(halves) == 2:
            if layer.shape[1] <= MAX_INPUTS and min(half.rows for half in halves):
                solved = reconstruct((halves[0], halves[1]), matrix, fixed, zeros)
                self.changed["weights"] += solved is not matrix
                matrix = solved
            else:
                self.wide += 1
        restored = layer.restore(matrix)
        affine = self._affine(item, restored, bias)
        integers = quantize(restored, affine, item.spec)
        if self.chosen.rounding is Rounding.ADAROUND and both.xx is not None:
            integers = self._rounded(item, both, matrix, fixed, affine, integers)
        if self._owns_weight(item):
            self.ready[layer.weight.name or ""] = Ready(integers, affine)
        if place is not None and free:
            shape = integers.shape
            stored = (integers - spread(affine.zero_point.astype(np.float32), shape, item.spec)) * (
                spread(affine.scale, shape, item.spec)
            )
            self._add_to_bias(place, both.mean_error(layer.matrix(stored), bias))

    def _affine(self, item: Weighted, weight: np.ndarray, bias: np.ndarray) -> Affine:
        layer = self.layers[item]
        affine = weight_affine(weight, item.spec, reduce_range=self.reduce_range)
        if item.has_bias:
            affine = raise_for_bias(affine, bias, float(self.input_affines[layer.data].scale))
        return affine

    def _rounded(
        self,
        item: Weighted,
        moments: Moments,
        matrix: np.ndarray,
        bias: np.ndarray | None,
        affine: Affine,
        nearest: np.ndarray,
    ) -> np.ndarray:
        layer = self.layers[item]
        middle = int(affine.zero_point.flat[0])
        low, high = integer_range(item.spec.dtype)
        scale = np.broadcast_to(spread(affine.scale, nearest.shape, item.spec), nearest.shape)
        limits = max(low, middle - (high - middle)) - middle, high - middle
        zeros = zeros_to_keep(matrix)
        found = adaround(moments, matrix, bias, layer.matrix(scale), limits, zeros=zeros)
        integers = layer.restore(found + middle).astype(nearest.dtype)
        self.changed["rounding"] += not np.array_equal(integers, nearest)
        return integers

    def _add_to_bias(self, place: tuple[ir.Node, int], error: np.ndarray) -> None:
        node, index = place
        value = node.inputs[index]
        array = constant_array(value)
        assert value is not None
        assert array is not None
        base = f"{value.name}/corrected"
        fixed = corrected_bias(array, error)
        node.replace_input_with(index, add_initializer(self.model.graph, base, fixed))
        drop_unused_constant(value)
        self.changed["bias"] += 1

    def notes(self) -> tuple[str, ...]:
        """What was done, and what could not be."""
        total = len(self.layers)
        parts = []
        if self.chosen.reconstruct:
            parts.append(f"solved the weights of {self.changed['weights']} again")
        if self.chosen.rounding is Rounding.ADAROUND:
            parts.append(f"rounded {self.changed['rounding']} by their results")
        if self.chosen.bias:
            parts.append(f"corrected {self.changed['bias']} biases")
        text = f"of {total} layers: {', '.join(parts)}"
        more = []
        if self.skipped:
            more.append(f"{self.skipped} layers not corrected: in a branch, or no plain product")
        if self.wide:
            more.append(
                f"{self.wide} layers not solved again: over {MAX_INPUTS} inputs, or too few samples"
            )
        return (text, *more)


def bias_place(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where a constant is added to the node's result: its bias, or an Add behind it."""
    if len(node.inputs) > 2 and constant_tensor(node.inputs[2]) is not None:
        return node, 2
    result = node.outputs[0]
    users = list(result.uses())
    if is_onnx_op(node, "MatMul") and len(users) == 1 and not result.is_graph_output():
        user = users[0].node
        other = user.inputs[1 - users[0].idx] if is_onnx_op(user, "Add") else None
        constant, weight = constant_array(other), node.inputs[1]
        width = None if weight is None or weight.shape is None else weight.shape[-1]
        if constant is not None and constant.ndim and constant.size == constant.shape[-1] == width:
            return user, 1 - users[0].idx
    return None


def own_bias(layer: LinearLayer) -> np.ndarray:
    """The bias that the layer's own result has in it, zeros where it has none."""
    groups, _, out = layer.shape
    array = constant_array(layer.bias)
    if array is None:
        return np.zeros(groups * out, np.float32)
    return np.array(np.broadcast_to(array.reshape(-1), (groups * out,)), np.float32)
