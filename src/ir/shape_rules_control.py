"""Shape rules of control flow, sequences and optionals: operators that run graphs or hold tensors.

A loop's carried values start from their initial shapes; a dimension that the body changes becomes
a symbol of its own and the body is inferred again, so what is said holds for every iteration.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from . import dims as dim_math
from .graph import Dim
from .shape_rules import Call, Dims, Fact, Undecided, rule


def common_dims(a: Dims | None, b: Dims | None) -> Dims | None:
    """What two shapes share: None when their ranks differ, unknown where dimensions do."""
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(x if dim_math.same(x, y) else dim_math.UNKNOWN for x, y in zip(a, b, strict=True))


def _put_named(call: Call, output: int, fact: Fact, dims: Dims | None) -> None:
    """An output with a fresh symbol for each unknown dimension."""
    if dims is not None:
        dims = tuple(
            call.fresh(output, i) if dim_math.is_unknown(d) else d for i, d in enumerate(dims)
        )
    call.put(output, dims, dtype=fact.dtype, kind=fact.kind)


# --- control flow ----------------------------------------------------------------------------


@rule("If")
def if_(call: Call) -> None:
    """What both branches agree on; one branch alone when the condition is constant.

    While the condition is open a branch may contradict: a model with a branch for each input size
    is sound, and given one size the other branches could not run.
    """
    branches = [call.attr("then_branch"), call.attr("else_branch")]
    taken = call.ints(0)
    for index, graph in enumerate(branches):
        if graph is None:
            call.fail("a branch is missing")
        certain = taken is not None and len(taken) == 1 and bool(taken[0]) == (index == 0)
        call.engine.infer_graph(graph, certain=certain)
        if len(graph.outputs) != len(call.node.outputs):
            call.fail(
                f"a branch has {len(graph.outputs)} outputs, the node {len(call.node.outputs)}"
            )
    if taken is not None and len(taken) == 1:
        branches = [branches[0 if taken[0] else 1]]
    for output in range(len(call.node.outputs)):
        facts = [call.engine.fact(graph.outputs[output]) for graph in branches]
        first, last = facts[0], facts[-1]
        tensors = first.kind is None and last.kind is None
        if tensors and first.dtype and last.dtype and first.dtype != last.dtype:
            call.fail(
                f"output {output} is {first.dtype.name} in one branch and {last.dtype.name} in "
                "the other"
            )
        if len(facts) == 1:
            call.put(output, first.dims, dtype=first.dtype, kind=first.kind, data=first.data)
        else:
            _put_named(call, output, first, common_dims(first.dims, last.dims))


def _settle(
    call: Call, body: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value],
    initial: Sequence[Fact],
) -> list[bool]:  # fmt: skip
    """Infer a body until its carried shapes repeat; which carried values change shape."""
    current = [Fact(f.dtype, f.dims, None, f.kind) for f in initial]
    changed = [False] * len(current)
    while True:
        for value, fact in zip(inputs, current, strict=True):
            call.engine.bind(value, fact)
        call.engine.infer_graph(body)
        stable = True
        for i, (value, result) in enumerate(zip(inputs, outputs, strict=True)):
            before, after = current[i].dims, call.engine.fact(result).dims
            if before is None:
                continue
            wider = common_dims(before, after)
            if wider is not None:
                wider = tuple(
                    call.engine.fresh(value, axis) if dim_math.is_unknown(d) else d
                    for axis, d in enumerate(wider)
                )
            if wider != before:
                current[i].dims = wider
                changed[i], stable = True, False
        if stable:
            return changed


@rule("Loop")
def loop(call: Call) -> None:
    """Carried values keep their shape where the body does; scanned ones gain the trip count."""
    body = call.attr("body")
    carried = len(call.node.inputs) - 2
    if body is None or len(body.inputs) < carried + 2 or len(body.outputs) < carried + 1:
        call.fail("the body's inputs or outputs do not fit the node's")
    call.engine.bind(body.inputs[0], Fact(ir.DataType.INT64, ()))
    call.engine.bind(body.inputs[1], Fact(ir.DataType.BOOL, ()))
    initial = [call.fact(2 + i) for i in range(carried)]
    changed = _settle(call, body, body.inputs[2:], body.outputs[1 : 1 + carried], initial)
    for i in range(carried):
        fact = call.engine.fact(body.outputs[1 + i])
        start = initial[i].dims
        _put_named(call, i, fact, common_dims(start, fact.dims) if changed[i] else fact.dims)
    trips = _trips(call, body)
    for output in range(carried, len(call.node.outputs)):
        fact = call.engine.fact(body.outputs[1 + output])
        dims = None
        if fact.dims is not None:
            own = [_outside(call, body, output, i + 1, d) for i, d in enumerate(fact.dims)]
            dims = (trips if trips is not None else call.fresh(output, 0), *own)
        call.put(output, dims, dtype=fact.dtype)


def _outside(call: Call, body: ir.Graph, output: int, axis: int, dim: Dim) -> Dim:
    """A body's dimension as seen outside: unknown ones are named after the node's output."""
    return call.fresh(output, axis) if dim_math.is_unknown(dim) else dim


def _trips(call: Call, body: ir.Graph) -> Dim | None:
    """The trip count, where no condition can end the loop early."""
    limit = call.data(0)
    if limit is None or len(limit) != 1 or isinstance(limit[0], float):
        return None
    if call.has(1) and call.ints(1) not in ((1,), (True,)):
        return None
    again: ir.Value | None = body.outputs[0]
    if call.engine.fact(body.outputs[0]).data == (1,):
        return limit[0]
    while again is not None and (producer := again.producer()) is not None:
        if producer.op_type != "Identity":
            return None
        again = producer.inputs[0]
    return limit[0] if again is body.inputs[1] else None


@rule("Scan")
def scan(call: Call) -> None:
    """The body sees one slice of each scanned input; scanned outputs gain the length."""
    body, scanned = call.attr("body"), call.attr("num_scan_inputs", 0)
    if call.opset < 9 or body is None:
        raise Undecided
    states = len(call.node.inputs) - scanned
    axes = call.attr("scan_input_axes") or (0,) * scanned
    length: Dim = dim_math.UNKNOWN
    for i in range(scanned):
        fact = call.fact(states + i)
        dims = fact.dims
        if dims is not None:
            axis = call.axis(axes[i], len(dims))
            call.require_same(
                length, dims[axis], f"the scanned inputs have lengths {length} and {dims[axis]}"
            )
            length = dims[axis]
            dims = (*dims[:axis], *dims[axis + 1 :])
        call.engine.bind(body.inputs[states + i], Fact(fact.dtype, dims))
    initial = [call.fact(i) for i in range(states)]
    changed = _settle(call, body, body.inputs[:states], body.outputs[:states], initial)
    for i in range(states):
        fact = call.engine.fact(body.outputs[i])
        dims = common_dims(initial[i].dims, fact.dims) if changed[i] else fact.dims
        _put_named(call, i, fact, dims)
    out_axes = call.attr("scan_output_axes") or (0,) * (len(call.node.outputs) - states)
    for output in range(states, len(call.node.outputs)):
        fact = call.engine.fact(body.outputs[output])
        found: Dims | None = None
        if fact.dims is not None:
            axis = call.axis(out_axes[output - states], len(fact.dims) + 1)
            size = call.fresh(output, axis) if dim_math.is_unknown(length) else length
            found = (*fact.dims[:axis], size, *fact.dims[axis:])
        _put_named(call, output, Fact(fact.dtype), found)


@rule("SequenceMap")
def sequence_map(call: Call) -> None:
    """Each output is a sequence of the body's output."""
    body = call.attr("body")
    for index, value in enumerate(body.inputs):
        fact = call.fact(index)
        if isinstance(fact.kind, ir.SequenceType):
            fact = Fact(fact.dtype, fact.dims)
        call.engine.bind(value, fact)
    call.engine.infer_graph(body)
    for output, value in enumerate(body.outputs):
        fact = call.engine.fact(value)
        if fact.dtype is not None:
            kind = ir.SequenceType(ir.TensorType(fact.dtype))
            call.put(output, fact.dims, dtype=fact.dtype, kind=kind)


