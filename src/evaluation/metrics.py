"""Metrics: a user's function, scikit-learn's, torchmetrics', built in, all in one form.

Here: `PerSample`, `Whole`, `resolve`. Not here: the built-in ones (`builtin_metrics`), intervals
(`bootstrap`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError

Function = Callable[..., Any]
Weighted = Callable[[Any, Any, np.ndarray], np.ndarray]
_LABELS_FIRST = ("y_true", "labels_true", "labels", "label", "targets", "target", "truth", "y1")
_LOWER = (
    *("loss", "error", "distance", "deviance", "perplexity", "wer", "cer", "eer"),
    *("mse", "mae", "rmse", "fpr", "fnr", "far", "frr"),
)


@dataclasses.dataclass(frozen=True)
class PerSample:
    """A metric that is a mean over samples: `finish(sum of numerators / sum of denominators)`.

    `measure(prediction, label)` gives one sample's numerator and denominator, or only the numerator
    (the denominator is then 1). Predictions are not kept for it, so that a language model's
    logits need no memory, and its intervals are quick.
    """

    measure: Callable[[Any, Any], float | tuple[float, float]]
    finish: Callable[[Any], Any] = lambda value: value
    higher_is_better: bool = True

    def contribution(self, prediction: Any, label: Any) -> tuple[float, float]:
        """Numerator and denominator of one sample."""
        found = self.measure(prediction, label)
        if isinstance(found, tuple):
            return float(found[0]), float(found[1])
        return float(found), 1.0


@dataclasses.dataclass(frozen=True)
class Decided:
    """The share of right decisions (`classification`), of which predictions need not be kept."""

    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Whole:
    """A metric of all predictions at once, such as AUC: `call(predictions, labels)`.

    `weighted(predictions, labels, weights)` gives its value for each row of sample weights, where
    that is quicker than calling it again and again. `takes_all`: it is given every output by name.
    `label_free`: it takes predictions only.
    """

    call: Function
    higher_is_better: bool = True
    weighted: Weighted | None = None
    takes_all: bool = False
    label_free: bool = False


Metric = PerSample | Decided | Whole


def resolve(
    metrics: Mapping[str, Any] | Sequence[str], limits: Mapping[str, float | str]
) -> dict[str, Metric]:
    """Metrics by name; the sign of a limit says which direction is better.

    Raises:
        UsageError: no built-in of that name, or not a metric.
    """
    if isinstance(metrics, str):
        metrics = [metrics]
    named = metrics if isinstance(metrics, Mapping) else {str(name): name for name in metrics}
    return {str(name): _one(str(name), metric, limits.get(name)) for name, metric in named.items()}


def _one(name: str, metric: Any, limit: float | str | None) -> Metric:
    from .builtin_metrics import BUILTIN

    if isinstance(metric, str):
        if metric not in BUILTIN:
            raise UsageError(
                f"There is no built-in metric {metric!r}",
                where=f"metric {name!r}",
                fix=f"use one of {', '.join(BUILTIN)}, or give a function",
            )
        metric = BUILTIN[metric]
    better = direction_of(limit)
    if isinstance(metric, PerSample | Decided | Whole):
        return metric if better is None else dataclasses.replace(metric, higher_is_better=better)
    if better is None:
        better = _guessed_direction(name, metric)
    if all(hasattr(metric, part) for part in ("update", "compute", "reset")):
        return Whole(_torch_call(metric), better)
    if not callable(metric):
        raise UsageError(
            f"The metric {name!r} is a {type(metric).__name__}, which can't be called",
            fix="give metric(predictions, labels) -> float, or a built-in name",
        )
    return _from_function(metric, better)


def direction_of(limit: float | str | None) -> bool | None:
    """Whether higher is better, as far as a limit says."""
    if isinstance(limit, str):
        text = limit.strip()
        if text[:1] in ("<", ">"):
            return text[0] == ">"
        return True if text[:1] == "-" else False if text[:1] == "+" else None
    return None if limit is None or limit == 0 else limit < 0


def _guessed_direction(name: str, metric: Any) -> bool:
    declared = getattr(metric, "higher_is_better", None)
    if isinstance(declared, bool):
        return declared
    inner = getattr(metric, "func", metric)  # functools.partial
    words = {*name.lower().split("_"), *str(getattr(inner, "__name__", "")).lower().split("_")}
    return not words & set(_LOWER)


# --- the forms of other libraries -------------------------------------------------------------


def _from_function(function: Function, better: bool) -> Metric:
    """A function in its own order of arguments; scikit-learn's get what their names ask for."""
    try:
        parameters = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    takes_all = parameters[:1] == ["outputs"]
    inner = getattr(function, "func", function)
    if function is getattr(sys.modules.get("sklearn.metrics"), "roc_auc_score", None):
        from .builtin_metrics import BUILTIN

        return BUILTIN["auc"]  # the same number, many times quicker on resamples
    if str(getattr(inner, "__module__", "")).startswith("sklearn."):
        return Whole(_sklearn_call(function, inner, parameters), better)
    if parameters[:1] and parameters[0] in _LABELS_FIRST:
        return Whole(lambda predictions, labels: function(labels, predictions), better)
    if len(parameters) == 1:
        return Whole(
            lambda predictions, labels: function(predictions), better, None, takes_all, True
        )
    return Whole(function, better, None, takes_all)


