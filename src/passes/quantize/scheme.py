"""Which 8-bit scheme a pass uses: the target's preference, or one named by an option.

Here: `resolve_scheme`, `named_scheme`. Not here: what the scheme does to a graph (`plan`).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...errors import PassOptionError, UsageError
from ...ir.graph import opset_of
from ...targets.target import QuantScheme, Target

SCHEMES: dict[str, QuantScheme] = {
    "u8s8": QuantScheme(),
    "s8s8": QuantScheme(
        activation=ir.DataType.INT8, session_options={"session.qdqisint8allowed": "1"}
    ),
    "u8u8": QuantScheme(weight=ir.DataType.UINT8),
    "s16s8": QuantScheme(activation=ir.DataType.INT16, symmetric_activation=True),
}
"""The schemes an option can name: dtype of activations, then of weights."""

AUTO = "auto"


def check_scheme_name(name: str, pass_name: str) -> None:
    """Raise PassOptionError unless `name` is "auto" or a known scheme."""
    if name != AUTO and name not in SCHEMES:
        raise PassOptionError(
            f"There is no quantization scheme {name!r}",
            where=f"pass {pass_name!r}, option 'scheme'",
            fix=f"one of {AUTO}, {', '.join(SCHEMES)}",
        )


def resolve_scheme(name: str, target: Target | None) -> QuantScheme:
    """The scheme to use: "auto" is what the target prefers (u8s8 where there is no target).

    A named scheme that the target lists too is taken with the target's own details (session
    options, reduced range).

    Raises:
        UsageError: "auto", and the target runs nothing in 8-bit integers.
    """
    listed = target.quantization if target is not None else ()
    if name == AUTO:
        if target is None:
            return SCHEMES["u8s8"]
        if target.scheme is None:
            raise UsageError(
                f"The target {target.name!r} runs nothing in 8-bit integers",
                where="pass 'int8', option 'scheme'",
                why="it lists no quantization scheme",
                fix='use "weight_only" to make the model smaller, or force one with '
                'int8{scheme="u8s8"}',
            )
        return target.scheme
    wanted = SCHEMES[name]
    for scheme in listed:
        if (scheme.activation, scheme.weight) == (wanted.activation, wanted.weight):
            return scheme
    return wanted


def for_opset(scheme: QuantScheme, model: ir.Model) -> tuple[QuantScheme, tuple[str, ...]]:
    """The scheme as far as the model's opset can say it, and a note on what it can't.

    QuantizeLinear came with opset 10, its per-channel form with 13.

    Raises:
        UsageError: the opset is below 10.
    """
    opset = opset_of(model)
    if opset < 10:
        raise UsageError(
            f"Opset {opset} has no QuantizeLinear",
            where="model.opset_imports",
            why="Q/DQ pairs came with opset 10, per-channel scales with opset 13",
            fix="load the model with edgepass.load, which converts old opsets, or convert it to "
            "opset 13 or above",
        )
    if scheme.activation.bitwidth == 16:
        if opset < 21:
            raise UsageError(
                f"Opset {opset} has no 16-bit QuantizeLinear",
                where="pass 'int8', option 'scheme'",
                why="int16 came with opset 21",
                fix="export the model with opset 21 or above, or use another scheme",
            )
        why = "ONNX Runtime's CPU has no integer kernels for them: smaller weights, not faster"
        return scheme, (f"int16 activations: {why}",)
    if opset < 13 and scheme.per_channel:
        note = f"per-tensor weights: opset {opset} has no per-channel scales (13 has)"
        return dataclasses.replace(scheme, per_channel=False), (note,)
    return scheme, ()
