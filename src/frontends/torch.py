"""A torch module, architecture or exported program to a graph, through `torch.export`.

Here: building named architectures without weights, example inputs and dynamic dimensions in
their short forms, and the export itself, silenced and with errors that name the user's line.
Not here: ONNX in any form (`onnx`). torch is imported inside functions only.

The graph comes out of the exporter unoptimized (`optimize=False`): its constant folding reads
weights and fails without them, and an architecture and its trained model give one same graph.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..errors import ArchitectureError, MissingDependencyError, UsageError, WeightsAbsentError
from ..ir.graph import AbsentTensor, graphs
from .onnx import finish, from_ir
from .torch_errors import export_failed
from .torch_inputs import ExampleInputs, example_inputs_of, rename_dimensions

_NOTES = "edgepass.load_notes"


def from_torch(
    source: Any,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    weights_required: bool = True,
) -> ir.Model:
    """Export what torch or a callable gives; see `load_model` for the arguments.

    Modules are exported in eval mode and left as they were.

    Raises:
        ArchitectureError: it can't be built or exported; names the cause and the user's line.
        WeightsAbsentError: the module is on the meta device and `weights_required`.
        MissingDependencyError: torch or onnxscript isn't installed.
    """
    torch = import_torch()
    if isinstance(source, str):
        source = _resolve(source)
    if isinstance(source, torch.onnx.ONNXProgram):
        return from_ir(source.model, weights_required)
    if not isinstance(source, torch.nn.Module | torch.export.ExportedProgram):
        source, built_inputs = _built(source, meta=not weights_required)
        example_inputs = built_inputs if example_inputs is None else example_inputs
        if isinstance(source, ir.Model):
            return from_ir(source, weights_required)
    if isinstance(source, torch.export.ExportedProgram):
        _refuse_inputs(example_inputs, dynamic_shapes, input_shapes)
        with _quiet():
            model = _to_onnx(source, type(source).__name__)
        return finish(model, weights_required)
    inputs = example_inputs_of(source, example_inputs, dynamic_shapes, input_shapes)
    return _export_module(source, inputs, weights_required)


def import_torch() -> Any:
    """torch, or the error that says how to get it."""
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"Exporting from torch needs {error.name}",
            why="torch is an optional dependency",
            fix="pip install 'edgepass[torch]'",
        ) from error
    return torch


# --- building --------------------------------------------------------------------------------


def _resolve(text: str) -> Any:
    """The object that `package.module:callable` names, the current directory importable."""
    module_name, _, attribute_path = text.partition(":")
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute_path.split("."):
            found = getattr(found, name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError | AttributeError)
        raise ArchitectureError(
            f"{text!r} can't be imported",
            where=f"looked in {folder!r} and the installed packages",
            why=f"{type(error).__name__}: {error}",
            fix="check the spelling, and start in the folder that holds the module"
            if missing
            else f"make `import {module_name}` work in Python first",
        ) from error
    finally:
        if added:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
    return found


def _built(builder: Callable[[], Any], *, meta: bool) -> tuple[Any, Any]:
    """(module, example inputs or None) from a callable, without allocating weights if `meta`.

    Two ways to do without: everything on the meta device; or, for modules that compute with
    their buffers while being built, only the parameters there.
    """
    torch = import_torch()
    name = getattr(builder, "__qualname__", repr(builder))
    ways: list[Any] = [contextlib.nullcontext]
    if meta:
        ways = [lambda: torch.device("meta"), _parameters_on_meta]
    failure: Exception | None = None
    for way in ways:
        try:
            with _quiet(), way():
                built = builder()
            break
        except Exception as error:
            failure = error
    else:
        assert failure is not None
        raise export_failed(failure, f"{name} can't be built", _build_fix(meta)) from failure
    inputs = None
    if isinstance(built, tuple) and len(built) == 2:
        built, inputs = built
    kinds = (torch.nn.Module, torch.export.ExportedProgram, ir.Model)
    if not isinstance(built, kinds):
        raise ArchitectureError(
            f"{name} returned a {type(built).__name__}, not a module",
            fix="return a torch.nn.Module, or a tuple (module, example_inputs)",
        )
    return built, inputs


def _build_fix(meta: bool) -> str:
    return (
        "make it buildable under `torch.device('meta')` (no reading of tensor values in __init__), "
        "or pass the built module"
        if meta
        else "make the callable work without arguments: it must return a module"
    )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter moves to the meta device when a module takes it; buffers stay real."""
    torch = import_torch()
    original = torch.nn.Module.register_parameter

    def register(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            parameter = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original


# --- exporting -------------------------------------------------------------------------------


def _export_module(module: Any, inputs: ExampleInputs, weights_required: bool) -> ir.Model:
    torch = import_torch()
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise ArchitectureError(
            f"{name} is TorchScript, which torch.export doesn't take",
            fix="pass the original nn.Module",
        )
    absent = [key for key, tensor in _tensors(module) if tensor.is_meta]
    if absent and weights_required:
        raise WeightsAbsentError(
            f"{len(absent)} of the weights of {name} are on the meta device",
            where=", ".join(absent[:5]) + (", ..." * (len(absent) > 5)),
            why="the module is an architecture without weights",
            fix="use `edgepass.estimate`, which needs shapes only, or load weights into it",
        )
    notes = [f"{name} was in training mode; exported in eval mode"] * bool(module.training)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_eval_mode(module))
        stack.enter_context(torch.no_grad())
        if absent or inputs.any_on_meta:
            inputs = stack.enter_context(_fake_weights(module, inputs))
        try:
            program = torch.export.export(
                module,
                inputs.args,
                inputs.kwargs,
                dynamic_shapes=inputs.dynamic_shapes,
                strict=False,
            )
        except Exception as error:
            raise export_failed(error, f"{name} can't be exported", _EXPORT_FIX) from error
        model = _to_onnx(program, name)
    notes += rename_dimensions(model, inputs)
    _restore_real(model, module)
    model = finish(model, weights_required)
    model.meta[_NOTES] = [*inputs.notes, *notes]
    return model


