"""A hash of what an evaluation measures by, for caches.

Here: `fingerprint`. Not here: hashing values (`runners.digest`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..npz import read_npz
from .data import samples_of
from .metrics import Decided, PerSample, Whole, direction_of
from .runners import digest

if TYPE_CHECKING:
    from .evaluation import Evaluation

_OPTIONS = ("output", "carry", "logits", "bins", "resamples", "confidence", "interval", "seed")
_FUNCTIONS = ("predict", "is_right", "step")


def fingerprint(evaluation: Evaluation) -> str:
    """See `Evaluation.fingerprint`.

    Raises:
        UsageError: no sample, or labels that do not fit.
    """
    state = hashlib.sha256()
    rules = {**evaluation.slices, "": evaluation.group}
    state.update("".join(sorted(_hashes(evaluation, rules))).encode())
    metrics = evaluation.metrics
    if not isinstance(metrics, Mapping):
        metrics = {str(name): name for name in metrics}
    for name in sorted(metrics):
        state.update(f"metric {name} {describe(metrics[name])}".encode())
        state.update(repr(direction_of(evaluation.limits.get(name))).encode())
    for name in sorted(rules, key=str):
        rule = rules[name]
        state.update(f"slice {name} {describe(rule) if callable(rule) else ''}".encode())
    for option in _OPTIONS:
        state.update(f"{option} {getattr(evaluation, option)!r}".encode())
    state.update(f"{evaluation.join} {evaluation.batched}".encode())
    for option in _FUNCTIONS:
        state.update(f"{option} {describe(getattr(evaluation, option))}".encode())
    return state.hexdigest()[:32]


def _hashes(evaluation: Evaluation, rules: Mapping[str, Any]) -> list[str]:
    """One a sample, in which its label and its entries of sequences beside the data are; stacks are
    hashed as a whole."""
    apart = [rule for rule in rules.values() if hasattr(rule, "__len__")]
    data = evaluation.data
    if isinstance(data, str | Path) and Path(data).is_file():
        data = read_npz(Path(data))
    if isinstance(data, Mapping | np.ndarray):
        return [digest([data, evaluation.labels, apart])]
    return [
        digest(
            [
                sample.feed,
                sample.label,
                sample.extra,
                [rule if isinstance(rule, str) else rule[sample.index] for rule in apart],
            ]
        )
        for sample in samples_of(evaluation, None)
    ]


def describe(function: Any, depth: int = 3) -> str:
    """A function by module, name, code, defaults and closure; anything else by its content."""
    if function is None or isinstance(function, str | int | float | bool | bytes):
        return repr(function)
    if isinstance(function, functools.partial):
        inner = describe(function.func, depth)
        return f"partial({inner}, {digest(function.args)}, {digest(function.keywords)})"
    if isinstance(function, PerSample | Whole | Decided):
        parts = [describe(value, depth) for value in vars(function).values()]
        return f"{type(function).__name__}({', '.join(parts)})"
    if inspect.ismethod(function):
        return f"{describe(function.__func__, depth)} of {describe(function.__self__, depth - 1)}"
    code = getattr(function, "__code__", None)
    if code is None:
        name = getattr(function, "__qualname__", None)
        if name is not None:
            return f"{function.__module__}.{name}"
        state = vars(function) if hasattr(function, "__dict__") and depth > 0 else {}
        plain = {k: v for k, v in state.items() if isinstance(v, str | int | float | bool | tuple)}
        return f"{type(function).__module__}.{type(function).__qualname__}({digest(plain)})"
    closed = [_cell(cell, depth) for cell in function.__closure__ or ()]
    defaults = [describe(value, depth - 1) for value in function.__defaults__ or ()]
    return f"{function.__module__}.{function.__qualname__} {_code(code)} {closed} {defaults}"


def _cell(cell: Any, depth: int) -> str:
    try:
        value = cell.cell_contents
    except ValueError:
        return "empty"
    if callable(value):
        return describe(value, depth - 1) if depth > 0 else type(value).__qualname__
    return digest(value)


def _code(code: Any) -> str:
    """The instructions and constants of a function, and of those within it."""
    parts = [code.co_code.hex(), repr(code.co_names)]
    for constant in code.co_consts:
        parts.append(_code(constant) if hasattr(constant, "co_code") else repr(constant))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
