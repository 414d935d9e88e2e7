"""What stays of every value when labels go.

Here: `Kept`. Not here: what nodes make of it (`resize`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .constants import Known, channel_values
from .cut import kept_sizes
from .flow import Flow
from .labels import Track


class Kept:
    """What stays of every value; `known` are channels that are constants."""

    def __init__(self, flow: Flow, gone: np.ndarray, known: Known) -> None:
        self.flow = flow
        self.gone = gone
        self.known = known

    def lost(self, value: ir.Value, axis: int) -> np.ndarray | None:
        """The constants that go along an axis, in order; None where there are none but zeros."""
        track = self.flow.at(value, axis)
        values = channel_values(self.known, value, axis)
        if track is None or track.ids.ndim > 1 or values is None:
            return None
        constants = np.nan_to_num(values[self.gone[track.ids]], nan=0.0)
        return constants if constants.any() else None

    def changed(self, value: ir.Value | None) -> list[Track]:
        """The tracks of a value that lose positions."""
        if value is None:
            return []
        return [t for t in self.flow.tracks.get(value, ()) if self.gone[t.ids].any()]

    def sizes(self, value: ir.Value | None) -> dict[int, int]:
        """The new size of each axis that loses positions."""
        found: dict[int, int] = {}
        for track in self.changed(value):
            found |= dict(zip(track.axes, kept_sizes(~self.gone[track.ids]), strict=True))
        return found

    def positions(self, value: ir.Value | None, axis: int) -> np.ndarray | None:
        """A mask along an axis of what stays (of the first row that does), or None: all of it."""
        for track in self.changed(value):
            if axis in track.axes:
                stays = ~self.gone[track.ids]
                place = track.axes.index(axis)
                moved = np.moveaxis(stays, place, -1).reshape(-1, stays.shape[place])
                if place < stays.ndim - 1:
                    mask: np.ndarray = moved.any(axis=0)
                    return mask
                first: np.ndarray = moved[int(moved.any(axis=1).argmax())]
                return first
        return None
