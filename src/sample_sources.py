"""Where samples come from, each read when it is asked for.

Here: `Source` and those of stacks, `.npz` files, folders, iterables, generators and torch loaders.
Not here: what is made of a raw sample (`samples`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CalibrationError, UsageError
from .npz import open_npz, read_npz, restored, storable
from .targets.feed import TensorSpec, check_feed

Raw = Any
"""A sample as the user has it: a feed, a tuple of arrays, an array."""
_SPOOLED = 1 << 24
"""Bytes of samples from an iterator that are kept in memory rather than in a file."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Samples that can be gone through again and again.

    `iterate` starts over. `length` is None where only going through them tells. `item` gives one
    without going through those before it. `held`: all samples are in memory anyway.
    """

    iterate: Callable[[], Iterator[Raw]]
    length: int | None = None
    item: Callable[[int], Raw] | None = None
    held: bool = False


def source_of(
    data: Any,
    inputs: Sequence[TensorSpec],
    checked: Callable[[Iterator[Raw]], Iterator[Mapping[str, np.ndarray]]],
) -> Source:
    """The samples in anything that a user has; nothing is read yet but what says how many.

    An iterator can be gone through once only, so that its samples are stored; `checked` makes feeds
    of them before that.

    Raises:
        CalibrationError: it is no form of samples; stacks that do not fit the inputs.
        UsageError: a path that is neither a `.npz` nor a folder of them.
    """
    if isinstance(data, str | Path):
        return _of_path(Path(data), inputs)
    if isinstance(data, Mapping):
        return _of_stacks(data, inputs)
    if isinstance(data, np.ndarray):
        raise _no_samples(data)
    if isinstance(data, list | tuple):
        return Source(lambda: iter(data), len(data), data.__getitem__, held=True)
    if isinstance(data, Iterator):
        return Source(Spool(checked(data)).__iter__)
    if _is_loader(data):
        return Source(lambda: _rows_of(data, inputs))
    if hasattr(data, "__iter__"):
        return Source(lambda: iter(data), _length(data))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Source(lambda: (data[i] for i in range(len(data))), len(data), data.__getitem__)
    if callable(data):
        return Source(lambda: _called(data))
    raise _no_samples(data)


def _no_samples(data: Any) -> CalibrationError:
    return CalibrationError(
        f"Samples can't be a {type(data).__name__}",
        fix="give a list of feeds, each a dict from input name to array, a function that yields "
        "them, a .npz file, or a folder of such files",
    )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _called(function: Callable[[], Any]) -> Iterator[Raw]:
    made = function()
    if not isinstance(made, Iterable):
        raise _no_samples(made)
    yield from made


# --- torch loaders -----------------------------------------------------------------------------


def _is_loader(data: Any) -> bool:
    return type(data).__module__.startswith("torch.utils.data") and hasattr(data, "batch_size")


def _rows_of(loader: Any, inputs: Sequence[TensorSpec]) -> Iterator[Raw]:
    """The samples of a loader's batches; what comes after the inputs (a label) is left out."""
    free = all(s.shape and (s.shape[0] == 1 or not isinstance(s.shape[0], int)) for s in inputs)
    for batch in loader:
        named = isinstance(batch, Mapping)
        if named:
            parts = dict(batch)
        else:
            values = list(batch) if isinstance(batch, list | tuple) else [batch]
            parts = dict(enumerate(values[: len(inputs)]))
        sizes = {len(part) if getattr(part, "ndim", 0) else 0 for part in parts.values()}
        if loader.batch_size is None or not free or len(sizes) != 1 or not min(sizes):
            yield parts if named else tuple(parts.values())
            continue
        for i in range(sizes.pop()):
            row = {key: part[i : i + 1] for key, part in parts.items()}
            yield row if named else tuple(row.values())


# --- stacks ------------------------------------------------------------------------------------


