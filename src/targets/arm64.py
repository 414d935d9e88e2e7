"""64-bit Arm, Cortex-A class with the dot-product instructions (Armv8.2 and later)."""

from __future__ import annotations

import onnx_ir as ir

from .target import Hardware, QuantScheme, Runtime, Target, Verified

# Without the option, ONNX Runtime leaves s8/s8 pairs unfused: measured 3.6x slower than u8/s8.
_S8S8 = QuantScheme(
    activation=ir.DataType.INT8,
    weight=ir.DataType.INT8,
    symmetric_activation=False,
    session_options={"session.qdqisint8allowed": "1"},
)
_U8S8 = QuantScheme(activation=ir.DataType.UINT8, weight=ir.DataType.INT8)

ARM64 = Target(
    name="arm64",
    description="64-bit Arm, Cortex-A class with dotprod, ONNX Runtime on the CPU",
    hardware=Hardware(
        arch="aarch64",
        cores=4,
        frequency_ghz=2.0,
        vector_bits=128,
        features=("neon", "dotprod", "fp16"),
        l1_kb=64,
        l2_kb=512,
        l3_kb=2048,
        memory_gb_per_s=8.0,
        # Cortex-A76: two 128-bit FMLA, two SDOT of 16 products each a cycle
        macs_per_cycle={"float32": 8.0, "float16": 16.0, "bfloat16": 8.0, "int8": 32.0},
    ),
    verified=Verified.EMULATED,
    opset=28,
    quantization=(_S8S8, _U8S8),
    fused_activations=("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"),
)

ARM64_TVM = ARM64.replace(
    name="arm64/tvm",
    description="64-bit Arm through TVM: one cross-compiled shared library",
    runtime=Runtime.TVM,
    tvm={"kind": "llvm", "cpu": "arm64"},
)

TARGETS = (ARM64, ARM64_TVM)
