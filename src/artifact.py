"""The bundle on disk: a folder with the model, a manifest and a golden input and output.

Here: `save_artifact`, `load`, `Artifact`. Not here: what is in the model files (each lowering's
`emit`), swapping folders (`atomic`), compiling (`api`). docs/artifact.md describes the format.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from .atomic import replacing
from .errors import ArtifactError, CalibrationError, UsageError
from .manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    broken,
    check_files,
    file_entry,
    is_artifact,
    read_manifest,
)
from .npz import read_npz, write_npz
from .targets.feed import TensorSpec, check_feed
from .targets.target import Runtime, Target

GOLDEN = "golden.npz"
TOLERANCE = 1e-4
"""Largest allowed difference to the golden output, relative to that output's range."""
_RUNNABLE = ("model.onnx", "model.ort", "model.so")


def save_artifact(
    folder: Path | str,
    *,
    write_model: Callable[[Path], Sequence[Path]],
    target: Target,
    recipe: str,
    session_options: Mapping[str, str] | None = None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    cost: Mapping[str, Any] | None = None,
    ledger: Any = None,
    placement: Any = None,
    notes: Sequence[str] = (),
    golden_input: Mapping[str, np.ndarray] | None = None,
    golden_output: Mapping[str, np.ndarray] | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Path:
    """Write an artifact, or replace the one that is there, as one step; returns its folder.

    `write_model` is called with an empty folder and returns the files it wrote there (`emit` of a
    lowering). Everything goes to a temporary sibling, is flushed, loaded again, and the golden
    input run, before the folders are swapped: a killed process leaves the old artifact or the new
    one. Without `golden_output` the model's own output is recorded. A TVM library for another
    machine is not run. `session_options` are the target's where not given. The same arguments give
    the same bytes.

    Raises:
        UsageError: the folder exists and is not an artifact, and not `force`.
        ArtifactError: what was written does not reproduce `golden_output`.
    """
    destination = Path(os.path.realpath(folder))
    options = target.session_options if session_options is None else session_options
    _check_destination(destination, force)
    with replacing(destination) as fresh:
        files = sorted(path.name for path in write_model(fresh))
        model = next((name for name in _RUNNABLE if name in files), None)
        if model is None:
            raise ArtifactError(
                "Nothing was written that could be run", where=str(fresh), why=f"files: {files}"
            )
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "target": target.name,
            "arch": target.hardware.arch,
            "runtime": str(target.runtime),
            "session_options": dict(sorted(options.items())),
            "recipe": recipe,
            "model": model,
            "inputs": [spec.as_dict() for spec in inputs],
            "outputs": [spec.as_dict() for spec in outputs],
            "versions": _versions(target.runtime),
            "cost": cost,
            "ledger": ledger,
            "placement": placement,
            "notes": list(notes),
        }
        _add_golden(manifest, fresh, files, golden_input, golden_output, tolerance)
        manifest["files"] = {name: file_entry(fresh / name) for name in sorted(files)}
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (fresh / MANIFEST).write_text(text + "\n", encoding="utf-8")
        artifact = load(fresh)
        if artifact.runs_here:
            artifact.verify()
        artifact.close()
    return Path(folder)


