"""The metrics that have a name: accuracy, top5, auc, eer, f1, mse, mae, rmse, spearman, perplexity,
wer, cer.

Not here: metrics of other libraries (`metrics`), decisions (`classification`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from .metrics import (
    Decided,
    Metric,
    PerSample,
    Whole,
    as_decisions,
    as_probabilities,
    is_probabilities,
)

# --- ranking -----------------------------------------------------------------------------------


def auc(predictions: Any, labels: Any) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney); over several classes, the mean
    of each against the rest by probability (scores that are not probabilities are softmaxed)."""
    return float(_over_classes(predictions, labels, np.ones((1, len(labels))), _plain_auc)[0])


def _plain_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Without weights: how many negatives are below each positive."""
    hits, others = scores[positive], np.sort(scores[~positive])
    if not len(hits) or not len(others) or np.isnan(scores).any():
        return np.array([np.nan])
    wins = np.searchsorted(others, hits) + np.searchsorted(others, hits, side="right")
    return np.array([wins.sum() / (2 * len(hits) * len(others))])


def weighted_auc(predictions: Any, labels: Any, weights: np.ndarray) -> np.ndarray:
    """AUC for each row of sample weights; NaN where a class is missing."""
    return _over_classes(predictions, labels, weights, _binary_auc)


def _over_classes(predictions: Any, labels: Any, weights: np.ndarray, binary: Any) -> np.ndarray:
    scores, truth = np.asarray(predictions, np.float64), np.asarray(labels)
    if scores.ndim == truth.ndim + 1 and scores.shape[-1] == 1:
        scores = scores[..., 0]
    if scores.ndim == 2 and truth.ndim == 1 and scores.shape[1] == 2:
        scores = scores[:, 1] - scores[:, 0]
    if scores.ndim == 2:
        classes = range(scores.shape[1])
        positive = truth.astype(bool) if truth.ndim == 2 else truth[:, None] == np.array(classes)
        if truth.ndim == 1:
            scores = as_probabilities(scores)
        each = [
            binary(scores[:, c], positive[:, c], weights) for c in classes if positive[:, c].any()
        ]
        return np.asarray(np.mean(each, axis=0))
    if scores.shape != truth.shape or scores.ndim != 1:
        raise UsageError(
            "AUC needs one score a sample, or one a class",
            why=f"predictions have shape {scores.shape}, labels {truth.shape}",
            fix="choose the output with `output`, or reduce it with `predict`",
        )
    return np.asarray(binary(scores, truth > 0, weights))


def _sorted_weights(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and negatives at each distinct score, ascending."""
    _, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    ranked = weights[:, order]
    hits = np.add.reduceat(ranked * positive[order], starts, axis=1)
    return hits, np.add.reduceat(ranked * ~positive[order], starts, axis=1)


