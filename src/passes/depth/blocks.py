"""Residual blocks: branches that can be taken out of a sum, with what they read and who reads it.

Here: `find_blocks`, which reads them off any graph, and `Block`. Not here: which of them matter
(`depth_harm`), taking them out (`depth_removal`), the pass (`depth`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from ...ir.dims import same
from ...ir.graph import (
    constant_tensor,
    dims_of,
    graph_tree,
    is_onnx_op,
    module_path,
    node_name,
    node_subgraphs,
)
from ...ir.ops import Category, facts, graph_macs
from ...ir.sizing import is_dynamic, static_twin

ATTENTION, CONVOLUTION, RECURRENT = "attention", "convolution", "recurrent"
PRODUCT, POOLING = "product", "pooling"
_SUMS = ("Add", "Sum")
_PASSING = (
    "Identity",
    "Cast",
    "Dropout",
    "Transpose",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
)
_SCALING = ("Mul", "Div")
_WORKING = (
    *(Category.CONVOLUTION, Category.MATMUL, Category.RECURRENT, Category.ATTENTION),
    Category.POOLING,
)
_MAX_ENTRIES = 8
_NO_WORK = "nothing is multiplied in it"
_LARGEST = 0.5
"""The largest share of a model's multiply-accumulates that is still a block, not the model."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A branch f of a sum x + f(x), which stays sound without it.

    `add` is the sum, `branch` its operand f(x), `entry` the value x. `nodes` are those that nothing
    needs without the branch, in graph order. `kind` is "attention" where activations are multiplied
    by activations, else "convolution", "recurrent", "product" or "pooling". `name` is the module
    path of its source where that is known. `macs` counts multiply-accumulates (None: not known),
    `parameters` weights. `layer` numbers the runs of blocks that belong together: an attention and
    the products that follow it.
    """

    name: str
    kind: str
    add: ir.Node
    branch: ir.Value
    entry: ir.Value
    nodes: tuple[ir.Node, ...]
    macs: int | None = None
    parameters: int = 0
    layer: int = 0

    @property
    def result(self) -> ir.Value:
        """x + f(x)."""
        return self.add.outputs[0]


@dataclasses.dataclass(frozen=True)
class Refused:
    """A sum that looks like a residual block and is none; `why` names what is in the way."""

    node: str
    why: str


@dataclasses.dataclass(frozen=True)
class Found:
    """The blocks of a graph, in its order, and sums that were refused.

    `macs` are those of the whole model, `costs` those of each node; None: not known.
    """

    blocks: tuple[Block, ...]
    refused: tuple[Refused, ...] = ()
    macs: int | None = None
    costs: Mapping[ir.Node, int] | None = dataclasses.field(default=None, repr=False)

    def saved(self, blocks: Iterable[Block]) -> int | None:
        """Multiply-accumulates that go with some blocks; what lies in two of them counts once."""
        if self.costs is None:
            return None
        return sum(self.costs[node] for node in {n for block in blocks for n in block.nodes})

    @property
    def reach(self) -> int | None:
        """Multiply-accumulates that lie in at least one block."""
        return self.saved(self.blocks)

    @property
    def share(self) -> float | None:
        """The share of the model's multiply-accumulates that lies in blocks."""
        if self.reach is None or not self.macs:
            return None
        return self.reach / self.macs


def find_blocks(model: ir.Model, dims: Mapping[str, int] | None = None) -> Found:
    """The residual blocks of the main graph.

    A sum's operand f is a block's branch where another operand x feeds it and

    - f has the shape of the sum, and so has what is left of the sum without it;
    - what f is computed from depends on the rest of the graph through x, constants, and values that
      do not depend on x (masks, rotary tables);
    - what lies between x and f is used for nothing else, but for a norm or an activation of x that
      branches side by side read;
    - it multiplies or pools something: sums within an activation function are no blocks.

    x may be moved, cast or scaled by a constant on its way to the sum, and may be one term of a
    longer sum. The search for one sum is bounded by what lies between x and the sum. Blocks may
    lie within others. Shapes only: weights may be absent. `dims` are sizes of symbolic dimensions.
    """
    search = _Search(model)
    blocks, refused = search.run()
    counts = _macs_of(model, dims)
    total = None if counts is None else sum(counts.values())
    kept = []
    for block in blocks:
        macs = None if counts is None else sum(counts[node] for node in block.nodes)
        if macs is not None and total and macs > _LARGEST * total:
            why = f"{macs / total:.0%} of the model's multiply-accumulates are in it"
            refused.append(Refused(node_name(block.add), why))
            continue
        kept.append(dataclasses.replace(block, macs=macs))
    return Found(tuple(_in_layers(kept)), tuple(refused), total, counts)


def _macs_of(model: ir.Model, dims: Mapping[str, int] | None) -> dict[ir.Node, int] | None:
    """Multiply-accumulates of each node of the main graph; None where some are not known."""
    found = _counted(model.graph, model.graph, dims, model)
    if found is None and dims and is_dynamic(model):
        twin = static_twin(model, dims)
        found = _counted(model.graph, twin.graph, dims, twin)
    return found


