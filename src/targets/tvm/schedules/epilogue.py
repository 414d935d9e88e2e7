"""Elementwise work fused into a kernel: an expression DAG over the kernel's value and operands.

An `Epilogue` is plain hashable data, so that kernels with equal shapes and epilogues are generated
once. Which Relax nodes may join one is decided in `rewrite.py`; here is what each operation means
and how its operands are addressed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .builder import Expr, KernelBuilder
from .vecmath import VectorMath


@dataclasses.dataclass(frozen=True)
class Access:
    """How a tensor is addressed from a kernel's coordinates.

    `shape` is the storage shape, `strides` the step in elements of each kernel coordinate (0 where
    it is broadcast). With `vector`, consecutive lanes are consecutive elements; without, all lanes
    read the same element.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    vector: bool = True

    def offset(self, coordinates: Sequence[Expr]) -> Expr:
        """The flat element offset of the first lane."""
        terms = [
            coordinate * stride
            for coordinate, stride in zip(coordinates, self.strides, strict=True)
            if stride
        ]
        total = terms[0] if terms else 0
        for term in terms[1:]:
            total = total + term
        return total


@dataclasses.dataclass(frozen=True)
class Operand:
    """The `index`-th extra tensor of an epilogue."""

    index: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation. An input is an int (0: the kernel's value; i: the result of step i), an
    `Operand`, or a float constant."""

    op: str
    inputs: tuple[int | Operand | float, ...]
    params: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """The steps in order of execution; the last one's result is the kernel's output."""

    steps: tuple[Step, ...] = ()
    operands: tuple[Access, ...] = ()

    @property
    def heavy(self) -> bool:
        """Whether it holds a polynomial, of some forty operations, too long to be unrolled."""
        return any(step.op in _POLYNOMIALS for step in self.steps)

    def declare(self, builder: KernelBuilder) -> list[Any]:
        """Declare the operands as kernel parameters."""
        return [
            builder.param(f"operand{index}", access.shape)
            for index, access in enumerate(self.operands)
        ]

    def apply(
        self,
        builder: KernelBuilder,
        buffers: Sequence[Any],
        value: Expr,
        coordinates: Sequence[Expr],
        lanes: int,
    ) -> Expr:
        """The output for the kernel's `value` at `coordinates` (of the first lane)."""
        math = VectorMath(builder, lanes)
        values = [value]

        def resolve(source: int | Operand | float) -> Expr:
            if isinstance(source, Operand):
                access = self.operands[source.index]
                offset = access.offset(coordinates)
                buffer = buffers[source.index]
                if access.vector:
                    return builder.load(buffer, offset, lanes)
                return builder.splat(builder.load(buffer, offset, 1), lanes)
            if isinstance(source, float):
                return math.const(source)
            return values[source]

        for step in self.steps:
            inputs = [resolve(source) for source in step.inputs]
            result = OPERATIONS[step.op](math, inputs, step.params)
            values.append(builder.let(result, lanes))
        return values[-1]


NO_EPILOGUE = Epilogue()

_Operation = Callable[[VectorMath, list[Expr], tuple[float, ...]], Expr]


def _gelu(m: VectorMath, x: list[Expr], _: tuple[float, ...]) -> Expr:
    return x[0] * m.const(0.5) * (m.const(1.0) + m.erf(x[0] * m.const(0.7071067811865476)))


def _gelu_tanh(m: VectorMath, x: list[Expr], _: tuple[float, ...]) -> Expr:
    inner = x[0] * (m.const(1.0) + m.const(0.044715) * x[0] * x[0])
    return x[0] * m.const(0.5) * (m.const(1.0) + m.tanh(inner * m.const(0.7978845608028654)))


def _leaky(m: VectorMath, x: list[Expr], params: tuple[float, ...]) -> Expr:
    return m.select(x[0] > m.const(0.0), x[0], x[0] * m.const(params[0]))


def _clip(m: VectorMath, x: list[Expr], params: tuple[float, ...]) -> Expr:
    return m.minimum(m.maximum(x[0], m.const(params[0])), m.const(params[1]))


def _fake_quantize(m: VectorMath, x: list[Expr], params: tuple[float, ...]) -> Expr:
    """Round to even, clip and rescale; params are the scale and the limits less the zero point."""
    scale, low, high = params
    steps = m.round(x[0] / m.const(scale))
    return m.minimum(m.maximum(steps, m.const(low)), m.const(high)) * m.const(scale)


def _sqrt(m: VectorMath, x: Expr) -> Expr:
    from tvm import tirx

    return tirx.sqrt(x)


# By Relax operator name without its prefix; `nan_to` and `fake_quantize` are made by `graph.py`.
OPERATIONS: dict[str, _Operation] = {
    "add": lambda m, x, p: x[0] + x[1],
    "subtract": lambda m, x, p: x[0] - x[1],
    "multiply": lambda m, x, p: x[0] * x[1],
    "divide": lambda m, x, p: x[0] / x[1],
    "maximum": lambda m, x, p: m.maximum(x[0], x[1]),
    "minimum": lambda m, x, p: m.minimum(x[0], x[1]),
    "relu": lambda m, x, p: m.maximum(x[0], m.const(0.0)),
    "clip": _clip,
    "sigmoid": lambda m, x, p: m.sigmoid(x[0]),
    "silu": lambda m, x, p: x[0] * m.sigmoid(x[0]),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": lambda m, x, p: m.tanh(x[0]),
    "erf": lambda m, x, p: m.erf(x[0]),
    "exp": lambda m, x, p: m.exp(x[0]),
    "negative": lambda m, x, p: m.const(0.0) - x[0],
    "square": lambda m, x, p: x[0] * x[0],
    "sqrt": lambda m, x, p: _sqrt(m, x[0]),
    "abs": lambda m, x, p: m.maximum(x[0], m.const(0.0) - x[0]),
    "leakyrelu": _leaky,
    "fake_quantize": _fake_quantize,
    "nan_to": lambda m, x, p: m.select(m.is_nan(x[0]), m.const(p[0]), x[0]),
}
_POLYNOMIALS = frozenset({"sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "erf", "exp"})
# Operations whose result on the zeros of padding channels may be infinite or NaN, which would
# poison the zero weights that meet them later. They stay out of the blocked layout.
UNSAFE_ON_PADDING = frozenset({"divide"})
