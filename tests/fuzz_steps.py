"""Steps that move, compute shapes and integers, repeat, and branch; see `fuzz_graph`."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fuzz_graph import BOOL, FLOAT, INT64, Grower, Value, step

BIG = 2**63 - 1
ORDERED = ["Add", "Sub", "Mul", "Max", "Min"]


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def static_tail(value: Value) -> bool:
    return len(value.shape) > 1 and all(isinstance(d, int) for d in value.shape[1:])


# --- elementwise -------------------------------------------------------------------------------


@step(4)
def unary(g: Grower) -> None:
    x = g.pick()
    ops = ["Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Identity", "Softplus", "Erf", "Dropout", "Sin"]
    op = g.choose(ops)
    # the sine of a large number shows its last digit
    g.keep(g.node(op, g.node("Tanh", x.name) if op == "Sin" else x.name), x.shape)


@step(4)
def binary(g: Grower) -> None:
    x = g.pick()
    y = g.pick(lambda v: v.shape == x.shape)
    pair = [x.name, y.name]
    g.keep(g.node(g.choose(ORDERED), *pair), x.shape)


@step(4)
def with_constant(g: Grower) -> None:
    """A number, a row, a channel, or a whole tensor; sometimes all alike; on either side."""
    x = g.pick(lambda v: len(v.shape) > 0)
    tail = [d if isinstance(d, int) else 1 for d in x.shape]
    forms = [(), (1,), tuple(tail[-1:]), (1, *tail[1:])]
    if len(tail) == 4:
        forms += [(tail[1], 1, 1), (1, tail[1], 1, 1)]
    shape = g.choose(forms)
    if g.chance(0.4):
        array = np.full(shape, g.choose([0.0, 1.0, 2.0, -1.0, 0.5]), np.float32)
    else:
        array = g.random(*shape, low=0.25, high=2.0)
    op = g.choose(["Add", "Mul", "Sub", "Div", "Max", "Min"])
    if op == "Div" and not array.all():
        op = "Mul"
    inputs = [x.name, array] if op == "Div" or g.chance(0.7) else [array, x.name]
    g.keep(g.node(op, *inputs), x.shape)


@step(2)
def affine_chain(g: Grower) -> None:
    """(x * a + b) * c, -x, x * a + x * b, x - (-y): what algebra merges."""
    x = g.pick()
    a, b = (f32(g.rng.uniform(0.5, 2)) for _ in range(2))
    kind = int(g.rng.integers(5))
    if kind == 0:
        out = g.node("Mul", g.node("Add", g.node("Mul", x.name, a), b), a)
    elif kind == 1:
        out = g.node("Add", g.node("Mul", x.name, a), g.node("Mul", x.name, b))
    elif kind == 2:
        out = g.node("Sub", g.node("Tanh", x.name), g.node("Neg", x.name))
    elif kind == 3:
        out = g.node("Div", g.node("Div", x.name, a), b)
    else:
        out = g.node("Mul", g.node("Neg", x.name), g.node("Neg", x.name))
    g.keep(out, x.shape)


@step(2)
def twice(g: Grower) -> None:
    """The same computed twice, and what undoes itself."""
    x = g.pick()
    kind = int(g.rng.integers(4))
    if kind == 0:
        parts = [g.node("Sigmoid", x.name) for _ in range(2)]
        out = g.node("Add", *parts)
    elif kind == 1:
        out = g.node("Neg", g.node("Neg", x.name))
    elif kind == 2:
        out = g.node("Relu", g.node("Relu", x.name))
    else:
        c = g.random()
        out = g.node("Mul", g.node("Add", x.name, c), g.node("Add", x.name, c.copy()))
    g.keep(out, x.shape)


@step(1)
def power(g: Grower) -> None:
    x = g.pick()
    exponent = g.choose([2.0, 1.0, 3.0, 0.5])
    base = g.node("Abs", x.name) if exponent == 0.5 else g.node("Tanh", x.name)
    g.keep(g.node("Pow", base, f32(exponent)), x.shape)


# --- movement ----------------------------------------------------------------------------------


def _turned(g: Grower, x: Value, perm: list[int]) -> Value:
    name = g.node("Transpose", x.name, perm=perm)
    return Value(name, tuple(x.shape[p] for p in perm), x.exact)


@step(4)
def transposes(g: Grower) -> None:
    """One, or two with something between, which may cancel."""
    x = g.pick(lambda v: len(v.shape) >= 2)
    perm = [int(p) for p in g.rng.permutation(len(x.shape))]
    y = _turned(g, x, perm)
    if g.chance(0.4):
        y = Value(g.node(g.choose(["Relu", "Tanh", "Neg"]), y.name), y.shape)
    elif g.chance(0.4) and isinstance(y.shape[-1], int):
        y = Value(g.node("Mul", y.name, g.random(y.shape[-1])), y.shape)
    if g.chance(0.7):
        back = [perm.index(i) for i in range(len(perm))]
        y = _turned(g, y, back if g.chance(0.6) else [int(p) for p in g.rng.permutation(len(perm))])
    g.keep(y.name, y.shape, y.exact)


@step(4)
def reshapes(g: Grower) -> None:
    x = g.pick(static_tail)
    if x is None:
        return
    total = math.prod(x.shape[1:])
    flat = g.choose(
        [
            lambda: g.node("Reshape", x.name, i64(0, -1)),
            lambda: g.node("Reshape", x.name, i64(-1, total)),
            lambda: g.node("Flatten", x.name, axis=1),
        ]
    )()
    shape = (x.shape[0], total)
    if g.chance(0.3):
        flat = g.node("Relu", flat)
    if g.chance(0.6):
        half = [2, total // 2] if total % 2 == 0 and g.chance(0.5) else list(x.shape[1:])
        flat, shape = g.node("Reshape", flat, i64(-1, *half)), (x.shape[0], *half)
    g.keep(flat, shape, x.exact)


@step(3)
def unit_axes(g: Grower) -> None:
    """Axes of size 1 put in, and mostly taken out again."""
    x = g.pick()
    axis = int(g.rng.integers(-len(x.shape) - 1, len(x.shape) + 1))
    wide = g.node("Unsqueeze", x.name, i64(axis))
    position = axis % (len(x.shape) + 1)
    shape = (*x.shape[:position], 1, *x.shape[position:])
    if g.chance(0.3):
        wide = g.node("Tanh", wide)
    if g.chance(0.75):
        wide, shape = g.node("Squeeze", wide, i64(axis)), x.shape
    if len(shape) <= 5:
        g.keep(wide, shape)


@step(4)
def slices(g: Grower) -> None:
    """Of one axis: all of it, a part, every other, backwards; two in a row; or all parts."""
    x = g.pick(lambda v: any(isinstance(d, int) and d > 1 for d in v.shape))
    axes = [i for i, d in enumerate(x.shape) if isinstance(d, int) and d > 1]
    axis = g.choose(axes)
    size = x.shape[axis]
    cut = int(g.rng.integers(1, size))
    given = axis if g.chance(0.6) else axis - len(x.shape)

    def part(name: str, start: int, end: int, stride: int = 1) -> str:
        numbers = [i64(start), i64(end), i64(given)]
        return g.node("Slice", name, *numbers, *([i64(stride)] if stride != 1 else []))

    def sized(count: int) -> tuple:
        return (*x.shape[:axis], count, *x.shape[axis + 1 :])

    kind = int(g.rng.integers(6))
    if kind == 0:
        g.keep(part(x.name, 0, g.choose([size, BIG])), x.shape, x.exact)
    elif kind == 1:
        g.keep(part(x.name, 0, cut), sized(cut), x.exact)
    elif kind == 2:
        g.keep(part(x.name, -1, -BIG, -1), x.shape, x.exact)
    elif kind == 3:
        parts = [part(x.name, 0, cut), part(x.name, cut, BIG)]
        parts = [g.node(g.choose(["Relu", "Tanh", "Identity"]), p) for p in parts]
        joined = parts if g.chance(0.5) else parts[::-1]
        g.keep(g.node("Concat", *joined, axis=given), x.shape)
    elif kind == 4:
        inner = part(x.name, 0, cut)
        g.keep(part(inner, 0, 1), sized(1), x.exact)
    else:
        g.keep(part(x.name, 0, BIG, 2), sized(-(-size // 2)), x.exact)


@step(4)
def splits(g: Grower) -> None:
    """Split, something with a part or not, Concat; in order or not."""
    x = g.pick(lambda v: any(isinstance(d, int) and d > 1 for d in v.shape))
    axis = g.choose([i for i, d in enumerate(x.shape) if isinstance(d, int) and d > 1])
    size = x.shape[axis]
    halves = size % 2 == 0 and g.chance(0.6)
    cut = size // 2 if halves else int(g.rng.integers(1, size))
    sizes = [cut, size - cut]
    parts = g.split(x.name, sizes, axis)
    if g.chance(0.4):
        parts[0] = g.node("Sigmoid", parts[0])
    if g.chance(0.2) and sizes[0] == sizes[1]:
        shape = (*x.shape[:axis], cut, *x.shape[axis + 1 :])
        g.keep(g.node("Mul", *parts), shape)
        return
    if g.chance(0.4):
        parts = parts[::-1]
    g.keep(g.node("Concat", *parts, axis=axis), x.shape)


@step(3)
def joins(g: Grower) -> None:
    """Concat of Concat, of one, and parts taken back out."""
    x = g.pick(lambda v: len(v.shape) > 0 and isinstance(v.shape[-1], int))
    last = len(x.shape) - 1
    inner = g.node("Concat", x.name, g.node("Neg", x.name), axis=-1)
    outer = g.node("Concat", inner, x.name, axis=last)
    size = x.shape[-1]
    if g.chance(0.6):
        start = size * int(g.rng.integers(3))
        out = g.node("Slice", outer, i64(start), i64(start + size), i64(last))
        g.keep(out, x.shape)
    elif size <= 8:
        g.keep(outer, (*x.shape[:-1], 3 * size))


@step(3)
def gathers(g: Grower) -> None:
    x = g.pick(lambda v: any(isinstance(d, int) for d in v.shape))
    axis = g.choose([i for i, d in enumerate(x.shape) if isinstance(d, int)])
    size = x.shape[axis]
    if size == 0:
        return
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    kind = int(g.rng.integers(4))
    if kind == 0:
        index = np.array(int(g.rng.integers(-size, size)))
        g.keep(g.node("Gather", x.name, index, axis=axis), (*before, *after), x.exact)
    elif kind == 1:
        g.keep(g.node("Gather", x.name, np.arange(size), axis=axis), x.shape, x.exact)
    elif kind == 2:
        order = g.rng.permutation(size)[: int(g.rng.integers(1, size + 1))]
        shape = (*before, len(order), *after)
        g.keep(g.node("Gather", x.name, order, axis=axis), shape, x.exact)
    else:  # one after the other, stacked again
        parts = [g.node("Gather", x.name, i64(i), axis=axis) for i in range(min(size, 4))]
        g.keep(g.node("Concat", *parts, axis=axis), (*before, len(parts), *after), x.exact)


@step(2)
def stacks(g: Grower) -> None:
    """Unsqueezed and joined, or split and squeezed: what Gather and Reshape do."""
    x = g.pick(lambda v: 1 < len(v.shape) < 4)
    y = g.pick(lambda v: v.shape == x.shape)
    axis = int(g.rng.integers(0, len(x.shape)))
    parts = [g.node("Unsqueeze", v.name, i64(axis)) for v in (x, y)]
    whole = g.node("Concat", *parts, axis=axis)
    if g.chance(0.5):
        parts = g.split(whole, [1, 1], axis)
        parts = [g.node("Squeeze", p, i64(axis)) for p in parts]
        g.keep(g.node("Sub", *parts), x.shape)
    else:
        g.keep(whole, (*x.shape[:axis], 2, *x.shape[axis:]))


@step(2)
def expands(g: Grower) -> None:
    """A row broadcast to a value, by Expand or Tile, then combined with it; or to itself."""
    x = g.pick(lambda v: len(v.shape) >= 2 and isinstance(v.shape[-1], int))
    row = g.node("Unsqueeze", g.constant(g.random(x.shape[-1])), i64(0))
    kind = int(g.rng.integers(3))
    if kind == 0:
        wide = g.node("Expand", row, g.node("Shape", x.name))
        g.keep(g.node("Add", x.name, wide), x.shape)
    elif kind == 1:
        g.keep(g.node("Expand", x.name, i64(*[1] * len(x.shape))), x.shape, x.exact)
    else:
        tiled = g.node("Tile", x.name, i64(*[1] * (len(x.shape) - 1), 2))
        g.keep(tiled, (*x.shape[:-1], 2 * x.shape[-1]), x.exact)


@step(1)
def pads(g: Grower) -> None:
    x = g.pick(lambda v: len(v.shape) == 4 and static_tail(v))
    if x is None:
        return
    amount = int(g.rng.integers(0, 2))
    padded = g.node("Pad", x.name, i64(0, 0, amount, amount, 0, 0, amount, amount))
    shape = (*x.shape[:2], *(d + 2 * amount for d in x.shape[2:]))
    g.keep(padded, shape, x.exact)


# --- shapes ------------------------------------------------------------------------------------


@step(4)
def shape_arithmetic(g: Grower) -> None:
    """[batch, everything else] or the shape itself, computed as exporters do, then back."""
    x = g.pick(lambda v: len(v.shape) >= 2 and all(d != 0 for d in v.shape))
    size = g.node("Shape", x.name)
    kind = int(g.rng.integers(5))
    if kind == 0:
        g.keep(g.node("Reshape", x.name, size), x.shape, x.exact)
        return
    batch = g.node("Gather", size, np.array(0))
    first = g.node("Unsqueeze", batch, i64(0))
    if kind == 1:
        flat = g.node("Reshape", x.name, g.node("Concat", first, i64(-1), axis=0))
    elif kind == 2:
        tail = g.node("Slice", size, i64(1), i64(BIG), i64(0))
        total = g.axes("ReduceProd", tail, [0], keepdims=1)
        flat = g.node("Reshape", x.name, g.node("Concat", first, total, axis=0))
    elif kind == 3:
        double = g.node("Div", g.node("Mul", first, i64(2)), i64(2))
        flat = g.node("Reshape", x.name, g.node("Concat", double, i64(-1), axis=0))
    else:
        zeros = g.node("ConstantOfShape", size, value=numpy_helper.from_array(f32([0.5])))
        g.keep(g.node("Mul", x.name, zeros), x.shape)
        return
    if g.chance(0.5):
        flat = g.node("Relu", flat)
    g.keep(g.node("Reshape", flat, size), x.shape)


@step(2)
def positions(g: Grower) -> None:
    """Range(0, length) added to the tokens, as position numbers."""
    x = g.pick(lambda v: len(v.shape) == 3)
    length = g.node("Gather", g.node("Shape", x.name), np.array(1))
    steps = g.node("Range", np.array(0), length, np.array(1))
    numbers = g.node("Cast", steps, to=FLOAT)
    column = g.node("Unsqueeze", numbers, i64(1))
    g.keep(g.node("Add", x.name, g.node("Mul", column, f32(0.1))), x.shape)


# --- reductions --------------------------------------------------------------------------------


@step(3)
def reductions(g: Grower) -> None:
    x = g.pick(lambda v: len(v.shape) >= 2 and 0 not in v.shape)
    ops = ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1"]
    op = g.choose(ops)
    count = int(g.rng.integers(1, len(x.shape)))
    axes = sorted(int(a) for a in g.rng.permutation(range(1, len(x.shape)))[:count])
    keep = int(g.chance(0.5))
    name, shape = x.name, x.shape
    if g.chance(0.25):
        perm = [0, *(int(p) for p in g.rng.permutation(range(1, len(shape))))]
        name, shape = g.node("Transpose", name, perm=perm), tuple(shape[p] for p in perm)
    out = g.axes(op, name, axes, keepdims=keep)
    left = tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)
    if g.chance(0.3) and len(left) >= 2:
        out = g.axes(op, out, [len(left) - 1], keepdims=1)
        left = (*left[:-1], 1)
    g.keep(out, left)


# --- integers, casts, conditions ---------------------------------------------------------------


@step(3)
def integers(g: Grower) -> None:
    """Arithmetic on ids: division truncates, so it may not become float's."""
    kinds = [(TensorProto.INT32, np.int32), (INT64, np.int64)]
    code, dtype = g.choose(kinds)
    whole = g.node("Cast", "ids", to=code) if g.chance(0.7) or dtype == np.int32 else "ids"
    for op in g.rng.permutation(["Div", "Mul", "Add", "Sub", "Mod"])[: int(g.rng.integers(1, 4))]:
        whole = g.node(str(op), whole, np.array(g.choose([1, 2, 3, 6]), dtype))
    x = g.keep(g.node("Cast", whole, to=FLOAT), g.inputs["ids"][1], True)
    if g.chance(0.5):
        g.keep(g.node("Add", g.node("Unsqueeze", x.name, i64(2)), "tokens"), g.inputs["tokens"][1])


