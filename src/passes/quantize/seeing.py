"""Running a model so that values inside it are seen, one sample at a time.

Here: `Summaries` (least and greatest of each value, taken inside the graph) and `Elements` (all
elements, a group of values at a time). Not here: the copies of the graph that tell of the values
(`watch`), folding samples (`calibrate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample
from .watch import Wanted, Watch

GROUP_BYTES = 1 << 27
"""`Elements` gets values in groups of about that size together."""


class Seen(NamedTuple):
    """What one sample makes of a value: least, greatest, how many, and its elements if wanted."""

    value: ir.Value
    low: float
    high: float
    finite: bool
    size: int
    elements: np.ndarray | None = None


class Source(Protocol):
    """Shows values on one sample after the other; a value not computed on it is left out."""

    unseen: Mapping[ir.Value, str]

    def see(self, sample: Feed, where: str) -> Iterator[Seen]:
        """What the sample makes of the values.

        Raises:
            CalibrationError: the model fails on the sample, which `where` names.
        """

    def close(self) -> None:
        """Free the sessions."""


class Summaries:
    """Least and greatest of each value: memory is that of one inference."""

    def __init__(self, model: ir.Model, values: Sequence[ir.Value]) -> None:
        watch = Watch(model, values, Wanted.SUMMARY)
        self.unseen: Mapping[ir.Value, str] = watch.unseen
        self._outputs = {value: watch.outputs[value] for value in values if value in watch.outputs}
        self._runner = OrtRunner(watch.model, optimize=False)

    def see(self, sample: Feed, where: str) -> Iterator[Seen]:
        found = run_on_sample(self._runner, sample, list(self._outputs.values()), where)
        for value, name in self._outputs.items():
            negated, high, bad, count = (float(x) for x in found[name])
            if count:
                finite = not bad and np.isfinite((negated, high)).all()
                yield Seen(value, 0.0 - negated, high + 0.0, bool(finite), int(count))

    def close(self) -> None:
        self._runner.close()


class Elements:
    """All elements of each value.

    The first sample is run for the sizes, then values are fetched in groups, each from a session of
    its own over the part of the graph that makes it. Values whose number of elements differs
    between the rounds of a loop can't be fetched: of them, only least and greatest are seen.
    """

    def __init__(
        self, model: ir.Model, values: Sequence[ir.Value], group_bytes: int = GROUP_BYTES
    ) -> None:
        self._model, self._values, self._group_bytes = model, list(values), group_bytes
        self._groups: list[tuple[OrtRunner, dict[ir.Value, str]]] = []
        self._rest: Summaries | None = None
        self._ready = False
        self.unseen: Mapping[ir.Value, str] = {}

    def see(self, sample: Feed, where: str) -> Iterator[Seen]:
        if not self._ready:
            self._prepare(sample, where)
        for runner, outputs in self._groups:
            found = run_on_sample(runner, sample, list(outputs.values()), where)
            for value, name in outputs.items():
                elements = found.pop(name)
                if elements.size:
                    low, high = float(elements.min()), float(elements.max())
                    finite = bool(np.isfinite((low, high)).all())
                    yield Seen(value, low + 0.0, high + 0.0, finite, elements.size, elements)
        if self._rest is not None:
            yield from self._rest.see(sample, where)

    def _prepare(self, sample: Feed, where: str) -> None:
        everything = Summaries(self._model, self._values)
        try:
            sizes = {seen.value: 4 * seen.size for seen in everything.see(sample, where)}
            self.unseen = everything.unseen
        finally:
            everything.close()
        groups = _in_groups(
            [value for value in self._values if value not in self.unseen], sizes, self._group_bytes
        )
        rest = []
        for group in groups:
            watch = Watch(self._model, group, Wanted.ELEMENTS, only=True)
            rest += [value for value in group if value in watch.unseen]
            outputs = {value: watch.outputs[value] for value in group if value in watch.outputs}
            if outputs:
                shared = len(groups) > 1
                runner = OrtRunner(watch.model, optimize=False, share_weights=shared)
                self._groups.append((runner, outputs))
        if rest:
            self._rest = Summaries(self._model, rest)
        self._ready = True

    def close(self) -> None:
        for runner, _ in self._groups:
            runner.close()
        if self._rest is not None:
            self._rest.close()


def _in_groups(
    values: Sequence[ir.Value], sizes: Mapping[ir.Value, int], limit: int
) -> list[list[ir.Value]]:
    """Runs of values of at most `limit` bytes together, or one value each."""
    groups: list[list[ir.Value]] = []
    room = 0
    for value in values:
        size = sizes.get(value, 0)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(value)
        room -= size
    return groups
