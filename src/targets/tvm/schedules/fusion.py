"""Which elementwise nodes join a kernel, and how its epilogue reads their other operands.

A group grows from an anchor over its elementwise consumers and must leave through one value, the
last node's; so the kernel can be placed where that node was. Whether a kernel's coordinates can
address an operand is asked of a `Domain`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from .epilogue import OPERATIONS, UNSAFE_ON_PADDING, Access, Epilogue, Operand, Step
from .graph import Expr, FlatGraph, Node, static_type
from .views import contiguous_strides

# How far a group may grow: enough for any activation spelled out in primitives.
MAX_GROUP = 16


@dataclasses.dataclass(frozen=True)
class Located:
    """An operand's addressing, and whether it is wanted in the blocked layout.

    `rank` is that of the output it is broadcast to: a constant of shape [c, 1, 1] has its channels
    elsewhere in an output of rank 3 than in one of rank 4.
    """

    access: Access
    blocked: bool
    rank: int = 0


class Domain(Protocol):
    """The coordinates of a kernel's output."""

    @property
    def padded(self) -> bool:
        """Whether some lanes are padding, that hold no value of the tensor."""
        ...

    def locate(self, shape: tuple[int, ...], constant: bool) -> Located | None:
        """How to address a tensor of `shape`, broadcast to the output; None if it can't be."""
        ...


@dataclasses.dataclass(frozen=True)
class PlainDomain:
    """Coordinates are the output's axes. With `rows`, all but the last are one coordinate."""

    shape: tuple[int, ...]
    rows: bool = False
    padded: bool = False

    def locate(self, shape: tuple[int, ...], constant: bool) -> Located | None:
        if len(shape) > len(self.shape):
            return None
        aligned = (1,) * (len(self.shape) - len(shape)) + shape
        if any(have not in (1, want) for have, want in zip(aligned, self.shape, strict=True)):
            return None
        strides = tuple(
            0 if extent == 1 else stride
            for extent, stride in zip(aligned, contiguous_strides(aligned), strict=True)
        )
        vector = aligned[-1] != 1
        if self.rows:
            outer, wanted = aligned[:-1], self.shape[:-1]
            if outer == wanted:
                step = aligned[-1]
            elif all(extent == 1 for extent in outer):
                step = 0
            else:
                return None
            strides = (step, strides[-1])
        return Located(Access(shape, strides, vector), blocked=False)


