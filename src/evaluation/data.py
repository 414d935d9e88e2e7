"""Samples from whatever a user iterates, one at a time: feed, label, and what else came along.

Here: `samples_of`. Not here: running them (`observe`), the values of slices (`slices`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..npz import read_npz
from ..samples import split_stack
from ..targets.feed import TensorSpec, check_feed

if TYPE_CHECKING:
    from .evaluation import Evaluation

LABEL_NAMES = ("label", "labels", "y", "target", "targets")
Inputs = Sequence[TensorSpec] | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample. `feed` is a mapping of arrays, or for a stateful model whatever its steps are;
    `extra` are entries of the data that are neither inputs nor the label."""

    feed: Any
    label: Any
    index: int
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def samples_of(evaluation: Evaluation, inputs: Inputs) -> Iterator[Sample]:
    """The samples of an evaluation, in order, for a model with these inputs.

    Raises:
        UsageError: data of no known kind, no sample, or not one label a sample.
        CalibrationError: a feed that does not fit the inputs.
    """
    stateful = evaluation.step is not None or evaluation.carry is not None
    known = None if stateful else inputs
    labels = _Labels(evaluation.labels)
    count = 0
    for feed, label, extra in _raw(evaluation.data, known, labels.given, evaluation.batched):
        if evaluation.carry is not None and inputs is not None and isinstance(feed, Mapping):
            feed, extra = _inputs_only(feed, extra, inputs)
        if known is not None:
            check_feed(known, feed, where=f"sample {count}")
        yield Sample(feed, labels.of(count, label, extra), count, extra)
        count += 1
    if count == 0:
        once = isinstance(evaluation.data, Iterator)
        raise UsageError(
            "There is no sample",
            why="the data is an iterator, which can be read only once" if once else "",
            fix="give a list, or the function that makes the iterator" if once else "give data",
        )
    labels.check(count)


class _Labels:
    """Labels from where the user put them: beside the data, or in it."""

    def __init__(self, labels: Any) -> None:
        self._name = labels if isinstance(labels, str) else None
        self._sequence: Any = None if self._name is not None else labels
        self._iterator = None
        if labels is not None and self._name is None and not hasattr(labels, "__getitem__"):
            self._iterator = iter(labels)
        self.given = labels is not None

    def of(self, index: int, own: Any, extra: Mapping[str, Any]) -> Any:
        if self._name is not None:
            if self._name not in extra:
                raise UsageError(
                    f"The data has no entry {self._name!r} for the labels",
                    fix=f"name one of {sorted(extra)}" if extra else "",
                )
            return extra[self._name]
        if self._iterator is not None:
            return next(self._iterator, None)
        if self._sequence is None:
            return own
        if index >= len(self._sequence):
            raise self._misfit(f"More than {index} samples", len(self._sequence))
        return to_numpy(self._sequence[index])

    def check(self, count: int) -> None:
        if hasattr(self._sequence, "__len__") and len(self._sequence) != count:
            raise self._misfit(f"{count} samples", len(self._sequence))

    def _misfit(self, samples: str, labels: int) -> UsageError:
        return UsageError(
            f"{samples} and {labels} labels can't be evaluated",
            why="each sample needs its label",
            fix="give as many labels as samples, and at least one",
        )


# --- from data to feeds ------------------------------------------------------------------------

Raw = tuple[Any, Any, Mapping[str, Any]]


def _raw(data: Any, inputs: Inputs, labels_apart: bool, batched: bool | None) -> Iterator[Raw]:
    if isinstance(data, str | Path):
        data = _from_path(Path(data))
    if isinstance(data, np.ndarray) or _is_tensor(data):
        if inputs is not None and len(inputs) != 1:
            raise UsageError(
                f"One array for a model of {len(inputs)} inputs",
                fix="give a mapping from input to stack of samples",
            )
        data = {inputs[0].name if inputs else "input": data}
    if isinstance(data, Mapping):
        yield from _unstacked(data, inputs, labels_apart)
        return
    loader = type(data).__module__.startswith("torch.utils.data") and hasattr(data, "batch_size")
    split = loader and data.batch_size is not None if batched is None else batched
    for item in _iterable(data):
        feed, label, extra = _parts(item, inputs, labels_apart)
        yield from _single(feed, label, extra, inputs, split)


