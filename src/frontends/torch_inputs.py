"""Example inputs and dynamic dimensions for exporting a torch module, in all forms users write.

Here: tuples, dicts, numpy arrays and shape texts to tensors; short forms of dynamic shapes to
`torch.export`'s, and the user's names for dimensions put back after export. Not here: exporting.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import ArchitectureError, UsageError
from ..ir.graph import graphs

_SHAPE_TEXT = re.compile(r"((?:\d+(?:x\d+)*)?)(?::(\w+))?")


@dataclasses.dataclass(frozen=True)
class ExampleInputs:
    """Arguments of `forward`, what of them is dynamic, and the user's names for that.

    `names`: (parameter, axis) -> the user's name of a dynamic dimension.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any = None
    names: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def any_on_meta(self) -> bool:
        """Whether an example has no data, as when it was built under `torch.device("meta")`."""
        from torch.utils import _pytree

        leaves = _pytree.tree_leaves((self.args, self.kwargs))
        return any(getattr(leaf, "is_meta", False) for leaf in leaves)

    def mapped(self, function: Callable[[Any], Any]) -> ExampleInputs:
        """The same with `function` applied to every leaf, nested containers kept."""
        from torch.utils import _pytree

        return dataclasses.replace(
            self,
            args=_pytree.tree_map(function, self.args),
            kwargs=_pytree.tree_map(function, self.kwargs),
        )


def example_inputs_of(
    module: Any,
    example_inputs: Any,
    dynamic_shapes: Any,
    input_shapes: Sequence[str] | Mapping[str, str] | None,
) -> ExampleInputs:
    """Bring the user's description of a module's inputs into one form.

    Raises:
        ArchitectureError: nothing describes the inputs, or they don't fit `forward`.
        UsageError: two descriptions at once, or one that can't be understood.
    """
    if example_inputs is not None and input_shapes is not None:
        raise UsageError(
            "example_inputs and input_shapes are both given", fix="give one of the two"
        )
    if input_shapes is not None:
        example_inputs = _from_shapes(input_shapes)
    if example_inputs is None:
        raise ArchitectureError(
            f"{type(module).__name__} has no example inputs",
            where=f"forward{inspect.signature(module.forward)}",
            why="exporting runs the module once, without data, to find its graph",
            fix='pass example_inputs, or input_shapes=["1x3x224x224"] ("1x128:int64" for '
            "another dtype); a callable can return (module, example_inputs)",
        )
    args, kwargs = _arguments(example_inputs)
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ArchitectureError(
            f"The example inputs don't fit {type(module).__name__}.forward",
            where=f"forward{inspect.signature(module.forward)}",
            why=str(error),
            fix="pass a tuple in the order of the parameters, or a dict by their names",
        ) from error
    inputs = ExampleInputs(args, kwargs)
    if dynamic_shapes is None:
        return inputs
    return _with_dynamic(inputs, dict(bound), dynamic_shapes)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            return torch.from_numpy(np.array(leaf))
        return leaf

    if isinstance(example_inputs, torch.Tensor | np.ndarray):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        inputs = ExampleInputs((), dict(example_inputs)).mapped(tensor)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        inputs = ExampleInputs(tuple(example_inputs), {}).mapped(tensor)
    else:
        raise UsageError(
            f"example_inputs is a {type(example_inputs).__name__}",
            fix="pass a tensor, a tuple of tensors, or a dict by parameter name",
        )
    return inputs.args, inputs.kwargs


def _from_shapes(input_shapes: Sequence[str] | Mapping[str, str]) -> Any:
    if isinstance(input_shapes, str):
        input_shapes = [input_shapes]
    if isinstance(input_shapes, Mapping):
        return {name: _zeros(text) for name, text in input_shapes.items()}
    return tuple(_zeros(text) for text in input_shapes)


def _zeros(text: str) -> Any:
    import torch

    found = _SHAPE_TEXT.fullmatch(text.replace(" ", ""))
    dtype = getattr(torch, found.group(2) or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise UsageError(
            f"{text!r} is not an input shape",
            fix='write dimensions and, unless float32, the dtype: "1x3x224x224" or "1x128:int64"',
        )
    shape = [int(size) for size in found.group(1).split("x") if size]
    return torch.zeros(shape, dtype=dtype)


# --- dynamic dimensions ----------------------------------------------------------------------


def _with_dynamic(
    inputs: ExampleInputs, bound: dict[str, Any], dynamic_shapes: Any
) -> ExampleInputs:
    if isinstance(dynamic_shapes, Mapping):
        specs = dict(dynamic_shapes)
    else:
        specs = dict(zip(bound, dynamic_shapes, strict=False))
        if len(specs) != len(tuple(dynamic_shapes)):
            raise UsageError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(bound)} inputs",
                fix="use a dict by input name",
            )
    unknown = [name for name in specs if name not in bound]
    if unknown:
        raise UsageError(
            f"dynamic_shapes names {', '.join(map(repr, unknown))}, which is no input",
            why=f"the inputs are {', '.join(bound)}",
            fix="use the names of forward's parameters",
        )
    names: dict[tuple[str, int], str] = {}
    converted = {name: _one_spec(name, specs.get(name), bound[name], names) for name in bound}
    enlarged, notes = _away_from_one(bound, names)
    args = tuple(enlarged[name] for name in list(bound)[: len(inputs.args)])
    kwargs = {name: enlarged.get(name, value) for name, value in inputs.kwargs.items()}
    if len(args) != len(inputs.args):  # *args: nothing here may change them
        args, kwargs = inputs.args, inputs.kwargs
    return ExampleInputs(args, kwargs, converted, names, notes)


