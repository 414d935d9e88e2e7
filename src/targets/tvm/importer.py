"""An `onnx_ir` graph as a Relax module, and which nodes TVM has no way to take.

Here: the check before import, the import itself with the offending node named, and the limits
of TVM 0.27's importer that were found by running it. Not here: changing the graph first
(`prepare`), compiling (`emit`). TVM is loaded when a function here is called.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir

from ...errors import LoweringError, MissingDependencyError, UnsupportedOpError
from ...ir.graph import (
    CONTRIB_DOMAIN,
    ONNX_DOMAINS,
    constant_scalar,
    describe_node,
    dims_of,
    node_subgraphs,
    opset_of,
)
from ...ir.sizing import symbolic_dims
from .limits import LIMITS, NO_KERNELS
from .lstm import lstm_obstacle
from .prepare import EXPANDED_BY_DEFINITION, private_copy
from .symbolic import dimension_sources

USE_ONNX_RUNTIME = 'use target="arm64" (ONNX Runtime)'
"""The way out that every refusal names: ONNX Runtime runs all of these."""

MIN_OPSET = 13
"""The oldest opset whose converters in TVM 0.27 follow that opset's meaning (Softmax, Squeeze)."""

_CONTRIB_CONVERTERS = frozenset(
    {"Attention", "BiasGelu", "EmbedLayerNormalization", "FastGelu", "SkipLayerNormalization"}
)
# TVM's map ignores domains: these are `com.microsoft` operators (ONNX's own Attention differs).


def require_tvm() -> Any:
    """The `tvm` module, or `MissingDependencyError` with the command that installs it."""
    try:
        import tvm
    except ImportError as error:
        raise MissingDependencyError(
            "TVM is not installed",
            why=str(error),
            fix='pip install "edgepass[tvm]"',
        ) from error
    return tvm


# --- the check before import -----------------------------------------------------------------


@functools.cache
def converter_names() -> frozenset[str]:
    """Operator names in the converter map of the TVM that is installed."""
    require_tvm()
    from tvm.relax.frontend.onnx import onnx_frontend

    return frozenset(onnx_frontend._get_convert_map())


def unsupported_nodes(model: ir.Model) -> list[tuple[ir.Node, str]]:
    """Nodes that TVM cannot import, each with the reason; subgraphs and functions included.

    The answer comes from TVM's own converter map, plus the limits in this module. An empty list
    does not promise a successful import: a converter may still refuse certain shapes.
    """
    return _refused(model, prepared=False)


def refusal(node: ir.Node) -> str | None:
    """Why TVM cannot import a node of the main graph, or None."""
    return _refusal(node, False, False)


def _refused(model: ir.Model, *, prepared: bool) -> list[tuple[ir.Node, str]]:
    found = []
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node, nested in _nodes(graph):
            if node.op_identifier() in model.functions:
                continue  # inlined before import
            reason = _refusal(node, nested, prepared)
            if reason is not None:
                found.append((node, reason))
    return found


def _nodes(graph: ir.Graph, nested: bool = False) -> Iterator[tuple[ir.Node, bool]]:
    for node in graph:
        yield node, nested
        for subgraph in node_subgraphs(node):
            yield from _nodes(subgraph, True)


def _refusal(node: ir.Node, nested: bool, prepared: bool) -> str | None:
    contrib = node.domain == CONTRIB_DOMAIN and node.op_type in _CONTRIB_CONVERTERS
    if node.domain not in ONNX_DOMAINS and not contrib:
        return f"TVM's ONNX importer has no converter for operators of {node.domain!r}"
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype in NO_KERNELS:
            return f"TVM has no kernels for {value.dtype.name} tensors ({value.name!r})"
    if node.op_type == "LSTM":
        return lstm_obstacle(node) if not nested else "TVM has no LSTM; nested ones stay as is"
    limit = LIMITS.get(node.op_type)
    reason = limit(node) if limit is not None else None
    if reason is not None or contrib:
        return reason
    if node.op_type in EXPANDED_BY_DEFINITION and not prepared:
        return None if not nested else "it is expanded in the main graph only"
    if node.op_type in EXPANDED_BY_DEFINITION:
        return "TVM has no converter, and ONNX's definition needs types that are not known here"
    if node.op_type in converter_names() - _CONTRIB_CONVERTERS or node.op_type == "If":
        return None
    return "TVM's ONNX importer has no converter for this operator"


# --- import ----------------------------------------------------------------------------------


def to_relax(model: ir.Model, dims: Mapping[str, int] | None = None) -> Any:
    """The Relax module (`tvm.IRModule`) of a model: one function `main`, weights as constants.

    Args:
        model: a graph of opset 13 or newer, with weights; it is not changed.
        dims: symbolic dimension -> size, to fix before import. The others stay symbolic.

    Raises:
        MissingDependencyError: TVM is not installed.
        WeightsAbsentError: the model has no weights.
        UsageError: `dims` names no dimension of the inputs.
        UnsupportedOpError: a node has no converter, or its converter refuses it.
    """
    require_tvm()
    _require_opset(model)
    copy = private_copy(model, dims)
    refused = _refused(copy, prepared=True)
    if refused:
        raise _unsupported(model, refused)
    proto = ir.to_proto(copy)
    nodes = _number_nodes(copy, proto)
    return _import(model, copy, proto, nodes)


def _require_opset(model: ir.Model) -> None:
    opset = opset_of(model)
    if opset < MIN_OPSET:
        raise LoweringError(
            f"TVM's importer reads opset {MIN_OPSET} and newer; this model has opset {opset}",
            why="below that it applies newer semantics to old nodes, with wrong results",
            fix="convert the model first: `edgepass.compile` does so for every target",
        )


