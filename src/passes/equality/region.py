"""What a rewrite replaced and by what, as two standalone models with the same inputs and outputs.

Here: the record of the nodes around a match before its rule changes them, and the two regions cut
out afterwards. Not here: deciding whether they are equal (`certificate`).

A rule may look further than its pattern, and what it builds may start further up than what it
matched. So the region before is grown upwards until both regions hang on the same values.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from ...ir.graph import graph_tree, is_onnx_op, node_subgraphs

REACH = 400
"""Nodes above a match that are recorded. A rule that looks further gets no certificate."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A node as it was when recorded: rules may change nodes in place."""

    node: ir.Node
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[ir.Value, ...]
    attributes: Mapping[str, ir.Attr]
    reads: tuple[ir.Value, ...]
    """Inputs, and the outer values that subgraphs use."""


@dataclasses.dataclass(frozen=True)
class Known:
    """What was known of a value when recorded."""

    dtype: ir.TypeProtocol | None
    shape: ir.Shape | None
    constant: ir.TensorProtocol | None = None
    """The data of an initializer, which leaves the graph when its last user does."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The nodes around a match by the identity of what they write, and the matched ones."""

    steps: Mapping[int, Step]
    known: Mapping[int, Known]
    matched: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of a graph that a rewrite replaced, and what it put there.

    `before` and `after` are models with the same inputs; their outputs correspond by position.
    `loose` names values that only `after` reads: where they come from was not found.
    """

    before: ir.Model
    after: ir.Model
    loose: str = ""


def step_of(node: ir.Node) -> Step:
    """A node as it is now."""
    inputs = tuple(node.inputs)
    reads = [value for value in inputs if value is not None]
    if any(True for _ in node_subgraphs(node)):
        reads += _captured(node)
    return Step(node, inputs, tuple(node.outputs), dict(node.attributes), tuple(reads))


def _captured(node: ir.Node) -> list[ir.Value]:
    """Outer values that a node's subgraphs use."""
    inner: set[int] = set()
    used: dict[int, ir.Value] = {}
    for subgraph in node_subgraphs(node):
        for graph in graph_tree(subgraph):
            inner.update(id(v) for v in (*graph.inputs, *graph.initializers.values()))
            for item in graph:
                inner.update(id(v) for v in item.outputs)
                used.update((id(v), v) for v in item.inputs if v is not None)
            used.update((id(v), v) for v in graph.outputs)
    return [value for key, value in used.items() if key not in inner]


def record(matched: Sequence[ir.Node], reach: int = REACH) -> Record:
    """Everything above a match, and the nodes beside and below it: up to `reach` nodes, before a
    rule changes anything."""
    steps: dict[int, Step] = {}
    known: dict[int, Known] = {}
    nodes = {id(node): node for node in matched}
    for value in _near(matched):
        for user in value.consumers()[:_FAN_OUT]:
            nodes.setdefault(id(user), user)
    waiting, seen = deque(nodes.values()), set(nodes)
    first: list[Step] = []
    while waiting:
        step = step_of(waiting.popleft())
        if len(first) < len(matched):
            first.append(step)
        for value in step.outputs:
            steps[id(value)] = step
            known[id(value)] = _known(value)
        for value in step.reads:
            known[id(value)] = _known(value)
            producer = value.producer()
            if producer is not None and id(producer) not in seen and len(seen) < reach:
                seen.add(id(producer))
                waiting.append(producer)
    return Record(steps, known, tuple(first))


def _known(value: ir.Value) -> Known:
    return Known(value.type, value.shape, value.const_value if _is_constant(value) else None)


_FAN_OUT = 64


