"""A user's metric that is a built-in one, found out by trying, so that resampling is quick.

Here: `recognised`. scikit-learn's functions spend milliseconds a call on checking their arguments;
an interval takes thousands of calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .bootstrap import draws
from .builtin_metrics import auc, weighted_auc
from .metrics import Weighted, as_decisions
from .scored import Calls

_TRIALS = 6
_EQUAL = 1e-11
_SEED = 7
_TWINS: tuple[tuple[Callable[[Any, Any], Any], Weighted], ...]


def recognised(calls: Calls) -> Calls:
    """The metric with a quick twin in its place, if a built-in metric gives the same value (to
    1e-11) for all models, on all samples and on six resamples, and those values differ."""
    if calls.labels is None or not all(
        isinstance(given, np.ndarray) for given in calls.predictions.values()
    ):
        return calls
    size = int(calls.units.max(initial=-1)) + 1
    everything = np.ones((1, size), np.int64)
    counts = np.concatenate([everything, *draws(size, _TRIALS, _SEED)])
    found = calls.values(counts)
    for call, weighted in _TWINS:
        twin = dataclasses.replace(calls, call=call, weighted=weighted)
        try:
            same = twin.values(counts)
        except Exception:  # not a metric of such predictions
            continue
        if all(_equal(found[name], same[name]) for name in found):
            return twin
    return calls


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    varied = len(np.unique(a)) > 1 and bool(np.isfinite(a).all())
    return varied and a.shape == b.shape and bool((np.abs(a - b) <= _EQUAL).all())


def _accuracy(predictions: Any, labels: Any) -> float:
    return float(np.mean(_right(predictions, labels)))


def _weighted_accuracy(predictions: Any, labels: Any, weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights @ _right(predictions, labels) / weights.sum(1))


def _right(predictions: Any, labels: Any) -> np.ndarray:
    chosen, truth = np.asarray(as_decisions(predictions, labels)), np.asarray(labels)
    if chosen.shape != truth.shape or truth.ndim != 1:
        raise ValueError("not decisions")
    return np.asarray(chosen == truth, np.float64)


_TWINS = ((auc, weighted_auc), (_accuracy, _weighted_accuracy))
