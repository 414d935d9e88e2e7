"""The register tile all matrix-like kernels share: accumulate `rows` x `vectors`, then store.

Where the row values and the vectors come from is the kernels' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .builder import Expr, KernelBuilder
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