# --- sequences -------------------------------------------------------------------------------


def _sequence_of(dtype: ir.DataType | None) -> ir.SequenceType | None:
    return None if dtype is None else ir.SequenceType(ir.TensorType(dtype))


@rule("SequenceConstruct")
def sequence_construct(call: Call) -> None:
    """A sequence; its elements' shape is what the tensors share."""
    items = tuple(call.dims(i) for i in range(len(call.node.inputs)))
    dims = items[0]
    for other in items[1:]:
        dims = common_dims(dims, other)
    call.put(0, dims, dtype=call.dtype(0), kind=_sequence_of(call.dtype(0)), items=items)


@rule("SequenceEmpty")
def sequence_empty(call: Call) -> None:
    """An empty sequence of `dtype`."""
    dtype = ir.DataType(call.attr("dtype", ir.DataType.FLOAT))
    call.put(0, dtype=dtype, kind=_sequence_of(dtype), items=())


@rule("SequenceInsert")
def sequence_insert(call: Call) -> None:
    """The sequence with one more element."""
    fact, added, at = call.fact(0), call.dims(1), call.ints(2)
    dims = added if fact.items == () else common_dims(fact.dims, added)
    call.put(0, dims, dtype=fact.dtype, kind=fact.kind)
    if fact.items is not None and (at is not None or not call.has(2)):
        items = list(fact.items)
        items.insert(at[0] if at else len(items), added)
        call.put(0, items=tuple(items))


