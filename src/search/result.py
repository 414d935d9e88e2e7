"""What a sweep found: rows, the best of them, and a folder to keep.

Here: `SweepResult`, its JSON form (docs/sweep.md describes it). Not here: finding it (`sweep`),
tables and pictures (`report`), choosing (`choice`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..atomic import replacing
from ..cost.budget import Budget
from ..errors import MissingDependencyError, UsageError
from ..evaluation.evaluation import Evaluation
from ..evaluation.report import Report, Rung
from .blame import Feed, Found, find_blame
from .choice import Best, choose
from .fingerprint import machine, versions
from .rows import Row
from .stages import Counts

SCHEMA = "edgepass.sweep"
SCHEMA_VERSION = 1
JSON_FILE = "sweep.json"
TABLE_FILE = "table.txt"
PLOT_FILE = "pareto.png"
BEST_FOLDER = "best"


@dataclasses.dataclass
class SweepResult:
    """The rows in the order tried; `original` is the model as given, on the same data.

    `left_out`: variants that were not tried, and why. `measured`: rows are compared by measured
    time, else by predicted. `done`: which recipes this call compiled, evaluated and timed; the rest
    came from `cache`.
    """

    target: str
    rows: tuple[Row, ...]
    original: Rung | None
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    measured: bool
    done: Counts
    cache: Path
    graph: ir.Model = dataclasses.field(repr=False)
    evaluation: Evaluation | None = dataclasses.field(default=None, repr=False)
    budget: Budget | None = None
    _feeds: Sequence[Feed] = dataclasses.field(default=(), repr=False)
    _keeper: Any = dataclasses.field(default=None, repr=False)
    _blamed: dict[str, Found] = dataclasses.field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise UsageError(
            f"The sweep has no recipe {name!r}",
            fix=f"it has: {', '.join(row.name for row in self.rows)}",
        )

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def front(self) -> tuple[Row, ...]:
        """The rows that no other beats in size, latency and the first metric at once."""
        return tuple(row for row in self.rows if row.front)

    def best(self, by: str = "both") -> Best:
        """The row to ship: the smallest (`by="size"`), fastest ("latency"), or best in both, of
        those that meet limits and budget. Where none does that compresses the model, it says which
        is nearest, what that misses, and which layers are to blame.

        Without limits, a row may be shipped whose metrics and slices are not worse beyond chance;
        without metrics, one whose outputs have 20 dB of signal to noise.

        Raises:
            UsageError: there is no such objective.
        """
        return choose(self.rows, by=by, measured=self.measured, blame=self._blame)

    def _blame(self, row: Row) -> Found:
        if row.name not in self._blamed:
            self._blamed[row.name] = find_blame(
                self.graph, row.artifact, self.evaluation, self._feeds, row.recipe, self.target
            )
        return self._blamed[row.name]

    def table(self, by: str = "both") -> Any:
        """A rich renderable: a line a recipe, `*` where no other beats it; remarks below, and the
        best by that."""
        from .report import sweep_table

        return sweep_table(self, by)

    def evaluation_report(self) -> Report | None:
        """The evaluation of all rows as one report; None where nothing was evaluated."""
        if self.original is None:
            return None
        rungs = (self.original, *(row.rung for row in self.rows if row.rung is not None))
        return Report(rungs, 0, 0)

    def as_dict(self, by: str = "both") -> dict[str, Any]:
        """Plain data: docs/sweep.md lists the fields. Only `best` may look into layers."""
        report = self.evaluation_report()
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "machine": machine(),
            "versions": versions(),
            "latency": "measured" if self.measured else "predicted",
            "original": None if report is None else report.as_dict()["rungs"][0],
            "rows": [row.as_dict() for row in self.rows],
            "front": [row.name for row in self.front],
            "best": self.best(by).as_dict(),
            "left_out": [{"name": name, "reason": why} for name, why in self.left_out],
            "notes": list(self.notes),
            "done": dataclasses.asdict(self.done),
        }

    def plot(self, path: str | Path) -> Path:
        """Save a picture: size and latency against the first metric, the front joined.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            UsageError: there is nothing to show.
        """
        from .report import plot_sweep

        return plot_sweep(self, Path(path))

    def save(self, folder: str | Path, *, plots: bool = True, by: str = "both") -> Path:
        """Write the table, the JSON form, the picture, and the best row's artifact, as one step.

        What an earlier sweep wrote there is replaced.

        Raises:
            UsageError: the folder has other things in it.
        """
        from .report import sweep_text

        place = Path(folder)
        if place.exists() and (
            not place.is_dir() or (any(place.iterdir()) and not (place / JSON_FILE).is_file())
        ):
            raise UsageError(
                f"{str(place)!r} is not what a sweep wrote, so it is not replaced",
                fix="name a folder that does not exist yet",
            )
        best = self.best(by)
        with replacing(place) as fresh:
            text = json.dumps(_finite(self.as_dict(by)), indent=1, ensure_ascii=False)
            (fresh / JSON_FILE).write_text(text + "\n", encoding="utf-8")
            (fresh / TABLE_FILE).write_text(sweep_text(self, by) + "\n", encoding="utf-8")
            if plots:
                try:
                    self.plot(fresh / PLOT_FILE)
                except (MissingDependencyError, UsageError) as error:
                    note = f"{PLOT_FILE} was not written: {error.diagnostic.what}"
                    self.notes = tuple(dict.fromkeys((*self.notes, note)))
            if best.row is not None and best.row.artifact is not None:
                shutil.copytree(best.row.artifact, fresh / BEST_FOLDER)
        return place

    def __str__(self) -> str:
        from .report import sweep_text

        return sweep_text(self)


def _finite(data: Any) -> Any:
    """NaN and infinity, which JSON lacks, as null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not abs(data) < float("inf"):
        return None
    return data