def _counted(
    graph: ir.Graph, priced: ir.Graph, dims: Mapping[str, int] | None, model: ir.Model
) -> dict[ir.Node, int] | None:
    found = {}
    for node, like in zip(graph, priced, strict=True):
        macs = graph_macs((like,), dims, model.functions)
        if macs is None:
            return None
        found[node] = macs
    return found


class _Search:
    """One walk over a graph's sums. Positions are those of the graph's order, a topological one."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph)
        self.position = {node: i for i, node in enumerate(self.nodes)}

    def run(self) -> tuple[list[Block], list[Refused]]:
        blocks: list[Block] = []
        refused: list[Refused] = []
        for node in self.nodes:
            if not is_onnx_op(node, *_SUMS) or len(node.inputs) < 2:
                continue
            for slot in range(len(node.inputs)):
                found = self._block(node, slot)
                if isinstance(found, Block):
                    blocks.append(found)
                elif found:
                    refused.append(Refused(node_name(node), found))
        return blocks, refused

    def _block(self, add: ir.Node, slot: int) -> Block | str | None:
        """The block that ends in an operand of a sum, why there is none, or None: no residual."""
        branch = add.inputs[slot]
        at = self._position(branch)
        if branch is None or at is None or at < 0:
            return None
        reason = None
        for entry in self._entries(add, slot):
            start = self._position(entry)
            if start is None or start >= at:
                continue
            found = self._between(add, branch, entry, start)
            if isinstance(found, Block):
                return found
            if found == _NO_WORK:
                return None
            reason = reason or found
        return reason

    # --- what x may be ---------------------------------------------------------------------------

    def _entries(self, add: ir.Node, slot: int) -> Iterator[ir.Value]:
        """Values that reach the sum as they are: its other operands, and what they are made of."""
        dims = dims_of(add.outputs[0])
        others = [v for i, v in enumerate(add.inputs) if i != slot and v is not None]
        if not any(_same_shape(v, add.outputs[0]) for v in others):
            return
        top = add
        for _ in range(3):  # a sum of sums: the terms beside this one
            users = top.outputs[0].uses()
            if len(users) != 1 or top.outputs[0].is_graph_output():
                break
            above, index = next(iter(users))
            if not is_onnx_op(above, *_SUMS) or above not in self.position:
                break
            if not _equal_dims(dims_of(above.outputs[0]), dims):
                break
            others += [v for i, v in enumerate(above.inputs) if i != index and v is not None]
            top = above
        seen: set[ir.Value] = set()
        queue = others
        while queue and len(seen) < _MAX_ENTRIES:
            value = queue.pop(0)
            if value in seen or constant_tensor(value) is not None:
                continue
            seen.add(value)
            yield value
            queue += _passed_on(value)

    # --- what lies between x and the sum ---------------------------------------------------------

    def _between(
        self, add: ir.Node, branch: ir.Value, entry: ir.Value, start: int
    ) -> Block | str | None:
        inside = self._only_for(branch, start)
        if not inside:
            return self._why_shared(branch, entry, start)
        ordered = sorted(inside, key=self.position.__getitem__)
        reached = {entry}
        independent: set[ir.Value] = set()
        working = []
        for node in ordered:
            inputs = set(_read(node))
            for value in inputs - reached:
                at = self._position(value)
                if at is None or at <= start or value.producer() in inside:
                    continue
                if not self._depends(value, entry, start, independent):
                    continue
                if self._works(value, entry, start):
                    return f"{value.name!r} lies within the branch and is used elsewhere"
                reached.add(value)  # a norm of x that two branches read
            if not inputs.isdisjoint(reached):
                reached.update(node.outputs)
                if _is_working(node):
                    working.append(node)
        if branch not in reached:
            return None
        if not working:
            return _NO_WORK
        if branch.dtype != add.outputs[0].dtype:
            return "the sum has another element type"
        kind = _kind(working, reached)
        name = _name(add, ordered, working)
        return Block(name, kind, add, branch, entry, tuple(ordered), None, _parameters(inside))

    def _only_for(self, branch: ir.Value, start: int) -> set[ir.Node]:
        """Nodes behind `start` that nothing needs but the one use of this value."""
        inside: set[ir.Node] = set()
        seen: dict[ir.Node, int] = {}
        first = self._unneeded(branch, seen, start)
        stack = [] if first is None else [first]
        while stack:
            node = stack.pop()
            inside.add(node)
            for value in _read(node):
                found = self._unneeded(value, seen, start)
                if found is not None:
                    stack.append(found)
        return inside

    def _unneeded(self, value: ir.Value, seen: dict[ir.Node, int], start: int) -> ir.Node | None:
        """The producer of a value, when this was the last use of anything it makes."""
        producer = value.producer()
        at = None if producer is None else self.position.get(producer)
        if producer is None or at is None or at <= start:
            return None
        seen[producer] = seen.get(producer, 0) + 1
        if any(v.is_graph_output() for v in producer.outputs):
            return None
        total = sum(len(v.uses()) for v in producer.outputs)
        return producer if seen[producer] == total else None

    def _depends(
        self, value: ir.Value, entry: ir.Value, start: int, independent: set[ir.Value]
    ) -> bool:
        """Whether a value is computed from `entry`; those found not to be are remembered."""
        stack, visited = [value], {value}
        while stack:
            found = stack.pop()
            if found is entry:
                return True
            if found in independent:
                continue
            producer = found.producer()
            at = None if producer is None else self.position.get(producer)
            if producer is None or at is None or at <= start:
                continue
            new = [v for v in _read(producer) if v not in visited]
            visited.update(new)
            stack += new
        independent |= visited
        return False

    def _works(self, value: ir.Value, entry: ir.Value, start: int) -> bool:
        """Whether anything is multiplied or pooled on the way from `entry` to a value."""
        stack, visited = [value], {value, entry}
        while stack:
            producer = stack.pop().producer()
            at = None if producer is None else self.position.get(producer)
            if producer is None or at is None or at <= start:
                continue
            if _is_working(producer):
                return True
            new = [v for v in _read(producer) if v not in visited]
            visited.update(new)
            stack += new
        return False

    def _why_shared(self, branch: ir.Value, entry: ir.Value, start: int) -> str | None:
        if not self._depends(branch, entry, start, set()):
            return None
        return f"{branch.name!r} is used elsewhere, not only by the sum"

    def _position(self, value: ir.Value | None) -> int | None:
        """That of what makes a value; -1 for a graph input, None for what is of another graph."""
        if value is None:
            return None
        producer = value.producer()
        if producer is None:
            return -1
        return self.position.get(producer)


def _is_working(node: ir.Node) -> bool:
    return facts(node).category in _WORKING or any(True for _ in node_subgraphs(node))


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its subgraphs included, a value for each use."""
    yield from (v for v in node.inputs if v is not None)
    for body in node_subgraphs(node):
        for graph in graph_tree(body):
            for inner in graph:
                yield from (v for v in inner.inputs if v is not None)