@rule("SequenceErase")
def sequence_erase(call: Call) -> None:
    """The sequence with one element less."""
    fact = call.fact(0)
    call.put(0, fact.dims, dtype=fact.dtype, kind=fact.kind)


@rule("SequenceAt")
def sequence_at(call: Call) -> None:
    """One element."""
    fact, at = call.fact(0), call.ints(1)
    dims = fact.dims
    if fact.items is not None and at is not None:
        if not -len(fact.items) <= at[0] < len(fact.items):
            call.fail(f"position {at[0]} of a sequence of {len(fact.items)}")
        dims = fact.items[at[0]]
    _put_named(call, 0, Fact(fact.dtype), dims)


@rule("SequenceLength OptionalHasElement")
def scalar(call: Call) -> None:
    """A scalar."""
    call.put(0, ())


@rule("SplitToSequence")
def split_to_sequence(call: Call) -> None:
    """Each element's shape where the parts are known; the type says what they share."""
    dims, dtype = call.known(0), call.dtype(0)
    axis = call.axis(call.attr("axis", 0), len(dims))
    parts = call.ints(1) if call.has(1) else None
    length = dims[axis]
    kind = _sequence_of(dtype)
    if not call.has(1):
        rest = dims[axis + 1 :]
        found: Dims = (
            (*dims[:axis], 1, *rest) if call.attr("keepdims", 1) else (*dims[:axis], *rest)
        )
        call.put(0, found, dtype=dtype, kind=kind)
        if isinstance(length, int):
            call.put(0, items=(found,) * length)
        return
    sizes: list[int] | None = list(parts) if parts is not None else None
    if parts and call.dims(1) == ():
        sizes = None
        if isinstance(length, int):
            sizes = [min(parts[0], length - at) for at in range(0, length, parts[0])]
    elif sizes is not None:
        call.require_same(
            sum(sizes), length, f"the parts {sizes} do not add up to axis {axis}, {length}"
        )
    size: Dim = sizes[0] if sizes and len(set(sizes)) == 1 else dim_math.UNKNOWN
    call.put(0, (*dims[:axis], size, *dims[axis + 1 :]), dtype=dtype, kind=kind)
    if sizes is not None:
        call.put(0, items=tuple((*dims[:axis], s, *dims[axis + 1 :]) for s in sizes))


@rule("ConcatFromSequence")
def concat_from_sequence(call: Call) -> None:
    """The joined axis is as long as the sequence, which is data."""
    fact = call.fact(0)
    call.put(0, dtype=fact.dtype)
    dims = call.known(0)
    new_axis = call.attr("new_axis", 0)
    axis = call.axis(call.attr("axis", 0), len(dims) + new_axis)
    found = list(dims)
    if new_axis:
        found.insert(axis, dim_math.UNKNOWN)
    else:
        found[axis] = dim_math.UNKNOWN
    _put_named(call, 0, Fact(fact.dtype), tuple(found))


# --- optionals -------------------------------------------------------------------------------


@rule("Optional")
def optional(call: Call) -> None:
    """An optional of the input, or an empty one of the type given."""
    if not call.has(0):
        given = call.attr("type")
        inner = getattr(given, "type", given)
        if inner is not None:
            call.put(0, dtype=inner.dtype, kind=ir.OptionalType(inner))
        return
    fact = call.fact(0)
    inner = fact.kind or (ir.TensorType(fact.dtype) if fact.dtype is not None else None)
    if inner is not None:
        call.put(0, fact.dims, dtype=fact.dtype, kind=ir.OptionalType(inner))


@rule("OptionalGetElement")
def optional_get(call: Call) -> None:
    """The element."""
    fact = call.fact(0)
    kind = fact.kind.elem_type if isinstance(fact.kind, ir.OptionalType) else fact.kind
    if isinstance(kind, ir.TensorType):
        kind = None
    call.put(0, fact.dims, dtype=fact.dtype, kind=kind)
