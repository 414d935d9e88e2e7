"""Attention and RotaryEmbedding, once heads or dimensions in them have gone.

Not here: what may go (`rules_attention`), other nodes (`resize`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import attribute, dims_of
from .kept import Kept
from .labels import Track


def _stays(kept: Kept, value: ir.Value | None, count: int) -> np.ndarray | None:
    """What stays, [heads, dimensions] (either may be 1 for all), or None where nothing changes."""
    for track in kept.changed(value):
        mask: np.ndarray = ~kept.gone[track.ids]
        if track.axes == (2,):
            return mask.reshape(count, -1) if count else None
        if set(track.axes) <= {1, 3}:
            return _by_head(track, mask)
    return None


def _by_head(track: Track, mask: np.ndarray) -> np.ndarray:
    missing = [i for i, a in enumerate((1, 3)) if a not in track.axes]
    return np.expand_dims(mask.transpose(np.argsort(track.axes)), tuple(missing))


def _attention(node: ir.Node, kept: Kept) -> None:
    """The scale stays that of the dimensions there were; heads are counted again."""
    query, key = node.inputs[0], node.inputs[1]
    dims = dims_of(query) or (None,)
    last = dims[-1]
    if "scale" not in node.attributes and isinstance(last, int):
        size = last if len(dims) == 4 else last // int(attribute(node, "q_num_heads", 1))
        Editor().set_attribute(node, "scale", 1.0 / math.sqrt(size))
    for value, name in ((query, "q_num_heads"), (key, "kv_num_heads")):
        _count_heads(node, name, _stays(kept, value, int(attribute(node, name, 0))))


def _count_heads(node: ir.Node, name: str, stays: np.ndarray | None) -> None:
    if int(attribute(node, name, 0)) and stays is not None and stays.shape[0] > 1:
        Editor().set_attribute(node, name, int(stays.any(axis=1).sum()))


def _rotary(node: ir.Node, kept: Kept) -> None:
    stays = _stays(kept, node.inputs[0], int(attribute(node, "num_heads", 0)))
    if stays is None:
        return
    turned = int(attribute(node, "rotary_embedding_dim", 0))
    if turned and stays.shape[1] > 1:
        first = stays[int(stays.any(axis=1).argmax())]
        Editor().set_attribute(node, "rotary_embedding_dim", int(first[:turned].sum()))
    _count_heads(node, "num_heads", stays)


ATTENTION: dict[str, Callable[[ir.Node, Kept], None]] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
}
