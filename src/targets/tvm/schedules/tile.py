"""The register tile all matrix-like kernels share: accumulate `rows` x `vectors`, then store.

Where the row values and the vectors come from is the kernels' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .builder import Expr, KernelBuilder
from .epilogue import Access, Epilogue
from .tiling import Tile


class RegisterTile:
    """`rows` x `vectors` float32 vector accumulators, zeroed at construction."""

    def __init__(self, builder: KernelBuilder, tile: Tile) -> None:
        self._b = builder
        self.tile = tile
        self._buffer = builder.alloc(tile.rows * tile.vectors * builder.lanes, registers=True)
        zero = builder.splat(0.0, builder.lanes)
        for slot in range(tile.rows * tile.vectors):
            builder.store(self._buffer, slot * builder.lanes, zero)

    def _offset(self, row: int, vector: int) -> int:
        return (row * self.tile.vectors + vector) * self._b.lanes

    def value(self, row: int, vector: int) -> Expr:
        """One accumulator."""
        return self._b.load(self._buffer, self._offset(row, vector), self._b.lanes)

    def lane(self, row: int, vector: int, lane: int) -> Expr:
        """One lane of an accumulator, as a scalar."""
        return self._b.load(self._buffer, self._offset(row, vector) + lane, 1)

    def add(self, row: int, vector: int, value: Expr) -> None:
        """Add `value`; a product is contracted to a fused multiply-add by LLVM."""
        total = self.value(row, vector) + value
        self._b.store(self._buffer, self._offset(row, vector), total)

    def replace(self, row: int, vector: int, value: Expr) -> None:
        """Overwrite an accumulator."""
        self._b.store(self._buffer, self._offset(row, vector), value)

    def rank_one_update(
        self, scalars: Sequence[tuple[int, Expr]], vectors: Callable[[int], Expr]
    ) -> None:
        """Add scalar x vector for each given `(row, scalar)` and each vector of the tile."""
        lanes = self._b.lanes
        loaded: list[Any] = [
            self._b.let(vectors(vector), lanes) for vector in range(self.tile.vectors)
        ]
        for row, scalar in scalars:
            spread = self._b.splat(scalar, lanes)
            for vector, value in enumerate(loaded):
                self.add(row, vector, spread * value)


class OutputWriter:
    """Stores register tiles through an epilogue."""

    def __init__(
        self,
        builder: KernelBuilder,
        epilogue: Epilogue,
        operands: Sequence[Any],
        out: Any,
        access: Access,
    ) -> None:
        self._b = builder
        self._epilogue = epilogue
        self._operands = operands
        self._out = out
        self._access = access

    def store(self, value: Expr, coordinates: Sequence[Expr], lanes: int) -> None:
        """One value of `lanes` lanes, the first of them at `coordinates`."""
        value = self._epilogue.apply(self._b, self._operands, value, coordinates, lanes)
        self._b.store(self._out, self._access.offset(coordinates), value)

    def store_tile(
        self,
        value: Callable[[int, int], Expr],
        coordinates: Callable[[Expr, Expr], Sequence[Expr]],
        rows: int,
        columns: int,
        lanes: int,
    ) -> None:
        """`value(row, column)` for all rows and columns, which are constants there.

        A long epilogue is applied in a loop, to the values stored without it: unrolled, it makes
        TVM's passes take seconds a kernel (measured: 11 s for a gelu), and the values come back
        from the first-level cache.
        """
        if not self._epilogue.heavy:
            for row in range(rows):
                for column in range(columns):
                    self.store(value(row, column), coordinates(row, column), lanes)
            return
        b = self._b
        for row in range(rows):
            for column in range(columns):
                place = coordinates(b.int64(row), b.int64(column))
                b.store(self._out, self._access.offset(place), value(row, column))
        with b.loop(rows) as i, b.loop(columns) as j:
            place = coordinates(i, j)
            self.store(b.load(self._out, self._access.offset(place), lanes), place, lanes)
