"""Matrix multiplication: A [batch, m, k] x B [batch, k, n], B packed at compile time or per call.

The kernel is a register tile of m rows by vectors along n, with the reduction outside; the bigger
of the two operands is the outer loop's, so that it is read once. A constant B comes packed by
`pack_columns`; one known only at run time is copied into the same form per batch, which also takes
care of transposed operands. Rows, columns and depths of any size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .builder import Expr, KernelBuilder
from .epilogue import NO_EPILOGUE, Access, Epilogue
from .spec import CpuSpec
from .tile import OutputWriter, RegisterTile
from .tiling import Tile, choose_tile, split_extent


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matrix product. `a`, `b` and `out` are addressed by `batch + (row, column)`.

    `b` is None where B is a constant packed by `pack_columns` with the tile's vectors.
    """

    batch: tuple[int, ...]
    m: int
    n: int
    k: int
    a: Access
    b: Access | None
    out: Access
    epilogue: Epilogue = NO_EPILOGUE

    def tile(self, spec: CpuSpec) -> Tile:
        """The register tile used, which fixes the packing of a constant B."""
        return choose_tile(self.m, -(-self.n // spec.lanes), spec)


class _Writer:
    def __init__(self, config: Matmul, spec: CpuSpec) -> None:
        self.config = config
        self.b = KernelBuilder(spec.lanes, spec.threads)
        self.lanes = spec.lanes
        self.tile = config.tile(spec)
        self.vectors = -(-config.n // spec.lanes)
        self.a_data = self.b.param("a", config.a.shape)
        packed = (self.vectors * self.lanes * config.k,)
        self.b_data = self.b.param("b", packed if config.b is None else config.b.shape)
        operands = config.epilogue.declare(self.b)
        out = self.b.param("out", config.out.shape)
        self.writer = OutputWriter(self.b, config.epilogue, operands, out, config.out)

    def write(self, name: str) -> Any:
        self._batches([])
        return self.b.finish(name)

    def _batches(self, outer: list[Expr]) -> None:
        if len(outer) < len(self.config.batch):
            with self.b.loop(self.config.batch[len(outer)], parallel=not outer) as i:
                self._batches([*outer, i])
            return
        packed = self.b_data
        if self.config.b is not None:
            packed = self.b.alloc(self.vectors * self.lanes * self.config.k, registers=False)
            self._pack(packed, outer)
        rows = split_extent(self.config.m, self.tile.rows)
        columns = split_extent(self.vectors, self.tile.vectors)
        rows_outside = self.config.m > self.config.n
        parallel = not outer
        first, second = (rows, columns) if rows_outside else (columns, rows)
        first_start = 0
        for first_size, first_count in first:
            with self.b.loop(first_count, parallel=parallel) as i:
                second_start = 0
                for second_size, second_count in second:
                    with self.b.loop(second_count) as j:
                        starts = (i * first_size + first_start, j * second_size + second_start)
                        sizes = (first_size, second_size)
                        if not rows_outside:
                            starts, sizes = starts[::-1], sizes[::-1]
                        self._tile(outer, packed, Tile(*sizes), *starts)
                    second_start += second_size * second_count
            first_start += first_size * first_count

    def _pack(self, packed: Any, outer: list[Expr]) -> None:
        """Copy B of one batch to [column tile][k][tile width], zero beyond the last column."""
        access = self.config.b
        assert access is not None
        start = 0
        for size, count in split_extent(self.vectors, self.tile.vectors):
            with self.b.loop(count) as j:
                block = j * size + start
                if access.strides[-1] == 1:
                    self._pack_rows(packed, outer, block, size, start + size * count)
                else:
                    self._pack_columns(packed, outer, block, size, start + size * count)
            start += size * count

    def _target(self, block: Expr, size: int, k: Expr, vector: int) -> Expr:
        return block * (self.lanes * self.config.k) + k * (size * self.lanes) + vector * self.lanes

    def _pack_rows(self, packed: Any, outer: list[Expr], block: Expr, size: int, last: int) -> None:
        access, lanes, n = self.config.b, self.lanes, self.config.n
        assert access is not None
        tail = n % lanes if last == self.vectors else 0
        with self.b.loop(self.config.k) as k:
            for vector in range(size):
                target = self._target(block, size, k, vector)
                source = access.offset([*outer, k, (block + vector) * lanes])
                # Only the last vector of the last block is cut; with several blocks in this loop,
                # only the last iteration is the last block, so it is tested for.
                cut = bool(tail) and vector == size - 1
                is_last = (block + vector) >= self.vectors - 1 if cut else None
                if cut:
                    with self.b.when(is_last):
                        for lane in range(lanes):
                            value = (
                                self.b.load(self.b_data, source + lane, 1)
                                if lane < tail
                                else self.b.splat(0.0, 1)
                            )
                            self.b.store(packed, target + lane, value)
                not_last = (block + vector) < self.vectors - 1 if cut else None
                with self.b.when(not_last):
                    self.b.store(packed, target, self.b.load(self.b_data, source, lanes))

    def _pack_columns(
        self, packed: Any, outer: list[Expr], block: Expr, size: int, last: int
    ) -> None:
        access, lanes, n = self.config.b, self.lanes, self.config.n
        assert access is not None
        cut = n % lanes != 0 and last == self.vectors
        for vector in range(size):
            with self.b.loop(lanes) as lane:
                column = (block + vector) * lanes + lane
                target = self._target(block, size, 0, vector) + lane
                with self.b.loop(self.config.k) as k:
                    value = self.b.load(self.b_data, access.offset([*outer, k, column]), 1)
                    if cut:
                        zero = self.b.splat(0.0, 1)
                        value = self.b.tirx.op.if_then_else(column < n, value, zero)
                    self.b.store(packed, target + k * (size * lanes), value)

    def _tile(self, outer: list[Expr], packed: Any, tile: Tile, row: Expr, block: Expr) -> None:
        config, lanes = self.config, self.lanes
        accumulators = RegisterTile(self.b, tile)
        with self.b.loop(config.k) as k:
            accumulators.rank_one_update(
                [
                    (r, self.b.load(self.a_data, config.a.offset([*outer, row + r, k]), 1))
                    for r in range(tile.rows)
                ],
                lambda v: self.b.load(packed, self._target(block, tile.vectors, k, v), lanes),
            )
        # The last vector may be cut. Tiles of the last size always hold it; a loop over several
        # equal tiles has to ask whether this is the one.
        tail = config.n % lanes
        last = tile.vectors - 1
        whole = last if tail else tile.vectors

        def columns_from(first: int, step: int) -> Any:
            return lambda r, v: [*outer, row + r, (block + first) * lanes + v * step]

        self.writer.store_tile(accumulators.value, columns_from(0, lanes), tile.rows, whole, lanes)
        if tail:
            with self.b.when((block + last) < self.vectors - 1):
                self.writer.store_tile(
                    lambda r, v: accumulators.value(r, last),
                    columns_from(last, lanes),
                    tile.rows,
                    1,
                    lanes,
                )
            with self.b.when((block + last) >= self.vectors - 1):
                self.writer.store_tile(
                    lambda r, lane: accumulators.lane(r, last, lane),
                    columns_from(last, 1),
                    tile.rows,
                    tail,
                    1,
                )


def matmul_kernel(config: Matmul, spec: CpuSpec, name: str) -> Any:
    """The PrimFunc `(a, b, *operands, out)` of a matrix product."""
    return _Writer(config, spec).write(name)
