"""What compressing weights can't fix in a model, with numbers and, where known, source lines.

Here: `advice`, from a model's kernels, their predicted times and its memory. Not here: the costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .features import Features
from .kernels import Kernel
from .latency import Latency, describe
from .text import format_bytes

DOMINATING = 0.25
"""One kernel is named from this share of the time on."""
NOTABLE = 0.10
"""The share of the time from which a kind of overhead is named."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """One finding. `kind` is a stable name, `share` 0 to 1 of the predicted time (or, for
    `activation-bound`, of all memory); `source` the user's line that has most of it, or ''."""

    kind: str
    text: str
    share: float
    source: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def advice(
    found: Sequence[Kernel],
    time: Latency,
    peak_bytes: int | None,
    stored_bytes: int,
    described: Sequence[Features | None] | None = None,
) -> tuple[Advice, ...]:
    """Findings, the largest share first. `stored_bytes`: of the file, `peak_bytes`: activations.

    `described` spares describing each kernel again.
    """
    listed = [*_memory(peak_bytes, stored_bytes)]
    total = time.ms
    if total and len(time.kernel_ms) == len(found):
        if described is None:
            described = [describe(kernel) for kernel in found]
        families = [item.family if item is not None else "" for item in described]
        rows = [
            (k, ms, family)
            for k, ms, family in zip(found, time.kernel_ms, families, strict=True)
            if ms
        ]
        timed = [(k, ms) for k, ms, _ in rows]
        listed += _dominating(timed, total)
        for kind, member, what, cure in _OVERHEADS:
            chosen = [(k, ms) for k, ms, family in rows if member(k, family)]
            listed += _overhead(chosen, total, kind, what, cure)
        listed += _small_kernels(timed, total)
    return tuple(sorted(listed, key=lambda item: -item.share))


def _memory(peak: int | None, stored: int) -> list[Advice]:
    if not peak or peak <= stored:
        return []
    share = peak / (peak + stored)
    return [
        Advice(
            "activation-bound",
            f"activations need {format_bytes(peak)} at their peak, weights {format_bytes(stored)}: "
            "compressing weights saves little memory; a smaller input or an earlier stride does",
            share,
        )
    ]


def _dominating(timed: Sequence[tuple[Kernel, float]], total: float) -> list[Advice]:
    if len(timed) < 2:
        return []
    kernel, ms = max(timed, key=lambda item: item[1])
    if ms < DOMINATING * total:
        return []
    share = ms / total
    where = _where(kernel)
    return [
        Advice(
            "dominating-kernel",
            f"{kernel.op} {where}takes {share:.0%} of the time: what is done elsewhere saves at "
            f"most {1 - share:.0%}",
            share,
            kernel.source_line,
        )
    ]


Member = Callable[[Kernel, str], bool]
"""Whether a kernel, of a family of features, is of a kind of overhead."""


def _is_conversion(kernel: Kernel, family: str) -> bool:
    return kernel.type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def _is_layout(kernel: Kernel, family: str) -> bool:
    return family.startswith("movement")


def _is_elementwise(kernel: Kernel, family: str) -> bool:
    return family.startswith(("elementwise", "normalization", "softmax"))


_OVERHEADS: tuple[tuple[str, Member, str, str], ...] = (
    (
        "conversions",
        _is_conversion,
        "quantizing and dequantizing between integer and float parts",
        "quantize the float operators between them too, or leave these parts in float",
    ),
    (
        "casts",
        lambda kernel, _: kernel.type == "Cast",
        "casts between number formats",
        "keep neighbours in one format",
    ),
    (
        "layout",
        _is_layout,
        "moving data (transposes, copies, layouts), which no compression of weights shortens",
        "keep one layout through the network; concatenate and slice less",
    ),
    (
        "elementwise",
        _is_elementwise,
        "elementwise operators, normalizations and softmax, whose cost is in activations",
        "fewer or cheaper activations; smaller feature maps",
    ),
)


def _overhead(
    chosen: Sequence[tuple[Kernel, float]], total: float, kind: str, what: str, cure: str
) -> list[Advice]:
    share = sum(ms for _, ms in chosen) / total
    if share < NOTABLE or (kind == "elementwise" and share < 2 * NOTABLE):
        return []
    worst, _ = max(chosen, key=lambda item: item[1])
    text = f"{share:.0%} of the time goes to {what} ({len(chosen)} kernels, most in {worst.op} "
    return [Advice(kind, f"{text}{_where(worst)}".rstrip() + f"): {cure}", share, _line(chosen))]


_SMALL_MS_OF_TOTAL = 1 / 500


def _small_kernels(timed: Sequence[tuple[Kernel, float]], total: float) -> list[Advice]:
    small = [(k, ms) for k, ms in timed if ms < _SMALL_MS_OF_TOTAL * total]
    share = sum(ms for _, ms in small) / total
    if share < 2 * NOTABLE:
        return []
    text = (
        f"{len(small)} kernels of less than 1/500 of the time each add up to {share:.0%}: "
        "launching them is what costs; fewer, larger layers are faster"
    )
    return [Advice("small-kernels", text, share, _line(small))]


def _line(chosen: Sequence[tuple[Kernel, float]]) -> str:
    by_line: dict[str, float] = {}
    for kernel, ms in chosen:
        if kernel.source_line:
            by_line[kernel.source_line] = by_line.get(kernel.source_line, 0.0) + ms
    return max(by_line, key=lambda line: by_line[line]) if by_line else ""


def _where(kernel: Kernel) -> str:
    shape = kernel.outputs[0].shape if kernel.outputs else None
    name = kernel.nodes[0].name if kernel.nodes else ""
    parts = [repr(name)] if name else []
    if shape is not None:
        parts.append("x".join(map(str, shape)))
    return f"({', '.join(parts)}) " if parts else ""
