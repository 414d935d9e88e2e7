"""Calibration and run inputs in any form a user has, as a sequence of checked feeds.

Here: `as_feeds` and `Feeds`, which holds one sample at a time. Not here: reading samples from where
they are (`sample_sources`), the check of one feed (`targets.feed`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from .errors import CalibrationError
from .sample_sources import Raw, Source, as_array, rows_a_sample, source_of
from .targets.feed import TensorSpec, check_feed

Feed = Mapping[str, np.ndarray]


class Feeds(Sequence[Feed]):
    """Samples as feeds, made and checked when they are asked for, none of them kept but the first.

    It can be gone through again and again. `known_length` is None where only going through all of
    them tells how many there are; `len` does that. An index is cheap where the samples are held or
    lie apart, else what comes before is gone through.
    """

    def __init__(self, source: Source, inputs: Sequence[TensorSpec], *, finite: bool) -> None:
        self._source, self._inputs, self._finite = source, inputs, finite
        self._first: Feed | None = None
        self.known_length = source.length

    def __iter__(self) -> Iterator[Feed]:
        count = 0
        for count, raw in enumerate(self._source.iterate(), start=1):
            yield self._feed(raw, count - 1)
        self.known_length = count

    def __len__(self) -> int:
        if self.known_length is None:
            self.known_length = sum(1 for _ in self._source.iterate())
        return self.known_length

    def __bool__(self) -> bool:
        return self.first() is not None

    @overload
    def __getitem__(self, index: int) -> Feed: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Feed]: ...
    def __getitem__(self, index: int | slice) -> Feed | Sequence[Feed]:
        if isinstance(index, slice):
            return self._part(range(len(self))[index])
        if index < 0:
            index += len(self)
        if index == 0 and (first := self.first()) is not None:
            return first
        if self._source.item is not None and 0 <= index < len(self):
            return self._feed(self._source.item(index), index)
        for raw in itertools.islice(self._source.iterate(), max(index, 0), None):
            if index >= 0:
                return self._feed(raw, index)
        raise IndexError(index)

    def first(self) -> Feed | None:
        """The first sample, None where there is none."""
        if self._first is None:
            for raw in self._source.iterate():
                self._first = self._feed(raw, 0)
                break
        return self._first

    def _part(self, indices: range) -> Sequence[Feed]:
        """Some of the samples, as lazy as all of them."""
        if indices.step < 0 and self._source.item is None:
            return [self[i] for i in indices]

        def iterate() -> Iterator[Raw]:
            if self._source.item is not None:
                return map(self._source.item, indices)
            bounds = indices.start, max(indices.stop, 0), indices.step
            return itertools.islice(self._source.iterate(), *bounds)

        return Feeds(Source(iterate, len(indices)), self._inputs, finite=self._finite)

    def _feed(self, raw: Raw, index: int) -> Feed:
        feed = _as_feed(raw, self._inputs, index)
        check_feed(self._inputs, feed, where=f"sample {index}", finite=self._finite)
        return feed


def as_feeds(data: Any, inputs: Sequence[TensorSpec], *, finite: bool = True) -> Feeds:
    """Samples as a sequence of feeds, each checked against the model's inputs.

    `data` may be a list or any other iterable of feeds, of tuples in input order, or, for a model
    of one input, of arrays; a generator, or better a function that makes one; a torch `DataLoader`,
    whose batches are taken apart where the model's batch is 1 or dynamic, and whose entries after
    the inputs (labels) are left out; a mapping from input name to a stack of samples; the path of a
    `.npz` with such stacks, or of a folder of `.npz` files, one sample each. A stack has one axis
    more than the input (each entry is a sample), or as many (then as many rows as the input's
    batch, 1 where that is dynamic, are a sample). torch tensors are taken as arrays. `finite`
    refuses NaN and infinity.

    Samples in memory are checked at once; others one at a time when they are used, and what was
    used is not kept. Only a generator, which can be gone through but once, is copied to a temporary
    file as it goes.

    Raises:
        CalibrationError: a wrong name, dtype or shape, stacks of different length, no sample, NaN.
        UsageError: a path that is neither a `.npz` nor a folder of them.
    """

    def checked(raws: Iterator[Raw]) -> Iterator[Feed]:
        for i, raw in enumerate(raws):
            feed = _as_feed(raw, inputs, i)
            check_feed(inputs, feed, where=f"sample {i}", finite=finite)
            yield feed

    if isinstance(data, Feeds):
        return data
    source = source_of(data, inputs, checked)
    feeds = Feeds(source, inputs, finite=finite)
    if source.held:
        for _ in feeds:  # a mistake in any of them is best said before anything is done
            pass
    if not feeds:
        raise CalibrationError(
            "There is no sample",
            why="ranges can't be read off nothing",
            fix="give a few dozen representative inputs",
        )
    return feeds


def _as_feed(sample: Any, inputs: Sequence[TensorSpec], index: int) -> Feed:
    if isinstance(sample, Mapping):
        return {str(name): as_array(value) for name, value in sample.items()}
    values = sample if isinstance(sample, tuple | list) else (sample,)
    if len(values) != len(inputs):
        raise CalibrationError(
            f"Sample {index} has {len(values)} values; the model takes {len(inputs)} inputs",
            why="values without names are taken in the order of the inputs",
            fix=f"give a dict with {', '.join(spec.name for spec in inputs)}",
        )
    return {spec.name: as_array(value) for spec, value in zip(inputs, values, strict=True)}


def split_stack(array: np.ndarray, spec: TensorSpec) -> list[np.ndarray]:
    """One array a sample: entries of a stack, else runs of rows as long as the input's batch."""
    rows = rows_a_sample(array.shape, spec)
    if rows < 0:
        return [array]
    if not rows:
        return [np.ascontiguousarray(entry) for entry in array]
    return [
        np.ascontiguousarray(array[i : i + rows]) for i in range(0, len(array) - rows + 1, rows)
    ]
