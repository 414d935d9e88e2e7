"""exp, tanh, erf and what is made of them, as branch-free vector code.

LLVM turns a call of `expf` over a vector into one call a lane; these polynomials stay in vector
registers. The coefficients are our own minimax fits (iteratively reweighted least squares over
Chebyshev nodes, in double precision). Error of the float32 code, checked in
`tests/test_tvm_schedules.py`: exp 2e-7 relative (0 below -86.9, next to the subnormals),
tanh and erf 3e-7 relative. NaN stays NaN, infinities give the limits.
"""

from __future__ import annotations

from typing import Any

from .builder import Expr

_LOG2_E = 1.4426950408889634
# ln 2 in two parts (Cody and Waite), so that n * ln 2 is exact to more than float32's precision.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_EXP = (
    1.0000000005998795,
    1.0000000385305132,
    0.49999991593737436,
    0.16666410244301497,
    0.04166828880592241,
    0.008375645004364335,
    0.001383579762733107,
)
# tanh(x) / x in x**2, on [0, 0.65]
_TANH = (
    0.9999999939601172,
    -0.33333229388409447,
    0.13330416667663808,
    -0.053665362647203396,
    0.02041538756433838,
    -0.005468434930305562,
)
# erf(x) / x in x**2, on [0, 1]
_ERF_NEAR = (
    1.1283791657322944,
    -0.3761262583960587,
    0.11283585269687581,
    -0.026853816032152898,
    0.005188334439578363,
    -0.0008010247163790532,
    7.854024817126146e-05,
)
# -log(1 - erf(x)) in x, on [0.95, 4]
_ERF_FAR = (
    0.0002564366570108934,
    1.1274261249363375,
    0.6375999706433032,
    0.10356695459030048,
    -0.02205202905736,
    0.0029995490360552298,
    -0.0001915050312077336,
)


class VectorMath:
    """Expressions over float32 vectors of `lanes` (1: scalars).

    `let` names an intermediate value: a `KernelBuilder`'s, or one that makes `Let` expressions.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self._b = builder
        self._lanes = lanes
        self._tirx = builder.tirx

    def const(self, value: float) -> Expr:
        return self._b.splat(value, self._lanes)

    def let(self, value: Expr) -> Expr:
        return self._b.let(value, self._lanes)

    def select(self, condition: Expr, then: Expr, otherwise: Expr) -> Expr:
        return self._tirx.Select(condition, then, otherwise)

    def maximum(self, a: Expr, b: Expr) -> Expr:
        return self._tirx.Max(a, b)

    def minimum(self, a: Expr, b: Expr) -> Expr:
        return self._tirx.Min(a, b)

    def round(self, x: Expr) -> Expr:
        """To the nearest integer, ties to even."""
        return self._tirx.op.nearbyint(x)

    def is_nan(self, x: Expr) -> Expr:
        """By its bits: TVM simplifies x != x away."""
        tirx, lanes = self._tirx, self._lanes
        suffix = "" if lanes == 1 else f"x{lanes}"

        def integer(value: int) -> Expr:
            constant = tirx.IntImm("int32", value)
            return constant if lanes == 1 else tirx.Broadcast(constant, lanes)

        bits = tirx.reinterpret("int32" + suffix, x)
        return tirx.op.bitwise_and(bits, integer(0x7FFFFFFF)) > integer(0x7F800000)

    def polynomial(self, x: Expr, coefficients: tuple[float, ...]) -> Expr:
        value = self.const(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = value * x + self.const(coefficient)
        return value

    def exp(self, x: Expr) -> Expr:
        """2**n * exp(r) with x = n ln 2 + r and |r| <= ln 2 / 2."""
        tirx, lanes = self._tirx, self._lanes
        suffix = "" if lanes == 1 else f"x{lanes}"
        x = self.let(x)
        # One less than n goes into the exponent bits, so that n = 128 does not overflow them.
        n = self.let(tirx.op.nearbyint(x * self.const(_LOG2_E)))
        n = self.let(self.minimum(self.maximum(n, self.const(-126.0)), self.const(128.0)))
        r = self.let(x - n * self.const(_LN2_HIGH) - n * self.const(_LN2_LOW))
        bits = tirx.Cast("int32" + suffix, n + self.const(126.0))
        shift = tirx.IntImm("int32", 23)
        bits = bits << (shift if lanes == 1 else tirx.Broadcast(shift, lanes))
        scale = tirx.reinterpret("float32" + suffix, bits)
        value = self.polynomial(r, _EXP) * scale * self.const(2.0)
        return self.let(self.select(x < self.const(-86.98), self.const(0.0), value))

    def sigmoid(self, x: Expr) -> Expr:
        return self.let(self.const(1.0) / (self.const(1.0) + self.exp(self.const(0.0) - x)))

    def tanh(self, x: Expr) -> Expr:
        """A polynomial near zero (the other form cancels there), 1 - 2 / (exp(2 x) + 1) beyond."""
        x = self.let(x)
        x2 = self.let(x * x)
        near = x * self.polynomial(x2, _TANH)
        far = self.const(1.0) - self.const(2.0) / (self.exp(x + x) + self.const(1.0))
        return self.let(self.select(x2 < self.const(0.4), near, far))

    def erf(self, x: Expr) -> Expr:
        """x P(x**2) up to 1, sign(x) (1 - exp(-Q(|x|))) beyond; float32's erf is 1 from 4 on."""
        x = self.let(x)
        size = self.let(self.maximum(x, self.const(0.0) - x))
        near = x * self.polynomial(self.let(x * x), _ERF_NEAR)
        capped = self.let(self.minimum(size, self.const(4.0)))
        tail = self.const(1.0) - self.exp(self.const(0.0) - self.polynomial(capped, _ERF_FAR))
        tail = self.let(tail)
        signed = self.select(x < self.const(0.0), self.const(0.0) - tail, tail)
        # Written so that NaN takes the near branch and stays NaN.
        return self.let(self.select(size > self.const(1.0), signed, near))
