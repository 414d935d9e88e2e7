"""Calibration and run inputs in any form a user has, as a list of checked feeds.

Here: `as_feeds`. Not here: the check of one feed (`targets.feed`), reading npz safely (`npz`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CalibrationError, UsageError
from .npz import read_npz
from .targets.feed import TensorSpec, check_feed

Feed = Mapping[str, np.ndarray]


def as_feeds(data: Any, inputs: Sequence[TensorSpec], *, finite: bool = True) -> list[Feed]:
    """Samples as a list of feeds, each checked against the model's inputs.

    `data` may be a list (or any iterable) of feeds, of tuples in input order, or, for a model of
    one input, of arrays; a mapping from input name to a stack of samples; the path of a `.npz`
    with such stacks, or of a folder of `.npz` files, one sample each. A stack has one axis more
    than the input (each entry is a sample), or as many (then as many rows as the input's batch, 1
    where that is dynamic, are a sample). torch tensors are taken as arrays. `finite` refuses NaN
    and infinity.

    Raises:
        CalibrationError: a wrong name, dtype or shape, stacks of different length, no sample, NaN.
        UsageError: a path that is neither a `.npz` nor a folder of them.
    """
    if isinstance(data, str | Path):
        data = _from_path(Path(data))
    if isinstance(data, Mapping):
        data = _unstack(data, inputs)
    if isinstance(data, np.ndarray) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"Samples can't be a {type(data).__name__}",
            fix="give a list of feeds, each a dict from input name to array, or a .npz file",
        )
    feeds = []
    for i, sample in enumerate(data):
        feed = _as_feed(sample, inputs, i)
        check_feed(inputs, feed, where=f"sample {i}", finite=finite)
        feeds.append(feed)
    if not feeds:
        raise CalibrationError(
            "There is no sample",
            why="ranges can't be read off nothing",
            fix="give a few dozen representative inputs",
        )
    return feeds


def _as_feed(sample: Any, inputs: Sequence[TensorSpec], index: int) -> Feed:
    if isinstance(sample, Mapping):
        return {str(name): _array(value) for name, value in sample.items()}
    values = sample if isinstance(sample, tuple | list) else (sample,)
    if len(values) != len(inputs):
        raise CalibrationError(
            f"Sample {index} has {len(values)} values; the model takes {len(inputs)} inputs",
            why="values without names are taken in the order of the inputs",
            fix=f"give a dict with {', '.join(spec.name for spec in inputs)}",
        )
    return {spec.name: _array(value) for spec, value in zip(inputs, values, strict=True)}


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if type(value).__module__.split(".")[0] == "torch":
        return value.detach().cpu().numpy()
    return np.asarray(value) if isinstance(value, int | float | bool | list) else value


def _unstack(stacks: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> list[Feed]:
    arrays = {str(name): np.asarray(_array(value)) for name, value in stacks.items()}
    specs = {spec.name: spec for spec in inputs}
    if set(arrays) != set(specs):
        check_feed(inputs, arrays, where="the stacked samples")
    split = {name: split_stack(array, specs[name]) for name, array in arrays.items()}
    counts = {name: len(parts) for name, parts in split.items()}
    if len(set(counts.values())) != 1:
        raise CalibrationError(
            "The stacks have different numbers of samples",
            why=", ".join(f"{name}: {count}" for name, count in counts.items()),
            fix="give each input one entry a sample along its first axis",
        )
    total = next(iter(counts.values()))
    return [{name: parts[i] for name, parts in split.items()} for i in range(total)]


def split_stack(array: np.ndarray, spec: TensorSpec) -> list[np.ndarray]:
    """One array a sample: entries of a stack, else runs of rows as long as the input's batch."""
    rank = None if spec.shape is None else len(spec.shape)
    if array.ndim == 0:
        return [array]
    if array.ndim != rank or spec.shape is None:
        return [np.ascontiguousarray(entry) for entry in array]
    batch = spec.shape[0] if isinstance(spec.shape[0], int) else 1
    return [
        np.ascontiguousarray(array[i : i + batch]) for i in range(0, len(array) - batch + 1, batch)
    ]


def _from_path(path: Path) -> Any:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise UsageError(
                f"The folder {str(path)!r} has no .npz file", fix="save one sample in each"
            )
        return [read_npz(file) for file in files]
    if path.suffix != ".npz" or not path.is_file():
        raise UsageError(
            f"The samples {str(path)!r} are not a .npz file or a folder of them",
            fix="numpy.savez('data.npz', x=stacked_samples)",
        )
    return read_npz(path)
