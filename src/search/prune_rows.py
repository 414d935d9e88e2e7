"""One group of a pruning scan, prunable or blocked, as plain data.

Here: `GroupRow` and `BlockedRow`. Not here: how the numbers come about (`prune_job`), all of them
together (`prune_scan`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

OUTPUTS, WEIGHTS = "outputs", "weights"


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """One group, or several that can only be pruned together, pruned alone.

    `units` are channels, heads or features, in `rows` that must stay equally long; `also` names
    what goes with them. `parameters`, `macs`: the share of the model's that reads or computes these
    units. `removed` of them go at the scan's ratio, and with them so many parameters, MACs and
    predicted milliseconds. `error`: power of the outputs' error over the signal's, or, by weights,
    the share of their energy. `order`: the suggested one, from 1.
    """

    name: str
    kind: str
    units: int
    rows: int
    also: tuple[str, ...]
    parameters: float
    macs: float | None
    removed: int
    fewer_parameters: int
    fewer_macs: int | None
    gained_ms: float | None
    error: float | None
    order: int = 0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to error; infinite where there is no error."""
        if self.error is None:
            return None
        if self.error <= 0:
            return math.inf
        return -math.inf if math.isinf(self.error) else -10 * math.log10(self.error)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain.pop("error")
        return plain | {"also": list(self.also), "sqnr_db": self.sqnr_db}


@dataclasses.dataclass(frozen=True)
class BlockedRow:
    """A group that can't be pruned, and why; `wish` names the option that would allow it."""

    name: str
    kind: str
    units: int
    parameters: float
    reason: str
    wish: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)