@step(2)
def casts(g: Grower) -> None:
    """There and back, twice, by CastLike, through what loses digits."""
    x = g.pick()
    kind = int(g.rng.integers(4))
    if kind == 0:
        out = g.node("Cast", g.node("Cast", x.name, to=TensorProto.DOUBLE), to=FLOAT)
    elif kind == 1:
        out = g.node("Cast", x.name, to=FLOAT)
    elif kind == 2 and g.opset >= 15:
        out = g.node("Mul", x.name, g.node("CastLike", np.array(2), x.name))
    elif x.exact:
        out = g.node("Cast", g.node("Cast", x.name, to=TensorProto.FLOAT16), to=FLOAT)
    else:
        return
    g.keep(out, x.shape)


@step(2)
def rounded(g: Grower) -> None:
    """Jumps, on inputs."""
    x = g.pick(lambda v: v.exact)
    kind = int(g.rng.integers(4))
    if kind == 0:
        out = g.node(g.choose(["Floor", "Ceil", "Round", "Sign"]), x.name)
    elif kind == 1:
        whole = g.node("Cast", g.node("Mul", x.name, f32(10)), to=TensorProto.INT32)
        out = g.node("Cast", whole, to=FLOAT)
    elif kind == 2:
        scale, zero = f32(0.05), np.array(3, g.choose([np.int8, np.uint8]))
        small = g.node("QuantizeLinear", x.name, scale, zero)
        out = g.node("DequantizeLinear", small, scale, zero)
    else:
        out = g.node("Cast", g.node("Greater", x.name, f32(0.25)), to=FLOAT)
    g.keep(out, x.shape)


