"""Running arm64 artifacts on this host, in user-mode emulation.

Here: finding the emulated machine that `scripts/setup_arm64.sh` sets up, and running models on it,
several in one emulated process because starting one takes seconds. Not here: what runs inside
(`guest_runner`), and any timing: emulation proves numerics and structure, never speed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import LoweringError, MissingDependencyError, UsageError

Feed = Mapping[str, npt.NDArray[Any]]

HOME_VARIABLE = "EDGEPASS_ARM64_HOME"
_SETUP = "run `scripts/setup_arm64.sh` (`--check` says what is missing)"
_QEMU = ("qemu-aarch64", "qemu-aarch64-static")
_CPU = "cortex-a76"  # Armv8.2 with dotprod and fp16, what the arm64 target stands for
_STARTUP_SECONDS = 120.0
_RUNTIMES = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".so": "tvm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedJob:
    """One model to run in the guest, and what to feed it.

    `model` is an `.onnx` or `.ort` file (ONNX Runtime), or a `.so` that TVM compiled for aarch64
    with its signature beside it in a `.json` of the same stem. Each of `feeds` is one call, by
    input name. `carry` maps output names to input names: from the second call on, such an input
    is the previous call's output unless the feed has it. `session_config`, `optimization` and
    `save_optimized` (where the session writes its optimized graph) are for ONNX Runtime only.
    """

    name: str
    model: Path
    feeds: Sequence[Feed]
    carry: Mapping[str, str] = dataclasses.field(default_factory=dict)
    session_config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optimization: Literal["all", "disabled"] = "all"
    save_optimized: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedResult:
    """What a job left: `outputs` per call by name, or `error`, the guest's message, if it failed.

    `details` is the guest's traceback or the end of its standard error. `optimized_model` is the
    saved optimized graph where the job asked for one.
    """

    job: EmulatedJob
    outputs: tuple[dict[str, npt.NDArray[Any]], ...] = ()
    error: str = ""
    details: str = ""
    optimized_model: Path | None = None

    def check(self) -> EmulatedResult:
        """This result; raises `LoweringError` naming the job if it failed."""
        if self.error:
            raise LoweringError(
                f"The job {self.job.name!r} failed on the emulated arm64 machine: {self.error}",
                where=f"model {self.job.model}",
                why=self.details.strip(),
                fix="check that the model runs on the host with the same inputs and options",
            )
        return self


@dataclasses.dataclass(frozen=True)
class Emulator:
    """A usable emulated machine: the emulator's path, and the folder the guest sees as its root."""

    qemu: Path
    sysroot: Path

    def run_jobs(
        self, jobs: Sequence[EmulatedJob], *, timeout: float = 600.0, check: bool = True
    ) -> list[EmulatedResult]:
        """Run jobs in the guest, in order, in one process; a crash costs a job, not the rest.

        `timeout` is in seconds for each job; the first one gets the start-up time on top. With
        `check`, the first failed job raises `LoweringError`; without, its result has `error`.
        Raises `UsageError` for a job that can't be sent to the guest.
        """
        for job in jobs:
            _check_job(job, self.sysroot)
        results: list[EmulatedResult] = []
        while len(results) < len(jobs):
            # The guest stops early only by dying in a job, which then has a result: this ends.
            batch = self._run_process(jobs[len(results) :], timeout)
            for result in batch if check else ():
                result.check()
            results += batch
        return results

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs the guest's Python with these arguments."""
        python = _guest_python(self.sysroot)
        line = [str(self.qemu), "-cpu", _CPU, "-L", str(self.sysroot), str(python)]
        # -P: the folder of the script (edgepass's `targets`) must not shadow onnxruntime and tvm.
        line += ["-s", "-P", *arguments]
        # setpriv (util-linux) has the kernel kill the guest with this process, even by kill -9.
        setpriv = shutil.which("setpriv")
        return [setpriv, "--pdeathsig", "KILL", *line] if setpriv else line

    def environment(self) -> dict[str, str]:
        """The guest's whole environment: nothing of the host's Python or linker settings leaks."""
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.sysroot),
            "TMPDIR": tempfile.gettempdir(),
            "ORT_DISABLE_TELEMETRY": "1",  # on by default in the wheel, with files under HOME
            "PYTHONPATH": str(self.sysroot / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TVM_NUM_THREADS": "1",
        }

    def _run_process(self, jobs: Sequence[EmulatedJob], timeout: float) -> list[EmulatedResult]:
        """One emulated process over `jobs`: a result for each up to the one it died in, if any."""
        with tempfile.TemporaryDirectory(prefix="edgepass-arm64-") as name:
            folder = Path(name)
            _write_jobs(folder, jobs)
            died = self._wait(folder, len(jobs), timeout)
            results: list[EmulatedResult] = []
            for index, job in enumerate(jobs):
                if not _result_file(folder, index).exists():
                    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
                    results.append(EmulatedResult(job=job, error=died, details=log[-4000:]))
                    break
                results.append(_read_result(folder, index, job))
            return results

    def _wait(self, folder: Path, count: int, timeout: float) -> str:
        """Start the guest and wait for it; returns how it ended, for the job it ended in."""
        runner = Path(__file__).with_name("guest_runner.py")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                self.command(str(runner), str(folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                cwd=folder,
            )
            finished = 0
            deadline = time.monotonic() + _STARTUP_SECONDS + timeout
            try:
                while time.monotonic() < deadline:
                    try:
                        return _ending(process.wait(timeout=0.1))
                    except subprocess.TimeoutExpired:
                        pass
                    while finished < count and _result_file(folder, finished).exists():
                        finished += 1
                        deadline = time.monotonic() + timeout
                return f"no result after {timeout:g} seconds"
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def find_emulator(arch: str = "arm64") -> Emulator:
    """The emulated machine of this user, in `$EDGEPASS_ARM64_HOME` or `~/.cache/edgepass/arm64`.

    Looks at files only; `scripts/setup_arm64.sh --check` runs it. Raises `MissingDependencyError`
    that says what is not there and how to set it up, `UsageError` for another architecture.
    """
    if arch != "arm64":
        raise UsageError(
            f"There is no emulated machine for {arch!r}",
            why="emulation is set up for arm64 only",
            fix="use arch='arm64'",
        )
    qemu = next((path for name in _QEMU if (path := shutil.which(name))), None)
    if qemu is None:
        raise MissingDependencyError(
            "The emulated arm64 machine needs qemu-aarch64",
            why="neither " + " nor ".join(_QEMU) + " is on the PATH",
            fix=_SETUP,
        )
    home = Path(os.environ.get(HOME_VARIABLE) or "~/.cache/edgepass/arm64").expanduser()
    # Absolute, because the guest starts in another folder.
    sysroot = Path(os.path.abspath(home / "sysroot"))
    # The stamp is written last: a folder without it is a set-up that was cut off.
    for part in (sysroot / ".edgepass-stamp", sysroot / "proc" / "cpuinfo", sysroot / "site"):
        if not part.exists():
            raise MissingDependencyError(
                "The emulated arm64 machine is not set up",
                where=str(sysroot),
                why=f"{part} is not there",
                fix=_SETUP,
            )
    emulator = Emulator(Path(qemu), sysroot)
    _guest_python(sysroot)
    return emulator


def _guest_python(sysroot: Path) -> Path:
    """The guest's Python by its real name (`usr/bin/python3` links to it)."""
    python = sysroot / "usr" / "bin" / "python3"
    if not python.exists():
        raise MissingDependencyError(
            "The emulated arm64 machine has no Python", where=str(python), fix=_SETUP
        )
    return python.resolve()


def _check_job(job: EmulatedJob, sysroot: Path) -> None:
    """Whether the guest can be given the job: files it sees, arrays that an npz holds."""
    where = f"job {job.name!r}"
    if job.model.suffix not in _RUNTIMES:
        raise UsageError(
            f"{job.model.name!r} is not a kind of model that runs in emulation",
            where=where,
            fix="use a file ending in " + ", ".join(_RUNTIMES),
        )
    needed = [job.model] + ([job.model.with_suffix(".json")] if job.model.suffix == ".so" else [])
    for path in needed:
        if not path.is_file():
            raise UsageError(f"There is no file {path}", where=where)
    for path in [*needed, *([job.save_optimized] if job.save_optimized else [])]:
        # qemu looks under the sysroot first, and takes the host's file only where none is there.
        if (sysroot / str(_absolute(path)).lstrip("/")).exists():
            raise UsageError(
                f"The guest can't see {path}",
                where=where,
                why=f"{sysroot} has a file of that path, which hides the host's",
                fix="copy the model to another folder",
            )
    for feed in job.feeds:
        for name, array in feed.items():
            if array.dtype.hasobject or array.dtype.isbuiltin != 1:
                raise UsageError(
                    f"The input {name!r} has dtype {array.dtype}, which can't be sent to the guest",
                    where=where,
                    fix="use one of numpy's own number types",
                )


def _write_jobs(folder: Path, jobs: Sequence[EmulatedJob]) -> None:
    described = []
    for index, job in enumerate(jobs):
        for number, feed in enumerate(job.feeds):
            arrays: Any = {str(position): array for position, array in enumerate(feed.values())}
            np.savez(folder / f"{index}-{number}.npz", **arrays)
        described.append(
            {
                "runtime": _RUNTIMES[job.model.suffix],
                "model": str(_absolute(job.model)),
                "feeds": [list(feed) for feed in job.feeds],
                "carry": dict(job.carry),
                "session_config": dict(job.session_config),
                "optimization": job.optimization,
                "save_optimized": str(_absolute(job.save_optimized)) if job.save_optimized else "",
            }
        )
    (folder / "jobs.json").write_text(json.dumps(described), encoding="utf-8")


def _read_result(folder: Path, index: int, job: EmulatedJob) -> EmulatedResult:
    result = json.loads(_result_file(folder, index).read_text(encoding="utf-8"))
    outputs = []
    for number, names in enumerate(result["steps"]):
        with np.load(folder / f"out-{index}-{number}.npz", allow_pickle=False) as stored:
            outputs.append({name: stored[str(position)] for position, name in enumerate(names)})
    return EmulatedResult(
        job=job,
        outputs=tuple(outputs),
        error=result["error"],
        details=result["trace"],
        optimized_model=None if result["error"] else job.save_optimized,
    )


def _result_file(folder: Path, index: int) -> Path:
    return folder / f"result-{index}.json"


def _absolute(path: Path) -> Path:
    # Not resolved: a link may lead to a store whose files have no suffix.
    return Path(os.path.abspath(path))


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        return f"the guest was killed by {signal.Signals(-code).name}"
    return f"the guest ended early with exit code {code}"
