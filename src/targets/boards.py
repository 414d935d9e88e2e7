"""Single devices with a fitted latency profile: boards, and a phone's chip.

Here: facts of each from its maker's documents. They derive from `ARM64`: ONNX Runtime makes the
same kernels on all of them, and differs in how fast. Not here: fitted numbers
(`devices/*.json`, which a target names as its `profile`), and what runtime those are of.

Peak MACs a cycle are of the cores' optimization guides: Cortex-A53, A55, A57, A72 and A73 complete
one 128-bit FMLA a cycle, A76 and A78 two. Without dot product instructions 8-bit products are
widened and added by pairs (SMULL, SMLAL, SADALP): 16 in three instructions, 5.3 a cycle where
float32 has 4. (On five such boards in ncnn's benchmark, eight networks take 0.65 to 0.91 of their
float32's time in 8 bits.) A55 has one SDOT a cycle, A76 and A78 two. float16 arithmetic came with
Armv8.2.
"""

from __future__ import annotations

from .arm64 import ARM64
from .target import Verified

_ARMV8_0 = {"float32": 4.0, "float16": 4.0, "bfloat16": 4.0, "int8": 16 / 3}
_LITTLE_ARMV8_2 = {"float32": 4.0, "float16": 8.0, "bfloat16": 4.0, "int8": 16.0}

_OLD = ARM64.replace(features=("neon",), l1_kb=32, l3_kb=0, macs_per_cycle=_ARMV8_0)

JETSON_NANO_CPU = _OLD.replace(
    name="jetson-nano-cpu",
    description="NVIDIA Jetson Nano, 4x Cortex-A57, ONNX Runtime on the CPU",
    cores=4,
    frequency_ghz=1.43,
    l2_kb=2048,
    memory_gb_per_s=25.6,
    profile="jetson-nano-cpu",
)

JETSON_NANO_GPU = ARM64.replace(
    name="jetson-nano-gpu",
    description="NVIDIA Jetson Nano, Maxwell GPU of 128 cores, ONNX Runtime's CUDA provider",
    # the architecture stays that of the CPU beside it: artifacts are the same, and so are kernels
    verified=Verified.STRUCTURE,
    cores=1,
    frequency_ghz=0.92,
    vector_bits=1024,
    features=("gpu", "fp16"),
    l1_kb=24,
    l2_kb=256,
    l3_kb=0,
    memory_gb_per_s=25.6,
    # 128 FMA a cycle, twice that in half2; no dp4a before Pascal's 6.1
    macs_per_cycle={"float32": 128.0, "float16": 256.0, "int8": 128.0},
    quantization=(),  # the provider has no convolutions or products of 8-bit integers
    profile="jetson-nano-gpu",
)

RASPBERRY_PI_3B_PLUS = _OLD.replace(
    name="raspberry-pi-3b-plus",
    description="Raspberry Pi 3 Model B+, BCM2837B0, 4x Cortex-A53",
    frequency_ghz=1.4,
    l2_kb=512,
    memory_gb_per_s=3.6,
    profile="raspberry-pi-3b-plus",
)

RASPBERRY_PI_ZERO_2_W = RASPBERRY_PI_3B_PLUS.replace(
    name="raspberry-pi-zero-2-w",
    description="Raspberry Pi Zero 2 W, BCM2710A1, 4x Cortex-A53",
    frequency_ghz=1.0,
    profile="raspberry-pi-zero-2-w",
)

RASPBERRY_PI_4 = _OLD.replace(
    name="raspberry-pi-4",
    description="Raspberry Pi 4 Model B, BCM2711, 4x Cortex-A72",
    frequency_ghz=1.8,
    l2_kb=1024,
    memory_gb_per_s=12.8,
    profile="raspberry-pi-4",
)

RK3399 = _OLD.replace(
    name="rk3399",
    description="Rockchip RK3399, its two Cortex-A72",
    cores=2,
    frequency_ghz=1.8,
    l2_kb=1024,
    memory_gb_per_s=12.8,
    profile="rk3399",
)

KHADAS_VIM3 = _OLD.replace(
    name="khadas-vim3",
    description="Khadas VIM3, Amlogic A311D, its four Cortex-A73",
    frequency_ghz=2.2,
    l2_kb=1024,
    memory_gb_per_s=12.8,
    profile="khadas-vim3",
)

ROCK_3A = ARM64.replace(
    name="rock-3a",
    description="Radxa ROCK 3A, Rockchip RK3568, 4x Cortex-A55",
    frequency_ghz=2.0,
    l1_kb=32,
    l2_kb=0,
    l3_kb=512,
    memory_gb_per_s=12.8,
    macs_per_cycle=_LITTLE_ARMV8_2,
    profile="rock-3a",
)

JETSON_ORIN_NANO = ARM64.replace(
    name="jetson-orin-nano",
    description="NVIDIA Jetson Orin Nano, 6x Cortex-A78AE, on the CPU",
    cores=6,
    frequency_ghz=1.5,
    l2_kb=256,
    l3_kb=4096,
    memory_gb_per_s=68.0,
    profile="jetson-orin-nano",
)

JETSON_AGX_ORIN = JETSON_ORIN_NANO.replace(
    name="jetson-agx-orin",
    description="NVIDIA Jetson AGX Orin, 12x Cortex-A78AE, on the CPU",
    cores=12,
    frequency_ghz=2.2,
    l3_kb=6144,
    memory_gb_per_s=204.8,
    profile="jetson-agx-orin",
)

SNAPDRAGON_855_PLUS = ARM64.replace(
    name="snapdragon-855-plus",
    description="Qualcomm Snapdragon 855+, its four Kryo 485 Gold (Cortex-A76)",
    frequency_ghz=2.96,
    l2_kb=512,
    l3_kb=2048,
    memory_gb_per_s=34.1,
    profile="snapdragon-855-plus",
)

TARGETS = (
    JETSON_NANO_CPU,
    JETSON_NANO_GPU,
    RASPBERRY_PI_3B_PLUS,
    RASPBERRY_PI_ZERO_2_W,
    RASPBERRY_PI_4,
    RK3399,
    KHADAS_VIM3,
    ROCK_3A,
    JETSON_ORIN_NANO,
    JETSON_AGX_ORIN,
    SNAPDRAGON_855_PLUS,
)
