"""Timing what ONNX Runtime runs on this machine: each kernel in its network, and whole networks.

Here: `Bench`, which times networks in turns so that a busy machine disturbs all alike, and the
records it makes. Not here: the networks (`microbench_nets`), what the profiler wrote
(`microbench_trace`), and fitting (`calibrate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..targets.onnx_file import write_onnx
from .microbench_trace import KernelTime, read_trace, typical

_USUAL = 0.4
"""The quantile of the reference's times in a batch that is taken for the machine's own speed."""
_WARM = 3
"""Runs of a session before those that count, each time it is its turn: another's left the caches
cold and its threads asleep. (Measured on 16 networks: the first run takes 1.39 times what a warm
one does, the second 1.13 to 1.17, the third 1.06 to 1.11.)"""
_RUNS = 3


@dataclasses.dataclass(frozen=True)
class NetTime:
    """A network that ran: `ms` of a whole run without the profiler, and its kernels.

    `profiled_ms`: of a whole run with the profiler on. `recipe`: what was done to the network.
    `reference_ms`: of the reference meanwhile: how fast the machine was.
    """

    net: str
    recipe: str
    threads: int
    ms: float
    profiled_ms: float
    kernels: tuple[KernelTime, ...]
    reference_ms: float = 0.0


# --- sessions ----------------------------------------------------------------------------------


class TimedNet:
    """One network with one number of threads: a session to time, and one that profiles.

    Raises what onnxruntime raises where it refuses the network.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        *,
        entries: Mapping[str, str] | None = None,
        profile: bool = True,
        seed: int = 0,
    ) -> None:
        self.threads = threads
        self.path = path
        self.walls: list[float] = []
        self.profiled: list[float] = []
        # the runtime optimizes alike for any number of threads
        self._optimized = path.with_suffix(".optimized.onnx")
        save = None if self._optimized.exists() else self._optimized
        entries = {**(entries or {}), **quiet_pool(threads)}
        self._plain = _session(path, threads, entries)
        self._profiling = (
            _session(path, threads, entries, profile=True, save=save) if profile else None
        )
        self._feed = random_feed(self._plain, seed)
        self._names = [output.name for output in self._plain.get_outputs()]

    def warm(self) -> None:
        """Run everything once: the first run allocates."""
        self._plain.run(self._names, self._feed)
        if self._profiling is not None:
            self._profiling.run(self._names, self._feed)

    def turn(self, *, profiled_only: bool = False) -> None:
        """Runs with the profiler and without it, each after some that do not count."""
        sessions = [(self._profiling, self.profiled)]
        if self._profiling is None or not profiled_only:
            sessions.append((self._plain, self.walls))
        for session, times in sessions:
            if session is None:
                continue
            for index in range(-_WARM, _RUNS):
                started = time.perf_counter()
                session.run(self._names, self._feed)
                if index >= 0:
                    times.append((time.perf_counter() - started) * 1e3)

    def result(self, net: str, recipe: str, reference_ms: float = 0.0) -> NetTime:
        """What was found, and the end of the sessions."""
        kernels: tuple[KernelTime, ...] = ()
        if self._profiling is not None:
            trace = Path(self._profiling.end_profiling())
            kernels = read_trace(trace, self._optimized)
            trace.unlink()
        self._plain = self._profiling = None
        return NetTime(
            net,
            recipe,
            self.threads,
            typical(self.walls),
            typical(self.profiled),
            kernels,
            reference_ms,
        )


