"""A profile from a table of timings of model files: `edgepass calibrate --from timings.csv`.

Here: `profile_from_table`, which reads the table, loads every model and hands kernels and times to
the fit, and `fit_models`, which chooses it. Not here: the fit (`cost.timings`, `cost.fleet`),
measuring this machine (`calibrating`).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .architecture import Architecture
from .cost.features import Features
from .cost.fleet import LEAST, Fleet, is_fleet
from .cost.profile import Profile
from .cost.profiles import find_profile
from .cost.timings import TimedModel, TimingRow, fit_timings, read_timings
from .errors import EdgepassError, ProfileError
from .targets.registry import get_target
from .targets.target import Target

ProgressCall = Callable[[int, int, str], None]


def profile_from_table(
    table: str | Path,
    target: str | Target = "arm64",
    *,
    name: str = "",
    device: str = "",
    runtime: str = "onnxruntime",
    prior: str | Path | Profile | None = None,
    progress: ProgressCall | None = None,
) -> Profile:
    """Fit a profile to a CSV of whole-model timings: columns `model`, `latency_ms`, and if wanted
    `family`, `threads`, `dims` (see `cost.timings.read_timings`).

    Models are ONNX files, weights may be absent; relative paths start at the table's folder. They
    are priced as they are, by the kernels that `target`'s runtime makes of them. `prior`: a related
    device's profile to start from, or a fleet's (fleet-ncnn), so that about ten timings are enough.

    Raises:
        ProfileError: the table can't be read, or there are too few timings.
        EdgepassError: a model can't be read; the line of the table is named.
    """
    path = Path(table)
    rows = read_timings(path)
    chip = get_target(target)
    related = prior if isinstance(prior, Profile) or prior is None else find_profile(prior)
    samples = []
    for done, row in enumerate(rows):
        if progress is not None:
            progress(done, len(rows), row.model)
        samples.append(_timed(path, row, chip))
    label = name or path.stem
    facts: dict[str, Any] = {
        "name": label,
        "device": device or label,
        "runtime": runtime,
        "target": chip.name,
        "source": f"{len(samples)} whole-model timings in {path.name}",
    }
    return fit_models(samples, related, facts, progress)


def fit_models(
    samples: Sequence[TimedModel],
    prior: Profile | None,
    facts: Mapping[str, Any],
    progress: ProgressCall | None = None,
) -> Profile:
    """Fit a profile to models whose kernels are known, by what the prior is: a fleet's, a device's
    or none. `facts`: name, device, runtime, target and source of the profile.

    Raises:
        ProfileError: there are too few timings.
    """
    if prior is not None and is_fleet(prior):
        return _one_of_a_fleet(samples, prior, facts)
    return fit_timings(samples, **facts, prior=prior, progress=progress)


def _one_of_a_fleet(
    samples: Sequence[TimedModel], related: Profile, facts: Mapping[str, Any]
) -> Profile:
    """By how devices of the fleet vary: how its rates go together, and what networks it has run."""
    by_threads: dict[int, list[tuple[Sequence[Features], float]]] = {}
    for sample in samples:
        by_threads.setdefault(sample.threads, []).append((sample.kernels, sample.ms))
    for threads, chosen in by_threads.items():
        if len(chosen) < LEAST:
            raise ProfileError(
                f"{len(chosen)} timings with {threads} thread(s) are too few",
                where=facts["name"],
                fix="time at least three models, ten for a profile that is worth much",
            )
    notes = [f"started from the profile {related.name!r}: {related.source}"]
    fleet = Fleet.from_profile(related)
    if related.runtime != facts["runtime"]:
        fleet = fleet.under_another_runtime()
        notes.append(f"that one is of {related.runtime}, these timings of {facts['runtime']}")
    return fleet.adapt(by_threads, **facts, date=datetime.date.today().isoformat(), notes=notes)


def _timed(table: Path, row: TimingRow, target: Target) -> TimedModel:
    try:
        launches = Architecture(table.parent / row.model).launches(target, dims=row.dims or None)
    except EdgepassError as error:
        raise ProfileError(
            f"The model {row.model!r} of a timing can't be used: {error.diagnostic.what}",
            where=f"{table}, line {row.line}",
            why=error.diagnostic.why,
            fix=error.diagnostic.fix or "correct the path; it starts at the table's folder",
        ) from error
    return TimedModel(row.model, launches, row.ms, row.family, row.threads)
