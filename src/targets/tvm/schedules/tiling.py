"""Register tile sizes as pure functions of the shape and the CPU: no tuning, no randomness.

A tile holds `rows` x `vectors` accumulators: rows are output pixels or matrix rows (one value of
the left side each, broadcast), vectors are groups of `lanes` output channels or columns.
"""

from __future__ import annotations

import dataclasses
import functools

from .spec import CpuSpec


@dataclasses.dataclass(frozen=True)
class Tile:
    """A register tile: `rows` x `vectors` accumulators of one vector each."""

    rows: int
    vectors: int


def _step_cost(rows: int, vectors: int) -> float:
    """Cycles of one reduction step of a tile, on a core with two FMA and two load ports.

    An FMA has a latency of four cycles, so that a step can't take less; a tile of one vector takes
    its broadcast as the FMA's memory operand, others load each row's value once.
    """
    return max(rows * vectors / 2, (rows + vectors) / 2, 4.0)


@functools.cache
def choose_tile(rows: int, vectors: int, spec: CpuSpec) -> Tile:
    """The tile with the least estimated time for a `rows` x `vectors` output.

    At most four registers less than there are hold accumulators (above 28 of 32 they spill:
    measured); the rest hold a step's vectors and a broadcast.
    """
    best = (float("inf"), 0, Tile(1, 1))
    for tile_vectors in range(1, min(vectors, 8) + 1):
        for tile_rows in range(1, min(rows, spec.registers) + 1):
            accumulators = tile_rows * tile_vectors
            if accumulators > spec.registers - 4 or accumulators + tile_vectors >= spec.registers:
                break
            cost = 0.0
            for r, r_count in split_extent(rows, tile_rows):
                for v, v_count in split_extent(vectors, tile_vectors):
                    cost += r_count * v_count * (_step_cost(r, v) + 0.02)
            # Among equals the larger tile, and of those the wider: fewer passes over the left side.
            best = min(
                best,
                (round(cost, 3), -accumulators * 16 - tile_vectors, Tile(tile_rows, tile_vectors)),
                key=lambda item: item[:2],
            )
    return best[2]


def split_extent(extent: int, tile: int) -> list[tuple[int, int]]:
    """`[(size, count)]` of the full tiles and of the remainder: 50 by 14 is `[(14, 3), (8, 1)]`."""
    full, rest = divmod(extent, tile)
    parts = [(tile, full)] if full else []
    return [*parts, (rest, 1)] if rest else parts
