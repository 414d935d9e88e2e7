"""Dependency groups: which slices of which weights can only be removed together.

Here: `Group` and its parts, and `find_groups`, which reads them off a graph. Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, is the idea; here positions of
tensors carry labels that the operators unite (`labels`, `rules`), so that channels are followed
through any layout. Not here: what is unimportant (`importance`), removing it (`remove`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter that a group's units run through.

    `weight` is the initializer, `node` the operator that reads it. `role` is "out" where the units
    are what the node computes, "in" where they are what it sums over, "norm" for scale, shift and
    statistics of a normalization, "bias", "table" for embeddings, "state" for the recurrent
    weights of an LSTM or GRU, and "other" for operands of elementwise operators.

    `units` says for each position along that axis of the weight (for "in": of the node's input
    channels; for "out": of its output channels, in the order in which they leave it) which unit
    of the group it belongs to, -1 where it is of another group.
    """

    node: ir.Node
    weight: ir.Value
    role: str
    units: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Units of one kind: each is a channel, a head, a dimension of a head or a hidden unit.

    `name` is that of the first node that computes them. `size` counts units. `rows` gives each
    unit's row: as many units must stay in one row as in every other row of the groups of the same
    `cluster` (groups of a convolution, heads of an attention); one row where units are free.
    `multiple` is how many channels one unit is (2 for rotary pairs, the factor for grouped queries).
    `parameters` is how many weights one unit holds, consumers' included. `blocked` says why it
    can't be pruned, or is empty.
    """

    name: str
    kind: str
    size: int
    rows: np.ndarray
    cluster: int
    sites: tuple[Site, ...]
    multiple: int = 1
    parameters: int = 0
    blocked: str = ""

    @property
    def producers(self) -> tuple[Site, ...]:
        """Where the units are computed."""
        return tuple(site for site in self.sites if site.role in ("out", "table", "state"))

    @property
    def consumers(self) -> tuple[Site, ...]:
        """Where they are summed over: the layers whose weights can make up for a loss."""
        return tuple(site for site in self.sites if site.role == "in")
