"""Hashes of everything that a result of a sweep depends on.

Here: digests of a model, of samples, of a target, of this program and of this machine. Equal
digests mean equal content, whatever file or object it came from. Not here: keeping results
(`cache`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..cost.profile import Profile
from ..cost.profiles import cpu_features, cpu_name
from ..ir.graph import graphs
from ..passes.base import Pass
from ..targets.target import Target

Feed = Mapping[str, np.ndarray]


def combine(*parts: object) -> str:
    """One digest of several texts or plain values, in order."""
    return hashlib.sha256(json.dumps(plain(parts)).encode()).hexdigest()


def model_digest(model: ir.Model) -> str:
    """Of the graph with all names, shapes, attributes and weights, wherever these are stored.

    Documentation and exporter metadata do not count.
    """
    state = hashlib.sha256()
    _add(state, sorted(model.opset_imports.items()))
    for key, function in model.functions.items():
        _add(state, [str(part) for part in key], [v.name for v in function.inputs])
    for graph in graphs(model):
        _add(state, "graph", graph.name, _signature(graph.inputs), _signature(graph.outputs))
        for node in graph:
            named = [[v and v.name for v in node.inputs], [v.name for v in node.outputs]]
            _add(state, node.domain, node.op_type, node.overload, named)
            for name, attribute in sorted(node.attributes.items()):
                _add(state, name)
                _add_attribute(state, attribute)
        for name, value in graph.initializers.items():
            _add(state, "weight", name)
            if value.const_value is not None:
                _add_array(state, value.const_value)
    return state.hexdigest()


def feeds_digest(feeds: Iterable[Feed] | None) -> str:
    """Of samples: names, dtypes, shapes and values, in order."""
    state = hashlib.sha256()
    for feed in feeds or ():
        _add(state, "sample")
        for name, array in feed.items():
            _add(state, name)
            _add_array(state, np.asarray(array))
    return state.hexdigest() if feeds is not None else ""


def target_digest(target: Target, profile: Profile | None) -> str:
    """Of the target's facts, and of the fitted latency that plans and predictions go by."""
    return combine(target, profile)


def passes_digest(passes: Iterable[Pass]) -> str:
    """Of passes from outside the package: their options and the source files they are from."""
    found = []
    for item in passes:
        if type(item).__module__.split(".")[0] == (__package__ or "").split(".")[0]:
            continue
        try:
            source = Path(inspect.getfile(type(item))).read_bytes()
        except (OSError, TypeError):
            source = b""
        found.append([str(item), hashlib.sha256(source).hexdigest()])
    return combine(found)


@functools.cache
def program_digest() -> str:
    """Of the source of this package and the versions of what computes beneath it.

    The version number alone would not tell two states of a checkout apart.
    """
    state = hashlib.sha256()
    home = Path(__file__).parents[1]
    for path in sorted(home.rglob("*.py")):
        _add(state, path.relative_to(home).as_posix())
        state.update(path.read_bytes())
    return combine(state.hexdigest(), versions())


@functools.cache
def versions() -> dict[str, str]:
    """The versions that results depend on; "" where a distribution is not installed."""
    found = {}
    for name in ("edgepass", "onnxruntime", "numpy", "onnx", "onnx-ir", "apache-tvm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.cache
def machine() -> dict[str, Any]:
    """What times of this machine are told apart from those of others by."""
    return {"cpu": cpu_name(), "features": list(cpu_features())}


def machine_digest() -> str:
    """Of this machine's CPU, its name and instruction sets."""
    return combine(machine())


def plain(value: Any) -> Any:
    """Dataclasses, mappings, enums, numpy values and the like as JSON can hold them.

    What has no such form counts by its type and `repr`; a function by where it is defined.
    """
    if isinstance(value, enum.Enum):
        return str(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [type(value).__name__, fields]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(plain(item)) for item in value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, np.ndarray):
        return feeds_digest([{"": value}])
    if isinstance(value, np.generic):
        return value.item()
    return repr(value)


# --- parts -----------------------------------------------------------------------------------


def _signature(values: Iterable[ir.Value]) -> list[list[str]]:
    return [[v.name or "", str(v.dtype), str(v.shape)] for v in values]


def _add(state: Any, *parts: object) -> None:
    """Each part with its length before it, so that no two lists of parts read the same."""
    for part in parts:
        text = json.dumps(part, default=str).encode()
        state.update(f"{len(text)}:".encode())
        state.update(text)


def _add_attribute(state: Any, attribute: ir.Attr) -> None:
    if attribute.is_ref():
        _add(state, "ref", str(attribute.ref_attr_name))
    elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        _add(state, "subgraph")  # walked with the others, right after its node's graph
    elif attribute.type == ir.AttributeType.TENSOR:
        _add_array(state, attribute.as_tensor())
    else:
        state.update(ir.to_proto(attribute).SerializeToString(deterministic=True))


def _add_array(state: Any, tensor: ir.TensorProtocol | np.ndarray) -> None:
    """Dtype, shape and values. `ir` names dtypes that numpy has only by extension."""
    array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
    dtype = str(array.dtype if isinstance(tensor, np.ndarray) else tensor.dtype)
    _add(state, dtype, list(array.shape))
    if array.dtype.kind in "OSU":
        _add(state, [item if isinstance(item, str) else repr(item) for item in array.flat])
        return
    state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
