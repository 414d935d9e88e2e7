"""What operators want of their operands, for `pattern_models`: shapes, attributes, constants.

Biased towards what rules look for (the last axis, swapped axes, neutral numbers), with enough of
everything else. Nothing here has to be legal: illegal models are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Shape = tuple[int | str, ...]
Operands = Sequence[ir.Value | None]
Rng = np.random.Generator

_LOGIC = ("And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
_COMPARE = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Sum", "Mean", "PRelu")
BINARY = frozenset((*_LOGIC, *_COMPARE, *_ARITHMETIC, "Where"))
_POOLS = ("GlobalAveragePool", "MaxPool", "AveragePool")
_NORMS = ("BatchNormalization", "InstanceNormalization", "GroupNormalization")
SPATIAL = frozenset(("Conv", "ConvTranspose", *_POOLS, *_NORMS))
REDUCE = "Reduce"


def dims(value: ir.Value | None) -> tuple:
    """The shape, or () where it is not known."""
    return () if value is None or value.shape is None else value.shape.dims


def operand_shape(
    op_type: str, index: int, shape: Shape | None, inputs: Operands, attributes: dict, rng: Rng
) -> Shape | None:
    """What to try for one operand, given what is wanted of the result."""
    if op_type in SPATIAL and index == 0:
        keep = shape is not None and len(shape) >= 3 and isinstance(shape[1], int)
        channels = shape[1] if keep else int(rng.choice([2, 4]))
        spatial = [(5, 5), (4, 6), (7,), (3, 4, 5)][rng.choice(4, p=[0.5, 0.3, 0.1, 0.1])]
        return (2, channels, *spatial)
    if op_type == "MatMul":
        known = dims(inputs[1 - index])
        if known and index == 1:
            return (*known[:-2], known[-1], int(rng.choice([3, 4])))
        return shape if shape is not None and len(shape) >= 2 else (2, 3, 4)
    if op_type == "Gemm":
        return (3, 4) if index == 0 else None
    if op_type == "Concat" and index > 0:
        return dims(inputs[0])
    if op_type in BINARY:
        if rng.random() < 0.65 or shape is None:
            return shape
        return broadcast_form(shape, rng)
    if op_type.startswith(REDUCE) and not shape:
        return (2, 3, 4)[: int(rng.integers(1, 4))]
    if op_type == "Transpose" and shape is not None:
        perm = attributes.get("perm")
        if perm is not None and len(perm) == len(shape):
            below: list = [None] * len(shape)
            for i, p in enumerate(perm):
                below[p] = shape[i]
            return tuple(below)
    if op_type == "Squeeze" and shape is not None:
        at = int(rng.integers(len(shape) + 1))
        return (*shape[:at], 1, *shape[at:])
    if op_type == "Unsqueeze" and shape:
        return shape[1:]
    if op_type == "Reshape" and shape is not None and all(isinstance(d, int) for d in shape):
        return (2, math.prod(shape) // 2) if math.prod(shape) % 2 == 0 else shape
    return shape


def broadcast_form(shape: Shape, rng: Rng) -> Shape:
    """The shape with leading dimensions left out, and some sizes 1."""
    kept = shape[int(rng.integers(len(shape) + 1)) :]
    return tuple(1 if rng.random() < 0.3 else d for d in kept)


def attributes_for(op_type: str, rng: Rng, opset: int, shape: Shape | None) -> dict:
    """Attributes that a pattern leaves open."""
    rank = max(1, 3 if shape is None else len(shape))
    axis = int(rng.choice([-1, rank - 1, *range(-rank, rank)]))
    match op_type:
        case "Transpose":
            return {"perm": permutation(rank, rng)} if rng.random() < 0.95 else {}
        case "Concat":
            return {"axis": axis}
        case "Split":
            count = int(rng.choice([1, 2, 2, 3]))
            found = {"axis": axis, "_outputs": count}
            return {**found, "num_outputs": count} if opset >= 18 else found
        case "Gather" | "Softmax" | "LogSoftmax" | "LayerNormalization" | "RMSNormalization":
            return {"axis": axis} if rng.random() < 0.9 else {}
        case "SimplifiedLayerNormalization":
            return {"axis": axis, "epsilon": 1e-5}
        case "Flatten":
            return {"axis": int(rng.integers(0, rank + 1))}
        case "Cast":
            return {"to": int(rng.choice([1, 6, 7, 11, 1]))}
        case "Conv" | "ConvTranspose":
            return convolution(rng)
        case "Gemm":
            chosen = {"transA": int(rng.random() < 0.2), "transB": int(rng.random() < 0.5)}
            return {**chosen, "alpha": 0.5} if rng.random() < 0.2 else chosen
        case "LeakyRelu" | "Elu" | "ThresholdedRelu" | "Celu":
            return {"alpha": float(np.float32(rng.uniform(0.1, 1)))} if rng.random() < 0.7 else {}
        case "HardSigmoid":
            return {"alpha": 1 / 6, "beta": 0.5} if rng.random() < 0.8 else {}
        case "Gelu":
            return {"approximate": "tanh"} if rng.random() < 0.5 else {}
        case "Mod":
            return {"fmod": 1}
        case "MaxPool" | "AveragePool":
            return {"kernel_shape": [2, 2]}
        case "SplitToSequence" | "ConcatFromSequence":
            return {"axis": axis}
    if op_type.startswith(REDUCE):
        found = {"keepdims": int(rng.random() < 0.7)}
        if opset < (13 if op_type == "ReduceSum" else 18) and rng.random() < 0.9:
            found["axes"] = some_axes(rank, rng).tolist()
        return found
    return {}


def permutation(rank: int, rng: Rng) -> list[int]:
    order = list(range(rank))
    kind = rng.random()
    if kind < 0.35 and rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    elif kind < 0.9:
        order = [int(i) for i in rng.permutation(rank)]
    return order


def convolution(rng: Rng) -> dict:
    if rng.random() < 0.6:
        return {}
    return {"group": 2} if rng.random() < 0.5 else {"auto_pad": "SAME_UPPER"}


def constant_for(
    op_type: str,
    index: int,
    inputs: Operands,
    attributes: dict,
    rng: Rng,
    dtype: ir.DataType,
    opset: int,
) -> np.ndarray | None:
    """A constant operand, given the others. None: nothing is known about it."""
    data = dims(inputs[0])
    rank = len(data)
    if op_type.startswith(REDUCE) and index == 1:
        return some_axes(rank, rng)
    special = _movement(op_type, index, data, attributes, rng)
    if special is not None:
        return special
    wide = _weights(op_type, index, data, attributes, rng)
    if wide is not None:
        if op_type == "BatchNormalization" and index == 4:
            wide = np.abs(wide) + 0.5
        return wide.astype(dtype.numpy())
    if op_type in ("Clip", "Min", "Max") and rng.random() < 0.8:
        bound = float(rng.choice([0, 0, 6, 1, -1])) if op_type != "Clip" else (0, 0, 6)[index]
        return np.array(bound).astype(dtype.numpy())
    if op_type == "Pow":
        return np.array(float(rng.choice([2, 0.5, 3, -1, 1]))).astype(dtype.numpy())
    if op_type in BINARY:
        other = next((dims(v) for v in inputs if v is not None), ())
        return _broadcast_constant(other, rng, dtype)
    return None


def _broadcast_constant(other: tuple, rng: Rng, dtype: ir.DataType) -> np.ndarray:
    static = tuple(d if isinstance(d, int) else 1 for d in other)
    forms: list[tuple[int, ...]] = [(), (), (1,), static[-1:], static]
    if len(static) >= 3:
        forms += [(static[1], *[1] * (len(static) - 2))] * 3
        forms.append((1, static[1], *[1] * (len(static) - 2)))
    shape = forms[rng.integers(len(forms))]
    small = dtype == ir.DataType.FLOAT and rng.random() < 0.3
    if small:  # an epsilon, or a number that rules know
        return np.full(shape, rng.choice([1e-5, 0.0, 1.0, 2.0, 0.5])).astype(np.float32)
    if dtype == ir.DataType.BOOL:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.is_integer():
        return rng.integers(1, 5, shape).astype(dtype.numpy())
    return (rng.standard_normal(shape) + 0.1).astype(dtype.numpy())


def some_axes(rank: int, rng: Rng) -> np.ndarray:
    if rank == 0:
        return np.array([0], np.int64)
    kind = rng.random()
    if kind < 0.4:
        chosen = [-1] if rng.random() < 0.6 else [rank - 1]
    elif kind < 0.6 and rank >= 3:
        chosen = list(range(2, rank))
    else:
        count = int(rng.integers(1, rank + 1))
        chosen = sorted(int(i) for i in rng.permutation(rank)[:count])
    return np.array(chosen, np.int64)


def _movement(
    op_type: str, index: int, data: tuple, attributes: dict, rng: Rng
) -> np.ndarray | None:
    rank = len(data)
    sizes = [d if isinstance(d, int) else 2 for d in data]
    match op_type, index:
        case "Squeeze", 1:
            ones = [i for i, d in enumerate(data) if d == 1] or [0]
            taken = ones if rng.random() < 0.4 else [ones[int(rng.integers(len(ones)))]]
            return np.array(taken, np.int64)
        case "Unsqueeze", 1:
            return np.array([int(rng.integers(-rank - 1, rank + 1))], np.int64)
        case "Slice", 1:
            return np.array([int(rng.choice([0, 0, 1, -1, -2]))], np.int64)
        case "Slice", 2:
            return np.array([int(rng.choice([1, 2, 2, -1, 2**31, 2**63 - 1]))], np.int64)
        case "Gather", 1:
            axis = int(attributes.get("axis", 0))
            size = max(1, sizes[axis]) if -rank <= axis < rank else 1
            choice = rng.random()
            if choice < 0.35:
                return np.array(int(rng.integers(-size, size)), np.int64)
            if choice < 0.6:
                return np.arange(size).astype(np.int64)
            return rng.integers(0, size, int(rng.integers(1, 4))).astype(np.int64)
        case "GatherND", 1:
            return np.zeros((int(rng.integers(1, 3)), 1), np.int64)
        case "SequenceAt", 1:
            return np.array(int(rng.integers(-1, 2)), np.int64)
        case "Pad", 1:
            pads = np.zeros(2 * rank, np.int64)
            if rng.random() < 0.5 and rank:
                pads[int(rng.integers(2 * rank))] = 1
            return pads
        case "Reshape", 1:
            return _target_shape(sizes, rng)
        case "Expand", 1:
            extra = [1] if rng.random() < 0.2 else []
            keep = rng.random() < 0.5
            return np.array(extra + [1 if keep else s for s in sizes], np.int64)
        case "Tile", 1:
            return rng.choice([1, 1, 2], rank).astype(np.int64)
    return None


def _target_shape(sizes: list[int], rng: Rng) -> np.ndarray:
    total = math.prod(sizes)
    kind = rng.random()
    if kind < 0.2:
        return np.array(sizes, np.int64)
    if kind < 0.4 and sizes:
        return np.array([0, -1], np.int64)
    if kind < 0.5:
        return np.array([-1], np.int64)
    if kind < 0.65:
        at = int(rng.integers(len(sizes) + 1))
        return np.array([*sizes[:at], 1, *sizes[at:]], np.int64)
    if kind < 0.8 and len(sizes) >= 2:
        at = int(rng.integers(len(sizes) - 1))
        merged = [*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :]]
        return np.array(merged, np.int64)
    divisor = int(rng.choice([d for d in range(1, total + 1) if total % d == 0] or [1]))
    return np.array([divisor, total // divisor if total else -1], np.int64)


def _weights(
    op_type: str, index: int, data: tuple, attributes: dict, rng: Rng
) -> np.ndarray | None:
    channels = data[1] if len(data) > 1 and isinstance(data[1], int) else 2
    groups = int(attributes.get("group", 1))
    kernel = [int(rng.choice([1, 3]))] * max(0, len(data) - 2)
    match op_type, index:
        case "Conv", 1:
            return rng.standard_normal((4, max(1, channels // groups), *kernel))
        case "ConvTranspose", 1:
            return rng.standard_normal((channels, 4 // groups, *kernel))
        case (("Conv" | "ConvTranspose"), 2):
            return rng.standard_normal(4)
        case (("BatchNormalization" | "InstanceNormalization"), _):
            return rng.standard_normal(channels)
        case (("LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization"), _):
            axis = int(attributes.get("axis", -1))
            sizes = [d for d in data[axis:] if isinstance(d, int)] if data else []
            return rng.standard_normal(sizes or [1])
        case "Gemm", 1:
            inner = data[0 if attributes.get("transA") else -1] if data else 4
            pair = (int(inner) if isinstance(inner, int) else 4, 3)
            return rng.standard_normal(pair[::-1] if attributes.get("transB") else pair)
        case "Gemm", 2:
            return rng.standard_normal([(3,), (1,), ()][rng.integers(3)])
        case "MatMul", 1:
            inner = data[-1] if data and isinstance(data[-1], int) else 4
            return rng.standard_normal((inner, 3))
    return None


def extra_inputs(
    op_type: str, have: int, inputs: Operands, attributes: dict, rng: Rng, opset: int
) -> list[np.ndarray | None]:
    """Inputs beyond those a pattern lists, where it allows them."""
    data = dims(inputs[0])
    rank = len(data)
    chance = rng.random()
    if op_type.startswith(REDUCE) and have == 1 and opset >= (13 if "Sum" in op_type else 18):
        return [some_axes(rank, rng)] if chance < 0.9 else []
    if op_type == "Slice":
        axes = np.array([int(rng.integers(-rank, rank)) if rank else 0], np.int64)
        steps = np.array([int(rng.choice([1, 1, 2, -1]))], np.int64)
        return [axes, steps][: (2 if chance < 0.4 else 1)]
    if op_type in ("Squeeze", "Unsqueeze", "Reshape", "Expand", "Tile") and have == 1:
        made = _movement(op_type, 1, data, attributes, rng)
        return [] if made is None else [made]
    if op_type in ("Conv", "ConvTranspose", "Gemm") and have == 2 and chance < 0.6:
        made = _weights(op_type, 2, data, attributes, rng)
        return [] if made is None else [made.astype(np.float32)]
    if op_type in ("LayerNormalization", "InstanceNormalization") and have < 3:
        made = [_weights(op_type, i, data, attributes, rng) for i in range(have, 3)]
        wanted = made if chance < 0.8 or op_type.startswith("Inst") else made[: max(0, 2 - have)]
        return [None if m is None else m.astype(np.float32) for m in wanted]
    if op_type == "Clip" and have == 1:
        return [np.array(0, np.float32), np.array(6, np.float32)]
    if op_type == "Split" and opset < 18 and chance < 0.5:
        return []
    return []
