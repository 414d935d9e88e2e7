"""More samples, made of the given ones, for layers that have more inputs than there are rows.

Here: `wanted_samples`, how many layers need, and `made_samples`, which swaps tokens of integer
inputs. What the float model says of a made sample is as good a target as any, so none of them needs
a label, or to make sense. Replacing words at random for more of the teacher's answers is the data
augmentation of Jiao et al. 2020, "TinyBERT", arXiv:1909.10351, less its language model. Not here:
judging (on given samples only, `divergence`), solving (`repair`).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import EdgepassError
from ...ir.graph import attribute, is_onnx_op
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample
from .groups import Group
from .statistics import batches, collect

_ROWS_PER_INPUT = 4
MOST = 512
_TIMES = 5
"""Samples in all, by those given, at most."""
_LEAST_SHARE, _MOST_SHARE = 0.1, 0.9
"""Of the tokens of a made sample that are swapped, each sample's own."""
_FROM_TABLE = 0.5
"""Of the swapped tokens that are any of the embedding's, where the input picks rows of one."""
_DISTINCT = 32
"""Inputs of fewer different values are masks, types and flags."""
_TOKENS = 4
"""Inputs of fewer elements a sample are lengths and indices."""
_COMMON = 0.9
_TRIED = 3


def wanted_samples(model: ir.Model, groups: Sequence[Group], samples: Sequence[Feed]) -> int:
    """How many samples give each layer that reads the units four rows an input (512 at most)."""
    wanted = 0
    for part in batches(groups):
        for found in collect(part, samples[:1], model, lambda done, total, what: None).values():
            size = _ROWS_PER_INPUT * found.gram.layer.shape[1]
            wanted = max(wanted, -(-size // max(1, found.gram.rows)))
    return min(wanted, MOST)


class _Made(dict[str, np.ndarray]):
    """A made sample, and the one it was made of."""

    origin: Feed


def half_of(sample: Feed) -> int:
    """Which half of the samples it is in, 0 or 1, for solving on one and judging on the other.

    By content, so that no order of the samples changes it; made ones are where the ones are that
    they were made of, or else they would be judged by what they were solved on.
    """
    origin = sample.origin if isinstance(sample, _Made) else sample
    check = 0
    for name in sorted(origin):
        check = zlib.crc32(np.ascontiguousarray(origin[name]).tobytes(), check)
    return check % 2


def made_samples(model: ir.Model, samples: Sequence[Feed], count: int, seed: int = 0) -> list[Feed]:
    """At most that many samples in which tokens are others; none where there are no tokens.

    The others are those of all samples and, where the input picks rows of a table, of the table.
    An input is one of tokens where it is of integers, many and different ones, in no order. What
    nearly all samples have, in a place or once at all, stays (marks of beginnings and ends), and so
    do runs (padding). At most four made samples for each given one.
    """
    count = min(count, (_TIMES - 1) * len(samples))
    pools = {
        name: pool for name in samples[0] if (pool := _Tokens.of(samples, name, model)) is not None
    }
    if count <= 0 or not pools:
        return []
    rng = np.random.default_rng(seed)
    made: list[_Made] = []
    for sample in itertools.islice(itertools.cycle(samples), count):
        changed = {name: pool.mixed(np.asarray(sample[name]), rng) for name, pool in pools.items()}
        made.append(_Made({**sample, **changed}))
        made[-1].origin = sample
    return list(made) if _fit(model, made[:_TRIED]) else []


_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


class _Tokens:
    """An input of tokens: those that may be swapped, and those that stay where they are."""

    def __init__(self, arrays: Sequence[np.ndarray], table: int = 0) -> None:
        self._table = table
        values, counts = _counted([np.unique(array) for array in arrays])
        everywhere = values[counts >= _COMMON * len(arrays)]
        values, counts = _counted(arrays)
        often = values[counts > 2 * len(arrays)]
        self._marks = np.setdiff1d(everywhere, often)
        self._first = _by_place([array.reshape(-1) for array in arrays])
        self._last = _by_place([array.reshape(-1)[::-1] for array in arrays])
        free = [array[self._free(array)] for array in arrays]
        self.pool = np.concatenate(free)

    @classmethod
    def of(cls, samples: Sequence[Feed], name: str, model: ir.Model) -> _Tokens | None:
        """None where the input is not one of tokens."""
        arrays = [np.asarray(sample[name]) for sample in samples if name in sample]
        if len(arrays) < len(samples) or len(arrays) < 2 or arrays[0].dtype.kind not in "iu":
            return None
        if sum(array.size for array in arrays) < _TOKENS * len(arrays):
            return None
        if all((np.diff(array.astype(np.int64).reshape(-1)) >= 0).all() for array in arrays):
            return None  # positions, offsets
        if len(np.unique(np.concatenate([array.reshape(-1) for array in arrays]))) < _DISTINCT:
            return None
        tokens = cls(arrays, _table(model, name))
        return tokens if len(tokens.pool) else None

    def _free(self, array: np.ndarray) -> np.ndarray:
        """Which elements may be swapped."""
        flat = array.reshape(-1)
        same = flat[1:] == flat[:-1]
        kept = np.isin(flat, self._marks)
        kept |= np.append(same, False) | np.append(False, same)
        for common, order in ((self._first, slice(None)), (self._last, slice(None, None, -1))):
            part = flat[order]
            known = min(len(part), len(common))
            held = np.zeros(len(part), bool)
            held[:known] = [common[i] == part[i] for i in range(known)]
            kept |= held[order]
        free: np.ndarray = ~kept.reshape(array.shape)
        return free

    def mixed(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The array with a part of what may be swapped drawn from all samples, or the table."""
        share = rng.uniform(_LEAST_SHARE, _MOST_SHARE)
        swapped = self._free(array) & (rng.random(array.shape) < share)
        others = rng.choice(self.pool, array.shape)
        if self._table:
            any_ = rng.integers(0, self._table, array.shape, dtype=array.dtype)
            others = np.where(rng.random(array.shape) < _FROM_TABLE, any_, others)
        found: np.ndarray = np.where(swapped, others, array)
        return found


def _counted(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(np.concatenate([a.reshape(-1) for a in arrays]), return_counts=True)


def _by_place(rows: Sequence[np.ndarray]) -> list[int | None]:
    """The value that nearly all samples have in each place, where there is one."""
    found: list[int | None] = []
    for place in range(max(map(len, rows))):
        own = [int(row[place]) for row in rows if len(row) > place]
        if len(own) < max(2, len(rows) // 4):
            break
        value = max(set(own), key=own.count)
        found.append(value if own.count(value) >= _COMMON * len(own) else None)
    return found


def _table(model: ir.Model, name: str) -> int:
    """The rows of the smallest table that the input picks rows of, 0 where it does nothing else."""
    sizes: list[int] = []
    waiting = [value for value in model.graph.inputs if value.name == name]
    while waiting:
        for node, index in waiting.pop().uses():
            if is_onnx_op(node, *_MOVES) and index == 0:
                waiting.append(node.outputs[0])
            elif is_onnx_op(node, "Gather") and index == 1 and attribute(node, "axis", 0) == 0:
                data = node.inputs[0]
                shape = data.shape if data is not None and data.is_initializer() else None
                sizes.append(shape.numpy()[0] if shape is not None else 0)
    return min(sizes, default=0)


def _fit(model: ir.Model, samples: Sequence[Mapping[str, np.ndarray]]) -> bool:
    """Whether the model takes such samples."""
    try:
        with OrtRunner(model, optimize=False) as runner:
            results = [run_on_sample(runner, s, None, "made sample") for s in samples]
    except EdgepassError:
        return False
    arrays = [array for found in results for array in found.values()]
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