def _binary_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, others = _sorted_weights(scores, positive, weights)
    below = np.cumsum(others, axis=1) - others
    wins = (hits * (below + 0.5 * others)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(wins / (hits.sum(1) * others.sum(1)))


def weighted_eer(predictions: Any, labels: Any, weights: np.ndarray) -> np.ndarray:
    """Equal error rate for each row of weights: where misses equal false alarms on the ROC curve,
    interpolated."""
    return _over_classes(predictions, labels, weights, _binary_eer)


def _binary_eer(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, others = _sorted_weights(scores, positive, weights)
    zero = np.zeros((len(weights), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        missed = np.hstack([zero, np.cumsum(hits, 1)]) / hits.sum(1, keepdims=True)
        alarms = 1 - np.hstack([zero, np.cumsum(others, 1)]) / others.sum(1, keepdims=True)
    gap = missed - alarms  # rises from -1 to 1
    after = np.argmax(gap >= 0, axis=1)
    rows, before = np.arange(len(weights)), np.maximum(after - 1, 0)
    g0, g1 = gap[rows, before], gap[rows, after]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(g1 > g0, -g0 / (g1 - g0), 0.0)
    return np.asarray(missed[rows, before] + share * (missed[rows, after] - missed[rows, before]))


def eer(predictions: Any, labels: Any) -> float:
    """Equal error rate."""
    return float(weighted_eer(predictions, labels, np.ones((1, len(labels))))[0])


def spearman(predictions: Any, labels: Any) -> float:
    """Rank correlation, ties at their mean rank."""
    scores = np.asarray(predictions, np.float64).reshape(len(labels), -1)
    truth = np.asarray(labels, np.float64).reshape(len(labels), -1)
    if scores.shape != truth.shape:
        raise UsageError(
            "Spearman's correlation needs one number a label",
            why=f"predictions have shape {scores.shape}, labels {truth.shape}",
            fix="choose the output with `output`, or reduce it with `predict`",
        )
    a, b = _ranks(scores.ravel()), _ranks(truth.ravel())
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[place])


# --- of decisions ------------------------------------------------------------------------------


def f1(predictions: Any, labels: Any) -> float:
    """F1 of class 1 where labels are 0 and 1, else the mean over the classes that occur."""
    chosen, truth = np.ravel(as_decisions(predictions, labels)), np.ravel(labels)
    if chosen.shape != truth.shape or truth.dtype.kind == "f":
        raise UsageError(
            "F1 needs one decision a label",
            why=f"predictions have shape {np.shape(predictions)}, labels {np.shape(labels)}",
            fix="choose the output with `output`, or reduce it with `predict`",
        )
    names, places = np.unique(np.concatenate([chosen, truth]), return_inverse=True)
    chosen, truth = places[: len(chosen)], places[len(chosen) :]
    hits = np.bincount(truth[chosen == truth], minlength=len(names))
    either = np.bincount(chosen, minlength=len(names)) + np.bincount(truth, minlength=len(names))
    scores = 2 * hits / either
    if set(names.tolist()) <= {0, 1}:
        return float(scores[names == 1].sum())
    return float(scores.mean())


# --- per sample --------------------------------------------------------------------------------


def _squared(prediction: Any, label: Any) -> tuple[float, float]:
    error = _error(prediction, label)
    return float(np.sum(error**2)), error.size


def _absolute(prediction: Any, label: Any) -> tuple[float, float]:
    error = np.abs(_error(prediction, label))
    return float(np.sum(error)), error.size


def _error(prediction: Any, label: Any) -> np.ndarray:
    found, truth = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    if found.size != truth.size:
        raise UsageError(
            "The prediction and the label have different sizes",
            why=f"shapes {found.shape} and {truth.shape}",
            fix="choose the output with `output`, or reduce it with `predict`",
        )
    return np.asarray(found.ravel() - truth.ravel())


def _top5(prediction: Any, label: Any) -> float:
    scores = np.asarray(prediction).ravel()
    best = np.argpartition(scores, -5)[-5:] if scores.size > 5 else np.arange(scores.size)
    return float(int(label) in best)


def _log_loss(prediction: Any, label: Any) -> tuple[float, float]:
    """Negative log likelihood of the label at each position, in nats. Labels below 0 are left out;
    one label fewer than positions leaves the last position out."""
    scores = np.asarray(prediction)
    scores = scores.reshape(-1, scores.shape[-1])
    truth = np.asarray(label).ravel()
    if len(truth) == len(scores) - 1:
        scores = scores[:-1]
    if len(truth) != len(scores) or truth.dtype.kind not in "iu":
        raise UsageError(
            "Perplexity needs scores [positions, tokens] and one token a position as the label",
            why=f"{np.shape(prediction)} against {np.shape(label)}, {np.asarray(label).dtype}",
            fix="give the next tokens as labels: ids[1:] for a causal model",
        )
    kept = truth >= 0
    scores, truth = scores[kept].astype(np.float64), truth[kept]
    chosen = scores[np.arange(len(truth)), truth]
    if is_probabilities(scores):
        return float(-np.log(np.maximum(chosen, 1e-300)).sum()), len(truth)
    peak = scores.max(-1, initial=-np.inf) if len(scores) else np.zeros(0)
    total = peak + np.log(np.exp(scores - peak[:, None]).sum(-1))
    return float((total - chosen).sum()), len(truth)


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Insertions, deletions and substitutions that turn one into the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _words(prediction: Any, label: Any) -> tuple[float, float]:
    found, truth = _text(prediction).split(), _text(label).split()
    return edit_distance(found, truth), len(truth)


def _characters(prediction: Any, label: Any) -> tuple[float, float]:
    return edit_distance(_text(prediction), _text(label)), len(_text(label))


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.ravel()[0]
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise UsageError(
            f"A {type(value).__name__} is not text",
            why="wer and cer compare text with text",
            fix="decode the outputs with `predict`, and give text labels",
        )
    return str(value)


BUILTIN: dict[str, Metric] = {
    "accuracy": Decided(),
    "top5": PerSample(_top5),
    "auc": Whole(auc, weighted=weighted_auc),
    "eer": Whole(eer, higher_is_better=False, weighted=weighted_eer),
    "f1": Whole(f1),
    "mse": PerSample(_squared, higher_is_better=False),
    "rmse": PerSample(_squared, np.sqrt, higher_is_better=False),
    "mae": PerSample(_absolute, higher_is_better=False),
    "spearman": Whole(spearman),
    "perplexity": PerSample(_log_loss, np.exp, higher_is_better=False),
    "wer": PerSample(_words, higher_is_better=False),
    "cer": PerSample(_characters, higher_is_better=False),
}
