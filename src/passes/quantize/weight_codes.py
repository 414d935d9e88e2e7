"""Codes of few-bit weights by the method asked for, with second moments where it needs data.

Here: `choose_codes`, which calibrates in batches of layers that fit in memory, or one after the
other so that later layers see the errors of earlier ones. Not here: the methods (`grids`, `gptq`,
`hqq`, `awq`), running the model (`capture`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_tensor, is_absent
from ..base import Context, Feed
from .capture import iterate
from .gptq import gptq
from .grids import Codes, Grid, clipped, nearest
from .hqq import hqq
from .packed import tensor_matrix
from .refine import refine
from .weight_choice import StoredWeight
from .zeros import zeros_to_keep

_BUDGET = 1 << 29
"""Bytes of second moments that are held at a time."""
_ROWS = 4096
"""Rows of one layer's input that one sample gives at most."""


class Method(enum.StrEnum):
    """How codes are chosen.

    `rtn` rounds to nearest in ranges of least error (`minmax`: in full ranges); `hqq` fits zero
    points, `gptq` passes errors on, `awq` first scales channels; the last three of the names need
    calibration data.
    """

    MINMAX = "minmax"
    RTN = "rtn"
    HQQ = "hqq"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq-gptq"

    @property
    def needs_data(self) -> bool:
        """Whether it looks at what the weights are multiplied by."""
        return self in (Method.GPTQ, Method.AWQ, Method.AWQ_GPTQ)

    @property
    def scales(self) -> bool:
        """Whether channels are scaled first."""
        return self in (Method.AWQ, Method.AWQ_GPTQ)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """What a caller may choose of the methods."""

    method: Method
    act_order: bool
    damping: float
    rounds: int
    sequential: bool


def choose_codes(
    model: ir.Model, weights: Sequence[StoredWeight], options: Rounding, context: Context
) -> dict[StoredWeight, Codes]:
    """The codes of each weight whose data is there; the model is not changed.

    Raises:
        CalibrationError: a sample does not fit the model, or the model fails on it.
    """
    present = [w for w in weights if not is_absent(constant_tensor(w.value))]
    found: dict[StoredWeight, Codes] = {}
    samples = context.calibration
    if options.method.needs_data and samples:
        twin = model.clone() if options.sequential else model
        batches = _in_turn(present) if options.sequential else _in_memory(present)
        for batch in batches:
            moments = second_moments(twin, batch, samples)
            for item in batch:
                found[item] = _codes(matrix_of(item), item.grid, options, moments.get(item))
                if options.sequential:
                    _replace(twin, item, found[item])
    for item in present:
        if item not in found:
            found[item] = _codes(matrix_of(item), item.grid, options, None)
    return found


def matrix_of(item: StoredWeight) -> np.ndarray:
    """The constant as [in, out]."""
    tensor = constant_tensor(item.value)
    assert tensor is not None
    return tensor_matrix(tensor.numpy(), item.axis)


def _codes(matrix: np.ndarray, grid: Grid, options: Rounding, moments: np.ndarray | None) -> Codes:
    method = options.method
    if method is Method.MINMAX:
        return nearest(matrix, grid)
    if method is Method.HQQ and not grid.symmetric:
        return hqq(matrix, grid)
    if moments is None or not method.needs_data:
        return clipped(matrix, grid)
    if method is Method.AWQ:
        return clipped(matrix, grid, np.diag(moments))
    zeros, damping = zeros_to_keep(matrix), options.damping
    found = gptq(matrix, moments, grid, damping=damping, act_order=options.act_order, zeros=zeros)
    return refine(matrix, moments, found, damping=damping, rounds=options.rounds, zeros=zeros)


# --- second moments ----------------------------------------------------------------------------


