"""GPUs through TVM's vulkan code generator: compiled and checked for structure, not run here."""

from __future__ import annotations

from .cuda import CUDA

VULKAN = CUDA.replace(
    name="vulkan",
    description="GPU through TVM (vulkan): compile and structural check only",
    arch="vulkan",
    tvm={"kind": "vulkan"},
)

TARGETS = (VULKAN,)
