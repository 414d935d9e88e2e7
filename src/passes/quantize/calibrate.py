"""Ranges of values over calibration samples, in memory that does not grow with the samples.

Here: `observe`, which folds what each sample makes of each value, wherever in the model it is. Not
here: what to observe (`plan`), running the model (`seeing`), how a range is made of what was seen
(`observers`), scales from ranges (`numbers`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import CalibrationError, UsageError
from ...ir.graph import describe_node
from ...targets.feed import check_feed, input_specs
from ..base import Feed
from .coverage import Coverage, batch_rows
from .numbers import Range
from .observers import Accumulator, MinMax, Observer, ObserverOptions
from .seeing import Elements, Seen, Source, Summaries
from .watch import same_names

__all__ = ["Observer", "ObserverOptions", "Ranges", "observe"]

NOT_TAKEN = "no calibration sample computed it"
_NAMED = 3


class Ranges(dict[str, Range]):
    """Ranges by the name of the value.

    Branches beside each other may use one name for two values: then the range here holds both, and
    `by_value` has each. `unseen` says why a value has no range (it is in a branch that no sample
    took). `notes` are lines for the ledger, `samples` how many there were.
    """

    def __init__(
        self,
        by_value: Mapping[ir.Value, Range],
        unseen: Mapping[ir.Value, str],
        notes: Sequence[str],
        samples: int,
    ) -> None:
        for name, values in same_names(by_value).items():
            first, *others = (by_value[value] for value in values)
            for other in others:
                first = first.union(other)
            self[name] = first
        self.by_value = dict(by_value)
        self.unseen = dict(unseen)
        self.notes = tuple(notes)
        self.samples = samples


def observe(
    model: ir.Model,
    values: Sequence[ir.Value],
    samples: Sequence[Feed] | None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    options: ObserverOptions | None = None,
) -> Ranges:
    """The range of each value over all samples, by name.

    Values are of the main graph or of any subgraph (branches, bodies of loops), best in graph
    order. The samples are gone through once, one at a time. Least and greatest are taken inside the
    graph, so that memory is that of one inference; observers that count elements hold a group of
    values more (`seeing.GROUP_BYTES`) and a histogram each. No result depends on the order of the
    samples.

    Raises:
        UsageError: there is no calibration data.
        CalibrationError: it is empty, does not fit the inputs, or makes a value NaN or infinite.
    """
    if samples is None:
        raise UsageError(
            "Static int8 needs calibration data, and there is none",
            where="pass 'int8'",
            why="the scales of activations come from what the model does on real inputs",
            fix="give `calibration=`, some tens of samples, each a dict from input name to array; "
            "or use int8_dynamic or weight_only, which need none",
        )
    options = options or ObserverOptions()
    values = list(dict.fromkeys(values))
    specs, optional = input_specs(model), list(model.graph.initializers)
    coverage = Coverage()
    accumulators: dict[ir.Value, Accumulator] = {}
    plain: set[ir.Value] = set()
    counting = Observer(options.observer).needs_values
    source: Source = Elements(model, values) if counting else Summaries(model, values)
    with contextlib.closing(source):
        for i, sample in enumerate(samples):
            progress(i, _total(samples, i), "calibrating")
            where = f"calibration sample {i}"
            check_feed(specs, sample, where=where, optional=optional, finite=True)
            half = coverage.start(sample, batch_rows(sample, model.graph.inputs))
            for seen in source.see(sample, where):
                if not seen.finite:
                    raise _not_finite(seen, i)
                if seen.value not in accumulators:
                    whole = counting and seen.elements is None
                    accumulators[seen.value] = MinMax() if whole else options.accumulator()
                    plain |= {seen.value} if whole else set()
                found = Range(seen.low, seen.high)
                accumulators[seen.value].add(found, seen.elements)
                coverage.add(seen.value, half, found)
    if not coverage.samples:
        raise CalibrationError(
            "The calibration data is empty",
            where="pass 'int8'",
            fix="give at least one sample; some tens of them cover the usual range",
        )
    progress(coverage.samples, coverage.samples, "calibrating")
    ranges = {value: accumulators[value].range() for value in values if value in accumulators}
    unseen = {v: source.unseen.get(v, NOT_TAKEN) for v in values if v not in ranges}
    for value in unseen:
        if value.graph is model.graph:  # it was computed, and had no elements
            ranges[value] = Range(0.0, 0.0)
    unseen = {value: why for value, why in unseen.items() if value not in ranges}
    notes = (*coverage.notes(), *_notes(unseen, plain))
    return Ranges(ranges, unseen, notes, coverage.samples)


def _total(samples: Sequence[Feed], done: int) -> int:
    """How many samples there are, or one more than are done where only going through them says."""
    known: int | None = getattr(samples, "known_length", -1)
    if known == -1:
        known = len(samples)
    return done + 1 if known is None else known


def _notes(unseen: Mapping[ir.Value, str], plain: set[ir.Value]) -> tuple[str, ...]:
    notes = []
    if unseen:
        reasons = sorted(set(unseen.values()))
        names = _names(value.name or "" for value in unseen)
        notes.append(f"no range for {len(unseen)} values ({'; '.join(reasons)}): {names}")
    if plain:
        names = _names(sorted(value.name or "" for value in plain))
        notes.append(
            f"least and greatest value taken for {len(plain)} values, whose number of elements "
            f"differs between the rounds of a loop: {names}"
        )
    return tuple(notes)


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(repr(name) for name in listed[:_NAMED]) + more


def _not_finite(seen: Seen, sample: int) -> CalibrationError:
    value = seen.value
    maker = value.producer()
    infinite = np.isinf(seen.low) or np.isinf(seen.high)
    return CalibrationError(
        f"The tensor {value.name!r} is {'infinite' if infinite else 'NaN'} on a calibration sample",
        where=f"calibration sample {sample}"
        + (f", made by {describe_node(maker)}" if maker is not None else ""),
        why="no 8-bit range holds it",
        fix="drop the sample if its input is bad; else the float model overflows there already, or "
        "leave the node out with int8{exclude=[...]}",
    )
