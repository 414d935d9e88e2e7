"""Packing of constant weights into the order in which kernels read them (numpy, compile time)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .tiling import split_extent

Weights = npt.NDArray[np.float32]


def pack_columns(matrix: npt.NDArray[Any], lanes: int, vectors: int) -> Weights:
    """A [k, n] matrix as column tiles of `vectors * lanes`, each [k][width] and contiguous.

    The columns are padded with zeros to a multiple of `lanes`; the last tile is narrower where
    `vectors` does not divide their number. Returns one dimension.
    """
    depth, columns = matrix.shape
    blocks = -(-columns // lanes)
    padded = np.zeros((depth, blocks * lanes), np.float32)
    padded[:, :columns] = matrix
    parts = []
    start = 0
    for size, count in split_extent(blocks, vectors):
        for _ in range(count):
            parts.append(padded[:, start * lanes : (start + size) * lanes].ravel())
            start += size
    return np.concatenate(parts)


def pack_conv(
    weight: npt.NDArray[Any], *, lanes: int, vectors: int, groups: int, blocked_input: bool
) -> Weights:
    """OIHW weights for the convolution kernels, one dimension.

    For each group, column tiles over output channels as `pack_columns` makes them, with the
    reduction in the order (channel block, kh, kw, lane) for a blocked input and (channel, kh, kw)
    for a plain one.
    """
    out_channels, in_channels, kh, kw = weight.shape
    per_group = out_channels // groups
    parts = []
    for group in range(groups):
        part = weight[group * per_group : (group + 1) * per_group]
        if blocked_input:
            blocks = -(-in_channels // lanes)
            padded = np.zeros((per_group, blocks * lanes, kh, kw), np.float32)
            padded[:, :in_channels] = part
            ordered = padded.reshape(per_group, blocks, lanes, kh, kw).transpose(1, 3, 4, 2, 0)
        else:
            ordered = part.transpose(1, 2, 3, 0)
        parts.append(pack_columns(ordered.reshape(-1, per_group), lanes, vectors))
    return np.concatenate(parts)


def block_channels(array: npt.NDArray[Any], lanes: int, axis: int) -> Weights:
    """[.., C, ..] to [.., ceil(C / lanes), .., lanes]: `axis` in blocks, padded with zeros."""
    channels = array.shape[axis]
    blocks = -(-channels // lanes)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, blocks * lanes - channels)
    padded = np.pad(array.astype(np.float32, copy=False), widths)
    shape = (*array.shape[:axis], blocks, lanes, *array.shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(padded.reshape(shape), axis + 1, -1))
