"""Widths and ranks that a target's vectors like.

Here: `preferred_multiple` and rounding to it. Not here: which widths are chosen (`select`,
`low_rank_choice`).
"""

from __future__ import annotations

from ...targets.target import Runtime, Target

_LARGEST = 16
_SMALLEST = 4


def preferred_multiple(target: Target | None) -> int:
    """The number of which channel counts, feature sizes and ranks should be multiples.

    What a vector register holds of float32: 16 with 512 bits, 8 with 256, 4 with 128 or fewer, 16
    at most. ONNX Runtime lays the channels of float convolutions on x86-64 out in blocks of the
    same size (MLAS, NCHWc), and pads what does not fill one; its products of matrices
    take 16 columns at a time on AVX-512, on arm64 4 and 8. Without a target: 8.
    """
    if target is None:
        return 8
    lanes = target.hardware.vector_bits // 32
    multiple = max(_SMALLEST, min(_LARGEST, lanes))
    if target.runtime is Runtime.ONNXRUNTIME and target.hardware.arch == "aarch64":
        return max(8, multiple)
    return multiple


def round_width(width: float, multiple: int, limit: int) -> int:
    """The multiple nearest to `width`, from `multiple` up to `limit` (itself where less fits)."""
    nearest = round(width / multiple) * multiple
    return min(max(nearest, multiple), limit)
