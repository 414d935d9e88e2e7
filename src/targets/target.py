"""The frozen description of a device: what it is, what it runs, and how it likes to be served.

Here: `Target` and the small dataclasses it is made of. Data for one device lives in its own module
(`arm64.py`, `x86_64.py`, ...); names are looked up in `registry`; whether a node runs in `support`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from ..errors import UsageError


class Runtime(enum.StrEnum):
    """What executes the compiled model."""

    ONNXRUNTIME = "onnxruntime"
    TVM = "tvm"


class Verified(enum.StrEnum):
    """How far edgepass itself can prove an artifact for the target on an ordinary x86-64 host."""

    NATIVE = "runs on an x86-64 host"
    EMULATED = "runs on the emulated machine"
    STRUCTURE = "compiled and checked for structure only"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Facts of one core complex. Units are in the names; zero means not known.

    `macs_per_cycle` gives peak multiply-accumulates per core and cycle by dtype name
    (`float32`, `float16`, `bfloat16`, `int8`).
    """

    arch: str
    cores: int = 1
    frequency_ghz: float = 0.0
    vector_bits: int = 128
    features: tuple[str, ...] = ()
    l1_kb: int = 32
    l2_kb: int = 0
    l3_kb: int = 0
    memory_gb_per_s: float = 0.0
    macs_per_cycle: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "macs_per_cycle", MappingProxyType(dict(self.macs_per_cycle)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """One way of 8-bit static quantization that the target executes in integers.

    `activation` and `weight` are the dtypes in the Q/DQ pairs; `per_channel` whether weights have
    a scale for each output channel; `session_options` what the runtime must be told;
    `min_conv_channels` from how many input channels on a convolution of floats over two axes or
    more is faster in integers than in float (0: from the first); `group_channels` up to how many
    input channels the groups of a convolution are joined before it runs in integers (0: never).
    """

    activation: ir.DataType = ir.DataType.UINT8
    weight: ir.DataType = ir.DataType.INT8
    per_channel: bool = True
    symmetric_activation: bool = False
    reduce_range: bool = False
    min_conv_channels: int = 0
    group_channels: int = 0
    session_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "session_options", MappingProxyType(dict(self.session_options)))

    def __str__(self) -> str:
        granularity = "per-channel" if self.per_channel else "per-tensor"
        return f"{self.activation.name}/{self.weight.name} {granularity}".lower()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSupport:
    """An operator the target runs on its fast path, and within what limits.

    `dtypes` are the element types of the first input (empty: any). `limits` is for people.
    """

    op_type: str
    domain: str = ""
    dtypes: frozenset[ir.DataType] = frozenset()
    limits: str = ""


@dataclasses.dataclass(frozen=True)
class Yes:
    """The target runs the node. `note` may say how."""

    note: str = ""

    def __bool__(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class No:
    """The target does not run the node, or not on its fast path, and why."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A device and the runtime that serves it.

    Variants derive with `replace`: `get_target("arm64").replace(name="my-board", cores=2)`.
    `ops` lists what runs on the fast path; None means "whatever the runtime has a kernel for".
    `quantization` is in order of preference. `fused_activations` are the activation operators the
    runtime folds into a preceding Conv or Gemm by itself. `opset` is the highest standard opset
    that the runtime takes. `sparse_patterns` are those of `sparsify` ("2:4", "block") whose zeros
    the runtime's kernels leave out: none of today's CPU kernels do.
    """

    name: str
    description: str
    hardware: Hardware
    runtime: Runtime = Runtime.ONNXRUNTIME
    verified: Verified = Verified.STRUCTURE
    opset: int = 21
    float_dtypes: tuple[ir.DataType, ...] = (ir.DataType.FLOAT,)
    ops: tuple[OpSupport, ...] | None = None
    quantization: tuple[QuantScheme, ...] = ()
    fused_activations: tuple[str, ...] = ()
    sparse_patterns: tuple[str, ...] = ()
    session_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tvm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    profile: str = ""

    def __post_init__(self) -> None:
        for field in ("session_options", "tvm"):
            object.__setattr__(self, field, MappingProxyType(dict(getattr(self, field))))

    def replace(self, **changes: Any) -> Target:
        """A variant: a field of the target, or of its hardware, by name.

        Raises:
            UsageError: a name that is a field of neither.
        """
        own = {field.name for field in dataclasses.fields(Target)}
        hardware = {field.name for field in dataclasses.fields(Hardware)}
        unknown = sorted(set(changes) - own - hardware)
        if unknown:
            raise UsageError(
                f"A target has no field {unknown[0]!r}",
                where=f"Target({self.name!r}).replace",
                fix=f"fields are: {', '.join(sorted(own | hardware))}",
            )
        parts = {key: changes.pop(key) for key in list(changes) if key in hardware - own}
        if parts:
            base = changes.get("hardware", self.hardware)
            changes["hardware"] = dataclasses.replace(base, **parts)
        return dataclasses.replace(self, **changes)

    @property
    def scheme(self) -> QuantScheme | None:
        """The preferred way of static int8, or None when integers do not run."""
        return self.quantization[0] if self.quantization else None
