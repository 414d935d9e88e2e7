"""The truth beside each prediction: random weights, each recipe applied, saved and timed here.

Here: `measure` and `Measurement`. Not here: predictions (`architecture`), timing (`speed`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .api import session_options
from .architecture import RECIPES, Architecture, ProgressCall
from .cost.latency import MEASURED, format_ms
from .cost.profile import Profile
from .cost.report import CostReport
from .cost.text import format_bytes
from .errors import EdgepassError, UsageError
from .ir.random_weights import fill_random_weights
from .passes.base import Context
from .passes.driver import run_passes, sort_by_stage
from .passes.probe import working_sample
from .pipelines import epilogue, parse_recipe
from .speed import time_in_turns
from .targets.onnx_file import write_onnx
from .targets.registry import get_target, is_measurable
from .targets.target import Target


@dataclasses.dataclass(frozen=True)
class MeasuredRecipe:
    """One recipe, predicted and measured: milliseconds a run, bytes on disk."""

    recipe: str
    predicted: CostReport
    ms: float
    file_bytes: int

    @property
    def ratio(self) -> float | None:
        """Predicted over measured milliseconds; None where nothing was predicted."""
        predicted = self.predicted.latency.ms
        return None if predicted is None else predicted / self.ms

    @property
    def inside(self) -> bool | None:
        """Whether the measured time lies in the predicted interval; None where there is none."""
        time = self.predicted.latency
        if time.low_ms is None or time.high_ms is None:
            return None
        return time.low_ms <= self.ms <= time.high_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "recipe": self.recipe,
            "measured_ms": self.ms,
            "label": MEASURED,
            "predicted": self.predicted.latency.as_dict(),
            "predicted_over_measured": self.ratio,
            "inside_interval": self.inside,
            "file_bytes": self.file_bytes,
            "predicted_file_bytes": self.predicted.file_bytes,
        }


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Recipes measured on this machine; `failed` gives why others were not."""

    target: str
    threads: int
    rows: tuple[MeasuredRecipe, ...]
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "target": self.target,
            "threads": self.threads,
            "recipes": [row.as_dict() for row in self.rows],
            "failed": dict(self.failed),
        }

    def table(self) -> Any:
        """A rich renderable: a line a recipe, predicted and measured side by side."""
        from rich import box
        from rich.console import Group
        from rich.table import Table

        plural = "s" if self.threads > 1 else ""
        table = Table(
            title=f"Measured on this machine ({self.target}, {self.threads} thread{plural})",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for heading in ("recipe", "predicted", "measured", "off by", "file predicted", "file"):
            table.add_column(heading, justify="left" if heading == "recipe" else "right")
        for row in self.rows:
            inside = {True: "", False: ", outside", None: ""}[row.inside]
            table.add_row(
                row.recipe,
                str(row.predicted.latency),
                f"{format_ms(row.ms)} ms",
                "?" if row.ratio is None else f"{row.ratio - 1:+.0%}{inside}",
                format_bytes(row.predicted.file_bytes),
                format_bytes(row.file_bytes),
            )
        lines = [f"  {recipe}: {' '.join(why.split())}" for recipe, why in self.failed.items()]
        return Group(table, *lines)

    def __str__(self) -> str:
        lines = [
            f"{row.recipe}: predicted {row.predicted.latency}, measured {format_ms(row.ms)} ms"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"{name}: {why}" for name, why in self.failed.items())])


def measure(
    architecture: Any,
    target: str | Target = "host",
    recipes: Iterable[str] = RECIPES,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int = 1,
    profile: str | Path | Profile | None = None,
    budget_s: float = 2.0,
    progress: ProgressCall | None = None,
) -> Measurement:
    """Time what `estimate` predicts, for every recipe, on this machine.

    Weights that are absent are drawn at random; a recipe that needs calibration gets one random
    sample. Recipes are timed in turns in one process, `budget_s` seconds each, and every time is
    the median of the fastest runs of seven rounds.

    Raises:
        UsageError: the target is another kind of machine, or is served by TVM.
        EdgepassError: the architecture can't be read, or does not run.
    """
    device = get_target(target)
    if not is_measurable(device):
        raise UsageError(
            f"The target {device.name!r} can't be measured on this machine",
            why=f"it is {device.hardware.arch} with {device.runtime}",
            fix="measure with --target host; time TVM with `compile`, and other devices there",
        )
    wanted = [recipes] if isinstance(recipes, str) else list(recipes)
    net = Architecture(
        architecture,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
    )
    predicted = net.estimate(device, wanted, dims=dims, threads=threads, profile=profile)
    model = net.graph.clone()
    fill_random_weights(model)
    sample = working_sample(model, dims)
    failed = dict(predicted.failed)
    if not sample.runs:
        raise UsageError(
            "The model ran on none of the random inputs tried, so it can't be timed",
            fix="give sizes of its dynamic dimensions (--dim), or a model whose inputs may be "
            "random",
        )
    context = Context(device, [sample.feed], sample.dims)
    runners: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for done, name in enumerate(row.recipe for row in predicted.rows):
        if progress is not None:
            progress(done, len(predicted.rows) + 1, name)
        try:
            ready = apply_recipe(model, name, context)
            sizes[name] = saved_bytes(ready)
            runners[name] = _runner(ready, device, threads)
        except EdgepassError as error:
            failed[name] = str(error)
    if progress is not None:
        progress(len(predicted.rows), len(predicted.rows) + 1, "timing")
    calls = [lambda runner=runner: runner.run(sample.feed) for runner in runners.values()]
    times = time_in_turns(calls, budget_s=budget_s)
    rows = tuple(
        MeasuredRecipe(name, predicted[name], ms, sizes[name])
        for name, ms in zip(runners, times, strict=True)
    )
    return Measurement(device.name, threads, rows, failed)


def apply_recipe(model: ir.Model, recipe: str, context: Context) -> ir.Model:
    """The model after a recipe's passes; the given one is not changed."""
    passes = sort_by_stage([*parse_recipe(recipe), *epilogue()])
    ready, _ = run_passes(model.clone(), passes, context)
    return ready


def saved_bytes(model: ir.Model) -> int:
    """Bytes of the files that edgepass writes for a model."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_onnx(model, Path(folder) / "model.onnx")
        return sum(file.stat().st_size for file in files)


def _runner(model: ir.Model, target: Target, threads: int) -> Any:
    from .targets.onnxruntime import OrtRunner

    return OrtRunner(model, threads=threads, session_options=session_options(target, model))
