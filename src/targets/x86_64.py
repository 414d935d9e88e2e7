"""x86-64 desktops and servers, AVX2 at least."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .target import Hardware, QuantScheme, Runtime, Target, Verified

# ONNX Runtime 1.32, one thread, AVX-512 VNNI: 3x3 over 3 channels 1.9x slower in integers, over 4
# channels 2.2x, over 8 1.35x; over three axes and one channel 10x. Groups of 2, 4 and 8 channels:
# 5.2x, 2.3x and 1.0x the time of float; joined to 32 channels 0.8x, 0.5x and 0.3x.
_U8S8 = QuantScheme(
    activation=ir.DataType.UINT8,
    weight=ir.DataType.INT8,
    min_conv_channels=8,
    group_channels=32,
)
# Without VNNI (Haswell to Skylake, Zen to Zen 3) ONNX Runtime 1.32 adds two products of 8 bits in
# 16 that saturate: 127 * 255 twice comes out as half. Seen on an emulated Haswell in products,
# one-row products and convolutions; not in depthwise ones, nor with u8 weights or s8 activations.
_U8S8_PAIRS = dataclasses.replace(_U8S8, reduce_range=True)

X86_64 = Target(
    name="x86_64",
    description="x86-64 with AVX2 or AVX-512 VNNI, ONNX Runtime on the CPU",
    hardware=Hardware(
        arch="x86_64",
        cores=4,
        frequency_ghz=3.0,
        vector_bits=256,
        features=("avx2", "fma"),
        l1_kb=32,
        l2_kb=1024,
        l3_kb=16384,
        memory_gb_per_s=20.0,
        # two 256-bit FMA ports: 2 * 8 lanes of float32; VPMADDUBSW chains give about 2x in int8
        macs_per_cycle={"float32": 16.0, "float16": 16.0, "bfloat16": 16.0, "int8": 32.0},
    ),
    verified=Verified.NATIVE,
    opset=28,
    quantization=(_U8S8_PAIRS,),
    fused_activations=("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"),
)

X86_64_TVM = X86_64.replace(
    name="x86_64/tvm",
    description="x86-64 through TVM: one shared library with the weights inside",
    quantization=(_U8S8,),
    runtime=Runtime.TVM,
    tvm={"kind": "llvm", "cpu": "x86_64"},
)

X86_64_AVX512 = X86_64.replace(
    name="x86_64-avx512",
    description="x86-64 with AVX-512 and VNNI, ONNX Runtime on the CPU",
    quantization=(_U8S8,),
    features=("avx2", "fma", "avx512", "vnni"),
    vector_bits=512,
    # one 512-bit FMA port at the least; VPDPBUSD does 64 products a cycle
    macs_per_cycle={"float32": 16.0, "float16": 16.0, "bfloat16": 16.0, "int8": 64.0},
)

X86_64_AVX512_TVM = X86_64_AVX512.replace(
    name="x86_64-avx512/tvm",
    description="x86-64 with AVX-512 through TVM: one shared library with the weights inside",
    runtime=Runtime.TVM,
    tvm={"kind": "llvm", "cpu": "x86_64-avx512"},
)

TARGETS = (X86_64, X86_64_TVM, X86_64_AVX512, X86_64_AVX512_TVM)
