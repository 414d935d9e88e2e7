"""Slices of the samples by value, and the metrics on each, most harmed first.

Here: `make_slices`, `slice_results`. Not here: the test (`permutation`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .permutation import harm_test, holm, permutations_for
from .report import ORIGINAL, SliceResult
from .scored import Calls, Scored

_DISTINCT = 12
"""Numbers of more distinct values than this are binned; whole numbers, which may be identities,
only where there are fewer than `_EACH` samples of each."""
_EACH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The samples, or rows of joined samples, that share one value."""

    name: str
    value: str
    samples: np.ndarray
    rows: np.ndarray | None = None

    def rows_of(self, scored: Scored) -> np.ndarray:
        """Indices of the scored rows in this slice."""
        if self.rows is not None and len(self.rows) == len(scored.samples):
            return np.flatnonzero(self.rows)
        return np.flatnonzero(self.samples[scored.samples])


def make_slices(values: Mapping[str, Sequence[Any]], bins: int) -> list[Slice]:
    """One slice for each value of each named sequence (one value a sample).

    Numbers of more than 12 distinct values are binned by quantile, but not whole numbers of which
    each has 8 samples or more. A value that is an array, one
    entry a row, slices within joined samples. A list or set of values puts a sample in several
    slices; None in none.
    """
    found = []
    for name, sequence in values.items():
        arrays = [isinstance(value, np.ndarray) and value.ndim == 1 for value in sequence]
        if sequence and all(arrays):
            flat = np.concatenate(sequence)
            sample = np.repeat(np.arange(len(sequence)), [len(value) for value in sequence])
            for text, mask in _by_value(list(flat.tolist()), bins):
                within = np.zeros(len(sequence), bool)
                within[sample[mask]] = True
                found.append(Slice(name, text, within, mask))
        else:
            found += [Slice(name, text, mask) for text, mask in _by_value(sequence, bins)]
    return found


def _by_value(sequence: Sequence[Any], bins: int) -> list[tuple[str, np.ndarray]]:
    several = [
        set(value) if isinstance(value, list | tuple | set | frozenset) else None
        for value in sequence
    ]
    if any(value is not None for value in several):
        sets = [v if v is not None else {one} for v, one in zip(several, sequence, strict=True)]
        names = sorted(
            {entry for entries in sets for entry in entries if entry is not None}, key=str
        )
        return [(str(n), np.array([n in entries for entries in sets])) for n in names]
    kept = [value for value in sequence if not _is_missing(value)]
    numeric = all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in kept)
    distinct = len(set(map(float, kept))) if numeric else 0
    whole = numeric and all(isinstance(v, int | np.integer) for v in kept)
    if distinct > _DISTINCT and not (whole and len(kept) >= _EACH * distinct):
        return _binned(np.array([np.nan if _is_missing(v) else float(v) for v in sequence]), bins)
    texts = ["" if _is_missing(value) else _text(value) for value in sequence]
    present = np.array([not _is_missing(value) for value in sequence])
    names = sorted({text for text, there in zip(texts, present, strict=True) if there})
    column = np.array(texts, dtype=object)
    return [(text, present & (column == text)) for text in names]