def _sklearn_call(function: Function, inner: Any, parameters: Sequence[str]) -> Function:
    second = parameters[1] if len(parameters) > 1 else ""
    wants_scores = second in ("y_score", "y_proba", "y_prob", "pred_decision", "probas_pred")
    wants_scores = wants_scores or inner.__name__ == "log_loss"
    probabilities = second not in ("pred_decision",)

    def call(predictions: Any, labels: Any) -> Any:
        shape = as_scores if wants_scores else as_decisions
        given = shape(predictions, labels)
        if wants_scores and probabilities and isinstance(given, np.ndarray) and given.ndim == 2:
            given = as_probabilities(given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(np.asarray(labels), given)

    return call


def _torch_call(metric: Any) -> Function:
    def call(predictions: Any, labels: Any) -> Any:
        import torch

        metric.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(predictions, list):
                metric.update(predictions, labels)
            else:
                metric.update(torch.as_tensor(predictions), torch.as_tensor(np.asarray(labels)))
            value = metric.compute()
        metric.reset()
        return value

    return call


def as_decisions(predictions: Any, labels: Any) -> Any:
    """Classes out of scores where the labels are classes: arg max, or the sign of one score (its
    half where scores are probabilities). Anything else is returned as it is."""
    scores, truth = np.asarray(predictions), np.asarray(labels)
    if scores.dtype.kind != "f" or truth.dtype.kind not in "iub":
        return predictions
    if scores.ndim == truth.ndim + 1 and scores.shape[-1] > 1:
        return scores.argmax(-1)
    if scores.ndim == truth.ndim + 1:
        scores = scores[..., 0]
    if scores.shape == truth.shape and set(np.unique(truth).tolist()) <= {0, 1}:
        return (scores > threshold_of(scores)).astype(np.int64)
    return scores


def as_scores(predictions: Any, labels: Any) -> Any:
    """Scores as scikit-learn takes them: one a sample for two classes, else one a class."""
    scores, truth = np.asarray(predictions), np.asarray(labels)
    if scores.ndim == truth.ndim + 1 and scores.shape[-1] == 1:
        return scores[..., 0]
    if scores.ndim == 2 and truth.ndim == 1 and scores.shape[1] == 2:
        return as_probabilities(scores)[:, 1]
    return predictions


def as_probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax along the last axis, unless the entries are probabilities already."""
    scores = np.asarray(scores, np.float64)
    if is_probabilities(scores):
        return scores
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def is_probabilities(scores: np.ndarray) -> bool:
    """Whether entries are non-negative and sum to one along the last axis."""
    return bool(
        scores.ndim >= 1
        and scores.shape[-1] > 1
        and (scores >= -1e-6).all()
        and (np.abs(scores.sum(-1, dtype=np.float64) - 1) < 2e-3).all()
    )


def threshold_of(scores: np.ndarray) -> float:
    """0.5 for scores within [0, 1], 0 for logits."""
    inside = scores.size == 0 or bool(scores.min() >= 0 and scores.max() <= 1)
    return 0.5 if inside else 0.0


def named_function(text: str) -> Any:
    """`package.module:name`, `file.py:name`, or a built-in metric's name.

    Raises:
        UsageError: it can't be imported, or has no such name.
    """
    module_name, colon, attribute = text.rpartition(":")
    if not colon:
        return text
    try:
        found: Any = _module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError) as error:
        raise UsageError(
            f"{text!r} can't be found",
            why=str(error),
            fix="give package.module:function, importable from the current folder, or file.py:name",
        ) from error
    return found


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove("")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
