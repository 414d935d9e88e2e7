"""What ONNX Runtime's CPU provider has kernels for, asked of the installed wheel.

Here: `kernel_support`, `ort_supports`, `highest_opset`. Not here: sessions (`onnxruntime`), and
what is *fast* on a device (`support`, the target's own table).
The answer is the host's: an arm64 wheel has some float16 kernels that an x86-64 one lacks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping
from typing import Any

import onnx_ir as ir

from ..ir.graph import ONNX_DOMAINS
from .target import No, Yes

_OPEN_END = 2**31 - 1
_EXOTIC = ("tensor(bfloat16", "tensor(float8", "tensor(float4")
_ORT_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: the first and last operator version it serves, and its types by constraint."""

    first: int
    last: int
    types: Mapping[str, frozenset[str]]

    def serves(self, since_version: int) -> bool:
        """An open-ended kernel serves only the version it was written for.

        That is the runtime's own rule: a later version of the operator may mean something else.
        """
        if self.last == _OPEN_END:
            return self.first == since_version
        return self.first <= since_version <= self.last


@dataclasses.dataclass(frozen=True)
class OpSchema:
    """One version of an operator: its inputs as (name, type constraint or plain type)."""

    since_version: int
    inputs: tuple[tuple[str, str], ...]
    variadic: bool

    def input(self, index: int) -> tuple[str, str] | None:
        if index < len(self.inputs):
            return self.inputs[index]
        return self.inputs[-1] if self.variadic and self.inputs else None


