"""Patterns of zeros: which weights become zero, by scores of what they are worth.

Here: `Pattern` (unstructured, N:M, blocks), arrays in and masks out. Not here: scores
(`sparsify_data`), which axis of a weight holds what (`sparsify_weights`).
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

_N_OF_M = re.compile(r"(\d+):(\d+)$")
_BLOCK = re.compile(r"(\d+)x(\d+)$")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Where zeros may lie.

    `keep` of `run` neighbouring input channels stay (N:M) where `run` is not 0; else zeros come in
    blocks of `block` (output channels, input channels), 1 x 1 when unstructured.
    """

    keep: int = 0
    run: int = 0
    block: tuple[int, int] = (1, 1)

    @property
    def is_fixed(self) -> bool:
        """Whether the pattern itself says the share of zeros."""
        return self.run > 0

    @property
    def is_free(self) -> bool:
        """Whether any single weight may become zero."""
        return not self.run and self.block == (1, 1)

    def share(self, ratio: float) -> float:
        """The share of zeros."""
        return 1 - self.keep / self.run if self.run else ratio

    def zeros(self, scores: np.ndarray, out_axis: int, in_axis: int, ratio: float) -> np.ndarray:
        """A mask of the least scores that fits the pattern, in the shape of `scores` (0 or more).

        Of equal scores the first become zero. Without a fixed share the number of zeros (of blocks:
        of blocks) is exact up to rounding. At the ragged end of a channel N of what is left stay.
        """
        if self.run:
            return keep_of_run(scores, in_axis, self.keep, self.run)
        if self.is_free:
            count = round(ratio * scores.size)
            return smallest(scores.reshape(-1), count).reshape(scores.shape)
        return self._blocks(scores, out_axis, in_axis, ratio)

    def _blocks(self, scores: np.ndarray, out_axis: int, in_axis: int, ratio: float) -> np.ndarray:
        moved = np.moveaxis(scores, (out_axis, in_axis), (0, 1))
        height, width = self.block
        down, across = (-(-n // s) for n, s in zip(moved.shape, self.block, strict=False))
        padding = [(0, down * height - moved.shape[0]), (0, across * width - moved.shape[1])]
        padding += [(0, 0)] * (moved.ndim - 2)
        padded = np.pad(moved.astype(np.float64), padding, constant_values=np.nan)
        split = padded.reshape(down, height, across, width, *moved.shape[2:])
        # the mean, so that a block that is not full is judged like the others
        worth = np.nanmean(split, axis=(1, 3))
        found = smallest(worth.reshape(-1), round(ratio * worth.size)).reshape(worth.shape)
        spread = np.repeat(np.repeat(found, height, axis=0), width, axis=1)
        cut = spread[: moved.shape[0], : moved.shape[1]]
        return np.ascontiguousarray(np.moveaxis(cut, (0, 1), (out_axis, in_axis)))


def parse_pattern(text: str, block: str) -> Pattern | None:
    """The pattern of that name: unstructured, N:M or block; None where there is no such."""
    if text == "unstructured":
        return Pattern()
    if found := _N_OF_M.match(text):
        keep, run = int(found[1]), int(found[2])
        return Pattern(keep, run) if 0 < keep < run <= 64 else None
    if text == "block" and (found := _BLOCK.match(block)):
        height, width = int(found[1]), int(found[2])
        return Pattern(block=(height, width)) if height > 0 and width > 0 else None
    return None


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """A mask of the `count` smallest of flat scores; of equal ones, the first."""
    mask = np.zeros(scores.shape, bool)
    if count:
        mask[np.argsort(scores, kind="stable")[:count]] = True
    return mask


def keep_of_run(scores: np.ndarray, axis: int, keep: int, run: int) -> np.ndarray:
    """A mask of all but the `keep` greatest of every `run` neighbours along an axis."""
    moved = np.moveaxis(scores, axis, -1)
    size = moved.shape[-1]
    runs = -(-size // run)
    # what lies behind the end is the first to go
    padding = [(0, 0)] * (moved.ndim - 1) + [(0, runs * run - size)]
    padded = np.pad(moved.astype(np.float64), padding, constant_values=-1.0)
    split = padded.reshape(*moved.shape[:-1], runs, run)
    order = np.argsort(split, axis=-1, kind="stable")[..., : run - keep]
    mask = np.zeros(split.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    cut = mask.reshape(*moved.shape[:-1], runs * run)[..., :size]
    return np.ascontiguousarray(np.moveaxis(cut, -1, axis))
