"""The three things that are done to a recipe, each looked up before it is done, and kept after.

Here: `Bench`, which compiles, evaluates and times, by way of the cache. Not here: which recipes and
in what order (`sweep`), what the results mean (`rows`, `choice`).

Compiling depends on the model, the recipe, the target, the samples and this program; evaluating and
timing only on the files that came out. Recipes that give the same files share what follows.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..api import compile as compile_model
from ..artifact import GOLDEN, Artifact, load
from ..cost.profiles import profile_for
from ..errors import (
    ArtifactError,
    EdgepassError,
    MissingDependencyError,
    PassOptionError,
    PluginError,
    UnknownPassError,
)
from ..evaluation.evaluation import Evaluation
from ..evaluation.report import Report
from ..passes.base import Pass
from ..passes.probe import working_sample
from ..passes.spec import format_passes
from ..pipelines import parse_recipe
from ..targets.target import Target
from . import fingerprint as fp
from .cache import Cache
from .recipes import Recipe
from .reference import Reference
from .rows import kept_cost
from .timing import Timing, time_group

COMPILED = "compiled"
EVALUATED = "evaluated"
TIMED = "timed"
_OUTPUTS = "outputs"
CANDIDATE = "@candidate"
"""What every candidate is called in a report that is kept; recipes have names of their own."""
_PASSING = (MissingDependencyError, PluginError, UnknownPassError, PassOptionError, MemoryError)
"""Failures that may be gone next time, and cost nothing to meet again: not kept."""


@dataclasses.dataclass
class Counts:
    """What was done in this call; the rest was found in the cache."""

    compiled: list[str] = dataclasses.field(default_factory=list)
    evaluated: list[str] = dataclasses.field(default_factory=list)
    timed: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Made:
    """What compiling a recipe gave: an artifact and its digest, or `failed`."""

    data: Mapping[str, Any]
    artifact: Path | None = None
    reused: bool = False

    @property
    def failed(self) -> str:
        """Why there is no artifact; '' where there is one."""
        return str(self.data.get("failed", ""))

    @property
    def digest(self) -> str:
        """Of the files and of what the runtime must be told."""
        return str(self.data["digest"])


class Bench:
    """One model on one target, with its samples and its evaluation."""

    def __init__(
        self,
        graph: ir.Model,
        target: Target,
        cache: Cache,
        *,
        calibration: Any = None,
        feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
        dims: Mapping[str, int] | None = None,
        passes: Sequence[Pass] = (),
        evaluation: Evaluation | None = None,
        time_budget_s: float = 1.0,
    ) -> None:
        self.graph, self.target, self.cache = graph, target, cache
        self.calibration, self.dims, self.passes = calibration, dims, tuple(passes)
        self.evaluation, self.time_budget_s = evaluation, time_budget_s
        self.done = Counts()
        self.model = fp.model_digest(graph)
        self._samples = fp.feeds_digest(feeds)
        self._first = None if not feeds else feeds[0]
        self._target = fp.target_digest(target, profile_for(target))
        self._asked = "" if evaluation is None else evaluation.fingerprint()
        self._original: Any = None
        self._reference: Reference | None = None

    # --- compiling -------------------------------------------------------------------------------

    def compile(self, recipe: Recipe, progress: Callable[[int, int, str], None]) -> Made:
        """The artifact of a recipe, from the cache or made now."""
        try:
            chosen = [*parse_recipe(recipe.text), *self.passes]
        except EdgepassError as error:
            return Made({"failed": str(error)})
        key = fp.combine(
            COMPILED,
            self.model,
            format_passes(chosen),
            fp.passes_digest(chosen),
            self._target,
            self._samples,
            self.dims or {},
            fp.program_digest(),
        )
        known = self._known(key)
        if known is not None:
            return known
        self.done.compiled.append(recipe.name)
        started = time.perf_counter()
        try:
            compiled = compile_model(
                self.graph,
                self.target,
                recipe=recipe.text,
                passes=self.passes,
                calibration=self.calibration,
                dims=self.dims,
                time_budget_s=0,
                force=True,
                progress=progress,
            )
            facts = {
                "passes": compiled.recipe,
                "cost": kept_cost(compiled.cost),
                "notes": list(compiled.notes),
                "ledger": [note for row in compiled.ledger.rows for note in _notes(row)],
            }
            return self._keep(key, facts, started, compiled.save)
        except EdgepassError as error:
            data = {"failed": str(error), **_when(started)}
            if not isinstance(error, _PASSING):
                self.cache.put(COMPILED, key, data)
            return Made(data)

    def _keep(
        self, key: str, facts: dict[str, Any], started: float, save: Callable[[Path], object]
    ) -> Made:
        """Store an artifact; its digest is known once it is written."""

        def fill(fresh: Path) -> dict[str, Any]:
            save(fresh / "artifact")
            return {**facts, **_written(fresh / "artifact"), **_when(started)}

        place = self.cache.put(COMPILED, key, fill)
        data = self.cache.get(COMPILED, key)
        assert data is not None
        return Made(data, place / "artifact")

    def _known(self, key: str) -> Made | None:
        data = self.cache.get(COMPILED, key)
        if data is None:
            return None
        if "failed" in data:  # a refusal may come from a timing, which is of one machine
            return Made(data, reused=True) if data["machine"] == fp.machine_digest() else None
        folder = self.cache.place(COMPILED, key) / "artifact"
        try:
            load(folder).close()
        except (ArtifactError, OSError) as error:
            self.cache.reject(COMPILED, key, str(error).splitlines()[0])
            return None
        return Made(data, folder, reused=True)

    # --- evaluating ------------------------------------------------------------------------------

    def evaluate(
        self, recipe: Recipe, made: Made, progress: Callable[[int, int, str], None]
    ) -> Report:
        """The evaluation of an artifact against the original; the limits are applied anew.

        Raises:
            EdgepassError: see `Evaluation.run`.
        """
        assert self.evaluation is not None
        assert made.artifact is not None
        key = fp.combine(EVALUATED, self.model, made.digest, self._asked, fp.program_digest())
        data = self.cache.get(EVALUATED, key)
        if data is not None:
            try:
                return self.evaluation.judge(Report.from_dict(data["report"]))
            except (KeyError, TypeError) as error:
                self.cache.reject(EVALUATED, key, repr(error))
        self.done.evaluated.append(recipe.name)
        candidate = load(made.artifact)
        try:
            report = self.evaluation.run(
                self.reference(), {CANDIDATE: candidate}, progress=progress
            )
        finally:
            candidate.close()
        self.cache.put(EVALUATED, key, {"report": report.as_dict()})
        return report

    def original(self) -> Any:
        """A session of the model as it was given."""
        from ..targets.onnxruntime import OrtRunner

        if self._original is None:
            self._original = OrtRunner(self.graph)
        return self._original

    def reference(self) -> Reference:
        """The original, whose outputs all candidates are held against."""
        if self._reference is None:
            key = fp.combine(_OUTPUTS, self.model, fp.versions(), fp.machine_digest())
            self._reference = Reference(self.original(), self.cache.place(_OUTPUTS, key))
        self._reference.begin()
        return self._reference

    # --- timing ----------------------------------------------------------------------------------

    def timing_feed(self) -> Mapping[str, np.ndarray] | None:
        """What is run to be timed: the first calibration sample, else random inputs; None where
        the model runs on none that were tried."""
        if self._first is not None:
            return self._first
        sample = working_sample(self.graph, self.dims)
        return sample.feed if sample.runs else None

    def timing_key(self, made: Made, feed: Mapping[str, np.ndarray]) -> str:
        """A time is of a file, an input, a machine and a runtime."""
        parts = (fp.feeds_digest([feed]), fp.machine_digest(), fp.versions())
        return fp.combine(TIMED, self.model, made.digest, *parts)

    def known_time(self, made: Made, feed: Mapping[str, np.ndarray]) -> Timing | None:
        """A time that was measured on this machine before."""
        key = self.timing_key(made, feed)
        data = self.cache.get(TIMED, key)
        if data is None:
            return None
        try:
            return Timing.from_dict(data)
        except (KeyError, TypeError) as error:
            self.cache.reject(TIMED, key, repr(error))
            return None

    def time(
        self, group: Mapping[str, Made], feed: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Times of a few artifacts in turns with the original; why others have none."""
        opened: dict[str, Artifact] = {}
        calls: dict[str, Callable[[], object]] = {}
        failed: dict[str, str] = {}
        try:
            for name, made in group.items():
                assert made.artifact is not None
                artifact = load(made.artifact)
                opened[name] = artifact
                try:
                    runner = artifact.runner()
                    runner.run(feed)
                except EdgepassError as error:
                    failed[name] = f"not timed: {error.diagnostic.what}"
                    continue
                calls[name] = _call(runner, feed)
            original = _call(self.original(), feed)
            found = time_group(original, calls, budget_s=self.time_budget_s) if calls else {}
        finally:
            for artifact in opened.values():
                artifact.close()
        for name, timing in found.items():
            self.done.timed.append(name)
            key = self.timing_key(group[name], feed)
            self.cache.put(TIMED, key, dataclasses.asdict(timing))
        return found, failed


def _call(runner: Any, feed: Mapping[str, np.ndarray]) -> Callable[[], object]:
    return lambda: runner.run(feed)


def _notes(row: Any) -> list[str]:
    return [f"{row.name}: {note}" for note in row.notes]


def _when(started: float) -> dict[str, Any]:
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": fp.machine_digest(),
    }


def _written(folder: Path) -> dict[str, Any]:
    """The bytes of an artifact's model files, and a digest of all that decides what it computes."""
    artifact = load(folder)
    manifest = artifact.manifest
    files = {name: dict(entry) for name, entry in manifest["files"].items() if name != GOLDEN}
    return {
        "digest": fp.combine(files, manifest["session_options"], manifest["runtime"]),
        "file_bytes": sum(entry["bytes"] for entry in files.values()),
        "runs_here": artifact.runs_here,
    }