_EXPORT_FIX = (
    "rewrite the line so that the graph doesn't depend on the data (torch.where instead of `if`, "
    "static shapes, or other dynamic_shapes), or export it yourself and pass the ExportedProgram"
)


def _to_onnx(program: Any, name: str) -> ir.Model:
    torch = import_torch()
    try:
        exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    except Exception as error:
        raise export_failed(
            error,
            f"{name} can't be translated to ONNX",
            "replace the operation by one that torch.onnx knows, or register a translation and "
            "pass the ONNXProgram",
            program,
        ) from error
    model: ir.Model = exported.model
    return model


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter and buffer by its full name, shared ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@contextlib.contextmanager
def _fake_weights(module: Any, inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Weights on the meta device become fake ones on the CPU while exporting.

    A forward that makes tensors of its own makes them on the CPU, and can't mix them with meta
    tensors; with fake tensors there is one device. Shared weights stay shared.
    """
    torch = import_torch()
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {}
    replaced: list[tuple[dict[str, Any], str, Any]] = []

    def fake(tensor: Any) -> Any:
        with mode:
            return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cpu")

    try:
        for owner in module.modules():
            for slots in (owner._parameters, owner._buffers):
                for key, tensor in list(slots.items()):
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in fakes:
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        new = fake(tensor)
                        fakes[id(tensor)] = (
                            torch.nn.Parameter(new, requires_grad=False) if is_parameter else new
                        )
                    replaced.append((slots, key, tensor))
                    slots[key] = fakes[id(tensor)]
        yield inputs.mapped(lambda t: fake(t) if isinstance(t, torch.Tensor) else t)
    finally:
        for slots, key, tensor in replaced:
            slots[key] = tensor


def _restore_real(model: ir.Model, module: Any) -> None:
    """Initializers that fake export left without data get it back where the module has it."""
    real = {key: tensor for key, tensor in _tensors(module) if not tensor.is_meta}
    for graph in graphs(model):
        for key, value in graph.initializers.items():
            tensor = value.const_value
            raw = getattr(tensor, "raw", None)
            if type(raw).__name__ in ("FakeTensor", "Parameter") and _is_fake(raw):
                if key in real:
                    value.const_value = ir.tensor(
                        real[key].detach().cpu(), dtype=tensor.dtype if tensor else None, name=key
                    )
                elif tensor is not None:
                    value.const_value = AbsentTensor(
                        key, tensor.dtype, list(tensor.shape.numpy()), "the module is on meta"
                    )


def _is_fake(raw: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(raw, FakeTensor)


@contextlib.contextmanager
def _eval_mode(module: Any) -> Iterator[None]:
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints, warnings or log lines from the exporter or the user's code under it."""
    disabled = logging.root.manager.disable
    logging.disable(max(logging.WARNING, disabled))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _refuse_inputs(*given: Any) -> None:
    if any(argument is not None for argument in given):
        raise UsageError(
            "Inputs or dynamic shapes given for an ExportedProgram",
            why="they were fixed when it was exported",
            fix="leave them out, or pass the module instead",
        )