def _passed_on(value: ir.Value) -> list[ir.Value]:
    """What a value is but for place, type and a constant factor; the terms of a sum."""
    node = value.producer()
    if node is None:
        return []
    if is_onnx_op(node, *_PASSING):
        return [v for v in node.inputs[:1] if v is not None]
    operands = [v for v in node.inputs if v is not None]
    if is_onnx_op(node, *_SCALING):
        moving = [v for v in operands if constant_tensor(v) is None]
        scaled = len(moving) == 1 and (node.op_type == "Mul" or moving[0] is node.inputs[0])
        return moving if scaled else []
    if is_onnx_op(node, *_SUMS):
        return [v for v in operands if _same_shape(v, value)]
    return []


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    return _equal_dims(dims_of(a), dims_of(b))


def _equal_dims(
    a: Sequence[int | ir.SymbolicDim] | None, b: Sequence[int | ir.SymbolicDim] | None
) -> bool:
    if a is None or b is None or len(a) != len(b):
        return False
    return all(same(x, y) is True for x, y in zip(a, b, strict=True))


# --- what a block is called ----------------------------------------------------------------------


def _kind(working: Iterable[ir.Node], reached: set[ir.Value]) -> str:
    kinds = set()
    for node in working:
        category = facts(node).category
        if category is Category.ATTENTION:
            return ATTENTION
        if category is Category.MATMUL and sum(v in reached for v in node.inputs) > 1:
            return ATTENTION
        kinds.add(category)
    if Category.CONVOLUTION in kinds:
        return CONVOLUTION
    if Category.RECURRENT in kinds:
        return RECURRENT
    return POOLING if kinds == {Category.POOLING} else PRODUCT


def _name(add: ir.Node, nodes: Sequence[ir.Node], working: Sequence[ir.Node]) -> str:
    """The module path that the branch's operators share, else what their names do."""
    paths = [path for node in working if (path := module_path(node))]
    if paths and (shared := _shared_prefix([path.split(".") for path in paths])):
        return ".".join(shared)
    names = [node.name.split("/") for node in working if node.name and "/" in node.name]
    if names and any(shared := _shared_prefix(names)):
        return "/".join(shared)
    return node_name(add)


def _shared_prefix(parts: Sequence[Sequence[str]]) -> list[str]:
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


def _parameters(nodes: Iterable[ir.Node]) -> int:
    """Elements of the initializers that only these nodes read."""
    nodes = set(nodes)
    held = {v for node in nodes for v in node.inputs if v is not None and v.is_initializer()}
    own = (v for v in held if all(user in nodes for user, _ in v.uses()))
    return sum(v.const_value.size for v in own if v.const_value is not None)


def _in_layers(blocks: Sequence[Block]) -> list[Block]:
    """Blocks with the number of their layer: a new one begins where an attention follows something
    else, and at every block of a model without attention."""
    number, found = 0, []
    attentive = any(block.kind == ATTENTION for block in blocks)
    for i, block in enumerate(blocks):
        mixing = block.kind == ATTENTION
        if i and (not attentive or (mixing and blocks[i - 1].kind != ATTENTION)):
            number += 1
        found.append(dataclasses.replace(block, layer=number))
    return found
