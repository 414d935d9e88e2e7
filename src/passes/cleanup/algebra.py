"""Algebraic identities and forms with fewer operators.

Here: arithmetic with constants merged, bounds merged, signs and reciprocals moved into the operator
next to them, conditions that are constant, casts that lose nothing. Not here: operators that
change nothing by themselves (`identities`), constants that meet weights (`fuse.affine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import attribute, constant_array, constant_scalar, dims_of, static_shape
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context, Stage
from ..rules import RewriteRule, RuleGroup
from .conditions import CleanupRule, attributes_of, must_stay, same_shape, uniform

_MAX_ELEMENTS = 1 << 16


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


@dataclasses.dataclass(frozen=True)
class MergeFactors(CleanupRule):
    """(x * a) * b -> x * (a * b), a and b constant; with Div, a factor of 1 / a. Floats only.

    Refused where the product of the constants overflows or vanishes.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x, a, b = var("x"), const("a"), const("b")
        forms = []
        for inner in (op.Mul(x, a, _name="inner"), op.Div(x, a, _name="inner")):
            forms += [op.Mul(inner, b), op.Div(inner, b)]
        return tuple(forms)

    def check(self, m: Match, context: Context) -> str | None:
        if not _is_float(m.root.outputs[0]):
            return "integers overflow and truncate"
        if self._constant(m) is None:
            return "the constants are large, or their product is no normal number"
        if not same_shape(m["x"], m.root.outputs[0]) and static_shape(m["a"]) != ():
            return "a constant widens x"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        constant = self._constant(m)
        assert constant is not None
        value: ir.Value = build.Mul(m["x"], constant)
        return value

    @staticmethod
    def _constant(m: Match) -> np.ndarray | None:
        a, b = (constant_array(m[name], _MAX_ELEMENTS) for name in ("a", "b"))
        if a is None or b is None or a.dtype != b.dtype or a.dtype not in (np.float32, np.float64):
            return None
        with np.errstate(all="ignore"):
            first = 1.0 / a.astype(np.float64) if m.node("inner").op_type == "Div" else a
            second = 1.0 / b.astype(np.float64) if m.root.op_type == "Div" else b
            product = first.astype(np.float64) * second
            if product.size > max(a.size, b.size):
                return None
            normal = np.abs(product) >= np.finfo(a.dtype).tiny
            single = [np.abs(f) >= np.finfo(a.dtype).tiny for f in (first, second)]
            result = product.astype(a.dtype)
        sound = np.isfinite(result).all() and normal.all() and all(s.all() for s in single)
        return result if sound else None


@dataclasses.dataclass(frozen=True)
class MergeSummands(CleanupRule):
    """(x + a) + b -> x + (a + b), a and b constant; with Sub, a summand of -a.

    Refused where floats of opposite signs nearly cancel: x + a may have lost what is left.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x, a, b = var("x"), const("a"), const("b")
        forms = []
        for inner in (op.Add(x, a, _name="inner"), op.Sub(x, a, _name="inner")):
            forms += [op.Add(inner, b), op.Sub(inner, b)]
        return tuple(forms)

    def check(self, m: Match, context: Context) -> str | None:
        if self._constant(m) is None:
            return "the constants are large, cancel, or widen each other"
        if not same_shape(m["x"], m.root.outputs[0]) and static_shape(m["a"]) != ():
            return "a constant widens x"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        constant = self._constant(m)
        assert constant is not None
        value: ir.Value = build.Add(m["x"], constant)
        return value

    @staticmethod
    def _constant(m: Match) -> np.ndarray | None:
        a, b = (constant_array(m[name], _MAX_ELEMENTS) for name in ("a", "b"))
        if a is None or b is None or a.dtype != b.dtype:
            return None
        if a.dtype.kind == "f":
            if a.dtype not in (np.float32, np.float64):
                return None
            a, b = a.astype(np.float64), b.astype(np.float64)
        elif a.dtype not in (np.int32, np.int64):
            return None
        with np.errstate(all="ignore"):
            first = -a if m.node("inner").op_type == "Sub" else a
            second = -b if m.root.op_type == "Sub" else b
            total = first + second
        if total.size > max(a.size, b.size):
            return None
        if a.dtype.kind == "f":
            larger = np.maximum(np.abs(first), np.abs(second))
            if not (np.abs(total) >= 0.5 * larger).all() or not np.isfinite(total).all():
                return None
        source = constant_array(m["a"])
        assert source is not None
        result: np.ndarray = total.astype(source.dtype)
        return result


@dataclasses.dataclass(frozen=True)
class MoveSign(CleanupRule):
    """x + Neg(y) -> x - y; x - Neg(y) -> x + y. Not Neg(x - y), whose zeros have another sign."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x, y = var("x"), var("y")
        return op.Add(x, op.Neg(y)), op.Sub(x, op.Neg(y))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = (build.Sub if m.root.op_type == "Add" else build.Add)(m["x"], m["y"])
        return value


