"""How far a candidate's outputs are from the original's, without labels, in constant memory.

Here: `Divergences`, `aligned`. Not here: a layer's error (`internals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import UsageError
from .metrics import as_probabilities, is_probabilities
from .report import Divergence
from .runners import Outputs

_EPSILON = 1e-12


class Divergences:
    """Running sums of one candidate against the original, an output each."""

    def __init__(self, logits: bool = False) -> None:
        self._logits = logits
        self._sums: dict[str, _Sums] = {}

    def add(self, expected: Outputs, actual: Outputs) -> None:
        """One sample; outputs are matched already (`aligned`)."""
        for name, array in expected.items():
            if name not in self._sums:
                self._sums[name] = _Sums(self._logits)
            self._sums[name].add(np.asarray(array), np.asarray(actual[name]))

    def results(self) -> Mapping[str, Divergence]:
        """By output."""
        return {name: sums.result() for name, sums in self._sums.items()}


class _Sums:
    def __init__(self, logits: bool) -> None:
        self._logits = logits
        self._signal = self._noise = self._dot = self._power = 0.0
        self._worst = self._kl = 0.0
        self._rows = self._agreeing = 0
        self._probabilities = True
        self._classes = True

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        if expected.dtype.kind in "OSUT" or expected.shape != actual.shape:
            self._add_text(expected, actual)
            return
        a, b = expected.astype(np.float64), actual.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            self._noise = self._worst = math.inf
        odd = ~(np.isfinite(a) & np.isfinite(b))
        a, b = np.where(odd, 0.0, a), np.where(odd, 0.0, b)
        error = a - b
        self._signal += float(np.sum(a * a))
        self._power += float(np.sum(b * b))
        self._dot += float(np.sum(a * b))
        self._noise += float(np.sum(error * error))
        if a.size:
            span = float(a.max() - a.min()) or float(np.abs(a).max()) or 1.0
            self._worst = max(self._worst, float(np.abs(error).max()) / span)
        self._add_classes(a, b)

    def _add_classes(self, a: np.ndarray, b: np.ndarray) -> None:
        self._classes = self._classes and a.ndim > 0 and a.shape[-1] > 1
        if not self._classes or not a.size:
            return
        same = a.argmax(-1) == b.argmax(-1)
        self._rows, self._agreeing = self._rows + same.size, self._agreeing + int(same.sum())
        if self._logits:
            a, b = as_probabilities(a), as_probabilities(b)
        self._probabilities = self._probabilities and is_probabilities(a) and is_probabilities(b)
        if self._probabilities:
            p, q = np.maximum(a, _EPSILON), np.maximum(b, _EPSILON)
            self._kl += float(np.sum(p * (np.log(p) - np.log(q))))

    def _add_text(self, expected: np.ndarray, actual: np.ndarray) -> None:
        equal = expected.shape == actual.shape and np.array_equal(
            expected.astype(np.str_), actual.astype(np.str_)
        )
        self._rows, self._agreeing = self._rows + 1, self._agreeing + int(equal)
        self._probabilities = False
        if not equal:
            self._noise = self._worst = math.inf

    def result(self) -> Divergence:
        if self._noise == 0:
            sqnr = math.inf
        elif self._signal == 0 or math.isinf(self._noise):
            sqnr = -math.inf
        else:
            sqnr = 10 * math.log10(self._signal / self._noise)
        norm = math.sqrt(self._signal * self._power)
        cosine = self._dot / norm if norm else float(self._noise == 0)
        rows = self._rows if self._classes else 0
        return Divergence(
            sqnr_db=sqnr,
            cosine=min(1.0, cosine) if self._noise else 1.0,
            worst=self._worst,
            kl=max(0.0, self._kl / rows) if rows and self._probabilities else None,
            agreement=self._agreeing / rows if rows else None,
        )


def aligned(expected: Outputs, actual: Outputs, name: str) -> Outputs:
    """The candidate's outputs under the original's names: by name, else by position (torch has
    no names).

    Raises:
        UsageError: another number of outputs.
    """
    if set(expected) <= set(actual):
        return actual
    if len(expected) != len(actual):
        raise UsageError(
            f"{name!r} has {len(actual)} outputs, the original {len(expected)}",
            why=f"{sorted(actual)} against {sorted(expected)}",
            fix="compare models with the same outputs",
        )
    return dict(zip(expected, actual.values(), strict=True))
