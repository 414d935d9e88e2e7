"""GPUs through TVM's vulkan code generator: compiled and checked for structure, not run here."""

from __future__ import annotations

from .target import Hardware, Runtime, Target, Verified

VULKAN = Target(
    name="vulkan",
    description="GPU through TVM (vulkan): compile and structural check only",
    hardware=Hardware(
        arch="vulkan",
        vector_bits=1024,
        frequency_ghz=1.0,
        memory_gb_per_s=50.0,
        macs_per_cycle={"float32": 512.0, "float16": 1024.0},
    ),
    runtime=Runtime.TVM,
    verified=Verified.STRUCTURE,
    opset=28,
    tvm={"kind": "vulkan"},
)

TARGETS = (VULKAN,)