@dataclasses.dataclass(frozen=True)
class DivideByFactor(CleanupRule):
    """x * Reciprocal(y) -> x / y, and x * (1 / y) -> x / y."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x, y = var("x"), var("y")
        return op.Mul(x, op.Reciprocal(y)), op.Mul(x, op.Div(const("one"), y))

    def check(self, m: Match, context: Context) -> str | None:
        if not _is_float(m.root.outputs[0]):
            return "integers truncate"
        if "one" in m.values and (m.array("one").ndim or m.array("one") != 1):
            return "what is divided is not the number 1"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Div(m["x"], m["y"])
        return value


@dataclasses.dataclass(frozen=True)
class MergeBounds(CleanupRule):
    """Relu and Clip of Relu or Clip, with constant bounds -> one Clip.

    Clip(Clip(x, a, b), c, d) is Clip(x, e, f) with e and f the inner bounds clipped by the outer.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        inner = op.one_of(("Relu", "Clip"), var("x"), _rest=True, _name="inner")
        return (
            op.Clip(inner, _rest=True, _name="outer"),
            op.Relu(op.Clip(var("x"), _rest=True, _name="inner"), _name="outer"),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if self._bounds(m) is None:
            return "a bound is not constant"
        return None if _is_float(m["x"]) else "it computes with integers"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        bounds, dtype = self._bounds(m), m["x"].dtype
        assert bounds is not None
        assert dtype is not None
        low, high = (
            None if np.isinf(b) else np.array(b, np.float64).astype(dtype.numpy()) for b in bounds
        )
        value: ir.Value
        if high is None and low is not None and low == 0:
            value = build.Relu(m["x"])
        else:
            value = build.Clip(m["x"], low, high)
        return value

    @staticmethod
    def _bounds(m: Match) -> tuple[float, float] | None:
        first, second = _clip_bounds(m.node("inner")), _clip_bounds(m.node("outer"))
        if first is None or second is None:
            return None
        low, high = (float(np.minimum(np.maximum(b, second[0]), second[1])) for b in first)
        return (low, high) if low <= high else None


def _clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Relu or a Clip, infinite where there is none; None if not constant."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [float("-inf"), float("inf")]
    for i, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        number = constant_scalar(value)
        if number is None or np.isnan(number):
            return None
        bounds[i] = float(number)
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None


@dataclasses.dataclass(frozen=True)
class SameOperands(CleanupRule):
    """Max(x, x), Min(x, x), And(x, x), Or(x, x), Where(c, x, x) -> x, where c does not widen x."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        two = tuple(op.one_of((name,), x, x) for name in ("Max", "Min", "And", "Or"))
        return (*two, op.Where(var("c"), x, x))

    def check(self, m: Match, context: Context) -> str | None:
        if not same_shape(m["x"], m.root.outputs[0]) and m.root.op_type == "Where":
            return "the condition widens x, or a shape is not known"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class KnownCondition(CleanupRule):
    """Where(true, x, y) -> x, Where(false, x, y) -> y; And(x, true), Or(x, false) -> x, where no
    shape changes; Where(Not(c), x, y) -> Where(c, y, x)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return (
            op.Where(op.Not(var("not")), var("x"), var("y")),
            op.Where(const("c"), var("x"), var("y")),
            op.one_of(("And",), var("x"), const("c")),
            op.one_of(("Or",), var("x"), const("c")),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if "not" in m.values:
            return None
        chosen = self._chosen(m)
        if chosen is None:
            return "the condition is not the same everywhere, or decides the result"
        if not same_shape(chosen, m.root.outputs[0]):
            return "the other operand widens it, or a shape is not known"
        return must_stay(m.root.outputs[0], chosen)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        if "not" in m.values:
            value: ir.Value = build.Where(m["not"], m["y"], m["x"])
            return value
        chosen = self._chosen(m)
        assert chosen is not None
        return chosen

    @staticmethod
    def _chosen(m: Match) -> ir.Value | None:
        condition = uniform(m["c"])
        if condition is None:
            return None
        if m.root.op_type == "Where":
            return m["x"] if condition else m["y"]
        return m["x"] if bool(condition) == (m.root.op_type == "And") else None


_RANGES: dict[ir.DataType, tuple[int, int]] = {
    # bits of the integers that are exact, and of the exponent's range where it has one
    ir.DataType.BOOL: (1, 0),
    ir.DataType.UINT8: (8, 0),
    ir.DataType.INT8: (7, 0),
    ir.DataType.UINT16: (16, 0),
    ir.DataType.INT16: (15, 0),
    ir.DataType.INT32: (31, 0),
    ir.DataType.INT64: (63, 0),
    ir.DataType.FLOAT16: (11, 5),
    ir.DataType.BFLOAT16: (8, 8),
    ir.DataType.FLOAT: (24, 8),
    ir.DataType.DOUBLE: (53, 11),
}
_UNSIGNED = frozenset({ir.DataType.BOOL, ir.DataType.UINT8, ir.DataType.UINT16})


def _holds(wide: ir.DataType | None, narrow: ir.DataType | None) -> bool:
    """Whether each value of `narrow` is one of `wide`, and so converting loses nothing."""
    if wide not in _RANGES or narrow not in _RANGES or wide is None or narrow is None:
        return False
    if wide == narrow:
        return True
    if wide == ir.DataType.BOOL or (_RANGES[narrow][1] and not _RANGES[wide][1]):
        return False
    if wide in _UNSIGNED and narrow not in _UNSIGNED:
        return False
    bits, exponent = _RANGES[narrow]
    if wide == ir.DataType.FLOAT16 and narrow == ir.DataType.UINT16:
        return False
    return _RANGES[wide][0] >= bits and _RANGES[wide][1] >= exponent


@dataclasses.dataclass(frozen=True)
class MergeCasts(CleanupRule):
    """Cast(Cast(x, wider), to) -> Cast(x, to), or x where that is its dtype; the first loses
    nothing."""

    def pattern(self) -> OpPattern:
        return op.Cast(op.Cast(var("x"), _name="inner", _shared=True), _name="outer")

    def check(self, m: Match, context: Context) -> str | None:
        source, middle = m["x"].dtype, m.node("inner").outputs[0].dtype
        result = m.root.outputs[0].dtype
        if not _holds(middle, source):
            return (
                f"converting {source} to {middle} loses something, or is not known to lose nothing"
            )
        if result is None:
            return "the dtype of the result is not known"
        if result == source:
            return must_stay(m.root.outputs[0], m["x"])
        if result.is_floating_point() or result == ir.DataType.BOOL or _holds(result, source):
            return None
        if _is_float(m.node("inner").outputs[0]):
            return "what does not fit depends on the dtype that it is converted from"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        result = m.root.outputs[0].dtype
        assert result is not None
        if result == m["x"].dtype:
            return m["x"]
        value: ir.Value = build.Cast(m["x"], **attributes_of(m.root))
        value.dtype = result
        return value


@dataclasses.dataclass(frozen=True)
class RemoveResize(CleanupRule):
    """Resize or Upsample by 1 to the same shape -> x; pooling of windows of one element -> x."""

    def pattern(self) -> OpPattern:
        ops = ("Resize", "Upsample", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
        return op.one_of(ops, var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        node = m.root
        if not same_shape(m["x"], node.outputs[0]):
            return "the shape changes, or is not known"
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            return "its indices are used"
        reason = (self._refuse_resize if node.op_type in ("Resize", "Upsample") else _refuse_pool)(
            node
        )
        return reason or must_stay(node.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        return (m["x"], *([None] * (len(m.root.outputs) - 1)))

    @staticmethod
    def _refuse_resize(node: ir.Node) -> str | None:
        mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
        if mode not in ("half_pixel", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"):
            return f"{mode} may move what it keeps"
        policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
        if attribute(node, "antialias", 0) or policy != "stretch":
            return "it filters, or chooses the sizes itself"
        if mode == "pytorch_half_pixel" and 1 in (static_shape(node.outputs[0]) or (1,)):
            return "a size of 1 is special"
        scales = node.inputs[2] if len(node.inputs) > 2 else None
        if scales is not None and (static_shape(scales) or (0,))[0]:
            return None if uniform(scales) == 1 else "a scale is not 1"
        if static_shape(node.inputs[0]) is None:
            return "a size is not known"
        return None


def _refuse_pool(node: ir.Node) -> str | None:
    dims = dims_of(node.inputs[0]) or ()
    if node.op_type.startswith("Global"):
        return None if all(d == 1 for d in dims[2:]) else "there is more than one element"
    if any(k != 1 for k in attribute(node, "kernel_shape", (0,))):
        return "the window has more than one element"
    if any(s != 1 for s in attribute(node, "strides", (1,))) or any(attribute(node, "pads", ())):
        return "it steps or pads"
    return None


@dataclasses.dataclass(frozen=True)
class PadIntoConv(CleanupRule):
    """Conv(Pad(x, zeros around the spatial axes)) -> Conv(x, pads); AveragePool likewise, which
    then counts what is padded; MaxPool where it pads with -inf."""

    def pattern(self) -> OpPattern:
        pad = op.Pad(var("x"), const("pads"), _rest=True, _name="pad")
        return op.one_of(("Conv", "AveragePool", "MaxPool"), pad, _rest=True, _name="window")

    def check(self, m: Match, context: Context) -> str | None:
        pad, window = m.node("pad"), m.node("window")
        if attribute(pad, "mode", "constant") != "constant":
            return "it does not pad with a constant"
        if self._pads(m) is None:
            return "it pads the batch or the channels, or cuts"
        if attribute(window, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return "the window's own padding depends on the shape"
        value = pad.inputs[2] if len(pad.inputs) > 2 else None
        fill = 0.0 if value is None else constant_scalar(value)
        wanted = float("-inf") if window.op_type == "MaxPool" else 0.0
        if fill != wanted:
            return f"it pads with {fill}, not {wanted}"
        if window.op_type == "Conv":
            return None
        own = attribute(window, "pads", ())
        if attribute(window, "ceil_mode", 0) or (window.op_type == "AveragePool" and any(own)):
            return "the window's own padding counts otherwise"
        if len(window.outputs) > 1:
            return "its indices count what is padded"
        sizes = [*attribute(window, "kernel_shape")] * 2
        if any(d != 1 for d in attribute(window, "dilations", ())) or any(
            p >= k for p, k in zip(self._pads(m) or (), sizes, strict=True)
        ):
            return "it pads as much as the window is wide"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        window, pads = m.node("window"), self._pads(m)
        assert pads is not None
        options: dict[str, Any] = attributes_of(window)
        own = attribute(window, "pads", (0,) * len(pads))
        options["pads"] = [a + b for a, b in zip(own, pads, strict=True)]
        options.pop("auto_pad", None)
        if window.op_type == "AveragePool":
            options["count_include_pad"] = 1
        return build.node(window.op_type, m["x"], *window.inputs[1:], **options).outputs[0]

    @staticmethod
    def _pads(m: Match) -> tuple[int, ...] | None:
        """The spatial pads, all beginnings and then all ends."""
        x, pad = dims_of(m["x"]), m.node("pad")
        if x is None or len(x) < 3:
            return None
        rank = len(x)
        given = [int(p) for p in m.array("pads").reshape(-1)]
        axes: Sequence[int] = range(rank)
        if len(pad.inputs) > 3 and pad.inputs[3] is not None:
            found = constant_array(pad.inputs[3], 64)
            if found is None:
                return None
            axes = [int(a) % rank for a in found.reshape(-1)]
        begin, end = [0] * rank, [0] * rank
        for i, axis in enumerate(axes):
            begin[axis], end[axis] = given[i], given[len(axes) + i]
        if any(begin[:2]) or any(end[:2]) or min(begin + end) < 0:
            return None
        return (*begin[2:], *end[2:])


@dataclasses.dataclass(frozen=True)
class TransposedProduct(CleanupRule):
    """MatMul of Transposes: Transpose(MatMul(Transpose(a), Transpose(b))) -> MatMul(b, a), for the
    last two axes."""

    def pattern(self) -> OpPattern:
        product = op.MatMul(op.Transpose(var("a"), _name="p"), op.Transpose(var("b"), _name="q"))
        return op.Transpose(product, _name="r")

    def check(self, m: Match, context: Context) -> str | None:
        for name in ("p", "q", "r"):
            perm = m.attribute(name, "perm")
            if perm is None or list(perm[:-2]) != list(range(len(perm) - 2)):
                return "a perm moves other axes than the last two, or is not written out"
            if len(perm) < 2 or tuple(perm[-2:]) != (len(perm) - 1, len(perm) - 2):
                return "a perm does not exchange the last two axes"
        ranks = {len(m.attribute(name, "perm")) for name in ("p", "q", "r")}
        return None if len(ranks) == 1 else "the ranks differ"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.MatMul(m["b"], m["a"])
        return value


@dataclasses.dataclass(frozen=True)
class Algebra(RuleGroup):
    """Rewrites arithmetic into forms with fewer operators.

    Relu(Clip(x, -1, 6)), Conv(Pad(x)), x + Neg(y)   ->   Clip(x, 0, 6), Conv(x), x - y

    Constants are merged later (`FoldLinear`): the fusions look for them one by one.
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        MoveSign,
        MergeBounds,
        SameOperands,
        KnownCondition,
        MergeCasts,
        RemoveResize,
        PadIntoConv,
        TransposedProduct,
    )
