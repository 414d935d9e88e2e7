"""What an evaluation found: a rung for each model, as plain data, a table and verdicts.

Here: `Report` and its parts, their JSON form (docs/evaluation.md describes it). Not here: measuring
(`evaluation`), limits (`limits`), drawing (`plots`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError

SCHEMA = "edgepass.evaluation"
SCHEMA_VERSION = 1
ORIGINAL = "original"
WITHIN = "within"
EXCEEDS = "exceeds"
CANNOT_TELL = "cannot tell"
NO_LIMITS = "no limits"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, digits: int = 4, *, signed: bool = False) -> str:
        """`0.9931 [0.9880, 0.9968]`."""
        sign = "+" if signed else ""
        head = f"{self.value:{sign}.{digits}g}"
        if self.low is None or self.high is None:
            return head
        return f"{head} [{self.low:{sign}.{digits}g}, {self.high:{sign}.{digits}g}]"


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """One metric of one model. `difference` is to the original on the same samples (paired), None
    for the original itself; its interval is that of the difference, not of either value."""

    value: Estimate
    difference: Estimate | None = None
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class SliceResult:
    """One metric on one slice.

    `p_value` is of the one-sided paired permutation test that the model is no worse than the
    original there; `adjusted` is it after Holm's correction over all slices and metrics of the
    model. None where it was not tested. `harmed` says that `adjusted` is at most 1 - confidence,
    and that this does not come from the samples of other harmed slices, which `explained_by` names.
    """

    slice: str
    value: str
    count: int
    metric: str
    original: float
    candidate: float
    difference: float
    p_value: float | None = None
    adjusted: float | None = None
    harmed: bool = False
    explained_by: str = ""

    @property
    def name(self) -> str:
        """`loudness=quiet`."""
        return f"{self.slice}={self.value}"


@dataclasses.dataclass(frozen=True)
class Flips:
    """Decisions that changed between right and wrong; McNemar's exact p-value where each sample is
    one decision."""

    broken: int
    mended: int
    decisions: int
    p_value: float | None = None


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One output against the original's over all samples.

    `sqnr_db` is infinite for equal outputs. `kl` (nats, original to candidate) only where both are
    probabilities; `agreement`, the share of equal arg max along the last axis, only where that has
    more than one entry. `worst` is the largest difference, relative to the output's range in its
    sample.
    """

    sqnr_db: float
    cosine: float
    worst: float
    kl: float | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class LimitResult:
    """One limit held against one model: the number it is about, the limit, and the verdict."""

    name: str
    limit: str
    value: float | None
    verdict: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One model against the original. `slices` has the most harmed first."""

    name: str
    metrics: Mapping[str, MetricResult] = dataclasses.field(default_factory=dict)
    slices: tuple[SliceResult, ...] = ()
    flips: Flips | None = None
    ece: float | None = None
    divergence: Mapping[str, Divergence] = dataclasses.field(default_factory=dict)
    limits: tuple[LimitResult, ...] = ()
    verdict: str = NO_LIMITS
    bytes: int | None = None

    @property
    def harmed(self) -> tuple[SliceResult, ...]:
        """The slices that are worse beyond chance, worst first."""
        return tuple(row for row in self.slices if row.harmed)

    @property
    def worst_slice(self) -> SliceResult | None:
        """The most harmed slice, or the one with the worst difference; None without slices."""
        return self.slices[0] if self.slices else None


@dataclasses.dataclass(frozen=True)
class Report:
    """The rungs, the original first, on the same samples.

    `samples` were run; `units` of them (groups, or samples) were resampled for the intervals, which
    hold `confidence`. `notes` say what a reader should know. `fingerprint` is the evaluation's,
    where it was asked for.
    """

    rungs: tuple[Rung, ...]
    samples: int
    units: int
    confidence: float = 0.95
    notes: tuple[str, ...] = ()
    fingerprint: str = ""

    def __getitem__(self, name: str) -> Rung:
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise UsageError(
            f"No model {name!r} was evaluated",
            fix=f"there are: {', '.join(rung.name for rung in self.rungs)}",
        )

    @property
    def original(self) -> Rung:
        return self.rungs[0]

    @property
    def candidates(self) -> tuple[Rung, ...]:
        return self.rungs[1:]

    def verdict(self, name: str) -> str:
        """`within`, `exceeds`, `cannot tell` or `no limits`: the model against all limits.

        Raises:
            UsageError: no such model.
        """
        return self[name].verdict

    @property
    def regressed(self) -> tuple[str, ...]:
        """The candidates that are not within their limits."""
        return tuple(r.name for r in self.candidates if r.verdict in (EXCEEDS, CANNOT_TELL))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back. NaN and infinity are text there."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            **_plain(dataclasses.asdict(self)),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read `as_dict` back.

        Raises:
            UsageError: another schema, or a newer version of it.
        """
        if data.get("schema") != SCHEMA or data.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(
                "This is not a report of an evaluation that this version reads",
                why=f"schema {data.get('schema')!r}, version {data.get('schema_version')!r}",
                fix="evaluate again",
            )
        fields = {key: value for key, value in data.items() if not key.startswith("schema")}
        fields["rungs"] = tuple(_rung(rung) for rung in data["rungs"])
        fields["notes"] = tuple(data["notes"])
        return cls(**fields)

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """One report of the candidates of several, which share original and samples.

        Raises:
            UsageError: none given, or of different samples.
        """
        found = list(reports)
        if not found or len({(r.samples, r.confidence, r.fingerprint) for r in found}) != 1:
            raise UsageError(
                "Reports of different evaluations can't be merged",
                why=f"samples: {', '.join(str(r.samples) for r in found) or 'no report'}",
                fix="merge reports of one evaluation",
            )
        rungs = {rung.name: rung for report in found for rung in report.candidates}
        notes = dict.fromkeys(note for report in found for note in report.notes)
        first = found[0]
        return dataclasses.replace(
            first, rungs=(first.original, *rungs.values()), notes=tuple(notes)
        )

    def table(self) -> Any:
        """A `rich.table.Table`: a line a model."""
        from .tables import report_table

        return report_table(self)

    def slice_table(self, limit: int = 10) -> Any:
        """A `rich.table.Table` of the worst slices of each candidate."""
        from .tables import slice_table

        return slice_table(self, limit)

    def save_plots(self, folder: str | Path) -> list[Path]:
        """Metrics with intervals, slices, and size against metric as PNG files; their paths.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from .plots import save_plots

        return save_plots(self, Path(folder))

    def __str__(self) -> str:
        from .tables import report_text

        return report_text(self)


# --- the JSON form ---------------------------------------------------------------------------


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _rung(data: Mapping[str, Any]) -> Rung:
    fields = dict(data)
    fields["ece"] = _number(data["ece"])
    fields["metrics"] = {
        name: MetricResult(
            _estimate(entry["value"]),
            None if entry["difference"] is None else _estimate(entry["difference"]),
            entry["higher_is_better"],
        )
        for name, entry in data["metrics"].items()
    }
    fields["slices"] = tuple(_flat(SliceResult, row) for row in data["slices"])
    fields["flips"] = None if data["flips"] is None else _flat(Flips, data["flips"])
    fields["divergence"] = {
        name: _flat(Divergence, row) for name, row in data["divergence"].items()
    }
    fields["limits"] = tuple(_flat(LimitResult, row) for row in data["limits"])
    return Rung(**fields)


def _estimate(data: Mapping[str, Any]) -> Estimate:
    return Estimate(**{key: _number(value) for key, value in data.items()})


def _flat(kind: Any, data: Mapping[str, Any]) -> Any:
    """A dataclass of numbers and text; a field of text that reads "nan" stays text."""
    texts = {f.name for f in dataclasses.fields(kind) if f.type == "str"}
    return kind(**{k: v if k in texts else _number(v) for k, v in data.items()})
