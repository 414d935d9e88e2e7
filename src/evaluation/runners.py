"""Anything that computes outputs from a feed, as a runner.

Here: `Runner`, `as_runner`, `Remembered`. Not here: samples (`data`), states (`stateful`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..compiled import Compiled
from ..errors import CalibrationError, UsageError
from ..manifest import is_artifact
from ..npz import read_npz, write_npz
from ..targets.feed import TensorSpec, input_specs

Outputs = Mapping[str, np.ndarray]


class Runner(Protocol):
    """A compiled model, a loaded artifact, a session, or anything else that runs a feed."""

    def run(self, feed: Mapping[str, np.ndarray], /) -> Outputs:
        """Outputs by name."""


def as_runner(model: Any, *, threads: int = 1) -> Runner:
    """A runner of a model in any form.

    Something with a `run` method is taken as it is; a path is an artifact's folder or a model file;
    an `onnx_ir.Model`, `ModelProto` or bytes get a session; a torch module runs in eval mode as it
    is; any other callable is called with the feed and returns outputs by name.

    Raises:
        EdgepassError: the model can't be read, or is none of these.
    """
    if callable(getattr(model, "run", None)):
        return model  # type: ignore[no-any-return]
    if isinstance(model, str | Path):
        return _from_path(model, threads)
    if hasattr(model, "state_dict") and hasattr(model, "forward"):
        return TorchRunner(model)
    if callable(model):
        return _Call(model)
    from ..frontends import load_model
    from ..targets.onnxruntime import OrtRunner

    return OrtRunner(load_model(model), threads=threads)


def _from_path(source: str | Path, threads: int) -> Runner:
    from ..artifact import load
    from ..frontends import load_model
    from ..targets.onnxruntime import OrtRunner

    path = Path(source)
    if path.is_dir():
        if not is_artifact(path):
            raise UsageError(
                f"The folder {str(path)!r} is not an artifact",
                fix="give a folder that `edgepass compile` wrote, or a model file",
            )
        return load(path, threads=threads)
    if path.suffix == ".ort" and path.is_file():
        return OrtRunner(path, threads=threads)
    return OrtRunner(load_model(str(source)), threads=threads)


def inputs_of(runner: Runner) -> tuple[TensorSpec, ...] | None:
    """What the runner takes; None where it does not say."""
    if isinstance(runner, Compiled):
        return input_specs(runner.model)
    found = getattr(runner, "inputs", None)
    if isinstance(found, Sequence) and all(isinstance(spec, TensorSpec) for spec in found):
        return tuple(found)
    return None


def bytes_of(model: Any) -> int | None:
    """Bytes of the model file or files; None where the model is in memory only."""
    if isinstance(model, Compiled):
        size = model.cost.get("file_bytes") or model.cost.get("size_bytes")
        return None if size is None else int(size)
    path = model if isinstance(model, str | Path) else getattr(model, "path", None)
    if path is None or not Path(path).exists():
        return None
    place = Path(path)
    if place.is_dir():
        return sum(file.stat().st_size for file in place.glob("model.*"))
    data = place.with_name(place.name + ".data")
    return place.stat().st_size + (data.stat().st_size if data.is_file() else 0)


class TorchRunner:
    """A torch module in eval mode: feeds by the names of `forward`'s parameters, by position where
    they are others; outputs by name where it returns a mapping, else `output_0`, ..."""

    def __init__(self, module: Any) -> None:
        self._module = module.eval()
        self._names = list(inspect.signature(module.forward).parameters)

    def run(self, feed: Mapping[str, np.ndarray], /) -> Outputs:
        """Outputs by name."""
        import torch

        with torch.no_grad():
            tensors = {name: torch.from_numpy(np.array(value)) for name, value in feed.items()}
            named = set(tensors) <= set(self._names)
            result = self._module(**tensors) if named else self._module(*tensors.values())
        if isinstance(result, Mapping):
            found = {str(k): v for k, v in result.items() if isinstance(v, torch.Tensor)}
        else:
            parts = result if isinstance(result, tuple | list) else [result]
            found = {f"output_{i}": part for i, part in enumerate(parts)}
        return {name: value.detach().cpu().numpy() for name, value in found.items()}


class _Call:
    """A function from feed to outputs."""

    def __init__(self, function: Callable[[Mapping[str, np.ndarray]], Outputs]) -> None:
        self._function = function

    def run(self, feed: Mapping[str, np.ndarray], /) -> Outputs:
        return self._function(feed)


class Remembered:
    """A runner that runs no feed twice: outputs are kept by the content of the feed.

    In memory, or with `folder` on disk, where another process finds them again; the folder must
    then be of this one model. Made for the original of a sweep, which every candidate is held
    against.
    """

    def __init__(self, runner: Runner, folder: str | Path | None = None) -> None:
        self.runner = runner
        self.inputs = inputs_of(runner)
        self._folder = None if folder is None else Path(folder)
        self._memory: dict[str, Outputs] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def run(self, feed: Mapping[str, np.ndarray], /) -> Outputs:
        """Outputs by name, the runner's own or what it gave for the same feed before."""
        key = digest(feed)
        if self._folder is None:
            if key not in self._memory:
                self._memory[key] = self.runner.run(feed)
            return self._memory[key]
        path = self._folder / f"{key}.npz"
        try:
            return read_npz(path)
        except CalibrationError:
            pass
        outputs = self.runner.run(feed)
        unfinished = path.with_suffix(".unfinished")
        write_npz(unfinished, outputs)
        unfinished.replace(path)
        return outputs


def digest(value: Any) -> str:
    """A hash of arrays, numbers, text and containers of them, by content."""
    state = hashlib.sha256()
    _update(state, value)
    return state.hexdigest()[:32]


def _update(state: Any, value: Any) -> None:
    if type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        state.update(f"map{len(value)}".encode())
        for key in sorted(value, key=str):
            state.update(repr(str(key)).encode())
            _update(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"list{len(value)}".encode())
        for entry in value:
            _update(state, entry)
    elif isinstance(value, np.ndarray) and value.dtype.kind != "O":
        state.update(f"{value.dtype}{value.shape}".encode())
        state.update(np.ascontiguousarray(value).data.cast("B") if value.size else b"")
    elif isinstance(value, np.ndarray):
        state.update(f"object{value.shape}".encode())
        _update(state, value.ravel().tolist())
    else:
        state.update(f"{type(value).__name__}{value!r}".encode())