@step(3)
def conditions(g: Grower) -> None:
    """Where, with a condition that is computed, repeated, negated twice, or known."""
    x = g.pick(lambda v: v.exact)
    y = g.pick(lambda v: v.shape == x.shape)
    bound = f32(g.choose([0.0, 0.5]))
    test = g.node(g.choose(["Greater", "Less", "GreaterOrEqual"]), x.name, bound)
    kind = int(g.rng.integers(4))
    if kind == 0:
        test = g.node("Not", g.node("Not", test))
    elif kind == 1:
        test = g.node("And", test, np.array(True))
    elif kind == 2:
        test = g.constant(np.array(g.chance(0.5)))
    other = g.node("Mul", x.name, f32(0.25)) if g.chance(0.6) else g.constant(f32(-1))
    g.keep(g.node("Where", test, y.name, other), x.shape)


@step(1)
def masked_ids(g: Grower) -> None:
    """An embedding, zero where an id is padding."""
    table = g.random(5, 8)
    rows = g.node("Gather", table, "ids")
    used = g.node("Cast", g.node("Not", g.node("Equal", "ids", np.array(0))), to=FLOAT)
    g.keep(g.node("Mul", rows, g.node("Unsqueeze", used, i64(2))), g.inputs["tokens"][1])


@step(1)
def sequences(g: Grower) -> None:
    x = g.pick(lambda v: len(v.shape) > 0 and isinstance(v.shape[-1], int) and v.shape[-1] > 1)
    size, last = x.shape[-1], len(x.shape) - 1
    cut = int(g.rng.integers(1, size))
    found = g.node("SplitToSequence", x.name, i64(cut, size - cut), axis=last)
    if g.chance(0.5):
        which = int(g.rng.integers(2))
        part = g.node("SequenceAt", found, np.array(which))
        g.keep(part, (*x.shape[:-1], (cut, size - cut)[which]), x.exact)
    else:
        g.keep(g.node("ConcatFromSequence", found, axis=last), x.shape, x.exact)