def quiet_pool(threads: int) -> dict[str, str]:
    """Session options with which sessions can take turns without disturbing each other.

    A session's worker threads go on spinning for up to 50 ms after a run, and now and then the
    system puts two threads on one core: both double the time of what runs meanwhile (measured,
    ONNX Runtime 1.32 on 2 cores). Neither changes the time of a session that runs alone.
    """
    if threads < 2:
        return {}
    options = {"session.force_spinning_stop": "1"}
    cores = _cores()
    if len(cores) >= threads:
        workers = ";".join(str(core + 1) for core in cores[1:threads])
        options["session.intra_op_thread_affinities"] = workers
    return options


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def _on_first_core() -> Iterator[None]:
    """This thread stays on the core that `quiet_pool` leaves to it."""
    cores = _cores()
    if len(cores) < 2:
        yield
        return
    os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _session(
    path: Path,
    threads: int,
    entries: Mapping[str, str],
    *,
    profile: bool = False,
    save: Path | None = None,
) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(path.with_suffix(f".{threads}.trace"))
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def random_feed(session: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal inputs for a session, small integers where it takes integers."""
    generator = np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    for given in session.get_inputs():
        shape = [d if isinstance(d, int) else 1 for d in given.shape]
        if given.type in _FLOATS:
            feed[given.name] = generator.standard_normal(shape).astype(_FLOATS[given.type])
        elif given.type == "tensor(bool)":
            feed[given.name] = np.ones(shape, bool)
        else:
            name = given.type.removeprefix("tensor(").removesuffix(")")
            feed[given.name] = generator.integers(0, 2, shape).astype(name)
    return feed


# --- benches -----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Entry:
    net: str
    recipe: str
    timed: TimedNet


class Bench:
    """Times networks in batches; use it as a context manager, it owns a temporary folder.

    The networks of a batch take turns `rounds` times over, with a small reference in between that
    tells how fast the machine is just then.
    """

    def __init__(
        self,
        threads: Sequence[int] = (1,),
        *,
        rounds: int = 3,
        reference: ir.Model | None = None,
    ) -> None:
        self.threads = tuple(threads)
        self.rounds = rounds
        self.reference_ms: dict[int, list[float]] = {count: [] for count in self.threads}
        """Of every batch, the fastest of its rounds."""
        self._folder = tempfile.TemporaryDirectory(prefix="edgepass-bench-")
        self._references: dict[int, TimedNet] = {}
        if reference is not None:
            path = self._write("reference", reference)
            for count in self.threads:
                self._references[count] = TimedNet(path, count, profile=False)
                self._references[count].warm()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._references.clear()
        self._folder.cleanup()

    def _write(self, name: str, model: ir.Model) -> Path:
        path = Path(self._folder.name) / f"{name}.onnx"
        write_onnx(model, path)
        return path

    def reference(self, threads: int) -> float:
        """Milliseconds of the reference now; 0 where there is none."""
        timed = self._references.get(threads)
        if timed is None:
            return 0.0
        timed.walls.clear()
        timed.turn()
        return typical(timed.walls)

    def speed(self, threads: int) -> float:
        """Milliseconds that the reference takes while nothing disturbs; 0 where there is none."""
        times = self.reference_ms[threads]
        return float(np.quantile(times, _USUAL)) if times else 0.0

    def run(
        self,
        models: Sequence[tuple[str, str, ir.Model, Mapping[str, str]]],
        *,
        profile: bool = True,
    ) -> list[NetTime]:
        """Time (name, recipe, model, session options), all weights given.

        A network that the runtime refuses is left out.
        """
        with _no_garbage_collection():
            return self._run(models, profile)

    def _run(
        self,
        models: Sequence[tuple[str, str, ir.Model, Mapping[str, str]]],
        profile: bool,
    ) -> list[NetTime]:
        entries: list[_Entry] = []
        paths: list[Path] = []
        for index, (name, recipe, model, options) in enumerate(models):
            paths.append(self._write(f"net{index}", model))
            for threads in self.threads:
                with contextlib.suppress(Exception):  # onnxruntime's share no base but Exception
                    timed = TimedNet(paths[-1], threads, entries=options, profile=profile)
                    timed.warm()
                    entries.append(_Entry(name, recipe, timed))
        references: dict[int, list[float]] = {count: [] for count in self.threads}
        with _on_first_core():
            for index in range(self.rounds):
                for count in self.threads:
                    references[count].append(self.reference(count))
                    for entry in entries:
                        if entry.timed.threads == count:
                            entry.timed.turn(profiled_only=index % 2 == 1)
        fastest = {count: min(times) for count, times in references.items()}
        for count, ms in fastest.items():
            self.reference_ms[count].append(ms)
        results = [
            entry.timed.result(entry.net, entry.recipe, fastest[entry.timed.threads])
            for entry in entries
        ]
        for path in paths:
            for file in path.parent.glob(f"{path.stem}.*"):
                file.unlink()
        return results


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