def _one_spec(name: str, spec: Any, example: Any, names: dict[tuple[str, int], str]) -> Any:
    """One input's specification as `torch.export` takes it; collects the names given."""
    import torch

    shape = tuple(getattr(example, "shape", ()))
    if isinstance(spec, list | tuple) and not any(
        isinstance(entry, dict | list | tuple) for entry in spec
    ):
        if hasattr(example, "shape") and len(spec) != len(shape):
            raise UsageError(
                f"dynamic_shapes of {name!r} has {len(spec)} entries for {len(shape)} dimensions",
                fix=f"the example's shape is {list(shape)}: write one entry for each",
            )
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping) or not all(isinstance(axis, int) for axis in spec):
        return spec
    result: dict[int, Any] = {}
    for axis, entry in spec.items():
        if not -len(shape) <= axis < len(shape):
            raise UsageError(
                f"dynamic_shapes of {name!r} names dimension {axis}",
                fix=f"the example's shape is {list(shape)}",
            )
        axis %= len(shape)
        if isinstance(entry, str):
            names[name, axis] = entry
            result[axis] = torch.export.Dim.DYNAMIC
        elif isinstance(entry, int) and not isinstance(entry, torch.export.Dim):
            if entry not in (-1, shape[axis]):
                raise UsageError(
                    f"dynamic_shapes of {name!r} says {entry} for dimension {axis}",
                    fix=f"the example has {shape[axis]} there: make them agree",
                )
        elif entry is not None:
            result[axis] = entry
            label = getattr(entry, "__name__", "")
            if label and isinstance(entry, torch.export.Dim):
                names[name, axis] = label
    return result


def _away_from_one(
    bound: dict[str, Any], names: Mapping[tuple[str, int], str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Examples whose dynamic dimensions are at least 2: torch.export takes 0 and 1 as fixed."""
    import torch

    enlarged, notes = dict(bound), []
    for (name, axis), label in names.items():
        tensor = enlarged[name]
        if isinstance(tensor, torch.Tensor) and tensor.shape[axis] < 2:
            shape = list(tensor.shape)
            shape[axis] = 2
            enlarged[name] = (
                tensor.expand(shape).contiguous()
                if tensor.shape[axis] == 1
                else torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            )
            notes.append(f"{name}: exported with {label}=2, as 1 would have fixed it")
    return enlarged, tuple(notes)


def rename_dimensions(model: ir.Model, inputs: ExampleInputs) -> list[str]:
    """Put the user's dimension names for the exporter's (`s77`), in expressions too."""
    renames: dict[str, str] = {}
    notes: list[str] = []
    values = {value.name: value for value in model.graph.inputs}
    for (name, axis), label in inputs.names.items():
        value = values.get(name)
        dim = value.shape[axis] if value is not None and value.shape is not None else None
        if isinstance(dim, ir.SymbolicDim) and dim.value:
            renames.setdefault(dim.value, label)
            if renames[dim.value] != label:
                notes.append(f"{name}: {label} equals {renames[dim.value]} in this module")
        elif isinstance(dim, int):
            notes.append(f"{name}: {label} turned out to be always {dim} in this module")
    if not renames:
        return notes
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, renames)) + r")\b")
    for graph in graphs(model):
        for group in (graph.inputs, *(node.outputs for node in graph)):
            for value in group:
                _rename_in(value, pattern, renames)
    return notes


def _rename_in(value: ir.Value, pattern: re.Pattern[str], renames: Mapping[str, str]) -> None:
    shape = value.shape
    if shape is None or all(isinstance(dim, int) for dim in shape.dims):
        return
    value.shape = ir.Shape(
        [
            pattern.sub(lambda found: renames[found.group()], dim.value)
            if isinstance(dim, ir.SymbolicDim) and dim.value
            else dim
            for dim in shape.dims
        ]
    )