# --- subgraphs and functions -------------------------------------------------------------------


@step(3)
def branches(g: Grower) -> None:
    """If on the flag, or on a constant; branches capture, fold, and share."""
    x = g.pick()
    made = []
    for op in g.rng.permutation(["Relu", "Neg", "Tanh", "Sigmoid"])[:2]:
        inner, out, c = g.name("i"), g.name("b"), g.name("c")
        nodes = [
            helper.make_node("Constant", [], [c], value=numpy_helper.from_array(f32(2))),
            helper.make_node("Mul", [x.name, c], [inner]),
            helper.make_node(str(op), [inner], [out]),
        ]
        if g.chance(0.3):
            nodes = [helper.make_node("Identity", [x.name], [out])]
        info = helper.make_tensor_value_info(out, FLOAT, None)
        made.append(helper.make_graph(nodes, g.name("branch"), [], [info]))
    test = "flag" if g.chance(0.6) else g.constant(np.array(g.chance(0.5)))
    g.keep(g.node("If", test, then_branch=made[0], else_branch=made[1]), x.shape)


@step(2)
def loops(g: Grower) -> None:
    """Three trips that add a captured value and what does not change from trip to trip."""
    x = g.pick()
    other = g.pick(lambda v: v.shape == x.shape)
    i, go, v, keep, out, same, grown = (g.name("l") for _ in range(7))
    half = g.constant(f32(0.5))
    nodes = [
        helper.make_node("Tanh", [other.name], [same]),
        helper.make_node("Mul", [v, half], [grown]),
        helper.make_node("Add", [grown, same], [out]),
        helper.make_node("Identity", [go], [keep]),
    ]
    inputs = [
        helper.make_tensor_value_info(i, INT64, []),
        helper.make_tensor_value_info(go, BOOL, []),
        helper.make_tensor_value_info(v, FLOAT, None),
    ]
    outputs = [
        helper.make_tensor_value_info(keep, BOOL, []),
        helper.make_tensor_value_info(out, FLOAT, None),
    ]
    body = helper.make_graph(nodes, g.name("body"), inputs, outputs)
    trips = np.array(g.choose([0, 1, 3]))
    g.keep(g.node("Loop", trips, np.array(True), x.name, body=body), x.shape)


@step(2)
def functions(g: Grower) -> None:
    """A function of the model, called once or twice, with an attribute."""
    if not g.functions:
        nodes = [
            helper.make_node("LeakyRelu", ["x"], ["t"]),
            helper.make_node("Sigmoid", ["t"], ["s"]),
            helper.make_node("Mul", ["t", "s"], ["y"]),
        ]
        reference = nodes[0].attribute.add()
        reference.name, reference.ref_attr_name, reference.type = "alpha", "slope", 1
        imports = [helper.make_opsetid("", g.opset)]
        function = helper.make_function("local", "Gate", ["x"], ["y"], nodes, imports, ["slope"])
        g.functions.append(function)
    x = g.pick()
    name = x.name
    for _ in range(int(g.rng.integers(1, 3))):
        name = g.node("Gate", name, domain="local", slope=float(g.choose([0.1, 0.2])))
    g.keep(name, x.shape)
