"""What each layer's quantization does to the result, and which layers had better stay float.

Here: `layer_effects` (one layer in, and one out, at a time, on any measure) and `protect` (the
fewest layers to keep float). Not here: the switches (`switched`), the user's metric on real data
(`search.sensitivity`), what an excluded layer becomes (`plan`, `leftovers`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from ..base import Feed
from .switched import Switched, Unit, divergence_over

Progress = Callable[[int, int, str], None]
Measure = Callable[[np.ndarray, np.ndarray], float]
"""What the masks of values and of weights cost, larger is worse."""

FINE = 0.001
"""Error power over signal power (30 dB) below which other ranges are not tried."""
QUIET = 0.01
"""Error power over signal power (20 dB) below which no layer is looked at."""
MAX_SAMPLES = 8
FEW = 4
"""Layers that may be kept float in any model, however few it has."""
MORE_SAMPLES = 32
"""As many where the outputs of `MAX_SAMPLES` are fewer than `ENOUGH` numbers."""
ENOUGH = 64
RUINED = 0.03
"""Error power over signal power (15 dB) above which results are of no use."""
MAX_KEPT = 0.25
"""The largest share of the layers that may be kept float, unless results are of no use."""
TRYING_MACS = 2e11
"""Multiply-accumulates for trying layers one by one (about half a minute on one core): as many
samples as they are enough for, one at the least, and none where one takes ten times as many."""
WORTH = 2.0
"""Keeping layers float must reduce the error at least so many times."""


@dataclasses.dataclass(frozen=True)
class LayerEffect:
    """`alone`: the measure with this layer in 8 bits and all others float; `without`: with all
    layers in 8 bits but this one; None where it was not measured. `weights`: as `alone`, of the
    weights only."""

    unit: Unit
    alone: float
    without: float | None = None
    weights: float | None = None


@dataclasses.dataclass(frozen=True)
class Protected:
    """Layers to keep float. `names` of nodes; `storable`: those whose weights may still be stored
    in 8 bits, since their values do the harm. `before` and `after` are divergences with all layers
    in 8 bits and with all but these."""

    names: tuple[str, ...] = ()
    storable: frozenset[str] = frozenset()
    before: float = 0.0
    after: float = 0.0
    notes: tuple[str, ...] = ()


def divergence_on(switched: Switched, samples: Sequence[Feed]) -> Measure:
    """The divergence of the outputs from the float model's over samples."""
    references = [switched.run(sample, switched.none()) for sample in samples]

    def measure(on: np.ndarray, weights: np.ndarray) -> float:
        return divergence_over(
            (reference, switched.run(sample, on, weights))
            for reference, sample in zip(references, samples, strict=True)
        )

    return measure