def spatial_rank4(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A shape as (n, c, h, w), for a tensor that broadcasts to one of `rank` 3 or 4."""
    aligned = (1,) * (rank - len(shape)) + shape
    return aligned if rank == 4 else (*aligned[:2], 1, aligned[2])


@dataclasses.dataclass(frozen=True)
class BlockedDomain:
    """Coordinates are (n, channel block, row, column); `flat` counts all pixels as the column."""

    shape: tuple[int, ...]
    lanes: int
    flat: bool = False

    @property
    def padded(self) -> bool:
        """Whether there are lanes beyond the last channel."""
        return self.shape[1] % self.lanes != 0

    def locate(self, shape: tuple[int, ...], constant: bool) -> Located | None:
        if len(shape) > len(self.shape):
            return None
        n, c, h, w = spatial_rank4(shape, len(self.shape))
        full = spatial_rank4(self.shape, len(self.shape))
        if any(have not in (1, want) for have, want in zip((n, c, h, w), full, strict=True)):
            return None
        if self.flat and (h, w) not in ((1, 1), full[2:]):
            return None
        blocked = c > 1 or (full[1] == 1 and len(shape) == len(self.shape) and not constant)
        if blocked and not constant and len(shape) != len(self.shape):
            return None
        width = self.lanes if blocked else 1
        blocks = -(-c // self.lanes)
        strides = (
            0 if n == 1 else blocks * h * w * width,
            0 if blocks == 1 else h * w * width,
            0 if h == 1 or self.flat else w * width,
            0 if h * w == 1 or (w == 1 and not self.flat) else width,
        )
        storage = (n, blocks, h, w, self.lanes) if blocked else shape
        return Located(Access(storage, strides, blocked), blocked, len(self.shape))


@dataclasses.dataclass(frozen=True)
class Source:
    """An operand of an epilogue before it is materialized."""

    expr: Expr
    blocked: bool
    rank: int


@dataclasses.dataclass
class Group:
    """An anchor's epilogue. `result` is the value that leaves the group."""

    nodes: list[Node]
    result: Expr
    epilogue: Epilogue
    sources: list[Source]


class _Growth:
    def __init__(self, graph: FlatGraph, domain: Domain, scale: float) -> None:
        self.graph = graph
        self.domain = domain
        self.values: dict[Expr, int] = {}
        self.steps: list[Step] = []
        self.accesses: list[Access] = []
        self.sources: list[Source] = []
        if scale != 1.0:
            self.steps.append(Step("multiply", (0, scale)))

    def operand(self, expr: Expr) -> int | Operand | float | None:
        """The epilogue's input for an expression; None if the kernel can't read it."""
        if expr in self.values:
            return self.values[expr]
        value = self.graph.constant(expr)
        if value is not None and value.size == 1:
            return float(value.reshape(()))
        shape, dtype = static_type(expr)
        if shape is None or dtype != "float32":
            return None
        located = self.domain.locate(shape, value is not None)
        if located is None:
            return None
        self.sources.append(Source(expr, located.blocked, located.rank))
        self.accesses.append(located.access)
        return Operand(len(self.sources) - 1)

    def step(self, node: Node) -> bool:
        """Append the node's step; False (and nothing changed) if it does not fit."""
        held = len(self.sources)
        op = node.op
        inputs = [self.operand(expr) for expr in node.inputs]
        fits = all(item is not None for item in inputs)
        if fits and op in UNSAFE_ON_PADDING and self.domain.padded:
            # By a constant scalar it is safe: nothing is divided by a padding lane.
            fits = isinstance(inputs[1], float)
        if not fits:
            del self.sources[held:], self.accesses[held:]
            return False
        self.steps.append(Step(op, tuple(item for item in inputs if item is not None), node.params))
        self.values[node.var] = len(self.steps)
        return True


def grow(
    graph: FlatGraph,
    start: Expr,
    domain: Domain,
    shape: tuple[int, ...],
    claimed: set[Node],
    *,
    roots: tuple[Node, ...] = (),
    scale: float = 1.0,
) -> Group:
    """The largest group that leaves through one value.

    `start` is the anchor's result (or, for an elementwise kernel, the tensor it reads, with its
    first nodes in `roots`). `claimed` nodes belong to other groups.
    """
    growth = _Growth(graph, domain, scale)
    growth.values[start] = len(growth.steps)
    members: list[Node] = []
    best = 0
    sizes = [(len(growth.steps), 0)]
    frontier = list(roots) if roots else list(graph.users.get(start, ()))
    refused: set[Node] = set()
    while frontier and len(members) < MAX_GROUP:
        node = min(frontier, key=lambda item: item.index)
        frontier.remove(node)
        if node in members or node in refused or node in claimed:
            continue
        if node.op not in OPERATIONS or node.shape != shape or node.dtype != "float32":
            refused.add(node)
            continue
        if not growth.step(node):
            refused.add(node)
            continue
        members.append(node)
        sizes.append((len(growth.steps), len(growth.sources)))
        frontier += [user for user in graph.users.get(node.var, ()) if user not in members]
        if _leaves_once(graph, start, members, bool(roots)):
            best = len(members)
    steps, sources = sizes[best]
    chosen = members[:best]
    return Group(
        chosen,
        chosen[-1].var if chosen else start,
        Epilogue(tuple(growth.steps[:steps]), tuple(growth.accesses[:sources])),
        growth.sources[:sources],
    )


def _leaves_once(graph: FlatGraph, start: Expr, members: list[Node], start_exists: bool) -> bool:
    inside = set(members)
    if not start_exists and (
        start in graph.results or any(user not in inside for user in graph.users.get(start, ()))
    ):
        return False
    return not any(graph.escapes(node, inside) for node in members[:-1])
