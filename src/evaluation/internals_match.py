"""Which value of a candidate is which of the original: by name, place, structure, or on data.

Here: `match`. A candidate made by edgepass keeps most names; other tools rename, fuse and split.
Not here: what is measured between values that belong together (`internals`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..errors import UsageError
from ..ir.graph import is_onnx_op
from ..ir.ops import facts
from .internals_graph import (
    FLOATS,
    Side,
    forced_session,
    is_layer,
    quantizers_of,
    seen_of,
    source_of,
)

Feed = Mapping[str, np.ndarray]

SAMPLED = 4096
"""Elements of a value that stand for it when values are compared."""
_ROUNDS = 6
_CLOSE = 0.9
"""Closeness from which values without a common name are the same one."""
_DOUBTFUL = 0.98
"""Closeness below which a common name is doubted, if another value is far closer."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A value of the original and the candidate's, before its Q/DQ pair. `how` is how it is known:
    "name", "input" or "output" (by position), "structure", "data"."""

    original: str
    candidate: str
    how: str


@dataclasses.dataclass(frozen=True)
class Print:
    """Some elements of an array, at places that depend on its size only."""

    size: int
    shape: tuple[int, ...]
    values: np.ndarray

    @staticmethod
    def of(array: np.ndarray) -> Print:
        """The print of an array."""
        flat = np.asarray(array).reshape(-1)
        places = np.linspace(0, max(flat.size - 1, 0), min(flat.size, SAMPLED)).astype(np.int64)
        shape = tuple(d for d in np.shape(array) if d != 1)
        return Print(flat.size, shape, flat[places].astype(np.float64))

    def closeness(self, other: Print) -> float:
        """1 less the error's power over the other's variance; -1 where sizes differ. Unlike
        a correlation it tells a value from one in other units (x * 6, x + 3)."""
        a, b = self._beside(other)
        spread = float(np.sum((b - b.mean()) ** 2)) if b.size > 1 else 0.0
        return max(1 - float(np.sum((a - b) ** 2)) / spread, -1.0) if spread > 0 else -1.0

    def _beside(self, other: Print) -> tuple[np.ndarray, np.ndarray]:
        """The elements that are finite in both; none where the shapes differ."""
        if self.size != other.size or self.shape != other.shape:
            return np.zeros(0), np.zeros(0)
        good = np.isfinite(self.values) & np.isfinite(other.values)
        return self.values[good], other.values[good]


def rename_feed(feed: Feed, original: Side, candidate: Side) -> dict[str, np.ndarray]:
    """A feed of the original under the candidate's names: equal ones, else by position."""
    return {theirs: feed[ours] for ours, theirs in _inputs(original, candidate).items()}


def _inputs(original: Side, candidate: Side) -> dict[str, str]:
    ours = [v.name or "" for v in original.inputs]
    theirs = [v.name or "" for v in candidate.inputs]
    if set(theirs) <= set(ours):
        return {name: name for name in theirs}
    if len(ours) != len(theirs):
        raise UsageError(
            "The candidate takes other inputs than the original",
            why=f"{theirs} against {ours}",
            fix="compare models of the same interface",
        )
    return dict(zip(ours, theirs, strict=True))


def match(original: Side, candidate: Side, feed: Feed) -> list[Pair]:
    """The pairs, in the candidate's order. Each value is in one pair at most.

    Names and positions come first. Then, in rounds: every pair is held against data, with the
    candidate fed the original's values wherever they are known, so that an error at one place
    does not hide what follows; values still alone are paired where the same operator reads the
    same values, then where they correlate best.

    Raises:
        UsageError: the models have different interfaces.
    """
    matcher = _Matcher(original, candidate, feed)
    for done in range(_ROUNDS):
        if done < _ROUNDS // 2:  # what did not fit may have been fed a wrong value before it
            matcher.rejected.clear()
        if not matcher.improve():
            break
    return matcher.result()