def _binned(numbers: np.ndarray, bins: int) -> list[tuple[str, np.ndarray]]:
    known = numbers[np.isfinite(numbers)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)))
    found = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        last = i == len(edges) - 2
        mask = (numbers >= low) & ((numbers <= high) if last else (numbers < high))
        found.append((f"{low:.4g} to {high:.4g}", mask))
    return found


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and not np.isfinite(value))


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def slice_results(
    slices: Sequence[Slice],
    scored: Mapping[str, Scored],
    better: Mapping[str, bool],
    model: str,
    *,
    level: float,
    seed: int,
) -> tuple[SliceResult, ...]:
    """Every metric on every slice for one model, the most harmed first.

    Slices so small that no outcome could be significant are shown and not tested. Holm's correction
    is over all that are, so that the chance of naming any slice of an unharmed model is `level`.
    """
    rows: list[SliceResult] = []
    parts: list[tuple[int, Scored]] = []
    for piece in slices:
        for metric, whole in scored.items():
            chosen = piece.rows_of(whole)
            if not len(chosen):
                continue
            part = whole.only(chosen)
            before, after = _values(part, model)
            rows.append(
                SliceResult(
                    slice=piece.name,
                    value=piece.value,
                    count=len(chosen),
                    metric=metric,
                    original=before,
                    candidate=after,
                    difference=after - before,
                )
            )
            if np.isfinite(after - before):
                parts.append((len(rows) - 1, part))
    tested = _testable(parts, level)
    permutations = permutations_for(len(tested), level)
    p_values = [
        harm_test(part, model, better[rows[i].metric], permutations, seed + i) for i, part in tested
    ]
    adjusted = holm(p_values)
    for (i, _), p, corrected in zip(tested, p_values, adjusted, strict=True):
        rows[i] = dataclasses.replace(rows[i], p_value=p, adjusted=corrected)
    harmed = [i for (i, _), corrected in zip(tested, adjusted, strict=True) if corrected <= level]
    pieces = {(piece.name, piece.value): piece for piece in slices}
    _name_harmed(rows, harmed, pieces, scored, better, model, level / max(len(tested), 1), seed)
    return tuple(sorted(rows, key=lambda row: _harm_order(row, better[row.metric])))


def _name_harmed(
    rows: list[SliceResult],
    harmed: Sequence[int],
    pieces: Mapping[tuple[str, str], Slice],
    scored: Mapping[str, Scored],
    better: Mapping[str, bool],
    model: str,
    level: float,
    seed: int,
) -> None:
    """Of the slices that are worse beyond chance, name those that are so by themselves.

    The greatest relative loss is named first; another slice only if it is still worse without the
    samples of those named before, else it says which explain it (a loud half that looks harmed
    because the one harmed speaker is in it).
    """
    named: list[Slice] = []
    for i in sorted(harmed, key=lambda i: _relative_loss(rows[i], better[rows[i].metric])):
        row = rows[i]
        piece, whole = pieces[row.slice, row.value], scored[row.metric]
        others = [other for other in named if other is not piece]
        if others and piece not in named:
            taken = np.concatenate([other.rows_of(whole) for other in others])
            left = np.setdiff1d(piece.rows_of(whole), taken)
            tried = permutations_for(1, level)
            if not len(left) or not (
                harm_test(whole.only(left), model, better[row.metric], tried, seed + i) <= level
            ):
                overlapping = [o for o in others if (o.samples & piece.samples).any()]
                names = ", ".join(f"{other.name}={other.value}" for other in overlapping)
                rows[i] = dataclasses.replace(row, explained_by=names)
                continue
        rows[i] = dataclasses.replace(row, harmed=True)
        if piece not in named:
            named.append(piece)


def _relative_loss(row: SliceResult, better: bool) -> float:
    """The change for the worse as a share of the original's value, negative."""
    loss = row.difference if better else -row.difference
    return loss / (abs(row.original) or 1.0)


def _values(part: Scored, model: str) -> tuple[float, float]:
    if isinstance(part, Calls):
        given = part.predictions
        return (
            part.tried(given[ORIGINAL], part.labels),
            part.tried(given[model], part.labels),
        )
    point = part.point()
    return point[ORIGINAL], point[model]


def _testable(parts: Sequence[tuple[int, Scored]], level: float) -> list[tuple[int, Scored]]:
    """Those with enough units: of n, one in 2^n exchanges is the most extreme."""
    needed = level / max(len(parts), 1)
    return [(i, part) for i, part in parts if 0.5 ** (int(part.units.max()) + 1) <= needed]


def _harm_order(row: SliceResult, better: bool) -> tuple[bool, float, float, float]:
    loss = row.difference if better else -row.difference
    p = 2.0 if row.p_value is None else row.p_value
    adjusted = 2.0 if row.adjusted is None else row.adjusted
    return (not row.harmed, adjusted, p, loss if np.isfinite(loss) else np.inf)
