"""What `edgepass run` does: an artifact or a model file, here or emulated, on one feed or many.

Not here: options and printing (`build`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..artifact import Artifact, load
from ..errors import ModelFileError, UsageError
from ..npz import read_npz
from ..samples import as_feeds
from ..targets.feed import TensorSpec, check_feed

Arrays = dict[str, np.ndarray]


def run_model(
    path: Path, data: Path | None, emulate: str | None, threads: int
) -> tuple[Arrays, dict[str, float] | None]:
    """Outputs by name, and their differences to the golden output where that input was run.

    Raises:
        UsageError: a model file without inputs.
        ArtifactError: a damaged artifact, or a golden output that is not reproduced.
        CalibrationError: inputs that do not fit.
    """
    if path.is_dir():
        return _run_artifact(load(path, threads=threads), data, emulate)
    if data is None:
        raise UsageError(
            "A model file has no golden input to run",
            where=str(path),
            fix="give inputs with `--input data.npz`, or compile it to an artifact first",
        )
    return _run_file(path, data, emulate, threads), None


def _run_artifact(
    artifact: Artifact, data: Path | None, emulate: str | None
) -> tuple[Arrays, dict[str, float] | None]:
    if data is not None:
        feeds = feeds_of(data, artifact.inputs)
    elif (golden := artifact.golden) is not None:
        feeds = [golden[0]]
    else:
        raise UsageError(
            "The artifact has no golden input",
            where=str(artifact.path),
            fix="give inputs with `--input data.npz`",
        )
    if emulate is not None:
        results = artifact.run_emulated(feeds, emulate)
    else:
        results = [artifact.run(feed) for feed in feeds]
    differences = artifact.verify(results[0]) if data is None else None
    return _stacked(results), differences


def _run_file(path: Path, data: Path, emulate: str | None, threads: int) -> Arrays:
    from ..frontends.onnx import from_path
    from ..targets.onnxruntime import OrtRunner

    if path.suffix == ".so":
        raise ModelFileError(
            "A library alone can't be run",
            where=str(path),
            fix="give the artifact's folder, which says what the library takes",
        )
    source = path if path.suffix == ".ort" else from_path(path, weights_required=True)
    with OrtRunner(source, threads=threads) as runner:
        feeds = feeds_of(data, runner.inputs)
        if emulate is None:
            return _stacked([runner.run(feed) for feed in feeds])
    from ..targets.emulator import EmulatedJob, find_emulator

    job = EmulatedJob(name=path.name, model=path, feeds=feeds)
    (result,) = find_emulator(emulate).run_jobs([job])
    return _stacked(list(result.check().outputs))


def feeds_of(data: Path, inputs: Sequence[TensorSpec]) -> list[Arrays]:
    """One feed when the arrays fit the inputs as they are, else one a sample.

    Raises:
        CalibrationError: the arrays fit in neither way.
    """
    arrays = read_npz(data)
    ranks = {spec.name: len(spec.shape) for spec in inputs if spec.shape is not None}
    if any(name in ranks and a.ndim == ranks[name] + 1 for name, a in arrays.items()):
        return [dict(feed) for feed in as_feeds(arrays, inputs, finite=False)]
    check_feed(inputs, arrays, where=str(data))
    return [arrays]


def _stacked(results: Sequence[Arrays]) -> Arrays:
    """One array an output: the only result as it is, several along a new first axis.

    Outputs whose shapes differ from sample to sample stay apart, as `name.0`, `name.1`, ...
    """
    if len(results) == 1:
        return dict(results[0])
    stacked: Arrays = {}
    for name in results[0]:
        arrays = [result[name] for result in results]
        if len({array.shape for array in arrays}) == 1:
            stacked[name] = np.stack(arrays)
        else:
            stacked |= {f"{name}.{i}": array for i, array in enumerate(arrays)}
    return stacked