def _iterable(data: Any) -> Iterable[Any]:
    if hasattr(data, "__iter__"):
        return data  # type: ignore[no-any-return]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))
    if callable(data):
        return _iterable(data())
    raise UsageError(
        f"A {type(data).__name__} gives no samples",
        fix="give a list or other iterable of feeds or of (feed, label), a function that returns "
        "one, a mapping of stacked arrays, an .npz file, or a folder",
    )


def _parts(item: Any, inputs: Inputs, labels_apart: bool) -> Raw:
    """Feed, label and the rest of one item."""
    if isinstance(item, Sample):
        return item.feed, item.label, item.extra
    if isinstance(item, Mapping):
        return _named_parts(item, inputs)
    if not isinstance(item, tuple | list):
        return _by_position([item], inputs), None, {}
    if labels_apart or (inputs is not None and len(item) == len(inputs) and len(inputs) > 1):
        pairs = len(item) == 2 and isinstance(item[0], Mapping | tuple | list)
        if not pairs:
            return _by_position(item, inputs), None, {}
    if len(item) == 2:
        feed, label = item
        if isinstance(feed, Mapping):
            named, _, extra = _named_parts(feed, inputs)
            return named, to_numpy(label), extra
        if inputs is None:
            return feed, to_numpy(label), {}
    if inputs is not None and len(item) == len(inputs):
        return _by_position(item, inputs), None, {}
    if len(item) == 2 and isinstance(item[0], tuple | list):
        return _by_position(item[0], inputs), to_numpy(item[1]), {}
    return _by_position(item[:-1], inputs), to_numpy(item[-1]), {}


def _named_parts(item: Mapping[str, Any], inputs: Inputs) -> Raw:
    names = None if inputs is None else {spec.name for spec in inputs}
    feed, extra = {}, {}
    label = None
    for name, value in item.items():
        if names is not None and name in names:
            feed[name] = _array(value)
        elif name in LABEL_NAMES:
            label = extra[name] = to_numpy(value)
        elif names is None:
            feed[name] = extra[name] = _array(value)
        else:
            extra[name] = to_numpy(value)
    return feed, label, extra