class Artifact:
    """A saved model, ready to run. Made by `load`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], threads: int = 1) -> None:
        self.path = path
        self.manifest: Mapping[str, Any] = MappingProxyType(dict(manifest))
        self.inputs = tuple(TensorSpec.from_dict(entry) for entry in manifest["inputs"])
        self.outputs = tuple(TensorSpec.from_dict(entry) for entry in manifest["outputs"])
        self.model_file = path / str(manifest["model"])
        self._threads = threads
        self._runner: Any = None

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, target={self.manifest['target']!r})"

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run it: ONNX files anywhere, a library on its own machine."""
        if self.manifest["runtime"] != Runtime.TVM:
            return True
        from .targets.tvm.crosscompile import architecture_of, host_architecture

        return architecture_of(self.manifest["arch"]) == host_architecture()

    def run(
        self, feed: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name for one feed.

        Raises:
            CalibrationError: the feed has wrong names, dtypes or shapes.
            ArtifactError: the library is for another machine.
        """
        session = self._session()
        check_feed(self.inputs, feed, optional=getattr(session, "defaults", ()))
        results: dict[str, np.ndarray] = session.run(feed)
        if outputs is None:
            return results
        unknown = [name for name in outputs if name not in results]
        if unknown:
            raise UsageError(
                f"The model has no output {unknown[0]!r}", fix=f"outputs are: {sorted(results)}"
            )
        return {name: results[name] for name in outputs}

    def run_emulated(
        self, feeds: Sequence[Mapping[str, np.ndarray]], arch: str = "arm64"
    ) -> list[dict[str, np.ndarray]]:
        """Outputs of each feed on the emulated machine. Slow, and proves numerics only.

        Raises:
            MissingDependencyError: the emulated machine is not set up.
            LoweringError: the model failed there.
        """
        from .targets.emulator import EmulatedJob, find_emulator

        for feed in feeds:
            check_feed(self.inputs, feed)
        options = self.manifest["session_options"]
        job = EmulatedJob(
            name=self.path.name, model=self.model_file, feeds=feeds, session_config=options
        )
        (result,) = find_emulator(arch).run_jobs([job])
        return list(result.check().outputs)

    @property
    def golden(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """The golden input and output, or None where the artifact has none."""
        entry = self.manifest["golden"]
        if entry is None:
            return None
        try:
            arrays = read_npz(self.path / entry["file"])
        except CalibrationError as error:
            raise broken(self.path, f"{entry['file']}: {error.diagnostic.why}") from error
        sides: dict[str, dict[str, np.ndarray]] = {"input": {}, "output": {}}
        for key, array in arrays.items():
            side, _, name = key.partition("/")
            sides.setdefault(side, {})[name] = array
        return sides["input"], sides["output"]

    def verify(
        self, results: Mapping[str, np.ndarray] | None = None, *, tolerance: float | None = None
    ) -> dict[str, float]:
        """Check hashes and the golden output; the relative difference of each output.

        `results` are outputs of the golden input from elsewhere (the emulated machine); without
        them the model is run here. `tolerance` overrides the manifest's.

        Raises:
            ArtifactError: a file changed, or an output differs by more than the tolerance.
        """
        check_files(self.path, self.manifest)
        golden = self.golden
        if golden is None:
            return {}
        feed, expected = golden
        actual = self.run(feed) if results is None else results
        allowed = self.manifest["golden"]["tolerance"] if tolerance is None else tolerance
        differences = {}
        for name, array in expected.items():
            if name not in actual:
                raise broken(self.path, f"it does not produce the output {name!r}")
            differences[name] = difference = relative_difference(array, actual[name])
            if not difference <= allowed:
                raise ArtifactError(
                    "The artifact does not reproduce its golden output",
                    where=f"{self.path}, output {name!r}",
                    why=f"differs by {difference:.3g} of the output's range, "
                    f"{allowed:.3g} is allowed",
                    fix="run it with the versions in the manifest, or compile the model again",
                )
        return differences

    def runner(self) -> Any:
        """The session or library behind `run`, without its checks: what is timed."""
        return self._session()

    def close(self) -> None:
        """Free the runtime's session."""
        if self._runner is not None and hasattr(self._runner, "close"):
            self._runner.close()
        self._runner = None

    def _session(self) -> Any:
        if self._runner is None:
            if self.manifest["runtime"] == Runtime.TVM:
                self._runner = self._tvm_runner()
            else:
                from .targets.onnxruntime import OrtRunner

                self._runner = OrtRunner(
                    self.model_file,
                    session_options=self.manifest["session_options"],
                    threads=self._threads,
                )
        return self._runner

    def _tvm_runner(self) -> Any:
        if not self.runs_here:
            arch = self.manifest["arch"]
            emulated = f"`edgepass run {self.path} --emulate arm64`, or "
            raise ArtifactError(
                f"The artifact is a library for {arch}, which this machine cannot run",
                where=str(self.path),
                fix=(emulated if arch in ("aarch64", "arm64") else "") + "copy it to the device",
            )
        from .targets.tvm.run import TvmRunner

        return TvmRunner(self.model_file)


def load(path: Path | str, *, threads: int = 1) -> Artifact:
    """Open an artifact: the manifest is read, and every file it lists is held against its hash.

    `threads` is what the runtime may use.

    Raises:
        ArtifactError: not an artifact, of an unknown version, incomplete or changed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        return Artifact(folder, manifest, threads)
    except (KeyError, TypeError, ValueError) as error:
        raise broken(folder, f"{MANIFEST}: an input or output is malformed, {error!r}") from error


def relative_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    """Largest difference relative to the range of `expected`; 0 when equal, infinity when of
    another shape, or NaN or infinite elsewhere. Text and bool are equal or not.
    """
    if np.shape(expected) != np.shape(actual):
        return float("inf")
    if expected.dtype.kind in "OSUb":
        equal = np.array_equal(expected.astype(np.str_), np.asarray(actual).astype(np.str_))
        return 0.0 if equal else float("inf")
    want, got = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        return float("inf")
    want, got = want[finite], got[finite]
    if not want.size or np.array_equal(want, got):
        return 0.0
    if not np.isfinite(got).all():
        return float("inf")
    extent = float(want.max() - want.min()) or float(np.abs(want).max()) or 1.0
    return float(np.abs(want - got).max() / extent)


# --- writing ---------------------------------------------------------------------------------


def _add_golden(
    manifest: dict[str, Any],
    folder: Path,
    files: list[str],
    feed: Mapping[str, np.ndarray] | None,
    expected: Mapping[str, np.ndarray] | None,
    tolerance: float,
) -> None:
    """Write the golden file, running the new model where its output is not given."""
    manifest["golden"] = None
    if feed is None:
        return
    if expected is None:
        unfinished = Artifact(folder, manifest)
        if not unfinished.runs_here:
            return
        expected = unfinished.run(feed)
        unfinished.close()
    arrays = {f"input/{name}": np.asarray(array) for name, array in feed.items()}
    arrays |= {f"output/{name}": np.asarray(array) for name, array in expected.items()}
    write_npz(folder / GOLDEN, arrays)
    files.append(GOLDEN)
    manifest["golden"] = {"file": GOLDEN, "tolerance": tolerance}


def _check_destination(folder: Path, force: bool) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    here = folder.resolve()
    if not folder.is_dir() or here in (Path.home(), Path.cwd().resolve()) or not here.name:
        raise UsageError(
            f"{str(folder)!r} cannot become an artifact",
            why="an artifact is a folder of its own, and this is something else",
            fix="name a folder that does not exist yet",
        )
    if not force and any(folder.iterdir()) and not is_artifact(folder):
        raise UsageError(
            f"{str(folder)!r} exists and is not an artifact",
            why="replacing it would delete what is in it",
            fix="name another folder, or say `--force` (`force=True`)",
        )


def _versions(runtime: Runtime) -> dict[str, str]:
    names = ["edgepass", "numpy", "onnx", "onnx-ir", "onnxruntime"]
    if runtime == Runtime.TVM:
        names += ["apache-tvm", "apache-tvm-ffi"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
