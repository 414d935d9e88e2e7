"""A model as a shared library: import, schedule, generate code, link, describe.

Here: `TvmTarget`, `emit`, and the report of what was made. Not here: the schedules themselves
(`schedules`), GPU code generators (`gpu`), linking (`crosscompile`), running (`run`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...errors import EdgepassError, LoweringError, UsageError
from ...ir.graph import static_shape
from ...ir.sizing import dim_name, fix_dims
from .crosscompile import (
    ELF_MACHINES,
    Linker,
    architecture_of,
    elf_machine,
    fcompile,
    find_linker,
    host_architecture,
)
from .gpu import check_gpu_module, gpu_target, lower_gpu, require_code_generator
from .importer import USE_ONNX_RUNTIME, first_line, require_tvm, to_relax
from .run import SIDE_FILE_FORMAT, TensorInfo, side_file
from .schedules.pipeline import schedule_module
from .schedules.report import ScheduleReport
from .schedules.spec import CpuSpec
from .tuning import tune

GPU_KINDS = ("cuda", "vulkan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TvmTarget:
    """What TVM generates code for.

    Fields:
        kind: `"llvm"` (a CPU), `"cuda"`, or `"vulkan"`.
        cpu: the CPU; for a GPU its host, None for an x86-64 host.
        cross_compile: link for `cpu.triple` also where that is not this machine; without it such
            a target is refused.
        tuning_trials: MetaSchedule's budget for what has no schedule of ours; 0 is off.
        arch: the GPU's compute capability, for `"cuda"`.
    """

    kind: str = "llvm"
    cpu: CpuSpec | None = None
    cross_compile: bool = True
    tuning_trials: int = 0
    arch: str = "sm_75"

    def __post_init__(self) -> None:
        if self.kind not in ("llvm", *GPU_KINDS):
            raise UsageError(
                f"TVM has no target kind {self.kind!r} here",
                why=f"known kinds: llvm, {', '.join(GPU_KINDS)}",
                fix="use one of them",
            )
        if self.kind == "llvm" and self.cpu is None:
            raise UsageError("A CPU target needs `cpu`", fix="pass cpu=X86_64_AVX2 or another")
        if self.tuning_trials < 0:
            raise UsageError("tuning_trials is negative", fix="pass 0 or more")

    def __str__(self) -> str:
        if self.cpu is None or self.kind != "llvm":
            return f"{self.kind} {self.arch}" if self.kind == "cuda" else self.kind
        return f"llvm {self.cpu.triple} {self.cpu.mcpu}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TvmEmitReport:
    """What was made. `schedule` is the CPU scheduler's own report, None for a GPU.

    `kernels` are the names of the compiled functions, `unscheduled` those that no rule of ours
    covered: they have TVM's own loops, vectorized. `library_bytes` is the `.so` as linked with
    `linker`, `params_bytes` a separate weights file or 0. `note` says what was not proven.
    """

    library: Path
    kernels: tuple[str, ...]
    schedule: ScheduleReport | None
    unscheduled: tuple[str, ...]
    library_bytes: int
    params_bytes: int
    seconds: float
    linker: str
    target: str
    note: str = ""


def emit(
    model: ir.Model,
    target: TvmTarget,
    out: Path,
    *,
    dims: Mapping[str, int] | None = None,
    linker: Linker | None = None,
) -> TvmEmitReport:
    """Compile `model` into the shared library `out` and its side file `<stem>.json`.

    Args:
        model: a graph of opset 13 or newer with weights; it is not changed.
        target: what to generate code for.
        out: the library to write, ending in `.so`; the same input gives the same bytes.
        dims: symbolic dimension -> size, to fix before compiling; the others stay symbolic.
        linker: what to link with; found by itself when None.

    Raises:
        UnsupportedOpError: TVM cannot import a node.
        MissingDependencyError: TVM, the code generator or a linker is not there.
        LoweringError: TVM or the linker refused the program.
    """
    started = time.perf_counter()
    tvm = require_tvm()
    if target.kind in GPU_KINDS:
        require_code_generator(target.kind)
    triple = target.cpu.triple if target.cpu is not None else "x86_64-linux-gnu"
    linker = linker or find_linker(triple)
    _check_cross(target, triple)
    if dims:
        model = fix_dims(model, dims)
    module = to_relax(model)
    note = ""
    schedule: ScheduleReport | None = None
    with _lowering_errors(target):
        if target.kind in GPU_KINDS:
            tvm_target = gpu_target(target.kind, target.arch, triple)
            module = lower_gpu(module, tvm_target)
        else:
            assert target.cpu is not None
            tvm_target = target.cpu.tvm_target()
            with _quiet():
                module, schedule = schedule_module(module, target.cpu)
            if target.tuning_trials:
                names = _untuned(schedule)
                module, tuned = tune(module, tvm_target, target.tuning_trials, names)
                note = f"MetaSchedule replaced {', '.join(tuned) or 'nothing'}"
        executable = _build(module, tvm_target)
    if target.kind in GPU_KINDS:
        note = check_gpu_module(executable.mod, target.kind)
    info = _describe(model, target, tvm.__version__)
    with tempfile.TemporaryDirectory(prefix=".edgepass-", dir=_folder_of(out)) as folder:
        # A new file, renamed: a process that has the old library mapped keeps it whole.
        made = Path(folder) / out.name
        with _lowering_errors(target):
            executable.export_library(str(made), fcompile=fcompile(linker, triple))
        _check_library(made, triple)
        side_file(made).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        made.replace(out)
        side_file(made).replace(side_file(out))
    return TvmEmitReport(
        library=out,
        kernels=_kernels(module),
        schedule=schedule,
        unscheduled=_untuned(schedule),
        library_bytes=out.stat().st_size,
        params_bytes=0,
        seconds=time.perf_counter() - started,
        linker=linker.name,
        target=str(target),
        note=note,
    )


def _folder_of(out: Path) -> Path:
    if out.suffix != ".so":
        raise UsageError(f"The library's name {out.name!r} does not end in .so", fix="use .so")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _check_cross(target: TvmTarget, triple: str) -> None:
    if target.cross_compile or architecture_of(triple) == host_architecture():
        return
    raise UsageError(
        f"The target is for {architecture_of(triple)}, and this machine is {host_architecture()}",
        why="cross_compile=False",
        fix="set cross_compile=True, or compile on the device",
    )


# --- passes and code generation --------------------------------------------------------------


def _build(module: Any, tvm_target: Any) -> Any:
    """Code for lowered functions, and the virtual machine's program that calls them."""
    import tvm
    from tvm import relax
    from tvm.relax.backend.cpu_generic import pipeline as cpu_passes

    if tvm_target.kind.name == "llvm":
        passes = [
            *cpu_passes.dataflow_lower_passes(tvm_target),
            *cpu_passes.finalize_passes(tvm_target),
        ]
        pipeline = tvm.transform.Sequential(passes)
    else:
        pipeline = relax.get_pipeline("default_build")
    with tvm.transform.PassContext(opt_level=3), _quiet():
        return relax.build(module, tvm_target, relax_pipeline=pipeline)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _lowering_errors(target: TvmTarget) -> Iterator[None]:
    """Turn whatever TVM raises into a `LoweringError`."""
    try:
        yield
    except EdgepassError:
        raise
    except Exception as error:  # TVM raises RuntimeError, ValueError, and errors of its own
        raise LoweringError(
            "TVM could not compile the graph",
            where=str(target),
            why=first_line(error),
            fix=f"{USE_ONNX_RUNTIME}; dynamic dimensions, if any, can be fixed with dims={{...}}",
        ) from error