class _Matcher:
    def __init__(self, original: Side, candidate: Side, feed: Feed) -> None:
        self.original = original
        self.candidate = candidate
        self.feed = rename_feed(feed, original, candidate)
        with original.watch(original.values) as runner:
            self.arrays = runner.run(feed)
        self.prints = {name: Print.of(a) for name, a in self.arrays.items()}
        self.order = {name: i for i, name in enumerate(original.values)}
        self.pairs: dict[str, tuple[str, str]] = {}  # candidate's -> original's, how
        self.rejected: set[tuple[str, str]] = set()
        self._by_name()

    def _by_name(self) -> None:
        for ours, theirs in _inputs(self.original, self.candidate).items():
            if theirs in self.candidate.values and ours in self.original.values:
                how = "name" if ours == theirs else "input"
                self.pairs[theirs] = (ours, how)
        for name, value in self.candidate.by_name.items():
            key = source_of(value).name or ""
            own = name == key or key not in self.original.values
            if own and name in self.original.values and key in self.candidate.values:
                self._pair(key, name, "name")
        if len(self.original.outputs) == len(self.candidate.outputs):
            outputs = zip(self.original.outputs, self.candidate.outputs, strict=True)
            for mine, other in outputs:
                key = source_of(other).name or ""
                if key in self.candidate.values and mine.name in self.original.values:
                    self._pair(key, mine.name or "", "output")

    def _pair(self, candidate: str, original: str, how: str) -> bool:
        if candidate in self.pairs or original in {name for name, _ in self.pairs.values()}:
            return False
        self.pairs[candidate] = (original, how)
        return True

    # --- rounds ------------------------------------------------------------------------------

    def improve(self) -> bool:
        """One round; whether anything changed."""
        before = dict(self.pairs)
        prints = self._candidate_prints()
        self._doubt(prints)
        self._by_data(prints)
        self._by_structure(prints)
        return self.pairs != before

    def _candidate_prints(self) -> dict[str, Print]:
        """What each value of the candidate is when it reads the original's."""
        seen = {name: seen_of(v).name or "" for name, v in self.candidate.values.items()}
        forced = {
            name: self.arrays[ours].ndim
            for name, (ours, _) in self.pairs.items()
            if self._fits(name, ours)
        }
        session, inputs = forced_session(self.candidate, forced, seen.values())
        feed = dict(self.feed)
        for name, (key, dtype) in inputs.items():
            feed[key] = as_dtype(self.arrays[self.pairs[name][0]], dtype)
        with session as runner:
            results = runner.run(feed)
        return {name: Print.of(results[key]) for name, key in seen.items()}

    def _fits(self, candidate: str, original: str) -> bool:
        """Whether the ranks agree, as far as is known."""
        shape = self.candidate.values[candidate].shape
        array = self.arrays[original]
        if shape is None:
            return True
        return len(shape) == array.ndim and all(
            not isinstance(want, int) or want == got
            for want, got in zip(shape.dims, array.shape, strict=True)
        )

    def _doubt(self, prints: Mapping[str, Print]) -> None:
        """Drop pairs of different sizes, and those that another value fits far better."""
        for name, (ours, how) in list(self.pairs.items()):
            mine, theirs = self.prints[ours], prints[name]
            if self.candidate.values[name] in self.candidate.inputs:
                continue
            if mine.size != theirs.size or mine.shape != theirs.shape or not self._fits(name, ours):
                del self.pairs[name]
                self.rejected.add((name, ours))
                continue
            close = theirs.closeness(mine)
            if close > (_DOUBTFUL if how == "name" else 1 - 1e-4):
                continue
            best, better = self._best(name, theirs)
            if how == "data" and close < _CLOSE and better < _CLOSE:
                del self.pairs[name]
                self.rejected.add((name, ours))
            elif best and better >= _CLOSE and (1 - better) < 0.2 * (1 - close):
                del self.pairs[name]
                self.rejected.add((name, ours))
                self._pair(name, best, "data")

    def _alone(self) -> Iterable[str]:
        """Values of the candidate that compute something and belong to none of the original's."""
        for name, value in self.candidate.values.items():
            if name not in self.pairs and is_layer(value.producer()):
                yield name

    def _by_structure(self, prints: Mapping[str, Print]) -> None:
        """The same operator on the same values."""
        for name in list(self._alone()):
            node = self.candidate.values[name].producer()
            assert node is not None
            read = self._read(node)
            if not read or None in read:
                continue
            taken = {ours for ours, _ in self.pairs.values()}
            found = [
                value.name
                for use in self.original.values[read[0] or ""].uses()
                if use.node.op_type == node.op_type and use.node.domain == node.domain
                for value in use.node.outputs[:1]
                if value.name in self.original.values
                and value.name not in taken
                and self._computed_inputs(use.node) == read
                and _same_constants(use.node, node, self.original, self.candidate)
                and self.prints[value.name].shape == prints[name].shape
                and self._fits(name, value.name)
                and (name, value.name) not in self.rejected
            ]
            best = max(found, key=lambda n: prints[name].closeness(self.prints[n]), default=None)
            if best is not None:
                self._pair(name, best, "structure")

    def _read(self, node: ir.Node) -> list[str | None]:
        """The original's names of what a candidate's node computes on."""
        found: list[str | None] = []
        for value in node.inputs:
            if value is None or value not in self.candidate.computed:
                continue
            source = source_of(value)
            if source.dtype in FLOATS:
                found.append(self.pairs.get(source.name or "", (None, ""))[0])
        return found

    def _computed_inputs(self, node: ir.Node) -> list[str | None]:
        return [
            v.name
            for v in node.inputs
            if v is not None and v in self.original.computed and v.dtype in FLOATS
        ]

    def _by_data(self, prints: Mapping[str, Print]) -> None:
        for name in list(self._alone()):
            best, close = self._best(name, prints[name])
            if best and close >= _CLOSE:
                self._pair(name, best, "data")

    def _best(self, name: str, seen: Print) -> tuple[str, float]:
        """The original's value that is closest to one of the candidate; the same operator first."""
        taken = {ours for ours, _ in self.pairs.values()}
        node = self.candidate.values[name].producer()
        ranked = []
        for ours, value in self.original.values.items():
            maker = value.producer()
            if ours in taken or (name, ours) in self.rejected or not self._fits(name, ours):
                continue
            if maker is None or facts(maker).movement_only or is_onnx_op(maker, "Identity"):
                continue
            close = seen.closeness(self.prints[ours])
            if close > 0:
                same = node is not None and maker.op_type == node.op_type
                ranked.append((round(close, 4), same, -self.order[ours], ours))
        if not ranked:
            return "", -1.0
        close, _, _, best = max(ranked)
        return best, close

    def result(self) -> list[Pair]:
        """In the candidate's order, values of another size dropped."""
        return [
            Pair(self.pairs[name][0], name, self.pairs[name][1])
            for name in self.candidate.values
            if name in self.pairs and self._fits(name, self.pairs[name][0])
        ]


