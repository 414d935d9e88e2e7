"""The part of an array that stays: whole positions of outer axes, and as many inner ones of each.

Here: arithmetic on masks. Not here: where masks come from (`labels`, `remove`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def kept_sizes(mask: np.ndarray) -> list[int]:
    """What stays along each axis of a rectangle of kept positions."""
    sizes = [int(mask.any(axis=_but(mask, a)).sum()) for a in range(mask.ndim - 1)]
    per_row = mask.reshape(-1, mask.shape[-1]).sum(axis=1)
    return [*sizes, int(per_row.max())]


def _but(mask: np.ndarray, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(mask.ndim) if a != axis)


def take(array: np.ndarray, masks: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """The kept part of an array, given what stays along groups of axes (outer to inner).

    Axes that two masks share keep the same positions in both.
    """
    outer: dict[int, np.ndarray] = {}
    for axes, mask in masks.items():
        for place, axis in enumerate(axes[:-1]):
            stays = np.flatnonzero(mask.any(axis=_but(mask, place)))
            outer[axis] = np.intersect1d(outer[axis], stays) if axis in outer else stays
    for axis, stays in outer.items():
        array = array.take(stays, axis=axis)
    for axes, mask in masks.items():
        for place, axis in enumerate(axes[:-1]):
            mask = mask.take(outer[axis], axis=place)
        size = kept_sizes(mask)[-1]
        picked = np.argsort(~mask, axis=-1, kind="stable")[..., :size]
        index = picked.transpose(np.argsort(axes))
        missing = [a for a in range(array.ndim) if a not in axes]
        index = np.expand_dims(index, tuple(missing))
        full = [array.shape[a] if a not in axes else index.shape[a] for a in range(array.ndim)]
        array = np.take_along_axis(array, np.broadcast_to(index, full), axis=axes[-1])
    return array
