"""Labels of every value of a graph: the state that the rules of operators read and write.

Here: `Flow`, and the table of rules. Not here: the rules (`rules`, `rules_movement`,
`rules_norms`, `rules_recurrent`), what is read off in the end (`groups`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import dims_of, is_onnx_op, node_name
from ...ir.shapes import ShapeReport
from .labels import Dim, Labels, Operand, Track, merge

_FOLLOWED_INTEGERS = ("INT8", "UINT8", "INT4", "UINT4", "BOOL")
_LAYOUT = ("Transpose", "Reshape", "Cast", "Identity", "DequantizeLinear", "Unsqueeze", "Squeeze")


@dataclasses.dataclass(frozen=True)
class Use:
    """How a node uses a parameter: `ids` are the labels along the axis that plays the role."""

    node: ir.Node
    weight: ir.Value
    role: str
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter whose axes are finer than its shape: groups of a convolution, gates of an LSTM.

    `tracks` are on the axes of `shape`; two of them may share outer axes.
    """

    shape: tuple[int, ...]
    tracks: tuple[Track, ...]


class Flow:
    """Tracks of all values met so far, and what was learnt of parameters."""

    def __init__(self, labels: Labels, shapes: ShapeReport, *, widths: bool) -> None:
        self.labels = labels
        self.shapes = shapes
        self.widths = widths
        self.tracks: dict[ir.Value, tuple[Track, ...]] = {}
        self.views: dict[ir.Value, View] = {}
        self.uses: list[Use] = []
        self._shown: set[ir.Value] = set()

    # --- values --------------------------------------------------------------------------------

    def of(self, value: ir.Value | None) -> tuple[Track, ...]:
        """The tracks of a value; those of a parameter are made when first asked for."""
        if value is None:
            return ()
        if value not in self.tracks:
            self.tracks[value] = self._parameter(value)
        return self.tracks[value]

    def put(self, value: ir.Value, tracks: Sequence[Track]) -> None:
        """Set the tracks of what a node computes. A unit that is alone stays, with all it is."""
        for track in tracks:
            if track.ids.size == 1:
                self.labels.block(track.ids, f"there is only one at {value.name!r}")
        self.tracks[value] = tuple(t for t in tracks if t.ids.size != 1)

    def at(self, value: ir.Value | None, axis: int) -> Track | None:
        """The track of a value that holds an axis."""
        return next((t for t in self.of(value) if axis in t.axes), None)

    def _parameter(self, value: ir.Value) -> tuple[Track, ...]:
        if not is_parameter(value):
            return ()
        dims = dims_of(value) or ()
        return tuple(
            Track((axis,), self.labels.new(dim))
            for axis, dim in enumerate(dims)
            if isinstance(dim, int) and dim > 1
        )

    def operand(self, value: ir.Value, rank: int, start: int | None = None) -> Operand:
        """A value against a result of that rank, its first axis at `start` (None: to the right)."""
        own = len(dims_of(value) or ())
        first = rank - own if start is None else start
        return self.placed(value, range(first, first + own), rank)

    def placed(self, value: ir.Value, places: Sequence[int], rank: int) -> Operand:
        """A value whose axes are at `places` among `rank` axes."""
        dims: tuple[Dim, ...] = dims_of(value) or ()
        to = dict(enumerate(places))
        back = {place: axis for axis, place in to.items()}
        full: list[Dim] = [1] * rank
        for axis, dim in enumerate(dims):
            full[to[axis]] = dim

        def adopt(track: Track) -> None:
            moved = track.moved(back)
            others = [t for t in self.of(value) if not set(t.axes) & set(moved.axes)]
            self.put(value, [*others, moved])

        fresh = is_parameter(value) and value not in self._shown
        self._shown.add(value)
        name = f"{value.name!r} {list(map(str, dims))}"
        tracks = tuple(t.moved(to) for t in self.of(value))
        return Operand(name, tuple(full), tracks, adopt if fresh else None)

    def merge(self, operands: Sequence[Operand], node: ir.Node) -> tuple[Track, ...]:
        """See `labels.merge`."""
        return merge(self.labels, operands, where_is(node))

    # --- what can't be followed ----------------------------------------------------------------

    def block(self, value: ir.Value | None, reason: str, wish: str = "") -> None:
        """Nothing of this value can go."""
        self.labels.block_tracks(self.of(value), reason, wish)

    def block_node(self, node: ir.Node, why: str = "") -> None:
        """Nothing of what the node reads can go, and what it computes is not followed."""
        reason = f"{where_is(node)}: {why or 'it is not known where channels go'}"
        for value in node.inputs:
            self.block(value, reason)
        for output in node.outputs:
            self.put(output, ())

    # --- parameters ----------------------------------------------------------------------------

    def use(self, node: ir.Node, value: ir.Value | None, role: str, ids: np.ndarray) -> None:
        """Note that `value`, or the parameter it is a layout of, plays a role at the node."""
        weight = base(value)
        if weight is not None:
            self.uses.append(Use(node, weight, role, ids.reshape(-1)))

    def view(self, value: ir.Value, shape: tuple[int, ...], tracks: Sequence[Track]) -> None:
        """Give a parameter a view; a second one must be of the same form."""
        known = self.views.get(value)
        if known is None and value not in self.tracks:
            self.views[value] = View(shape, tuple(tracks))
            self.tracks[value] = ()
            return
        alike = known is not None and known.shape == shape
        for i, track in enumerate(tracks):
            if alike and known is not None:
                self.labels.unite(track.ids, known.tracks[i].ids)
            else:
                self.labels.block(track.ids, f"{value.name!r} is used in two ways")
        self.block(value, f"{value.name!r} is used in two ways")


Rule = Callable[[Flow, ir.Node], None]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Makes a function the rule of these operators."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[domain, op_type] = function
        return function

    return register


def is_parameter(value: ir.Value) -> bool:
    """Whether positions of this initializer can be removed."""
    if not value.is_initializer() or value.is_graph_input() or value.dtype is None:
        return False
    return value.dtype.is_floating_point() or value.dtype.name in _FOLLOWED_INTEGERS


def base(value: ir.Value | None) -> ir.Value | None:
    """The parameter that a value is, or is another layout of."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or not is_onnx_op(node, *_LAYOUT):
            return None
        value = node.inputs[0]
    return value if value is not None and is_parameter(value) else None


def where_is(node: ir.Node) -> str:
    """A node in a reason: operator and name."""
    return f"{node.op_type} {node_name(node)!r}"
