"""What a CPU kernel generator has to know of a CPU, and the four machines described so far.

Only facts that change the generated code live here (vector width, register count, the LLVM target).
Tile sizes are derived from them in `tiling.py`; speed and memory sizes of real devices belong to
the target descriptors.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuSpec:
    """A CPU as the schedules see it.

    `vector_bits` is the width of a vector register in bits, `registers` how many there are,
    `threads` how many threads the outer loops may be shared among (1 emits no parallel loop).
    """

    triple: str
    mcpu: str = ""
    mattr: tuple[str, ...] = ()
    vector_bits: int
    registers: int
    has_vnni: bool = False
    has_dotprod: bool = False
    threads: int = 1

    @property
    def lanes(self) -> int:
        """How many float32 values a vector register holds."""
        return self.vector_bits // 32

    def tvm_target(self) -> Any:
        """The `tvm.target.Target` for this CPU. Imports tvm."""
        import tvm

        config: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple}
        if self.mcpu:
            config["mcpu"] = self.mcpu
        if self.mattr:
            config["mattr"] = list(self.mattr)
        return tvm.target.Target(config)


X86_64_AVX512 = CpuSpec(
    triple="x86_64-linux-gnu",
    mcpu="cascadelake",
    # Without this LLVM splits 512-bit vectors in two on server Xeons.
    mattr=("-prefer-256-bit",),
    vector_bits=512,
    registers=32,
    has_vnni=True,
)
X86_64_AVX2 = CpuSpec(triple="x86_64-linux-gnu", mcpu="haswell", vector_bits=256, registers=16)
ARM64_NEON_DOTPROD = CpuSpec(
    triple="aarch64-linux-gnu",
    mattr=("+neon", "+dotprod"),
    vector_bits=128,
    registers=32,
    has_dotprod=True,
)
RISCV64 = CpuSpec(
    triple="riscv64-linux-gnu",
    mattr=("+m", "+a", "+f", "+d", "+c"),
    vector_bits=128,
    registers=32,
)