@functools.cache
def kernel_support() -> Mapping[tuple[str, str], tuple[Kernel, ...]]:
    """Kernels of the CPU provider by (domain, operator)."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider != "CPUExecutionProvider":
            continue
        types = {name: frozenset(allowed) for name, allowed in kernel.type_constraints.items()}
        first, last = kernel.version_range
        found.setdefault((kernel.domain, kernel.op_name), []).append(Kernel(first, last, types))
    return {key: tuple(kernels) for key, kernels in found.items()}


@functools.cache
def _schemas() -> Mapping[tuple[str, str], tuple[OpSchema, ...]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], list[OpSchema]] = {}
    for schema in state.get_all_operator_schema():
        inputs = tuple((p.name, p.typeStr) for p in schema.inputs)
        last = bool(schema.inputs) and schema.inputs[-1].option.name == "Variadic"
        key = (schema.domain, schema.name)
        found.setdefault(key, []).append(OpSchema(schema.since_version, inputs, last))
    return {k: tuple(sorted(v, key=lambda s: s.since_version)) for k, v in found.items()}


@functools.cache
def highest_opset() -> int:
    """The highest version of the standard operators the installed ONNX Runtime has a schema for.

    A model stamped with a higher one is refused (seen with 1.32: 28 loads, 29 does not).
    """
    return max(
        schemas[-1].since_version for (domain, _), schemas in _schemas().items() if not domain
    )


def ort_supports(
    node: ir.Node,
    opset: int | Mapping[str, int],
    *,
    functions: Container[tuple[str, str]] = (),
) -> Yes | No:
    """Whether ONNX Runtime's CPU provider runs a node of a model with this opset.

    `opset` is the version of the standard domain, or versions by domain. `functions` are the
    model's own, as (domain, name): they are expanded, so always run. Types that are not known are
    taken to fit. The note of a `Yes` says when the node is run in another way than by a kernel of
    its own: as its function body, or in float32 between casts that the runtime inserts.
    """
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    if (node.domain, node.op_type) in functions or (domain, node.op_type) in functions:
        return Yes("a function of the model")
    schema = _schema(domain, node.op_type, _version(domain, opset))
    name = f"{domain}.{node.op_type}" if domain else node.op_type
    if schema is None:
        known = _schemas().get((domain, node.op_type))
        if known is None:
            return No(f"ONNX Runtime knows no operator {name}")
        return No(f"{name} is new in opset {known[0].since_version} of its domain")
    kernels = [
        kernel
        for kernel in kernel_support().get((domain, node.op_type), ())
        if kernel.serves(schema.since_version)
    ]
    types = _input_types(node, schema)
    if any(_fits(kernel, types) for kernel in kernels):
        return Yes()
    # A body's own operators have hardly any kernels in the types that numpy lacks.
    plain = not any(t.startswith(_EXOTIC) for _, _, t in types)
    actual = types[0][2] if types else ""
    if plain and _runs_as_function(domain, node.op_type, _version(domain, opset), actual):
        return Yes("as its function body, expanded by ONNX Runtime")
    if any(_fits(kernel, _as_float(types)) for kernel in kernels):
        return Yes("in float32, between casts that ONNX Runtime inserts")
    if not kernels:
        return No(f"the CPU provider has no kernel for {name} of version {schema.since_version}")
    return No(f"the CPU provider's kernels for {name} take {_taken(kernels, types)}")


def runs_in_float32(node: ir.Node, opset: int | Mapping[str, int]) -> bool:
    """Whether a float16 node has no kernel of its own and runs in float32 between casts."""
    answer = ort_supports(node, opset)
    return bool(answer) and isinstance(answer, Yes) and "float32" in answer.note


def _version(domain: str, opset: int | Mapping[str, int]) -> int:
    if isinstance(opset, Mapping):
        return opset.get(domain, _OPEN_END)
    return _OPEN_END if domain else opset


def _schema(domain: str, op_type: str, version: int) -> OpSchema | None:
    fitting = [s for s in _schemas().get((domain, op_type), ()) if s.since_version <= version]
    return fitting[-1] if fitting else None


def _input_types(node: ir.Node, schema: OpSchema) -> list[tuple[str, str, str]]:
    """(input name, type constraint, actual type) of each input whose type is known."""
    found = []
    for index, value in enumerate(node.inputs):
        parameter = schema.input(index)
        if value is not None and parameter is not None and isinstance(value.type, ir.TensorType):
            found.append((*parameter, _ort_type(value.type.dtype)))
    return found


def _ort_type(dtype: ir.DataType) -> str:
    return f"tensor({_ORT_NAMES.get(dtype, dtype.name.lower())})"


def _fits(kernel: Kernel, types: list[tuple[str, str, str]]) -> bool:
    for name, constraint, actual in types:
        for key in (name, constraint):
            allowed = kernel.types.get(key)
            if allowed is not None and actual not in allowed:
                return False
    return True


def _as_float(types: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(n, c, "tensor(float)" if t == "tensor(float16)" else t) for n, c, t in types]


@functools.cache
def _runs_as_function(domain: str, op_type: str, opset: int, actual: str) -> bool:
    """Whether the operator is defined as a function that the runtime expands and has kernels for.

    It expands a body only while no operator of it has changed since the body was written (seen
    with 1.32: LeakyRelu of float64 fails at opset 20). `actual` is the type of the first input,
    which the body's own operators must take.
    """
    import onnx
    import onnx.defs

    if domain or not onnx.defs.has(op_type, opset, ""):
        return False
    schema: Any = onnx.defs.get_schema(op_type, opset, "")
    if schema.has_context_dependent_function:
        return True
    written = [v for v in schema.function_opset_versions if v <= opset]
    if not schema.has_function or not written:
        return False
    text = schema.get_function_with_opset_version(max(written))
    body = onnx.FunctionProto.FromString(text)
    return all(
        _same_operator(node.op_type, max(written), opset) and _takes(node.op_type, actual)
        for node in body.node
    )


def _same_operator(op_type: str, written: int, opset: int) -> bool:
    import onnx.defs

    versions = {onnx.defs.get_schema(op_type, v, "").since_version for v in (written, opset)}
    return len(versions) == 1


def _takes(op_type: str, actual: str) -> bool:
    """Whether some kernel of the operator takes the type; true where there is none to ask."""
    kernels = kernel_support().get(("", op_type), ())
    return not kernels or any(
        not kernel.types or any(actual in allowed for allowed in kernel.types.values())
        for kernel in kernels
    )


def _taken(kernels: list[Kernel], types: list[tuple[str, str, str]]) -> str:
    """What the first constraint that fails would take, and what it was given."""
    for name, constraint, actual in types:
        for key in (name, constraint):
            sets = [kernel.types[key] for kernel in kernels if key in kernel.types]
            if sets and not any(actual in allowed for allowed in sets):
                return f"{', '.join(sorted(frozenset().union(*sets)))} for {name}, not {actual}"
    return f"no such combination of types: {', '.join(t for _, _, t in types)}"
