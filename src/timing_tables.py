"""A profile from a table of timings of model files: `edgepass calibrate --from timings.csv`.

Here: `profile_from_table`, which reads the table, loads every model and hands kernels and times to
the fit. Not here: the fit (`cost.timings`), measuring this machine (`calibrating`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .architecture import Architecture
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
    device's profile to start from, so that about ten timings are enough.

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
    return fit_timings(
        samples,
        name=label,
        device=device or label,
        runtime=runtime,
        target=chip.name,
        source=f"{len(samples)} whole-model timings in {path.name}",
        prior=related,
        progress=progress,
    )


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
