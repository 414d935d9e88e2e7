"""Code for GPUs, as far as TVM's wheel generates it: compiled and checked for structure, not run.

Here: which code generators the wheel has, TVM's default GPU schedules, and the check that the
compiled module really holds kernels. Not here: CPU targets, and linking the host part.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from ...errors import LoweringError, MissingDependencyError
from .importer import USE_ONNX_RUNTIME

_KERNEL = {"cuda": re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)")}


def require_code_generator(kind: str) -> None:
    """Check that this build of TVM generates code for `kind` (`"cuda"`, `"vulkan"`).

    Raises:
        MissingDependencyError: it does not; the message says what was looked for.
    """
    import tvm_ffi

    if tvm_ffi.get_global_func(f"target.build.{kind}", allow_missing=True) is None:
        import tvm

        raise MissingDependencyError(
            f"This TVM cannot generate code for {kind}",
            where=f"apache-tvm {tvm.__version__}",
            why=f"its wheel was built without that code generator: `target.build.{kind}` "
            "is not registered",
            fix=f"build TVM with USE_{kind.upper()}=ON, or {USE_ONNX_RUNTIME}",
        )


def gpu_target(kind: str, arch: str, host_triple: str) -> Any:
    """The `tvm.target.Target` of a GPU with a CPU host."""
    import tvm

    host = {"kind": "llvm", "mtriple": host_triple}
    device: dict[str, Any] = {"kind": kind, "arch": arch} if kind == "cuda" else {"kind": kind}
    return tvm.target.Target(device, host=host)


def lower_gpu(module: Any, target: Any) -> Any:
    """Legalize, fuse, and give every kernel one of TVM's default GPU schedules (dlight)."""
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        dlight.ApplyDefaultSchedule(
            gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
        ),
    ]
    with target, contextlib.redirect_stdout(io.StringIO()):
        return tvm.transform.Sequential(passes)(module)


def check_gpu_module(module: Any, kind: str) -> str:
    """Check that a compiled module holds device kernels; returns a note of what was found.

    Raises:
        LoweringError: there is no device code, or no kernel in it.
    """
    kernels = gpu_kernels(module, kind)
    if not kernels:
        raise LoweringError(
            f"TVM made no {kind} kernels",
            why="the compiled module has no device code with a kernel in it",
            fix=USE_ONNX_RUNTIME,
        )
    return (
        f"{len(kernels)} {kind} kernels as source, compiled by the driver's NVRTC when loaded; "
        "checked for structure only, not run"
    )


def gpu_kernels(module: Any, kind: str) -> list[str]:
    """Names of the kernels in the device code of a compiled module."""
    pattern = _KERNEL[kind]
    return [
        name
        for part in _tree(module)
        if part.kind == kind
        for name in pattern.findall(part.inspect_source(kind))
        if not name.startswith("__")
    ]


def _tree(module: Any) -> Iterator[Any]:
    yield module
    for part in module.imports:
        yield from _tree(part)