def _of_stacks(stacks: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Source:
    arrays = {str(name): np.asarray(as_array(value)) for name, value in stacks.items()}
    layout = _layout({name: array.shape for name, array in arrays.items()}, inputs)

    def item(index: int) -> dict[str, np.ndarray]:
        return {
            name: np.array(array[layout.entry(name, index)], order="C")
            for name, array in arrays.items()
        }

    held = not any(isinstance(value, np.memmap) for value in stacks.values())
    return Source(lambda: map(item, range(layout.count)), layout.count, item, held=held)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How stacks are cut: how many samples, and for each input the rows of one (0: one entry)."""

    count: int
    rows: Mapping[str, int]

    def entry(self, name: str, index: int) -> Any:
        rows = self.rows[name]
        if rows < 0:
            return ()
        return slice(index * rows, (index + 1) * rows) if rows else index


def rows_a_sample(shape: Sequence[int], spec: TensorSpec) -> int:
    """How many rows of a stack of that shape are a sample: as many as the input's batch (1 where
    that is dynamic); 0 where each entry is one, without the axis; -1 where there is no axis."""
    if not len(shape):
        return -1
    if spec.shape is None or len(shape) != len(spec.shape):
        return 0
    return max(spec.shape[0], 1) if isinstance(spec.shape[0], int) else 1


def _layout(shapes: Mapping[str, Sequence[int]], inputs: Sequence[TensorSpec]) -> _Layout:
    specs = {spec.name: spec for spec in inputs}
    if set(shapes) != set(specs):
        check_feed(inputs, dict.fromkeys(shapes), where="the stacked samples")
    rows = {name: rows_a_sample(shape, specs[name]) for name, shape in shapes.items()}
    counts = {
        name: 1 if rows[name] < 0 else shape[0] // max(rows[name], 1)
        for name, shape in shapes.items()
    }
    if len(set(counts.values())) > 1:
        raise CalibrationError(
            "The stacks have different numbers of samples",
            why=", ".join(f"{name}: {count}" for name, count in counts.items()),
            fix="give each input one entry a sample along its first axis",
        )
    return _Layout(next(iter(counts.values()), 0), rows)


def as_array(value: Any) -> Any:
    """torch tensors, numbers and lists as arrays; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value
    if type(value).__module__.split(".")[0] == "torch":
        return value.detach().cpu().numpy()
    return np.asarray(value) if isinstance(value, int | float | bool | list) else value


# --- files -------------------------------------------------------------------------------------


def _of_path(path: Path, inputs: Sequence[TensorSpec]) -> Source:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise UsageError(
                f"The folder {str(path)!r} has no .npz file", fix="save one sample in each"
            )
        return Source(lambda: map(read_npz, files), len(files), lambda i: read_npz(files[i]))
    if path.suffix != ".npz" or not path.is_file():
        raise UsageError(
            f"The samples {str(path)!r} are not a .npz file or a folder of them",
            fix="numpy.savez('data.npz', x=stacked_samples)",
        )
    return _of_npz(path, inputs)


def _of_npz(path: Path, inputs: Sequence[TensorSpec]) -> Source:
    """Stacks of an `.npz`, read sample by sample from one stream an array."""
    with open_npz(path) as streams:
        in_turn = not any(stream.fortran for stream in streams.values())
        shapes = {name: stream.shape for name, stream in streams.items()}
    if not in_turn:
        return _of_stacks(read_npz(path), inputs)
    layout = _layout(shapes, inputs)

    def iterate() -> Iterator[Raw]:
        with open_npz(path) as streams:
            for _ in range(layout.count):
                found = {n: s.read(max(layout.rows[n], 1)) for n, s in streams.items()}
                yield {n: array if layout.rows[n] else array[0] for n, array in found.items()}

    return Source(iterate, layout.count)


class Spool:
    """What an iterator gives, to be gone through again: kept in a file once it is some megabytes.

    Nothing is taken from the iterator before it is asked for.
    """

    def __init__(self, feeds: Iterator[Mapping[str, np.ndarray]]) -> None:
        self._feeds: Iterator[Mapping[str, np.ndarray]] | None = feeds
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOLED)  # noqa: SIM115 - lives on
        self._starts: list[int] = []

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        index = 0
        while True:
            if index < len(self._starts):
                yield self._read(self._starts[index])
            elif self._feeds is None:
                return
            else:
                try:
                    feed = next(self._feeds)
                except StopIteration:
                    self._feeds = None
                    return
                self._write(feed)
                yield feed
            index += 1

    def _write(self, feed: Mapping[str, np.ndarray]) -> None:
        self._file.seek(0, io.SEEK_END)
        self._starts.append(self._file.tell())
        members = [storable(name, np.asarray(array)) for name, array in feed.items()]
        names = np.array(json.dumps([name for name, _ in members]))
        for array in (names, *(array for _, array in members)):
            np.lib.format.write_array(self._file, array, allow_pickle=False)

    def _read(self, start: int) -> dict[str, np.ndarray]:
        self._file.seek(start)
        names = json.loads(str(np.lib.format.read_array(self._file, allow_pickle=False)))
        arrays = [np.lib.format.read_array(self._file, allow_pickle=False) for _ in names]
        return dict(restored(name, array) for name, array in zip(names, arrays, strict=True))
