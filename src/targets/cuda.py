"""GPUs through TVM's cuda code generator: compiled and checked for structure, not run here."""

from __future__ import annotations

from .target import Hardware, Runtime, Target, Verified

CUDA = Target(
    name="cuda",
    description="GPU through TVM (cuda): compile and structural check only",
    hardware=Hardware(
        arch="cuda",
        vector_bits=1024,
        frequency_ghz=1.0,
        memory_gb_per_s=50.0,
        macs_per_cycle={"float32": 512.0, "float16": 1024.0},
    ),
    runtime=Runtime.TVM,
    verified=Verified.STRUCTURE,
    opset=28,
    tvm={"kind": "cuda"},
)

TARGETS = (CUDA,)
