"""Anything a user has -> an `onnx_ir.Model` that is edgepass's own, weights optional.

Here: which frontend reads a source. Not here: reading ONNX (`onnx`), exporting torch (`torch`),
bringing old opsets up (`opset`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx import ModelProto

from ..errors import UsageError
from . import onnx as onnx_frontend
from .opset import WORKING_OPSET, to_supported_opset

__all__ = ["WORKING_OPSET", "load_model", "load_notes", "load_supported", "to_supported_opset"]

_CALLABLE_TEXT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_model(
    source: Any,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    weights_required: bool = True,
    map_weights: bool = False,
) -> ir.Model:
    """Read a model or architecture from any supported form into a graph the caller may change.

    Args:
        source: an ONNX file's path, its bytes, a `ModelProto`, an `onnx_ir.Model`; a torch
            `nn.Module`, `ExportedProgram` or `ONNXProgram`; a callable that returns a module or
            (module, example inputs), or its name as `package.module:callable`.
        example_inputs: for a module: a tensor, a tuple, or a dict by parameter name; tensors or
            numpy arrays.
        dynamic_shapes: for a module: as `torch.export` takes them, or in short
            `{"x": {0: "batch"}}` or `{"x": ("batch", 3, "h", "w")}`.
        input_shapes: instead of example inputs: `["1x3x224x224", "1x128:int64"]` or a dict of
            such by parameter name; float32 if no dtype is given.
        weights_required: False makes missing weights `AbsentTensor` instead of an error, and
            builds named architectures without allocating any.
        map_weights: leave an ONNX file's weights on disk until they are read; the file must stay
            as it is for as long as the model is used.

    Raises:
        ModelFileError, UnsafePathError, InvalidGraphError, WeightsAbsentError: see `onnx`.
        ArchitectureError, MissingDependencyError: see `torch`.
        UsageError: the source is none of these, or the arguments don't fit it.
    """
    for_torch = {
        "example_inputs": example_inputs,
        "dynamic_shapes": dynamic_shapes,
        "input_shapes": input_shapes,
    }
    if isinstance(source, ir.Model | ModelProto | bytes | bytearray | memoryview):
        _refuse_torch_arguments(for_torch)
        if isinstance(source, ir.Model):
            return onnx_frontend.from_ir(source, weights_required)
        if isinstance(source, ModelProto):
            return onnx_frontend.from_proto(source, weights_required)
        return onnx_frontend.from_bytes(bytes(source), weights_required)
    named = (
        isinstance(source, str)
        and _CALLABLE_TEXT.fullmatch(source) is not None
        and not os.path.exists(source)
    )
    if isinstance(source, str | os.PathLike) and not named:
        _refuse_torch_arguments(for_torch)
        return onnx_frontend.from_path(source, weights_required, map_weights=map_weights)
    if not (named or callable(source) or _comes_from_torch(source)):
        raise UsageError(
            f"A {type(source).__module__}.{type(source).__qualname__} is not a model",
            fix="pass an ONNX path, bytes, ModelProto or onnx_ir.Model; a torch module with "
            "example inputs or an ExportedProgram; or `package.module:callable`",
        )
    from .torch import from_torch

    return from_torch(source, weights_required=weights_required, **for_torch)


def load_supported(source: Any, **options: Any) -> ir.Model:
    """`load_model`, and the opset brought up to one that passes work on; notes say so.

    Raises:
        EdgepassError: see `load_model`.
    """
    model = load_model(source, **options)
    notes = to_supported_opset(model)
    if notes:
        model.meta["edgepass.load_notes"] = [*load_notes(model), *notes]
    return model


def load_notes(model: ir.Model) -> list[str]:
    """What loading changed or noticed, one sentence each, for the ledger."""
    return list(model.meta.get("edgepass.load_notes", ()))


def _comes_from_torch(source: Any) -> bool:
    return any(base.__module__.split(".")[0] == "torch" for base in type(source).__mro__)


def _refuse_torch_arguments(arguments: Mapping[str, Any]) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)} given for a model that is ONNX already",
            why="an ONNX model states its own inputs and shapes",
            fix="leave them out",
        )
