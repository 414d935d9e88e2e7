"""Which layers of a candidate do the harm, and what to do about each.

Here: `Blame`, and asking what looks inside models (`evaluation.internals`), or what tries layers
(`sensitivity`). Not here: how errors of layers are measured, which candidate to ask about
(`choice`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import EdgepassError
from ..evaluation.evaluation import Evaluation

if TYPE_CHECKING:
    from ..evaluation.internals import Internals

SAMPLES = 16
"""Enough for ranges and errors of layers; each is run three times."""
_NAMED = 3
_MOST_RUNS = 3000
Feed = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Blame:
    """A layer, what it does, and the remedy."""

    layer: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.layer} ({self.why})"
        return f"{text}, remedy: {self.remedy}" if self.remedy else text

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Found:
    """The layers to blame, worst first; `unknown`: why there are none, where that is not known."""

    layers: tuple[Blame, ...] = ()
    unknown: str = ""


def find_blame(
    graph: ir.Model,
    artifact: Path | None,
    evaluation: Evaluation | None,
    feeds: Sequence[Feed] = (),
    recipe: str = "",
    target: str = "host",
) -> Found:
    """The layers of an artifact that do most harm, on some samples of the evaluation; on `feeds`
    where the evaluation's samples are sequences of steps. Where looking inside names none (layers
    in branches), those of static int8 are tried one by one, calibrated on `feeds`."""
    from ..evaluation.internals import inspect

    samples = _feeds(graph, evaluation) or list(feeds)
    if artifact is None or not samples:
        return Found(unknown="there is no sample to run")
    try:
        found = inspect(graph, artifact, samples[:SAMPLES])
    except EdgepassError as error:
        layers, why = [], error.diagnostic.what
    else:
        layers, why = _named(found), ""
    layers = layers or _tried(graph, target, recipe, feeds)
    return Found(tuple(layers), "" if layers else why)


def _tried(graph: ir.Model, target: str, recipe: str, feeds: Sequence[Feed]) -> list[Blame]:
    """The layers of static int8 that do most harm alone; none for another recipe."""
    from .sensitivity import sensitivity

    if not recipe or not feeds:
        return []
    try:
        found = sensitivity(
            graph, target, calibration=list(feeds), recipe=recipe, max_runs=_MOST_RUNS
        )
    except EdgepassError:
        return []
    return [
        Blame(
            layer.name,
            f"alone in 8 bits it leaves {layer.alone.sqnr_db:.0f} dB at the outputs, all layers "
            f"together {found.every.sqnr_db:.0f} dB",
            f"leave it in float: exclude=[{layer.name!r}]",
        )
        for layer in found.ranked[:_NAMED]
        if layer.alone.error > 0
    ]


def _named(found: Internals) -> list[Blame]:
    """The culprits; without any, the layers that err most by themselves."""
    if found.culprits:
        worst: dict[str, Blame] = {}
        for item in found.culprits:
            worst.setdefault(item.layer, Blame(item.layer, item.what, item.remedy))
        return list(worst.values())[:_NAMED]
    erring = [layer for layer in found.layers if math.isfinite(layer.injected.sqnr)]
    erring.sort(key=lambda layer: layer.injected.sqnr)
    return [
        Blame(
            layer.name,
            f"of all layers, one that adds most error: {layer.injected.sqnr:.0f} dB alone, "
            f"{layer.accumulated.sqnr:.0f} dB with all before it",
            f"leave it in float: exclude=[{layer.name!r}]",
        )
        for layer in erring[:_NAMED]
    ]


def _feeds(graph: ir.Model, evaluation: Evaluation | None) -> list[Feed]:
    from ..targets.onnxruntime import OrtRunner

    if evaluation is None or evaluation.step is not None or evaluation.carry is not None:
        return []
    try:
        with OrtRunner(graph) as runner:
            found = itertools.islice(evaluation.samples(runner), SAMPLES)
            return [sample.feed for sample in found if isinstance(sample.feed, Mapping)]
    except EdgepassError:
        return []
