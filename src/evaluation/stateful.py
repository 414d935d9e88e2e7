"""Models that carry a state: a sequence of steps, what one gives handed to the next.

Here: `run_sequence`, `end_to_end`. Not here: samples (`data`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from ..targets.feed import TensorSpec
from .runners import Outputs, Runner, inputs_of

Feed = Mapping[str, np.ndarray]


def run_sequence(runner: Runner, sequence: Any, carry: Mapping[str, str]) -> Outputs:
    """Outputs of all steps end to end, without the carried ones.

    `sequence` is an iterable of feeds, or a mapping of arrays along time; arrays without a time
    axis are given to every step. `carry` maps an output to the input that it becomes; the first
    step's states are those given, else zeros.

    Raises:
        UsageError: no step, no such output, or a state of unknown shape.
    """
    specs = {spec.name: spec for spec in inputs_of(runner) or ()}
    state: dict[str, np.ndarray] = {}
    collected: dict[str, list[np.ndarray]] = {}
    for step in _steps(sequence, specs, set(carry.values())):
        feed = {**step, **state}
        for name in carry.values():
            if name not in feed:
                feed[name] = _zeros(name, specs)
        outputs = runner.run(feed)
        missing = [name for name in carry if name not in outputs]
        if missing:
            raise UsageError(
                f"The model has no output {missing[0]!r} to carry",
                fix=f"`carry` maps outputs to inputs; outputs are: {sorted(outputs)}",
            )
        state = {target: outputs[name] for name, target in carry.items()}
        for name, array in outputs.items():
            if name not in carry:
                collected.setdefault(name, []).append(array)
    if not collected:
        raise UsageError("A sequence has no step", fix="give at least one feed a sequence")
    return {name: end_to_end(arrays) for name, arrays in collected.items()}


def end_to_end(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Results of steps along a time axis, which takes the place of a batch of one."""
    batches = all(np.ndim(array) and len(array) == 1 for array in arrays)
    return np.concatenate(arrays) if batches else np.stack(arrays)


def _steps(sequence: Any, specs: Mapping[str, TensorSpec], states: set[str]) -> Iterator[Feed]:
    if not isinstance(sequence, Mapping):
        yield from sequence
        return
    initial = {name: np.asarray(v) for name, v in sequence.items() if name in states}
    parts = {
        name: _along_time(np.asarray(array), specs.get(name))
        for name, array in sequence.items()
        if name not in states
    }
    lengths = {name: len(steps) for name, steps in parts.items() if steps is not None}
    if len(set(lengths.values())) > 1:
        raise UsageError(
            "The inputs of a sequence have different numbers of steps",
            why=", ".join(f"{name}: {count}" for name, count in lengths.items()),
            fix="give every input one entry a step, or none",
        )
    for t in range(next(iter(lengths.values()), 1)):
        feed = {n: np.asarray(sequence[n]) if s is None else s[t] for n, s in parts.items()}
        yield {**initial, **feed} if t == 0 else feed


def _along_time(array: np.ndarray, spec: TensorSpec | None) -> Sequence[np.ndarray] | None:
    """One array a step; None where there is no time axis."""
    rank = None if spec is None or spec.shape is None else len(spec.shape)
    if array.ndim == 0 or (rank is not None and array.ndim < rank):
        return None
    if spec is None or spec.shape is None or array.ndim > len(spec.shape):
        return list(array)
    if spec.shape and (not isinstance(spec.shape[0], int) or spec.shape[0] == 1):
        return [array[i : i + 1] for i in range(len(array))] if len(array) > 1 else None
    return None


def _zeros(name: str, specs: Mapping[str, TensorSpec]) -> np.ndarray:
    spec = specs.get(name)
    if spec is None or spec.shape is None:
        raise UsageError(
            f"The first state {name!r} is not given, and its shape is not known",
            fix=f"put {name!r} into the first feed of each sequence",
        )
    shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape]
    return np.zeros(shape, np.dtype(spec.dtype))
