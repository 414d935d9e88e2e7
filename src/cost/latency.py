"""Latency of one inference: by a profile where the target has one, else by an assumed roofline.

Here: `latency` and `Latency`. Predictions from a profile say *calibrated*; what nobody fitted to a
device says *assumed*, and is for comparing recipes on one target and for the order of magnitude.
Not here: which kernels there are (`kernels`), what a profile is (`profile`).

Assumed, a kernel takes as long as the slower of its arithmetic and its memory traffic (the roofline
of Williams, Waterman and Patterson, 2009), plus the cost of a launch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from ..ir.ops import Category
from ..targets.target import Hardware, Target
from .features import Features, features
from .kernels import DEPTHWISE, Kernel
from .operand import Operand
from .profile import Prediction, Profile
from .relative import RATIO_SPREAD, relative_ms
from .runtime_graph import Tensor

ASSUMED = "assumed"
CALIBRATED = "calibrated"
MEASURED = "measured"
SPREAD = 3.0
"""The interval of an assumed latency is from a third to three times the estimate."""

EFFICIENCY: Mapping[str, float] = MappingProxyType(
    {
        Category.CONVOLUTION.value: 0.6,
        Category.MATMUL.value: 0.6,
        Category.ATTENTION.value: 0.4,
        Category.RECURRENT.value: 0.3,
        DEPTHWISE: 0.2,
    }
)
"""The share of peak MACs a kind of kernel reaches. Textbook figures, not measurements."""
_OTHER_EFFICIENCY = 0.25
_BANDWIDTH_SHARE = 0.6  # of the nominal bandwidth, for one streaming kernel
_CACHE_SPEEDUP = 4.0  # last-level cache against memory
_LAUNCH_CYCLES = 5000.0  # of one kernel: dispatch, shape checks, allocation
_THREAD_SHARE = 0.8  # of another core's peak that one more thread adds
_FALLBACK = {"float16": "float32", "bfloat16": "float32", "float64": "float32", "int8": "float32"}


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference, batch and sizes as bound, and an 80 % interval around it.

    `ms` is None when the target's hardware is not described or a dimension has no size. `unknown`
    counts the kernels of unknown cost among `kernels`: they are not in the sum, so it is then a
    lower bound and the interval has no upper end (`high_ms` None). `label`: measured, calibrated or
    assumed. `novel`, `assumed`: shares of the time in kernels unlike any that the profile knows,
    and in classes that it lacks. `device`, `runtime`: what the profile was fitted on.
    `kernel_ms`: of each kernel; None where nothing is known.
    """

    ms: float | None
    low_ms: float | None
    high_ms: float | None
    label: str = ASSUMED
    kernels: int = 0
    unknown: int = 0
    reason: str = ""
    threads: int = 1
    profile: str = ""
    device: str = ""
    runtime: str = ""
    held_out: str = ""
    novel: float = 0.0
    assumed: float = 0.0
    kernel_ms: tuple[float | None, ...] = dataclasses.field(default=(), repr=False)

    @property
    def unknown_share(self) -> float:
        """The share of kernels of unknown cost, 0 to 1."""
        return self.unknown / self.kernels if self.kernels else 0.0

    def __str__(self) -> str:
        if self.ms is None:
            return f"? ({self.label})"
        if self.unknown:
            missing = f"{self.unknown} of {self.kernels} kernels unknown"
            return f">= {format_ms(self.low_ms)} ms ({self.label}, {missing})"
        low, high = format_ms(self.low_ms), format_ms(self.high_ms)
        return f"{format_ms(self.ms)} ms ({self.label}, {low} to {high})"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and the manifest; times of single kernels left out."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "kernel_ms"
        }


def latency(
    found: Sequence[Kernel],
    target: Target,
    threads: int = 1,
    profile: Profile | None = None,
    described: Sequence[Features | None] | None = None,
) -> Latency:
    """The sum over kernels on `threads` cores, by the profile, or assumed where there is none.

    Threads are no more than the target has, and the nearest that the profile was fitted for.
    `described` spares describing each kernel again.
    """
    if profile is not None:
        if described is None:
            described = [describe(kernel) for kernel in found]
        return _calibrated(found, described, target, threads, profile)
    unknown = sum(1 for kernel in found if not kernel.is_known)
    reason = _missing_facts(target.hardware)
    if reason:
        return Latency(None, None, None, ASSUMED, len(found), unknown, reason, threads)
    times = tuple(kernel_ms(kernel, target.hardware, threads) for kernel in found)
    total = sum(ms or 0.0 for ms in times)
    high = None if unknown else total * SPREAD
    return Latency(
        total,
        total / SPREAD,
        high,
        ASSUMED,
        len(found),
        unknown,
        threads=threads,
        assumed=1.0,
        kernel_ms=times,
    )