def _unsupported(model: ir.Model, refused: list[tuple[ir.Node, str]]) -> UnsupportedOpError:
    node, reason = refused[0]
    kinds = sorted({other.op_type for other, _ in refused})
    more = f"; {len(refused)} such nodes, of {', '.join(kinds)}" if len(refused) > 1 else ""
    return UnsupportedOpError(
        f"TVM cannot take {node.op_type}",
        where=describe_node(node),
        why=reason + more,
        fix=_way_out(model),
    )


def _way_out(model: ir.Model) -> str:
    dims = list(symbolic_dims(model))
    if not dims:
        return USE_ONNX_RUNTIME
    example = ", ".join(f"{name!r}: 1" for name in dims)
    return f"{USE_ONNX_RUNTIME}, or fix the dynamic dimensions: dims={{{example}}}"


def _number_nodes(model: ir.Model, proto: onnx.ModelProto) -> dict[str, ir.Node]:
    """Name each node of `proto` uniquely, and return name -> node of `model`."""
    named: dict[str, ir.Node] = {}

    def walk(graph: ir.Graph, graph_proto: onnx.GraphProto) -> None:
        for node, node_proto in zip(graph, graph_proto.node, strict=True):
            node_proto.name = f"n{len(named)}"
            named[node_proto.name] = node
            for attr in node_proto.attribute:
                if attr.type == onnx.AttributeProto.GRAPH:
                    walk(node.attributes[attr.name].as_graph(), attr.g)

    walk(model.graph, proto.graph)
    return named


def _import(
    model: ir.Model, copy: ir.Model, proto: onnx.ModelProto, nodes: dict[str, ir.Node]
) -> Any:
    """Run TVM's importer over `proto`; `nodes` are those of `copy`, `model` is the caller's."""
    importer = _importer_class()(nodes, dimension_sources(copy.graph))
    # The importer prints the failing operator, and warns of every renamed input.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importer.from_onnx(proto.graph, opset_of(copy))
        except Exception as error:  # the importer raises whatever its converters raise
            # Before a conversion the importer names the node itself: "Node n12 cannot ...".
            named = re.match(r"Node (n\d+) ", str(error))
            node = nodes.get(named[1] if named else importer.at or "")
            operator = node.op_type if node is not None else importer.op_type
            raise UnsupportedOpError(
                f"TVM's ONNX importer failed at {operator or 'the graph inputs'}",
                where=describe_node(node) if node is not None else importer.at or "",
                why=first_line(error),
                fix=_way_out(model),
            ) from error


@functools.cache
def _importer_class() -> Any:
    """TVM's importer, which remembers the node it is at and keeps the shapes ONNX inferred."""
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend

    class Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
        def __init__(
            self, nodes: Mapping[str, ir.Node], sources: Mapping[str, tuple[ir.Value, int]]
        ) -> None:
            super().__init__({}, {}, keep_params_in_input=False, sanitize=True)
            self.nodes, self.sources = nodes, sources
            self.at: str | None = None
            self.op_type = ""

        def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
            self.at, self.op_type = str(attrs["tvm_custom"]["name"]), op_name
            node = self.nodes.get(self.at)
            if node is None or len(node.outputs) != 1 or not self.sources:
                return super()._convert_operator(op_name, inputs, attrs, opset)
            if op_name == "Range":
                counted = self._count(node)
                if counted is not None:
                    return self.bb.normalize(counted)
            result = super()._convert_operator(op_name, inputs, attrs, opset)
            return self._with_known_shape(result, node.outputs[0])

        def _count(self, node: ir.Node) -> Any:
            """0, 1, 2, ... up to a dimension of an input; None for any other `Range`."""
            start, step = constant_scalar(node.inputs[0]), constant_scalar(node.inputs[2])
            shape = self._known_shape(node.outputs[0])
            if shape is None or (start, step) != (0, 1):
                return None
            dtype = node.outputs[0].dtype
            return relax.op.arange(0, shape[0], 1, (dtype or ir.DataType.INT64).numpy().name)

        def _known_shape(self, value: ir.Value) -> list[Any] | None:
            """The inferred shape in sizes and the inputs' symbols, or None."""
            shape = []
            for dim in dims_of(value) or ():
                if isinstance(dim, int):
                    shape.append(dim)
                elif dim.value is not None and dim.value in self.sources:
                    source, axis = self.sources[dim.value]
                    shape.append(self._nodes[source.name].ty.shape[axis])
                else:
                    return None
            return shape if value.shape is not None else None

        def _with_known_shape(self, result: Any, value: ir.Value) -> Any:
            """`result` cast to the shape ONNX inferred, where Relax itself lost track of it.

            `NonZero` and dynamic slices give fresh symbols, which later operators
            cannot relate to the input's. The cast is checked when the model runs.
            """
            kind = getattr(result, "ty", None)
            if not isinstance(kind, relax.TensorType) or not self._lost(kind):
                return result
            shape = self._known_shape(value)
            if shape is None:
                return result
            return self.bb.match_cast(result, relax.TensorType(shape, kind.dtype))

        def _lost(self, kind: Any) -> bool:
            if kind.shape is None or not hasattr(kind.shape, "values"):
                return True
            # Sources are keyed by dimension name, which is what the importer calls its variable.
            variables = relax.analysis.tir_vars_in_type(kind)
            return any(variable.name not in self.sources for variable in variables)

    return Importer


def first_line(error: BaseException) -> str:
    """The message of a TVM error without its C++ backtrace, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = next((line for line in lines if not line.startswith(("Traceback", "File"))), "")
    return f"{type(error).__name__}: {message}"[:300]