def _same_constants(a: ir.Node, b: ir.Node, original: Side, candidate: Side) -> bool:
    """Whether two nodes read constants at the same places, of the same shapes."""

    def shapes(node: ir.Node, side: Side) -> list[object]:
        return [
            None
            if v is None or v in side.computed
            else (None if v.shape is None else tuple(v.shape.dims))
            for v in node.inputs[:2]
        ]

    return shapes(a, original) == shapes(b, candidate)


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array in another float type, what is beyond its range at its ends."""
    if array.dtype == dtype:
        return array
    import ml_dtypes

    bound = float(ml_dtypes.finfo(dtype).max)
    clipped = np.where(np.isfinite(array), np.clip(array, -bound, bound), array)
    return clipped.astype(dtype)


def pre_activation(side: Side, name: str, candidate: ir.Value) -> str:
    """What of the original a candidate's value before its Q is: where the candidate has no Relu or
    Clip, since saturation replaces it, the value before the original's."""
    if not quantizers_of(candidate):
        return name
    maker, theirs = side.values[name].producer(), candidate.producer()
    if maker is None or theirs is None or not is_onnx_op(maker, "Relu", "Clip"):
        return name
    source = maker.inputs[0]
    if is_onnx_op(theirs, maker.op_type) or source is None or source.name not in side.values:
        return name
    return source.name or name