def _calibrated(
    found: Sequence[Kernel],
    described: Sequence[Features | None],
    target: Target,
    threads: int,
    profile: Profile,
) -> Latency:
    dtype = main_dtype(described)
    setting = profile.setting(threads)

    def roofline(kernel: Kernel) -> float | None:
        return kernel_ms(kernel, target.hardware, threads)

    def assumed(index: int) -> tuple[float, float] | None:
        ms = relative_ms(found[index], setting, describe, roofline)
        if ms is not None:
            return ms, RATIO_SPREAD
        ms = roofline(found[index])
        return None if ms is None else (ms, SPREAD)

    made: Prediction = profile.predict(described, threads, dtype=dtype, assumed=assumed)
    proof = setting.held_out.get(dtype) or setting.held_out.get("")
    fitted = made.assumed <= 0.5
    return Latency(
        made.ms,
        made.low_ms,
        None if made.unknown else made.high_ms,
        CALIBRATED if fitted else ASSUMED,
        len(found),
        made.unknown,
        threads=made.threads,
        profile=profile.name,
        device=profile.device,
        runtime=profile.runtime,
        held_out=str(proof) if proof is not None and fitted else "",
        novel=made.novel,
        assumed=made.assumed,
        kernel_ms=made.kernel_ms,
    )


def describe(kernel: Kernel) -> Features | None:
    """What a profile asks about a kernel; None when a size is not known."""
    if not kernel.is_known:
        return None
    inputs = [None if tensor is None else _operand(tensor) for tensor in kernel.inputs]
    outputs = [_operand(tensor) for tensor in kernel.outputs]
    known = [found for found in outputs if found is not None]
    if len(known) != len(outputs) or any(
        found is None and tensor is not None
        for found, tensor in zip(inputs, kernel.inputs, strict=True)
    ):
        return None
    return features(
        kernel.type, kernel.domain, inputs, known, kernel.attributes, float(kernel.macs or 0)
    )


def _operand(tensor: Tensor) -> Operand | None:
    if tensor.shape is None or tensor.dtype is None:
        return None
    return Operand(tensor.shape, _dtype_name(tensor.dtype), tensor.constant)


@functools.cache
def _dtype_name(dtype: ir.DataType) -> str:
    name = dtype.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def main_dtype(described: Sequence[Features | None]) -> str:
    """What most multiply-accumulates are done in; float32 where there are none."""
    macs: Counter[str] = Counter()
    for found in described:
        if found is not None:
            macs[found.dtype] += int(found.amounts.get("macs", 0.0))
    best = macs.most_common(1)
    return best[0][0] if best and best[0][1] else "float32"


def kernel_ms(kernel: Kernel, hardware: Hardware, threads: int = 1) -> float | None:
    """Assumed milliseconds of one kernel; None when its cost or the hardware is not known."""
    if kernel.macs is None or kernel.bytes_read is None or kernel.bytes_written is None:
        return None
    if _missing_facts(hardware):
        return None
    cores = min(max(1, threads), max(1, hardware.cores))
    speedup = 1.0 + _THREAD_SHARE * (cores - 1)
    cycles = 1e6 * hardware.frequency_ghz  # in a millisecond
    efficiency = EFFICIENCY.get(kernel.kind, _OTHER_EFFICIENCY)
    arithmetic = kernel.macs / (_macs_per_cycle(hardware, kernel.dtype) * efficiency)
    # Everything besides MACs: one vector operation a cycle at best.
    lanes = max(1.0, hardware.vector_bits / 32)
    arithmetic += max(0, kernel.flops - 2 * kernel.macs) / (lanes * _OTHER_EFFICIENCY)
    moved = kernel.bytes_read + kernel.bytes_written
    per_ms = 1e6 * hardware.memory_gb_per_s * _BANDWIDTH_SHARE
    if moved <= 1024 * max(hardware.l2_kb, hardware.l3_kb):
        per_ms *= _CACHE_SPEEDUP
    launch = _LAUNCH_CYCLES / cycles
    return max(arithmetic / (cycles * speedup), moved / per_ms) + launch


def format_ms(ms: float | None) -> str:
    """Three significant figures."""
    return "?" if ms is None else f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def _macs_per_cycle(hardware: Hardware, dtype: str) -> float:
    """Peak MACs a cycle; a dtype the hardware lists none for runs as float32."""
    rates = hardware.macs_per_cycle
    rate = rates.get(dtype) or rates.get(_FALLBACK.get(dtype, "float32"))
    return rate or 1.0


def _missing_facts(hardware: Hardware) -> str:
    missing = [
        name
        for name, value in (
            ("frequency_ghz", hardware.frequency_ghz),
            ("memory_gb_per_s", hardware.memory_gb_per_s),
            ("macs_per_cycle", hardware.macs_per_cycle),
        )
        if not value
    ]
    return f"the target does not say {', '.join(missing)}" if missing else ""
