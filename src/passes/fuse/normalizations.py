"""Normalizations that exporters spell out, as the one operator that runtimes have.

Here: LayerNorm (over the last axes, or over channels in front), RMSNorm, InstanceNorm, each first
without scale and bias, which two more rules then take in. Not here: softmax and norms (`softmax`),
BatchNorm (`affine`), and what only one runtime fuses (`passes.lower`). A variance as
E[x^2] - E[x]^2 is left alone: it rounds otherwise, and may be negative.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    AbsentTensor,
    Dim,
    constant_array,
    constant_scalar,
    constant_tensor,
    dims_of,
    static_shape,
)
from ...ir.match import AnyOf, Match, OpPattern, ValuePattern, any_of, const, op, var
from ..base import Context, Stage
from ..operators import missing_operator
from ..rules import RewriteRule, RuleGroup
from .softmax import LogSoftmaxForm, NormForm, SoftmaxForm, reduced_axes

MAX_ONES = 1 << 14
"""Elements of a scale of ones that a normalization without one is given, at most."""


def _deviations(square_mean: ValuePattern, numerator: ValuePattern) -> Iterable[OpPattern]:
    """numerator / Sqrt(square_mean + eps), as division or as product with the reciprocal."""
    shifted = op.Add(square_mean, const("eps"))
    root = any_of(op.Sqrt(shifted), op.Pow(shifted, 0.5))
    inverse = any_of(op.Reciprocal(root), op.Pow(shifted, -0.5), op.Div(1.0, root))
    yield op.Div(numerator, root)
    yield op.Mul(numerator, inverse)


def _square(value: ValuePattern) -> AnyOf:
    return any_of(op.Pow(value, 2.0), op.Mul(value, value))


def _check_epsilon(m: Match) -> str | None:
    epsilon = constant_scalar(m["eps"])
    if epsilon is None or len(m["eps"].shape or ()) > len(dims_of(m["x"]) or ()):
        return "epsilon is not one number"
    if m["x"].dtype == ir.DataType.DOUBLE and epsilon > 1e-3 and np.float32(epsilon) != epsilon:
        return "epsilon, an attribute, would be rounded to float32, and it is not small"
    return None if epsilon >= 0 else "epsilon is negative"


def _check_means(m: Match, names: Sequence[str]) -> str | tuple[int, ...]:
    """The axes over which all the means are taken, which keep their dimensions, or why not."""
    dims = dims_of(m["x"])
    if not dims:
        return "the input's rank is not known"
    if m["x"].dtype is None or not m["x"].dtype.is_floating_point():
        return "it does not compute in a float type"
    found: set[tuple[int, ...]] = set()
    for name in names:
        axes = reduced_axes(m.node(name), len(dims))
        if axes is None:
            return f"the axes of the {name} are not known"
        if not m.attribute(name, "keepdims", 1):
            return f"the {name} does not keep its dimension"
        found.add(axes)
    return found.pop() if len(found) == 1 else "the means are over different axes"


def _trailing(axes: tuple[int, ...], rank: int) -> bool:
    return bool(axes) and axes == tuple(range(axes[0], rank))


def _sizes(dims: Sequence[Dim]) -> list[int]:
    """Those of the dimensions that are known."""
    return [d for d in dims if isinstance(d, int)]


def _ones(m: Match, dims: Sequence[Dim]) -> np.ndarray:
    assert m["x"].dtype is not None
    return np.ones(_sizes(dims), m["x"].dtype.numpy())


def _epsilon(m: Match) -> float:
    return float(constant_scalar(m["eps"]) or 0.0)


def _cannot_scale(dims: Sequence[Dim], least: int = 2) -> str | None:
    """Why no scale of ones can be made for these dimensions, `least` elements at the least."""
    if len(_sizes(dims)) < len(dims):
        return "a normalized axis has no known size"
    count = math.prod(_sizes(dims))
    return f"a scale would have {count} elements" if not least <= count <= MAX_ONES else None


def _centred(x: ValuePattern) -> tuple[OpPattern, ...]:
    """(x - mean) / Sqrt(mean of squares + eps)."""
    centred = op.Sub(x, op.ReduceMean(x, _rest=True, _name="mean"))
    variance = op.ReduceMean(_square(centred), _rest=True, _name="variance")
    return tuple(_deviations(variance, centred))


@dataclasses.dataclass(frozen=True)
class LayerNormForm(RewriteRule):
    """(x - mean) / Sqrt(variance + eps) over the last axes -> LayerNormalization(x, ones).

    Over the channels of (N, C, ...): between two Transposes, which is 1.8 to 2.3 times as fast as
    the nodes spelled out (x86-64, one thread, (1, 64, 56, 56) and (1, 256, 14, 14)).
    Ba et al. 2016, arXiv:1607.06450, equation 4.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        return _centred(var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        axes = _check_means(m, ("mean", "variance"))
        if isinstance(axes, str):
            return axes
        dims = dims_of(m["x"])
        assert dims is not None
        if not _trailing(axes, len(dims)) and axes != (1,):
            return f"the mean is over axes {list(axes)}, neither the last ones nor the channels"
        return (
            _cannot_scale([dims[a] for a in axes])
            or _check_epsilon(m)
            or missing_operator(context, "LayerNormalization", (m["x"], m["x"]))
        )

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        axes = _check_means(m, ("mean", "variance"))
        assert dims is not None
        assert not isinstance(axes, str)
        epsilon = _epsilon(m)
        if _trailing(axes, len(dims)):
            ones, axis = _ones(m, [dims[a] for a in axes]), axes[0] - len(dims)
            return build.node(
                "LayerNormalization", m["x"], ones, axis=axis, epsilon=epsilon
            ).outputs[0]
        there = [0, *range(2, len(dims)), 1]
        back = [0, len(dims) - 1, *range(1, len(dims) - 1)]
        last = build.Transpose(m["x"], perm=there)
        normal = build.LayerNormalization(last, _ones(m, [dims[1]]), axis=-1, epsilon=epsilon)
        for inner in (last, normal):
            inner.type, inner.shape = m["x"].type, ir.Shape([dims[i] for i in there])
        value: ir.Value = build.Transpose(normal, perm=back)
        value.type, value.shape = m["x"].type, ir.Shape(list(dims))
        return value


@dataclasses.dataclass(frozen=True)
class InstanceNormForm(RewriteRule):
    """(x - mean) / Sqrt(variance + eps) over all spatial axes -> InstanceNormalization(x, 1, 0).

    Where a scale over the spatial axes follows it is a LayerNorm instead. Ulyanov et al. 2016,
    arXiv:1607.08022, equation 4.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        return _centred(var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        axes = _check_means(m, ("mean", "variance"))
        if isinstance(axes, str):
            return axes
        dims = dims_of(m["x"])
        assert dims is not None
        if len(dims) < 3 or axes != tuple(range(2, len(dims))):
            return f"the mean is over axes {list(axes)}, not over all from 2 on"
        scale = _next_constant(m.root.outputs[0], "Mul")
        if scale is None and len(dims) == 3:
            return "without a scale it is a LayerNorm over the last axis"
        if scale is not None and scale[-1:] != (1,):
            return "its scale is not one number per channel"
        given = (m["x"], m["x"], m["x"])
        return (
            _cannot_scale([dims[1]], 1)
            or _check_epsilon(m)
            or missing_operator(context, "InstanceNormalization", given)
        )

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        assert dims is not None
        ones = _ones(m, [dims[1]])
        value: ir.Value = build.InstanceNormalization(
            m["x"], ones, np.zeros_like(ones), epsilon=_epsilon(m)
        )
        return value


def _next_constant(value: ir.Value, op_type: str) -> tuple[int, ...] | None:
    """The shape of the constant that the only user, an `op_type`, combines the value with."""
    users = list(value.consumers())
    if len(users) != 1 or users[0].op_type != op_type:
        return None
    others = [v for v in users[0].inputs if v is not value and constant_tensor(v) is not None]
    return static_shape(others[0]) if len(others) == 1 else None


@dataclasses.dataclass(frozen=True)
class RmsNormForm(RewriteRule):
    """x / Sqrt(mean of x^2 + eps) over the last axes -> RMSNormalization(x, ones).

    Below opset 23 the operator that ONNX Runtime itself writes for it, SimplifiedLayerNormalization
    of the standard domain (last axis only). Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        mean = op.ReduceMean(_square(x), _rest=True, _name="mean")
        return tuple(_deviations(mean, x))

    def check(self, m: Match, context: Context) -> str | None:
        axes = _check_means(m, ("mean",))
        if isinstance(axes, str):
            return axes
        dims = dims_of(m["x"])
        assert dims is not None
        if not _trailing(axes, len(dims)):
            return f"the mean is over axes {list(axes)}, not the last ones"
        operator = _rms_operator(context.opsets.get("", 0))
        if operator != "RMSNormalization" and len(axes) > 1:
            return "the mean is over several axes, and RMSNormalization is new in opset 23"
        return (
            _cannot_scale([dims[a] for a in axes])
            or _check_epsilon(m)
            or missing_operator(context, operator, (m["x"], m["x"]))
        )

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        axes = _check_means(m, ("mean",))
        assert dims is not None
        assert not isinstance(axes, str)
        ones = _ones(m, [dims[a] for a in axes])
        operator = _rms_operator(build.opset)
        return build.node(
            operator,
            m["x"],
            ones,
            axis=axes[0] - len(dims),
            epsilon=_epsilon(m),
            stash_type=None if operator == "RMSNormalization" else 1,
        ).outputs[0]


def _rms_operator(opset: int) -> str:
    return "RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"


# --- scale and bias --------------------------------------------------------------------------

_NORMS = (
    "LayerNormalization",
    "InstanceNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
)
_BIASED = ("LayerNormalization", "InstanceNormalization")


def _normal(names: Sequence[str]) -> AnyOf:
    """A normalization, or one whose result is transposed."""
    inner = op.one_of(tuple(names), var("x"), const("scale", data=False), _rest=True, _name="norm")
    return any_of(inner, op.Transpose(inner, _name="transpose"))


def _parameter(m: Match, value: ir.Value) -> tuple[int, ...] | None:
    """The norm's parameter shape when `value` of the match fits it, entry by entry, else None.

    `value` broadcasts against the norm's result, or against its transpose.
    """
    norm = m.node("norm")
    wanted, given = static_shape(m["scale"]), static_shape(value)
    dims = dims_of(m["x"])
    if wanted is None or given is None or dims is None or len(given) > len(dims):
        return None
    padded = (1,) * (len(dims) - len(given)) + given
    if "transpose" in m.nodes:
        perm = m.attribute("transpose", "perm")
        if perm is None or len(perm) != len(dims):
            return None
        padded = tuple(padded[perm.index(i)] for i in range(len(dims)))
    if norm.op_type == "InstanceNormalization":
        full = (1, *wanted, *(1,) * (len(dims) - 2))
    else:
        full = (1,) * (len(dims) - len(wanted)) + wanted
    return wanted if padded == full else None


def _is_filled(value: ir.Value | None, number: float) -> bool:
    data = constant_array(value)
    return data is not None and bool((data == number).all())


def _rebuild(m: Match, build: Builder, *parameters: ir.Value | np.ndarray | None) -> ir.Value:
    """The norm with other parameters, and the transposition behind it."""
    norm = m.node("norm")
    options = {a.name: a.value for a in norm.attributes.values()}
    value = build.node(norm.op_type, m["x"], *parameters, **options).outputs[0]
    if "transpose" in m.nodes:
        value.type, value.shape = norm.outputs[0].type, norm.outputs[0].shape
        moved: ir.Value = build.Transpose(value, perm=m.attribute("transpose", "perm"))
        return moved
    return value


def _bias(m: Match) -> ir.Value | None:
    norm = m.node("norm")
    return norm.inputs[2] if len(norm.inputs) > 2 else None


def _normalizes_several(m: Match) -> bool:
    """Whether more than one element shares a mean: with one, only rounding is left to scale."""
    if m.node("norm").op_type != "InstanceNormalization":
        return math.prod(static_shape(m["scale"]) or (1,)) > 1
    spatial = (dims_of(m["x"]) or ())[2:]
    return math.prod(_sizes(spatial)) > 1


def _check_norm(m: Match, name: str) -> str | None:
    if any(v.uses() or v.is_graph_output() for v in m.node("norm").outputs[1:]):
        return "the mean or the deviation is used too"
    if m[name].dtype != m["scale"].dtype:
        return "the types differ"
    if not _normalizes_several(m):
        return "one element alone may be normalized: its deviation from itself is rounding only"
    shape = _parameter(m, m[name])
    if shape is None:
        return f"the {name} of shape {static_shape(m[name])} is not the normalized shape"
    return None


@dataclasses.dataclass(frozen=True)
class NormScale(RewriteRule):
    """Mul(Norm(x, s, b), k) -> Norm(x, s * k, b * k), k constant; s ones where k has no data."""

    def pattern(self) -> OpPattern:
        return op.Mul(_normal(_NORMS), const("factor", data=False))

    def check(self, m: Match, context: Context) -> str | None:
        bias = _bias(m)
        known = all(constant_array(v) is not None for v in (m["scale"], bias, m["factor"]) if v)
        plain = _is_filled(m["scale"], 1) and (bias is None or _is_filled(bias, 0))
        if not plain and not known:
            return "the normalization has a scale already, and its data is absent"
        return _check_norm(m, "factor")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        bias = _bias(m)
        factor = _with_shape(m["factor"], static_shape(m["scale"]) or (), build)
        if _is_filled(m["scale"], 1) and (bias is None or _is_filled(bias, 0)):
            return _rebuild(m, build, factor, *(() if bias is None else (bias,)))
        k = m.array("factor").reshape(m.array("scale").shape)
        scaled = [constant_array(v) for v in (m["scale"], bias) if v is not None]
        return _rebuild(m, build, *(a * k for a in scaled if a is not None))


@dataclasses.dataclass(frozen=True)
class NormBias(RewriteRule):
    """Add(Norm(x, s, b), k) -> Norm(x, s, b + k), k constant; b is 0 where k has no data."""

    def pattern(self) -> OpPattern:
        return op.Add(_normal(_BIASED), const("summand", data=False))

    def check(self, m: Match, context: Context) -> str | None:
        bias = _bias(m)
        known = constant_array(bias) is not None and constant_array(m["summand"]) is not None
        if bias is not None and not _is_filled(bias, 0) and not known:
            return "the normalization has a bias already, and the data is absent"
        return _check_norm(m, "summand")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        bias, shape = _bias(m), static_shape(m["scale"]) or ()
        if bias is None or _is_filled(bias, 0):
            return _rebuild(m, build, m["scale"], _with_shape(m["summand"], shape, build))
        total = m.array("summand").reshape(shape) + np.asarray(constant_array(bias))
        return _rebuild(m, build, m["scale"], total)


def _with_shape(value: ir.Value, shape: tuple[int, ...], build: Builder) -> ir.Value | np.ndarray:
    """The constant in another shape of as many elements; without data if it has none."""
    if static_shape(value) == shape:
        return value
    data = constant_array(value)
    if data is not None:
        return data.reshape(shape)
    assert value.dtype is not None
    return build.initializer("weight", AbsentTensor("weight", value.dtype, shape))


@dataclasses.dataclass(frozen=True)
class FuseNormalizations(RuleGroup):
    """Recognizes normalizations that exporters spell out.

    (x - mean) / Sqrt(variance + eps) * scale + bias   ->   LayerNormalization(x, scale, bias)
    """

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        InstanceNormForm,
        LayerNormForm,
        RmsNormForm,
        NormScale,
        NormBias,
        SoftmaxForm,
        LogSoftmaxForm,
        NormForm,
    )
