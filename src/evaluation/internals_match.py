"""Which value of a candidate is which of the original: by name, place, structure, or on data.

Here: `match`. A candidate made by edgepass keeps most names; other tools rename, fuse and split.
Not here: what is measured between values that belong together (`internals`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

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
from .internals_weights import collect

Feed = Mapping[str, np.ndarray]

SAMPLED = 4096
"""Elements of a value that stand for it when values are compared."""
_ROUNDS = 6
_ALIKE = 0.5
"""Cosine from which two weights may be the same: batch norms folded in change it."""
_LEAST = 8
"""Elements that a weight must have to tell nodes apart."""
_FOLDED = 6
_FOLDS = ("Add", "Sub", "Mul", "Div", "BatchNormalization", "Relu", "Clip", "LeakyRelu")
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_CLOSE = 0.9
"""Closeness from which values without a common name are the same one."""
_DOUBTFUL = 0.98
"""Closeness below which a common name is doubted, if another value is far closer."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A value of the original and the candidate's, before its Q/DQ pair. `how` is how it is known:
    "name", "input" or "output" (by position), "weights" (made by the node with the same weights),
    "structure", "data", or "view" (a reshape of one matched)."""

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

    def correlation(self, other: Print) -> float:
        """In -1..1, whatever the units; -1 where sizes differ or nothing varies."""
        a, b = self._beside(other)
        if a.size < 2:
            return -1.0
        a, b = a - a.mean(), b - b.mean()
        norm = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
        return float(np.sum(a * b)) / norm if norm > 0 else -1.0

    def closeness(self, other: Print) -> float:
        """1 less the error's power over the other's variance; -1 where sizes differ. Unlike
        a correlation it tells a value from one in other units (x * 6, x + 3)."""
        a, b = self._beside(other)
        spread = float(np.sum((b - b.mean()) ** 2)) if b.size > 1 else 0.0
        return max(1 - float(np.sum((a - b) ** 2)) / spread, -1.0) if spread > 0 else -1.0

    def _beside(self, other: Print) -> tuple[np.ndarray, np.ndarray]:
        """The elements that are finite in both; none where the shapes differ."""
        if self.size != other.size:
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
    does not hide what follows; values still alone are paired where they are close, then where they
    are made with the same weights, or by the same operator of the same values.

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
        self.given = feed
        self.feed = rename_feed(feed, original, candidate)
        with original.watch(original.values) as runner:
            self.arrays = runner.run(feed)
        with candidate.watch(candidate.values) as runner:
            self.shapes = {name: np.shape(a) for name, a in runner.run(self.feed).items()}
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
        self._by_weights(prints)
        self._by_structure(prints)
        return self.pairs != before

    def _candidate_prints(self) -> dict[str, Print]:
        """What each value of the candidate is when it reads the original's."""
        seen = {name: seen_of(v).name or "" for name, v in self.candidate.values.items()}
        fitting = [name for name, (ours, _) in self.pairs.items() if self._fits(name, ours)]
        forced = {name: len(self.shapes[name]) for name in fitting}
        session, inputs = forced_session(self.candidate, forced, seen.values())
        feed = dict(self.feed)
        for name, (key, dtype) in inputs.items():
            array = self.arrays[self.pairs[name][0]].reshape(self.shapes[name])
            feed[key] = as_dtype(array, dtype)
        with session as runner:
            results = runner.run(feed)
        return {name: Print.of(results[key]) for name, key in seen.items()}

    def _fits(self, candidate: str, original: str) -> bool:
        """Whether one is a reshape of the other, as far as sizes tell."""
        return bool(np.prod(self.shapes[candidate]) == self.arrays[original].size)

    def _doubt(self, prints: Mapping[str, Print]) -> None:
        """Drop pairs of different sizes, and those that another value fits far better."""
        for name, (ours, how) in list(self.pairs.items()):
            mine, theirs = self.prints[ours], prints[name]
            if self.candidate.values[name] in self.candidate.inputs:
                continue
            close = theirs.closeness(mine)
            if mine.size != theirs.size or (mine.shape != theirs.shape and close < _CLOSE):
                del self.pairs[name]
                self.rejected.add((name, ours))
                continue
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

    def _by_weights(self, prints: Mapping[str, Print]) -> None:
        """What a node makes with weights like those of one of the original's nodes: its result, or
        that of what was folded into it (a bias, a norm, a Relu), whichever it follows best."""
        alone = [n for n in self._alone() if self.candidate.values[n].producer() in self.theirs]
        taken = {ours for ours, _ in self.pairs.values()}
        for name in alone:
            node = self.candidate.values[name].producer()
            assert node is not None
            ranked = [
                (likeness, ours)
                for ours, mine in self.ours.items()
                if (
                    likeness := max(
                        (m.likeness(w) for m in mine for w in self.theirs[node]), default=0
                    )
                )
                > _ALIKE
            ]
            if not ranked:
                continue
            made = max(ranked, key=lambda pair: pair[0])[1].outputs[0]
            chain = [v.name or "" for v in _folded(made, self.original.computed)]
            free = [
                ours
                for ours in chain
                if ours in self.original.values and ours not in taken and self._fits(name, ours)
            ]
            best = max(free, key=lambda n: prints[name].correlation(self.prints[n]), default=None)
            if best is not None and self._pair(name, best, "weights"):
                taken.add(best)

    @functools.cached_property
    def ours(self) -> dict[ir.Node, list[_Signature]]:
        """The weights of the original's nodes."""
        return _signatures(self.original, self.given)

    @functools.cached_property
    def theirs(self) -> dict[ir.Node, list[_Signature]]:
        """The weights of the candidate's nodes."""
        return _signatures(self.candidate, self.feed)

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
                for use in _uses(self.original.values[read[0] or ""])
                if use.node.op_type == node.op_type and use.node.domain == node.domain
                for value in use.node.outputs[:1]
                if value.name in self.original.values
                and value.name not in taken
                and self._computed_inputs(use.node) == read
                and _same_constants(use.node, node, self.original, self.candidate)
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
            while is_reshape(source) and source.name not in self.pairs:
                source = source_of(_before(source))
            if source.dtype in FLOATS:
                ours = self.pairs.get(source.name or "", (None, ""))[0]
                found.append(None if ours is None else _origin(self.original.values[ours]).name)
        return found

    def _computed_inputs(self, node: ir.Node) -> list[str | None]:
        return [
            _origin(v).name
            for v in node.inputs
            if v is not None and v in self.original.computed and v.dtype in FLOATS
        ]

    def _by_data(self, prints: Mapping[str, Print]) -> None:
        """What is close; the closest of all first, so that a sum without its bias does not take the
        place of the one with it."""
        ranked = [item for name in self._alone() for item in self._ranked(name, prints[name])]
        for close, _, _, ours, name in sorted(ranked, reverse=True):
            if close >= _CLOSE:
                self._pair(name, ours, "data")

    def _best(self, name: str, seen: Print) -> tuple[str, float]:
        """The original's value that is closest to one of the candidate, and how close."""
        close, _, _, best, _ = max(self._ranked(name, seen), default=(-1.0, False, 0, "", name))
        return best, close

    def _ranked(self, name: str, seen: Print) -> list[tuple[float, bool, int, str, str]]:
        """The original's values that are free and somewhat close: closeness, whether the operator
        is the same, order (the first is greatest), their names and the candidate's."""
        taken = {ours for ours, _ in self.pairs.values()}
        node = self.candidate.values[name].producer()
        ranked = []
        for ours, value in self.original.values.items():
            maker = value.producer()
            if ours in taken or (name, ours) in self.rejected or not self._fits(name, ours):
                continue
            if maker is None or facts(maker).movement_only or is_onnx_op(maker, "Identity"):
                continue
            close = round(seen.closeness(self.prints[ours]), 4)
            if close > 0:
                same = node is not None and maker.op_type == node.op_type
                ranked.append((close, same, -self.order[ours], ours, name))
        return ranked

    def _past_lost_biases(self) -> None:
        """A product whose bias is lost is as close to the original's product as one with a bias is
        to the sum: it is to be held against the sum."""
        taken = {ours for ours, _ in self.pairs.values()}
        for name, (ours, how) in list(self.pairs.items()):
            if how not in ("data", "weights", "structure"):
                continue
            after = _folded(self.original.values[ours], self.original.computed)[1:2]
            adds = [v for v in after if is_onnx_op(v.producer(), "Add")]  # type: ignore[arg-type]
            if not adds or adds[0].name in taken or adds[0].name not in self.original.values:
                continue
            if not any(self._adds_constant(u.node) for u in _uses_past_pairs(self.candidate, name)):
                self.pairs[name] = (adds[0].name or "", how)

    def _adds_constant(self, node: ir.Node) -> bool:
        constant = any(v is not None and v not in self.candidate.computed for v in node.inputs)
        return is_onnx_op(node, "Add") and constant

    def result(self) -> list[Pair]:
        """In the candidate's order, with reshapes of what is matched that have a Q of their own."""
        self._past_lost_biases()
        found = []
        for name, value in self.candidate.values.items():
            if name in self.pairs and self._fits(name, self.pairs[name][0]):
                found.append(Pair(self.pairs[name][0], name, self.pairs[name][1]))
            elif is_reshape(value) and quantizers_of(value):
                source = value
                while is_reshape(source) and source.name not in self.pairs:
                    source = source_of(_before(source))
                ours = self.pairs.get(source.name or "")
                if ours is not None and self._fits(name, ours[0]):
                    found.append(Pair(ours[0], name, "view"))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Signature:
    """The first elements of a weight and of its transpose."""

    size: int
    rows: np.ndarray
    columns: np.ndarray

    @staticmethod
    def of(array: np.ndarray) -> _Signature:
        flat = (np.asarray(a, np.float64).reshape(-1)[:SAMPLED] for a in (array, array.T))
        return _Signature(array.size, *flat)

    def likeness(self, other: _Signature) -> float:
        """Cosine, of the better of both orientations."""
        if self.size != other.size:
            return 0.0
        return max(_cosine(self.rows, other.rows), _cosine(self.rows, other.columns))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 and np.isfinite(norm) else 0.0


