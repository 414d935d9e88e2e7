"""Whether calibration samples are enough, and like each other: notes for the ledger.

Here: `Coverage`, which compares the ranges of two halves of the samples. Not here: ranges that are
used (`observers`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..base import Feed
from .numbers import Range

FEW = 16
"""Fewer samples than that are noted."""
EXCESS = 0.25
"""By how much a half's range may be wider than the other's, as a share of that one's width."""
SHARE = 1 / 3
"""The share of the tensors over which that may be so.

Measured, 32 samples, 6 to 20 draws each: at most 0 % of a digits CNN's tensors, 15 % of a text
recognizer's, 13 % of a file type detector's but for one draw (42 %: one file set a third of them).
"""
_NAMED = 3


class Coverage:
    """Folds the ranges of samples into two halves, chosen by content: order does not matter."""

    def __init__(self) -> None:
        self.samples = 0
        self.rows = 0
        self._first = b""
        self._differ = False
        self._halves: dict[ir.Value, list[Range | None]] = {}
        self._sizes = [0, 0]

    def start(self, feed: Feed, rows: int = 1) -> int:
        """Count a sample of so many rows of a batch; the half it is in, 0 or 1."""
        digest = content_hash(feed)
        self._first = self._first or digest
        self._differ |= digest != self._first
        half = digest[0] & 1
        self.samples += 1
        self.rows += rows
        self._sizes[half] += 1
        return half

    def add(self, value: ir.Value, half: int, seen: Range) -> None:
        """Fold in the range of one value on one sample."""
        halves = self._halves.setdefault(value, [None, None])
        before = halves[half]
        halves[half] = seen if before is None else before.union(seen)

    def notes(self) -> tuple[str, ...]:
        """What is wrong with the samples, a line each; none where nothing is."""
        found = []
        if self.rows < FEW:
            found.append(
                f"WARNING: few calibration samples ({self.rows}): other inputs may leave the "
                "ranges; some tens are usual"
            )
        if self.samples >= FEW and not self._differ:
            found.append(f"WARNING: the {self.samples} calibration samples are all the same")
        elif min(self._sizes) and self.samples >= 4:
            found += self._disagreement()
        return tuple(found)

    def _disagreement(self) -> list[str]:
        excess = {v: _excess(*halves) for v, halves in self._halves.items()}
        beyond = sorted((v for v in excess if excess[v] > EXCESS), key=lambda v: -excess[v])
        if len(beyond) <= SHARE * len(excess) or len(beyond) == 1 < len(excess):
            return []
        worst = ", ".join(f"{v.name!r} ({_times(excess[v])})" for v in beyond[:_NAMED])
        return [
            "WARNING: the calibration samples do not agree on the ranges: halves of them differ in "
            f"width by more than {EXCESS:.0%} in {len(beyond)} of {len(excess)} tensors, most in "
            f"{worst}; a few samples set the ranges: give more of them, or look for outliers"
        ]


def _excess(one: Range | None, other: Range | None) -> float:
    """By how much the range of both halves is wider than that of the narrower half."""
    if one is None or other is None:
        return 0.0  # in a branch that few samples take: nothing to compare
    one, other = (Range(min(r.low, 0.0), max(r.high, 0.0)) for r in (one, other))
    both = one.union(other)
    narrow = min(one.high - one.low, other.high - other.low)
    if both.high == both.low:
        return 0.0
    return (both.high - both.low) / narrow - 1 if narrow > 0 else float("inf")


def _times(excess: float) -> str:
    return f"{1 + excess:.1f} times" if np.isfinite(excess) else "zero in one"


def content_hash(feed: Feed) -> bytes:
    """A digest of a sample's arrays and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(feed):
        array = np.ascontiguousarray(feed[name])
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        if array.dtype.hasobject:
            digest.update(repr(array.tolist()).encode())
        else:
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def batch_rows(feed: Feed, inputs: Sequence[ir.Value]) -> int:
    """How many samples a feed holds: rows of a dynamic first axis that all inputs share, or 1."""
    rows = set()
    for value in inputs:
        array = feed.get(value.name or "")
        if array is None:
            continue
        first = value.shape[0] if value.shape is not None and len(value.shape) > 1 else 1
        rows.add(1 if isinstance(first, int) else int(array.shape[0]))
    return rows.pop() if len(rows) == 1 else 1
