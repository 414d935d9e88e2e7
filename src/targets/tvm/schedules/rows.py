"""Kernels over contiguous rows: softmax, layer normalization, and reductions of the last axes.

A row is read in vectors with four partial results in flight (a single one would wait for the
latency of each addition), which are then combined; what does not fill a vector is done in scalars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from .builder import Expr, KernelBuilder
from .epilogue import NO_EPILOGUE, Access, Epilogue
from .spec import CpuSpec
from .vecmath import VectorMath

_PARTIALS = 4
_BLOCK = 32
"""Vectors that one partial result sums before it is put aside. Over a long row it would grow until
the terms fall below its last digit: a softmax of 18,710 classes was off by 1e-4."""
_LOWEST = float("-inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """An operator on each of prod(`outer`) rows of `columns` float32 values.

    Coordinates of the epilogue are `outer + (column,)`; for reductions `outer + (0,)`.
    """

    kind: Literal["softmax", "layer_norm", "sum", "mean", "max", "min"]
    outer: tuple[int, ...]
    columns: int
    epsilon: float = 0.0
    scale: bool = True
    center: bool = True
    epilogue: Epilogue = NO_EPILOGUE


_Combine = Callable[[VectorMath, Expr, Expr], Expr]
_ADD: _Combine = lambda math, a, b: a + b  # noqa: E731
_MAX: _Combine = lambda math, a, b: math.maximum(a, b)  # noqa: E731
_MIN: _Combine = lambda math, a, b: math.minimum(a, b)  # noqa: E731


class _Writer:
    def __init__(self, config: Rows, spec: CpuSpec, out: Access) -> None:
        self.config = config
        self.b = KernelBuilder(spec.lanes, spec.threads)
        self.lanes = spec.lanes
        self.storage = out

    def write(self, name: str, data_shape: tuple[int, ...]) -> Any:
        config, b = self.config, self.b
        self.data = b.param("data", data_shape)
        if config.kind == "layer_norm":
            self.gamma = b.param("gamma", (config.columns,))
            self.beta = b.param("beta", (config.columns,))
        self.operands = config.epilogue.declare(b)
        self.out = b.param("out", self.storage.shape)
        self._outer([])
        return b.finish(name)

    def _outer(self, coordinates: list[Expr]) -> None:
        if len(coordinates) < len(self.config.outer):
            extent = self.config.outer[len(coordinates)]
            with self.b.loop(extent, parallel=not coordinates) as i:
                self._outer([*coordinates, i])
            return
        row: Expr = self.b.int64(0)
        for extent, coordinate in zip(self.config.outer, coordinates, strict=True):
            row = row * extent + coordinate
        base = self.b.let(row * self.config.columns, 1, "int64")
        if self.config.kind == "softmax":
            self._softmax(base, coordinates)
        elif self.config.kind == "layer_norm":
            self._layer_norm(base, coordinates)
        else:
            self._reduce(base, coordinates)

    def _fold(
        self,
        start: float,
        combine: _Combine,
        value: Callable[[Expr, int], Expr],
    ) -> Expr:
        """Combine `value(column, lanes)` over a row to one scalar."""
        b, lanes = self.b, self.lanes
        vector, scalar = VectorMath(b, lanes), VectorMath(b, 1)
        vectors, tail = divmod(self.config.columns, lanes)
        groups, rest = divmod(vectors, _PARTIALS)
        partial = b.alloc(_PARTIALS * lanes, registers=True)
        for slot in range(_PARTIALS):
            b.store(partial, slot * lanes, b.splat(start, lanes))

        def accumulate(slot: int, column: Expr) -> None:
            held = b.load(partial, slot * lanes, lanes)
            b.store(partial, slot * lanes, combine(vector, held, value(column, lanes)))

        def accumulate_groups(first: Expr, count: int) -> None:
            with b.loop(count) as i:
                for slot in range(_PARTIALS):
                    accumulate(slot, (first + i) * (_PARTIALS * lanes) + slot * lanes)

        blocks, left = divmod(groups, _BLOCK) if combine is _ADD else (0, groups)
        aside = b.alloc(_PARTIALS * lanes, registers=True) if blocks else None
        for slot in range(_PARTIALS if blocks else 0):
            b.store(aside, slot * lanes, b.splat(start, lanes))
        if blocks:
            with b.loop(blocks) as block:
                accumulate_groups(block * _BLOCK, _BLOCK)
                for slot in range(_PARTIALS):
                    total = b.load(aside, slot * lanes, lanes) + b.load(
                        partial, slot * lanes, lanes
                    )
                    b.store(aside, slot * lanes, total)
                    b.store(partial, slot * lanes, b.splat(start, lanes))
        if left:
            accumulate_groups(b.int64(blocks * _BLOCK), left)
        for slot in range(rest):
            accumulate(slot, b.int64((groups * _PARTIALS + slot) * lanes))
        for slot in range(_PARTIALS if blocks else 0):
            total = b.load(aside, slot * lanes, lanes) + b.load(partial, slot * lanes, lanes)
            b.store(partial, slot * lanes, total)
        halves = [b.load(partial, slot * lanes, lanes) for slot in range(_PARTIALS)]
        both = combine(
            vector, combine(vector, halves[0], halves[1]), combine(vector, halves[2], halves[3])
        )
        b.store(partial, 0, both)
        parts = [b.load(partial, lane, 1) for lane in range(lanes)]
        while len(parts) > 1:
            parts = [
                b.let(combine(scalar, parts[i], parts[i + 1]), 1) for i in range(0, len(parts), 2)
            ]
        total = parts[0]
        if tail:
            b.store(partial, 0, total)
            with b.loop(tail) as i:
                column = i + vectors * lanes
                held = b.load(partial, 0, 1)
                b.store(partial, 0, combine(scalar, held, value(column, 1)))
            total = b.load(partial, 0, 1)
        return b.let(total, 1)

    def _for_columns(self, body: Callable[[Expr, int], None]) -> None:
        vectors, tail = divmod(self.config.columns, self.lanes)
        if vectors:
            with self.b.loop(vectors) as i:
                body(i * self.lanes, self.lanes)
        if tail:
            with self.b.loop(tail) as i:
                body(i + vectors * self.lanes, 1)

    def _finish(self, value: Expr, coordinates: list[Expr], lanes: int) -> None:
        value = self.config.epilogue.apply(self.b, self.operands, value, coordinates, lanes)
        self.b.store(self.out, self.storage.offset(coordinates), value)

    def _load(self, base: Expr, column: Expr, lanes: int) -> Expr:
        return self.b.load(self.data, base + column, lanes)

    def _softmax(self, base: Expr, outer: list[Expr]) -> None:
        b = self.b
        top = self._fold(_LOWEST, _MAX, lambda column, lanes: self._load(base, column, lanes))
        scratch = b.alloc(self.config.columns, registers=False)

        def exponential(column: Expr, lanes: int) -> Expr:
            shifted = self._load(base, column, lanes) - b.splat(top, lanes)
            value = VectorMath(b, lanes).exp(shifted)
            b.store(scratch, column, value)
            return value

        total = self._fold(0.0, _ADD, exponential)
        inverse = b.let(b.splat(1.0, 1) / total, 1)

        def scaled(column: Expr, lanes: int) -> None:
            value = b.load(scratch, column, lanes) * b.splat(inverse, lanes)
            self._finish(value, [*outer, column], lanes)

        self._for_columns(scaled)

    def _layer_norm(self, base: Expr, outer: list[Expr]) -> None:
        """Two passes for mean and variance, as ONNX defines it (no difference of squares)."""
        b, config = self.b, self.config
        share = b.splat(1.0 / config.columns, 1)
        total = self._fold(0.0, _ADD, lambda column, lanes: self._load(base, column, lanes))
        mean = b.let(total * share, 1)

        def squared(column: Expr, lanes: int) -> Expr:
            centered = b.let(self._load(base, column, lanes) - b.splat(mean, lanes), lanes)
            return centered * centered

        variance = self._fold(0.0, _ADD, squared) * share
        deviation = b.tirx.sqrt(variance + b.splat(config.epsilon, 1))
        inverse = b.let(b.splat(1.0, 1) / deviation, 1)

        def normalized(column: Expr, lanes: int) -> None:
            value = (self._load(base, column, lanes) - b.splat(mean, lanes)) * b.splat(
                inverse, lanes
            )
            if config.scale:
                value = value * b.load(self.gamma, column, lanes)
            if config.center:
                value = value + b.load(self.beta, column, lanes)
            self._finish(b.let(value, lanes), [*outer, column], lanes)

        self._for_columns(normalized)

    def _reduce(self, base: Expr, outer: list[Expr]) -> None:
        start, combine = {
            "sum": (0.0, _ADD),
            "mean": (0.0, _ADD),
            "max": (_LOWEST, _MAX),
            "min": (float("inf"), _MIN),
        }[self.config.kind]
        value = self._fold(start, combine, lambda column, lanes: self._load(base, column, lanes))
        if self.config.kind == "mean":
            value = value * self.b.splat(1.0 / self.config.columns, 1)
        self._finish(value, [*outer, self.b.int64(0)], 1)


def rows_kernel(
    config: Rows, spec: CpuSpec, name: str, data_shape: tuple[int, ...], out: Access
) -> Any:
    """The PrimFunc `(data, [gamma, beta,] *operands, out)` of an operator on contiguous rows."""
    return _Writer(config, spec, out).write(name, data_shape)