def second_moments(
    model: ir.Model, weights: Iterable[StoredWeight], samples: Sequence[Feed]
) -> dict[StoredWeight, np.ndarray]:
    """X'X / rows of what multiplies each matrix, float64 [in, in]; products of the main graph."""
    by_name = {v.name or "": v for v in model.graph.inputs}
    by_name.update((v.name or "", v) for node in model.graph for v in node.outputs)
    data = {item: _data(item, by_name) for item in weights}
    names = {value.name or "" for values in data.values() for value in values}
    sums: dict[str, np.ndarray] = {}
    rows: dict[str, int] = dict.fromkeys(names, 0)
    if names:
        for arrays in iterate(model, [by_name[name] for name in sorted(names)], samples):
            for name, array in arrays.items():
                part = array.reshape(-1, array.shape[-1])
                if len(part) > _ROWS:
                    part = part[np.linspace(0, len(part) - 1, _ROWS).astype(int)]
                product = (part.T @ part).astype(np.float64)
                sums[name] = sums[name] + product if name in sums else product
                rows[name] += len(part)
    found = {}
    for item, values in data.items():
        total = sum(rows[v.name or ""] for v in values)
        if total:
            found[item] = np.sum([sums[v.name or ""] for v in values], axis=0) / total
    return found


def _data(item: StoredWeight, by_name: Mapping[str, ir.Value]) -> list[ir.Value]:
    """What multiplies a matrix, where all of it is in the main graph."""
    if len(item.shape) != 2:
        return []
    depth = item.shape[1 - item.axis]
    found: dict[str, ir.Value] = {}
    for node in item.products:
        value = node.inputs[0]
        if value is None or (value.name or "") not in by_name or value.shape is None:
            return []
        if node.op_type not in ("MatMul", "Gemm") or value.shape.dims[-1:] != (depth,):
            return []
        found[value.name or ""] = value
    return list(found.values())


def _in_memory(weights: Sequence[StoredWeight]) -> Iterator[list[StoredWeight]]:
    """Batches whose second moments fit in memory together."""
    batch: list[StoredWeight] = []
    held: dict[str, int] = {}
    for item in weights:
        need = _moments_bytes(item)
        new = {name: size for name, size in need.items() if name not in held}
        if batch and sum(held.values()) + sum(new.values()) > _BUDGET:
            yield batch
            batch, held, new = [], {}, need
        batch.append(item)
        held.update(new)
    if batch:
        yield batch


def _moments_bytes(item: StoredWeight) -> dict[str, int]:
    size = 8 * (item.shape[1 - item.axis] ** 2) if len(item.shape) == 2 else 0
    return {(n.inputs[0].name or "") if n.inputs[0] else "": size for n in item.products}


def _in_turn(weights: Sequence[StoredWeight]) -> Iterator[list[StoredWeight]]:
    """Weights that read the same data, in graph order."""
    groups: dict[tuple[str, ...], list[StoredWeight]] = {}
    for item in sorted(weights, key=_position):
        groups.setdefault(tuple(_moments_bytes(item)), []).append(item)
    yield from groups.values()


def _position(item: StoredWeight) -> int:
    """How far down its graph the last product of a weight is."""
    last = item.products[-1] if item.products else item.reads[-1].node
    graph = last.graph
    return 0 if graph is None else _index_of(graph)[last]


def _index_of(graph: ir.Graph | ir.Function) -> dict[ir.Node, int]:
    found: dict[ir.Node, int] | None = graph.meta.get(_ORDER)
    if found is None or len(found) != len(graph):
        found = {node: i for i, node in enumerate(graph)}
        graph.meta[_ORDER] = found
    return found


_ORDER = "edgepass.weight_codes.order"


def _replace(twin: ir.Model, item: StoredWeight, codes: Codes) -> None:
    """Put what a runtime will compute with in place of the constant."""
    name = item.value.name or ""
    value = twin.graph.initializers.get(name)
    if value is None:
        return  # a Constant node, or of a subgraph: later layers see the float
    matrix = codes.restored()
    moved = [d for i, d in enumerate(item.shape) if i != item.axis]
    tensor = np.moveaxis(matrix.reshape(*moved, -1), -1, item.axis)
    value.const_value = ir.Tensor(np.ascontiguousarray(tensor), name=name)