def layer_effects(
    switched: Switched,
    measure: Measure,
    *,
    leave_one_out: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> tuple[LayerEffect, ...]:
    """One layer's effect at a time, in graph order."""
    found = []
    total = len(switched.units)
    for i, unit in enumerate(switched.units):
        progress(i, total, "trying layers one by one")
        mask = switched.none()
        mask[i] = True
        alone = measure(mask, mask)
        without = measure(~mask, ~mask) if leave_one_out else None
        found.append(LayerEffect(unit, alone, without))
    progress(total, total, "")
    return tuple(found)


def spread_over(samples: Sequence[Feed], count: int) -> list[Feed]:
    """At most `count` samples, evenly spread."""
    step = max(1, math.ceil(len(samples) / count))
    return [samples[i] for i in range(0, len(samples), step)][:count]


def harm(switched: Switched, samples: Sequence[Feed]) -> float:
    """The divergence of the outputs with all layers in 8 bits."""
    every = switched.every()
    return divergence_on(switched, telling(switched, samples))(every, every)


def telling(switched: Switched, samples: Sequence[Feed]) -> list[Feed]:
    """Some samples, evenly spread: more of them where a result is only a number or two."""
    few = spread_over(samples, MAX_SAMPLES)
    if not few or len(few) == len(samples):
        return few
    size = min(output.size for output in switched.run(few[0], switched.none()))
    wanted = math.ceil(ENOUGH / max(1, size))
    return spread_over(samples, min(MORE_SAMPLES, max(MAX_SAMPLES, wanted)))


def protect(
    switched: Switched,
    samples: Sequence[Feed],
    macs: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Protected:
    """The fewest layers to keep float so that the outputs stay near the float model's.

    With all layers in 8 bits and a divergence below `QUIET`: none. Else layers are ranked by what
    each does alone, and the shortest head of the ranking is taken that brings the divergence below
    `QUIET`, or, where none does, comes within twice of the best that any reaches; and further
    layers as long as they halve what is left above `FINE`. A head is at most
    a quarter of the layers; where the result would be `RUINED` even so, it may be all of them. A
    head that does not halve the error is no remedy, and nothing is kept. `macs` are those of one
    inference, where they are known.
    """
    units = len(switched.units)
    few = telling(switched, samples)
    measure = divergence_on(switched, few)
    every = switched.every()
    before = measure(every, every)
    if before <= QUIET or units < 2:
        return Protected(before=before, after=before)
    enough = TRYING_MACS / max(1, units * macs)
    if enough < 0.1:
        note = f"{decibels(before)} at the outputs in 8 bits; too large to try {units} layers"
        return Protected(before=before, after=before, notes=(note,))
    if enough < len(few):
        few = spread_over(few, max(1, int(enough)))
        measure = divergence_on(switched, few)
        before = measure(every, every)
    effects = layer_effects(switched, measure, progress=progress)
    ranked = sorted(range(units), key=lambda i: -effects[i].alone)
    most = min(units, max(FEW, int(units * MAX_KEPT)))
    tried: list[tuple[int, float]] = []
    for count in _heads(units):
        if count > most and min(error for _, error in tried) <= RUINED:
            break
        mask = every.copy()
        mask[ranked[:count]] = False
        tried.append((count, measure(mask, mask)))
        if tried[-1][1] <= QUIET and not (_is_steep(tried) and tried[-1][1] > FINE):
            break
    count, after = _head_of_choice(tried)
    if after * WORTH > before:
        note = (
            f"all layers in 8 bits: {decibels(before)} at the outputs on calibration data; no few "
            "layers are to blame (the worst: "
            f"{effects[ranked[0]].unit.described}, {decibels(effects[ranked[0]].alone)} alone)"
        )
        return Protected(before=before, after=before, notes=(note,))
    chosen = ranked[:count]
    storable = _storable(switched, measure, chosen, after)
    notes = [
        f"{count} of {units} layers kept float: {decibels(before)} at the outputs with them in 8 "
        f"bits, {decibels(after)} without",
        *(f"  {effects[i].unit.described}: {decibels(effects[i].alone)} alone" for i in chosen),
    ]
    names = tuple(effects[i].unit.name for i in sorted(chosen))
    return Protected(names, storable, before, after, tuple(notes))


def _storable(
    switched: Switched, measure: Measure, chosen: Sequence[int], after: float
) -> frozenset[str]:
    """Of the layers kept float, those whose weights in 8 bits add little: all of them together at
    most half of what is left, or of what nobody looks at (errors of layers add up)."""
    harms = []
    for i in chosen:
        mask = switched.none()
        mask[i] = True
        harms.append((measure(switched.none(), mask), i))
    found, total = [], 0.0
    for error, i in sorted(harms):
        total += error
        if total > 0.5 * max(after, QUIET):
            break
        found.append(switched.units[i].name)
    return frozenset(found)


def _is_steep(tried: Sequence[tuple[int, float]]) -> bool:
    """Whether the last layers kept float halved the error."""
    return len(tried) < 2 or tried[-1][1] * WORTH <= tried[-2][1]


def _head_of_choice(tried: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The first head that is quiet, or near the best; and those behind it that halve the error."""
    best = min(error for _, error in tried)
    at = next(i for i, (_, error) in enumerate(tried) if error <= max(QUIET, 2 * best))
    while at + 1 < len(tried) and tried[at + 1][1] * WORTH <= tried[at][1]:
        at += 1
    return tried[at]


def _heads(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to the most."""
    found, size = [], 1
    while size < most:
        found.append(size)
        size = max(size + 1, int(size * 1.5))
    return [*found, most]


def decibels(error: float) -> str:
    """A divergence as a ratio of signal to error."""
    if error <= 0:
        return "no error"
    return "not finite" if math.isinf(error) else f"{-10 * math.log10(error):.1f} dB"
