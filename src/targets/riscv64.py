"""64-bit RISC-V through TVM: compiled and checked for structure, not run here."""

from __future__ import annotations

from .target import Hardware, Runtime, Target, Verified

RISCV64 = Target(
    name="riscv64",
    description="64-bit RISC-V (rv64gc) through TVM: compile and structural check only",
    hardware=Hardware(
        arch="riscv64",
        cores=4,
        frequency_ghz=1.5,
        vector_bits=64,
        memory_gb_per_s=4.0,
        macs_per_cycle={"float32": 1.0, "int8": 1.0},
    ),
    runtime=Runtime.TVM,
    verified=Verified.STRUCTURE,
    opset=28,
    tvm={"kind": "llvm", "cpu": "riscv64"},
)

TARGETS = (RISCV64,)