def _untuned(schedule: ScheduleReport | None) -> tuple[str, ...]:
    if schedule is None:
        return ()
    return tuple(record.name for record in schedule.of_kind("fallback"))


def _kernels(module: Any) -> tuple[str, ...]:
    from tvm import tirx

    names = (
        var.name_hint for var, func in module.functions.items() if isinstance(func, tirx.PrimFunc)
    )
    return tuple(sorted(names))


def _check_library(out: Path, triple: str) -> None:
    expected = ELF_MACHINES.get(architecture_of(triple))
    found = elf_machine(out)
    if found != expected:
        raise LoweringError(
            "The linker made a library for another machine",
            where=os.fspath(out),
            why=f"ELF machine {found}, expected {expected} for {triple}",
            fix="remove the compiler that does so from PATH, or install ziglang",
        )


# --- the side file ---------------------------------------------------------------------------


def _describe(model: ir.Model, target: TvmTarget, version: str) -> dict[str, Any]:
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    return {
        "format": SIDE_FILE_FORMAT,
        "inputs": [_entry(value) for value in inputs],
        "outputs": [_entry(value) for value in model.graph.outputs],
        "target": str(target),
        "tvm": version,
    }


def _entry(value: ir.Value) -> dict[str, Any]:
    info = TensorInfo(value.name or "", _shape(value), _dtype_name(value))
    return {"name": info.name, "shape": info.shape, "dtype": info.dtype}


def _shape(value: ir.Value) -> tuple[int | str, ...] | None:
    if value.shape is None:
        return None
    static = static_shape(value)
    if static is not None and all(d >= 0 for d in static):
        return static
    return tuple(
        d if isinstance(d, int) and d >= 0 else dim_name(value, axis)
        for axis, d in enumerate(value.shape.dims)
    )


def _dtype_name(value: ir.Value) -> str:
    if value.dtype is None:
        return "float32"
    return str(value.dtype.numpy().name)