def _signatures(side: Side, feed: Feed) -> dict[ir.Node, list[_Signature]]:
    nodes = [n for n in side.graph if any(v in side.computed for v in n.outputs)]
    return {
        node: [_Signature.of(w.array) for w in weights if w.array.size >= _LEAST]
        for node, weights in collect(side, nodes, feed).items()
        if weights
    }


def _folded(value: ir.Value, computed: set[ir.Value]) -> list[ir.Value]:
    """A node's result, and those of what may be folded into it, one after another."""
    found = [value]
    while len(uses := list(value.uses())) == 1 and len(found) < _FOLDED:
        node = uses[0].node
        inputs = [v for v in node.inputs if v is not None and v in computed]
        if len(inputs) != 1 or not (is_onnx_op(node, *_FOLDS) or is_reshape(node.outputs[0])):
            break
        value = node.outputs[0]
        found.append(value)
    return found


def is_reshape(value: ir.Value) -> bool:
    """Whether a value has the elements of another in the same order."""
    node = value.producer()
    return node is not None and is_onnx_op(node, *_RESHAPES) and node.inputs[0] is not None


def _before(value: ir.Value) -> ir.Value:
    node = value.producer()
    assert node is not None
    source = node.inputs[0]
    assert source is not None
    return source


def _origin(value: ir.Value) -> ir.Value:
    """What a value is a reshape of."""
    while is_reshape(value):
        value = _before(value)
    return value


def _uses_past_pairs(side: Side, name: str) -> Iterable[Any]:
    """The uses of a value of a candidate, its Q/DQ pair and reshapes aside."""
    value = side.values[name]
    yield from _uses(value)
    seen = seen_of(value)
    if seen is not value:
        yield from _uses(seen)


def _uses(value: ir.Value) -> Iterable[Any]:
    """The uses of a value and of its reshapes."""
    for use in value.uses():
        if is_reshape(use.node.outputs[0]) and use.idx == 0:
            yield from _uses(use.node.outputs[0])
        else:
            yield use


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


def pre_activation(side: Side, pair: Pair, candidate: ir.Value) -> str | None:
    """The original's value before its Relu or Clip, where a candidate may have none because the
    saturation of a Q replaces it: then that is what comes before the Q."""
    maker = side.values[pair.original].producer()
    if pair.how == "view" or not quantizers_of(candidate) or maker is None:
        return None
    source = maker.inputs[0] if is_onnx_op(maker, "Relu", "Clip") else None
    return source.name if source is not None and source.name in side.values else None
