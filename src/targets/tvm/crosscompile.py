"""The linker that turns LLVM's object files into a shared library, for the host or another CPU.

Here: finding a C compiler that can link for a triple, and the link itself with fixed flags.
Not here: generating code (`emit`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import LoweringError, MissingDependencyError

ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}
"""Architecture -> `e_machine` of an ELF header (System V ABI, and the psABI of each)."""

_GLIBC = "2.28"
# Oldest C library the zig-linked library needs: Debian 10, and what manylinux_2_28 wheels need.


@dataclasses.dataclass(frozen=True)
class Linker:
    """A command that links a shared library for one architecture."""

    command: tuple[str, ...]
    architecture: str
    name: str


def architecture_of(triple: str) -> str:
    """The first part of an LLVM triple, `aarch64` for `aarch64-linux-gnu`."""
    first = triple.split("-", 1)[0]
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(first, first)


def host_architecture() -> str:
    """The architecture this process runs on, spelled as in a triple."""
    return architecture_of(platform.machine().lower())


def find_linker(triple: str, *, prefer: str | None = None) -> Linker:
    """The compiler driver to link with: the host's own, Debian's cross gcc, or PyPI's ziglang.

    Args:
        triple: LLVM triple of the library.
        prefer: `"gcc"` or `"zig"` to consider only that one.

    Raises:
        MissingDependencyError: neither is installed; both ways to install one are named.
    """
    architecture = architecture_of(triple)
    if prefer != "zig":
        cross = shutil.which(f"{architecture}-linux-gnu-gcc")
        if cross is not None:
            return Linker((cross,), architecture, f"{architecture}-linux-gnu-gcc")
        if architecture == host_architecture():
            native = next((c for c in map(shutil.which, ("gcc", "clang", "cc")) if c), None)
            if native is not None:
                return Linker((native,), architecture, os.path.basename(native))
    if prefer != "gcc" and importlib.util.find_spec("ziglang") is not None:
        target = f"{architecture}-linux-gnu.{_GLIBC}"
        command = (sys.executable, "-m", "ziglang", "cc", "-target", target)
        return Linker(command, architecture, f"zig cc -target {target}")
    debian = {"aarch64": "aarch64", "riscv64": "riscv64", "x86_64": "x86-64"}.get(architecture)
    package = f"gcc-{debian}-linux-gnu" if architecture != host_architecture() else "gcc"
    raise MissingDependencyError(
        f"No compiler here can link a library for {architecture}",
        where=f"triple {triple!r}",
        why=f"neither {architecture}-linux-gnu-gcc nor the Python package ziglang was found",
        fix=f"apt-get install {package}, or pip install ziglang",
    )


def link(linker: Linker, objects: Sequence[Path], out: Path) -> None:
    """Link object files into the shared library `out`, the same bytes for the same objects.

    Raises:
        LoweringError: the linker failed; its own words are the reason.
    """
    flags = ["-shared", "-fPIC", "-Wl,--build-id=none", "-s"]
    # Run beside the objects, with relative names: absolute ones would end up in the library.
    folder = objects[0].parent
    names = [obj.name for obj in objects]
    command = [*linker.command, *flags, "-o", str(out.resolve()), *names, "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LoweringError(
            f"Linking the library for {linker.architecture} failed",
            where=linker.name,
            why=(done.stderr or done.stdout).strip()[-600:],
            fix="check that the compiler works on its own: " + " ".join(linker.command),
        )


def fcompile(linker: Linker, triple: str) -> Callable[..., None]:
    """`link` in the form TVM's `export_library` calls: `(output, objects, options)`."""

    def compile_library(output: str, objects: list[str], options: object = None) -> None:
        link(linker, [Path(name) for name in objects], Path(output))

    compile_library.get_target_triple = lambda: triple  # type: ignore[attr-defined]
    return compile_library


def elf_machine(path: Path) -> int | None:
    """The `e_machine` field of an ELF file, or None when the file is not ELF."""
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    order = "little" if header[5] == 1 else "big"
    return int.from_bytes(header[18:20], order)  # type: ignore[arg-type]
