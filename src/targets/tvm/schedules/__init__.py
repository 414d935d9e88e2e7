"""Deterministic CPU schedules for TVM: from a freshly imported Relax module to fast kernels.

TVM's default CPU pipeline schedules nothing. `schedule_module` replaces convolutions, matrix
products, poolings and row operators by kernels written for the CPU's vector width (`rules.py`) and
gives whatever is left vectorized loops (`generic.py`). Tile sizes are pure functions of shapes and
the `CpuSpec`; nothing is tuned, nothing is random. Code generation and linking are not here.
"""

from __future__ import annotations

from .pipeline import schedule_module
from .report import KernelRecord, ScheduleReport
from .spec import ARM64_NEON_DOTPROD, RISCV64, X86_64_AVX2, X86_64_AVX512, CpuSpec

__all__ = [
    "ARM64_NEON_DOTPROD",
    "RISCV64",
    "X86_64_AVX2",
    "X86_64_AVX512",
    "CpuSpec",
    "KernelRecord",
    "ScheduleReport",
    "schedule_module",
]
