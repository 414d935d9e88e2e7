"""Decisions of a classifier: which were right, what flipped, and whether confidence is calibrated.

Here: `Decisions`, `flips`, `calibration_error`. Not here: metrics of scores (`builtin_metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .metrics import as_probabilities, is_probabilities, threshold_of
from .report import Flips

_BINS = 15


class Decisions:
    """What one model decided on each sample, and whether that was right.

    `add` takes predictions one at a time and keeps a few numbers of each. `usable` turns False
    where prediction and label are not those of a classifier: a class is an arg max over scores,
    the sign of one score (its half for probabilities), an integer, or text.
    """

    def __init__(self, is_right: Callable[[Any, Any], bool] | None, logits: bool) -> None:
        self.usable = True
        self._is_right = is_right
        self._logits = logits
        self._probabilities = True
        self._single = False
        self._right: list[np.ndarray] = []
        self._top: list[np.ndarray] = []
        self._truth: list[np.ndarray] = []

    def add(self, prediction: Any, label: Any, outputs: Any) -> None:
        """One sample."""
        if not self.usable:
            return
        if self._is_right is not None:
            self._right.append(np.array([bool(self._is_right(outputs, label))]))
        elif not self._add(prediction, label):
            self.usable = False
            self._right, self._top, self._truth = [], [], []

    def _add(self, prediction: Any, label: Any) -> bool:
        if isinstance(prediction, str | bytes) or isinstance(label, str | bytes):
            self._right.append(np.array([_plain(prediction) == _plain(label)]))
            return True
        if label is None or not _is_numeric(prediction) or not _is_numeric(label):
            return False
        scores, truth = np.asarray(prediction), np.asarray(label)
        if truth.dtype.kind not in "iub" or not truth.size:
            return False
        if scores.dtype.kind in "iub":
            if scores.size != truth.size:
                return False
            self._right.append(scores.ravel() == truth.ravel())
            return True
        arranged = class_axis_last(scores, truth)
        if arranged is not None:
            return self._add_classes(arranged, truth.ravel())
        if scores.size != truth.size or truth.min() < 0 or truth.max() > 1:
            return False
        self._single = True
        self._top.append(scores.ravel().astype(np.float64))
        self._truth.append(truth.ravel().astype(bool))
        return True

    def _add_classes(self, scores: np.ndarray, truth: np.ndarray) -> bool:
        if truth.max() >= scores.shape[-1]:
            return False
        kept = truth >= 0  # -100 and the like: positions that do not count
        scores, truth = scores[kept], truth[kept]
        right = (scores.argmax(-1) == truth) & ~np.isnan(scores).any(-1)
        self._right.append(right)
        if self._logits:
            scores = as_probabilities(scores)
        self._probabilities = self._probabilities and is_probabilities(scores)
        self._top.append(scores.max(-1).astype(np.float64))
        return True

    def threshold(self) -> float:
        """Above which a single score says yes, by this model's scores."""
        return threshold_of(np.concatenate(self._top)) if self._single else 0.5

    def right(self, threshold: float) -> list[np.ndarray]:
        """For each sample its decisions: right or not."""
        if not self._single:
            return self._right
        return [(t > threshold) == y for t, y in zip(self._top, self._truth, strict=True)]

    def calibration_error(self, threshold: float) -> float | None:
        """Expected calibration error; None where there are no probabilities."""
        if not self._top or not self._probabilities:
            return None
        top = np.concatenate(self._top)
        if self._single:
            if self._logits:
                top, threshold = 1 / (1 + np.exp(-np.clip(top, -700, 700))), 0.5
            elif threshold != 0.5:
                return None
            top = np.clip(top, 0, 1)
            right = (top > 0.5) == np.concatenate(self._truth)
            return calibration_error(np.maximum(top, 1 - top), right)
        return calibration_error(top, np.concatenate(self._right))


def class_axis_last(scores: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
    """Scores as [decisions, classes]: one class axis beside those of the labels, last or (as in
    segmentation) first; None where there is none."""
    shape = tuple(d for d in truth.shape if d != 1)
    given = tuple(d for d in scores.shape if d != 1)
    if len(given) != len(shape) + 1:
        return None
    if given[:-1] == shape:
        return scores.reshape(-1, given[-1])
    if given[1:] == shape:
        return np.ascontiguousarray(np.moveaxis(scores.reshape(given), 0, -1)).reshape(-1, given[0])
    return None


def flips(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Flips:
    """Decisions that changed between right and wrong, with McNemar's exact test (McNemar 1947)
    where every sample is one decision."""
    single = all(len(right) == 1 for right in before)
    a, b = np.concatenate(before), np.concatenate(after)
    broken, mended = int((a & ~b).sum()), int((b & ~a).sum())
    return Flips(broken, mended, len(a), mcnemar(broken, mended) if single else None)


def mcnemar(broken: int, mended: int) -> float:
    """Two-sided p-value that both flips are equally likely: an exact sign test."""
    total, fewer = broken + mended, min(broken, mended)
    if not total:
        return 1.0
    log_half = total * math.log(2)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - log_half
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * sum(math.exp(value) for value in logs))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017)."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, right.astype(float) - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / max(len(confidence), 1))


def _is_numeric(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "fiub"
    if isinstance(value, list | tuple):
        try:
            return np.asarray(value).dtype.kind in "fiub"
        except ValueError:  # ragged: boxes, spans
            return False
    return isinstance(value, int | float | bool)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.ravel()[0]
    return value.decode() if isinstance(value, bytes) else value