def _inputs_only(
    feed: Mapping[str, Any], extra: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the model takes, and the rest as extra entries."""
    names = {spec.name for spec in inputs}
    rest = {name: to_numpy(value) for name, value in feed.items() if name not in names}
    return {name: value for name, value in feed.items() if name in names}, {**extra, **rest}


def _by_position(values: Sequence[Any], inputs: Inputs) -> Any:
    if inputs is None:
        return values[0] if len(values) == 1 else list(values)
    if len(values) != len(inputs):
        raise UsageError(
            f"A sample has {len(values)} values; the model takes {len(inputs)} inputs",
            why="values without names are taken in the order of the inputs, then the label",
            fix=f"give a dict with {', '.join(spec.name for spec in inputs)}",
        )
    return {spec.name: _array(value) for spec, value in zip(inputs, values, strict=True)}


def _single(
    feed: Any, label: Any, extra: Mapping[str, Any], inputs: Inputs, batched: bool
) -> Iterator[Raw]:
    """One sample, or each of a batch of them; a missing batch axis is added."""
    if inputs is None:
        yield feed, label, extra
        return
    shapes = {spec.name: spec.shape for spec in inputs}
    full = {name: _with_batch(array, shapes.get(name)) for name, array in feed.items()}
    sizes = {
        len(array)
        for name, array in full.items()
        if getattr(array, "ndim", 0) and shapes.get(name) and _is_free(shapes[name])
    }
    size = sizes.pop() if len(sizes) == 1 else 1
    if not batched or size == 1:
        yield full, label, extra
        return
    for i in range(size):
        rows = {
            name: array[i : i + 1] if shapes.get(name) else array for name, array in full.items()
        }
        yield rows, _entry(label, i, size), {k: _entry(v, i, size) for k, v in extra.items()}


def _with_batch(array: Any, shape: tuple[Any, ...] | None) -> Any:
    if shape and isinstance(array, np.ndarray) and array.ndim == len(shape) - 1 and _is_free(shape):
        return array[None]
    return array


def _is_free(shape: tuple[Any, ...] | None) -> bool:
    """Whether the first axis may be a batch of one."""
    return bool(shape) and (not isinstance(shape[0], int) or shape[0] == 1)  # type: ignore[index]


def _entry(value: Any, index: int, size: int) -> Any:
    is_stack = isinstance(value, list | tuple | np.ndarray) and np.ndim(value) != 0
    return to_numpy(value[index]) if is_stack and len(value) == size else value


# --- stacks and files --------------------------------------------------------------------------


def _unstacked(stacks: Mapping[str, Any], inputs: Inputs, labels_apart: bool) -> Iterator[Raw]:
    feeds, label, extra = _named_parts(stacks, inputs)
    if inputs is None and isinstance(feeds, dict):
        extra = {name: value for name, value in extra.items() if name in LABEL_NAMES} | feeds
        parts: dict[str, list[np.ndarray] | None] = {
            name: list(array) if np.ndim(array) else None for name, array in feeds.items()
        }
    else:
        specs = {spec.name: spec for spec in inputs or ()}
        if set(feeds) != set(specs):
            check_feed(list(specs.values()), feeds, where="the stacked samples")
        parts = {name: _stack_parts(array, specs[name]) for name, array in feeds.items()}
    counts = {name: len(entries) for name, entries in parts.items() if entries is not None}
    if len(set(counts.values())) != 1:
        raise UsageError(
            "The stacks have different numbers of samples",
            why=", ".join(f"{name}: {count}" for name, count in counts.items()),
            fix="give each input one entry a sample along its first axis",
        )
    total = next(iter(counts.values()))
    if label is not None and not labels_apart and len(label) % total:
        raise UsageError(
            f"{total} samples and {len(label)} labels can't be evaluated",
            why="each sample needs its label",
            fix="give as many labels as samples",
        )
    for i in range(total):
        feed = {n: e[i] if e is not None else feeds[n] for n, e in parts.items()}
        own = None if label is None or labels_apart else _share(label, i, total)
        yield feed, own, {name: _share(value, i, total) for name, value in extra.items()}


def _stack_parts(array: np.ndarray, spec: TensorSpec) -> list[np.ndarray] | None:
    """One array a sample; None for a scalar, which all samples share."""
    return None if array.ndim == 0 else split_stack(array, spec)


def _share(values: Any, index: int, total: int) -> Any:
    """Entry `index`; a run of entries where there are several a sample."""
    if np.ndim(values) == 0 or len(values) < total:
        return values
    each = len(values) // total
    return values[index] if each == 1 else values[index * each : (index + 1) * each]


def _from_path(path: Path) -> Any:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if files:
            return lambda: (read_npz(file) for file in files)
        classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
        pairs = [
            (file, i) for i, entry in enumerate(classes) for file in sorted(entry.glob("*.npz"))
        ]
        if not pairs:
            raise UsageError(
                f"The folder {str(path)!r} has no .npz file",
                fix="save one sample in each, or one folder of them a class",
            )
        return lambda: ((read_npz(file), label) for file, label in pairs)
    if path.suffix != ".npz" or not path.is_file():
        raise UsageError(
            f"The data {str(path)!r} is not a .npz file or a folder of them",
            fix="numpy.savez('data.npz', x=stacked_samples, labels=labels)",
        )
    return read_npz(path)


def to_numpy(value: Any) -> Any:
    """torch tensors and numpy scalars as numpy's and Python's own; the rest as it is."""
    if _is_tensor(value):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value[()]
    return value


def _array(value: Any) -> Any:
    if _is_tensor(value):
        return value.detach().cpu().numpy()
    return np.asarray(value) if isinstance(value, int | float | bool | list) else value


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach")


def call_with(function: Callable[..., Any], *values: Any) -> Any:
    """Call a function with the first so many of (feed, label, index) as it takes."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return function(values[0])
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return function(*values)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = [p.default is p.empty or p.name in ("label", "index") for p in positional]
    taken = max((i + 1 for i, want in enumerate(wanted) if want), default=1)
    return function(*values[: min(taken, len(values))])