def _near(matched: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """Values whose users a rule may replace with its match: what it reads, what it makes, and what
    is made of that."""
    for node in matched:
        yield from (v for v in node.inputs if v is not None and not _is_constant(v))
        for value in node.outputs:
            yield value
            for user in value.consumers()[:_FAN_OUT]:
                yield from user.outputs


def cut(
    before: Record,
    replaced: Sequence[tuple[ir.Value, ir.Value]],
    opsets: Mapping[str, int],
    functions: Iterable[ir.Function] = (),
    *,
    context: int = 0,
) -> Region:
    """The region that a firing replaced, its two sides hanging on the same values.

    `replaced` are the values that had users, and what these use now.
    `context` adds that many layers of producers above: for rules that rely on what feeds the match.
    """
    pairs = [(old, new) for old, new in replaced if id(old) in before.steps]
    inside = {id(step.node): step for step in before.matched}
    inside.update((id(before.steps[id(old)].node), before.steps[id(old)]) for old, _ in pairs)
    _add_whole_numbers(before, inside)
    for _ in range(context):
        for value in _border(inside.values(), before.known):
            step = before.steps.get(id(value))
            if step is not None:
                inside[id(step.node)] = step
        _add_whole_numbers(before, inside)
    missing = ""
    for _ in range(REACH):
        border = {id(value): value for value in _border(inside.values(), before.known)}
        made, loose = _made([new for _, new in pairs], border, before, inside)
        grown = _between(loose, border, before)
        if not grown:
            missing = ", ".join(sorted(value.name or "?" for value in loose))
            border.update((id(value), value) for value in loose)
            break
        inside.update((id(step.node), step) for step in grown)
    inputs = [v for v in border.values() if not _is_constant(v, before.known)]
    functions = list(functions)
    olds, news = [old for old, _ in pairs], [new for _, new in pairs]
    ordered = _ordered(inside.values(), olds)
    return Region(
        _model("before", ordered, inputs, olds, olds, before.known, opsets, functions),
        _model("after", _ordered(made, news), inputs, news, olds, before.known, opsets, functions),
        missing,
    )


def _border(steps: Iterable[Step], known: Mapping[int, Known]) -> list[ir.Value]:
    """Values that steps read and that none of them writes, constants left out."""
    items = list(steps)
    written = {id(value) for step in items for value in step.outputs}
    found = {
        id(value): value
        for step in items
        for value in step.reads
        if id(value) not in written and not _is_constant(value, known)
    }
    return list(found.values())


def _is_constant(value: ir.Value, known: Mapping[int, Known] | None = None) -> bool:
    """Whether a value is an initializer that no caller overrides, or was one when recorded."""
    facts = None if known is None else known.get(id(value))
    if facts is not None and facts.constant is not None:
        return True
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def _add_whole_numbers(before: Record, inside: dict[int, Step], limit: int = 60) -> None:
    """Take in what computes shapes and indices: random numbers would seldom be legal there."""
    waiting = deque(_border(inside.values(), before.known))
    while waiting and len(inside) < limit:
        value = waiting.popleft()
        known, step = before.known.get(id(value)), before.steps.get(id(value))
        if step is None or known is None or id(step.node) in inside:
            continue
        dtype = known.dtype.dtype if known.dtype is not None else None
        small = known.shape is not None and len(known.shape) <= 1
        whole = dtype in (ir.DataType.INT64, ir.DataType.INT32) and small
        if whole or is_onnx_op(step.node, "Constant"):
            inside[id(step.node)] = step
            waiting.extend(step.reads)


def _made(
    news: Sequence[ir.Value],
    border: Mapping[int, ir.Value],
    before: Record,
    inside: Mapping[int, Step],
) -> tuple[list[Step], list[ir.Value]]:
    """What computes the new values from the border, and values that are not on it.

    Nodes that were in the graph before are taken in where they lie inside the region or beside it
    (an equal node elsewhere, which now serves here too); those above it are what is loose.
    """
    found: dict[int, Step] = {}
    loose: dict[int, ir.Value] = {}
    waiting = deque(news)
    while waiting:
        value = waiting.popleft()
        producer = value.producer()
        if id(value) in border or _is_constant(value, before.known):
            continue
        if producer is None:
            loose[id(value)] = value
            continue
        if id(value) in before.steps and id(producer) not in inside:
            loose[id(value)] = value
            continue
        if id(producer) not in found:
            found[id(producer)] = step_of(producer)
            waiting.extend(found[id(producer)].reads)
    return list(found.values()), list(loose.values())


def _between(
    loose: Iterable[ir.Value], border: Mapping[int, ir.Value], before: Record
) -> list[Step]:
    """Recorded nodes on the ways from loose values down to the border."""
    targets = {id(value) for value in loose}
    leads: dict[int, bool] = {}

    def reaches(value: ir.Value) -> bool:
        """Whether a value is, or depends on, one of the targets; without recursion."""
        stack = [value]
        while stack:
            item = stack[-1]
            if id(item) in leads:
                stack.pop()
                continue
            step = before.steps.get(id(item))
            if id(item) in targets or step is None:
                leads[id(item)] = id(item) in targets
                stack.pop()
                continue
            missing = [v for v in step.reads if id(v) not in leads]
            if missing:
                stack.extend(missing)
                continue
            leads[id(item)] = any(leads[id(v)] for v in step.reads)
            stack.pop()
        return leads[id(value)]

    if not targets:
        return []
    return [
        before.steps[id(value)]
        for value in border.values()
        if id(value) not in targets and reaches(value)
    ]


def _ordered(steps: Iterable[Step], outputs: Sequence[ir.Value]) -> list[Step]:
    """Steps in an order in which each comes after what it reads; only those the outputs need."""
    by_value = {id(value): step for step in steps for value in step.outputs}
    done: dict[int, Step] = {}
    stack: list[tuple[Step, bool]] = [
        (by_value[id(value)], False) for value in reversed(outputs) if id(value) in by_value
    ]
    while stack:
        step, ready = stack.pop()
        if id(step.node) in done:
            continue
        if ready:
            done[id(step.node)] = step
            continue
        stack.append((step, True))
        stack.extend(
            (by_value[id(value)], False)
            for value in step.reads
            if id(value) in by_value and id(by_value[id(value)].node) not in done
        )
    return list(done.values())


def _model(
    name: str,
    steps: Sequence[Step],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    olds: Sequence[ir.Value],
    known: Mapping[int, Known],
    opsets: Mapping[str, int],
    functions: Sequence[ir.Function],
) -> ir.Model:
    """A model of copies of the steps; weights are shared with the original."""
    copies: dict[int, ir.Value] = {}
    names: set[str] = set()

    def copy(value: ir.Value, *, typed: bool) -> ir.Value:
        base = "v" if value.name is None else value.name
        label, n = base, 0
        while label in names:
            n += 1
            label = f"{base}_{n}"
        if label:  # an output that is left out has the empty name, as often as it likes
            names.add(label)
        facts = known.get(id(value)) or Known(value.type, value.shape)
        made = ir.Value(
            name=label,
            type=facts.dtype if typed else None,
            shape=facts.shape.copy() if typed and facts.shape is not None else None,
        )
        copies[id(value)] = made
        return made

    graph_inputs = [copy(value, typed=True) for value in inputs]
    initializers = []
    for step in steps:
        for value in step.reads:
            if id(value) not in copies and _is_constant(value, known):
                initializers.append(_constant(value, copy(value, typed=False)))
    nodes: list[ir.Node] = []
    for step in steps:
        made = [copy(value, typed=id(value) in known) for value in step.outputs]
        node = ir.Node(
            step.node.domain,
            step.node.op_type,
            [None if value is None else copies[id(value)] for value in step.inputs],
            [_attribute(item, copies) for item in step.attributes.values()],
            overload=step.node.overload,
            outputs=made,
            name=f"n{len(nodes)}",
        )
        nodes.append(node)
    results = []
    for index, (value, old) in enumerate(zip(outputs, olds, strict=True)):
        if id(value) not in copies:  # the result is a constant
            initializers.append(_constant(value, copy(value, typed=False)))
        facts = known.get(id(old)) or Known(old.type, old.shape)
        carrier = ir.Node("", "Identity", [copies[id(value)]], num_outputs=1, name=f"out{index}")
        carrier.outputs[0].name = f"{name}:{index}"
        carrier.outputs[0].type = facts.dtype or value.type
        nodes.append(carrier)
        results.append(carrier.outputs[0])
    domains = {node.domain for node in nodes} | {node.domain for f in functions for node in f}
    imports = {"": 18, **opsets, **{d: 1 for d in domains if d and d not in opsets}}
    graph = ir.Graph(
        graph_inputs,
        results,
        nodes=nodes,
        initializers=initializers,
        name=name,
        opset_imports=imports,
    )
    return ir.Model(graph, ir_version=10, functions=functions)


def _constant(value: ir.Value, made: ir.Value) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    made.const_value = tensor
    made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(list(tensor.shape.numpy()))
    return made


def _attribute(item: ir.Attr, copies: Mapping[int, ir.Value]) -> ir.Attr:
    """An attribute; subgraphs are copied, and what they capture is the copy of it."""
    if item.is_ref() or item.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return item
    found = [item.as_graph()] if item.type == ir.AttributeType.GRAPH else list(item.as_graphs())
    clones = [graph.clone(allow_outer_scope_values=True) for graph in found]
    for clone in clones:
        for graph in graph_tree(clone):
            for node in graph:
                for index, value in enumerate(node.inputs):
                    if value is not None and id(value) in copies:
                        node.replace_input_with(index, copies[id(value)])
            for index, value in enumerate(list(graph.outputs)):
                if id(value) in copies:
                    graph.outputs[index] = copies[id(value)]
    if item.type == ir.AttributeType.GRAPH:
        return ir.Attr(item.name, item.type, clones[0])
    return ir.Attr(item.name, item.type, clones)
