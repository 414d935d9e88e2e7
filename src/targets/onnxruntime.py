"""ONNX Runtime as a back-end: sessions over a graph, a file or bytes, and files from a graph.

Here: `OrtRunner`, `emit`. Not here: which operators have kernels (`ort_support`), errors in our
words (`ort_errors`), the ONNX bytes themselves (`onnx_file`), checking inputs (`feed`).
"""

from __future__ import annotations

import os
import re
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import EdgepassError, LoweringError, ModelFileError, UsageError
from ..ir.mapped import MappedTensor
from .feed import TensorSpec, check_feed, input_specs, output_specs
from .onnx_file import INLINE_LIMIT, leaves_message, serialize, weight_bytes, write_onnx
from .ort_errors import translate
from .ort_file import canonicalize
from .ort_support import highest_opset, kernel_support, ort_supports, runs_in_float32
from .ort_values import exotic_dtype, ort_value, to_numpy
from .target import Target

__all__ = [
    "OrtRunner",
    "TensorSpec",
    "check_feed",
    "emit",
    "highest_opset",
    "input_specs",
    "kernel_support",
    "ort_supports",
    "output_specs",
    "runs_in_float32",
]

FORMATS = ("onnx", "ort")
_CONFIG_PREFIXES = ("session.", "optimization.", "mlas.", "memory.", "ep.")
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_PREPACKING = {"session.disable_prepacking": "1"}
_PORTABLE = ("NchwcTransformer", "NhwcTransformer")
"""Optimizers that bake the host's memory layout into a saved graph."""


class OrtRunner:
    """A session on the CPU: `run` takes a mapping of arrays and returns one.

    `session_options` are ONNX Runtime's configuration entries (`session.qdqisint8allowed`: "1").
    `optimize=False` turns its graph optimizations off: the reference for numerics. `threads` is
    the intra-op pool. `save_optimized` writes the graph as ONNX Runtime rewrote it. Weights over
    `inline_limit` bytes are handed over in memory without a copy; `share_weights` does so at any
    size, maps what lies in files from there, and lets no kernel pack a copy of its own: slower runs
    for less memory. `inputs` and `outputs` say what it takes and gives, `defaults` which inputs may
    be left out of a feed.

    Raises:
        UnsupportedOpError: a node has no kernel or no schema.
        LoweringError: the session was refused for another reason.
        ModelFileError: the file is not a model.
        WeightsAbsentError: an architecture without weights.
    """

    def __init__(
        self,
        model: ir.Model | Path | str | bytes,
        *,
        session_options: Mapping[str, str] | None = None,
        optimize: bool = True,
        threads: int = 1,
        save_optimized: Path | None = None,
        inline_limit: int = INLINE_LIMIT,
        share_weights: bool = False,
    ) -> None:
        import onnxruntime as ort

        entries = {**(session_options or {}), **(_NO_PREPACKING if share_weights else {})}
        options = _session_options(entries, threads)
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        if share_weights:  # an arena keeps what it once had
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
        self._kept: list[Any] = []
        self._closer: weakref.finalize[Any, Any] | None = None
        source: bytes | str
        if isinstance(model, ir.Model):
            source = self._load(model, options, save_optimized, inline_limit, share_weights)
        elif isinstance(model, bytes):
            source = model
        else:
            source = str(model)
            if not Path(model).is_file():
                raise ModelFileError(f"There is no file {source!r}", where=source)
        self._session: Any = create_session(
            source, options, model if isinstance(model, ir.Model) else None
        )
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self.defaults = tuple(n.name for n in self._session.get_overridable_initializers())
        ports = (*self.inputs, *self.outputs)
        self._exotic = any(exotic_dtype(port.dtype) is not None for port in ports)

    def run(
        self, feed: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name, all of them or those asked for, in that order.

        Raises:
            CalibrationError: the feed has wrong names, dtypes or shapes.
            UsageError: an output that is not there.
            LoweringError: the runtime failed while running.
        """
        names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        known = {spec.name for spec in self.outputs}
        for name in names:
            if name not in known:
                raise UsageError(
                    f"The model has no output {name!r}", fix=f"outputs are: {sorted(known)}"
                )
        check_feed(self.inputs, feed, optional=self.defaults)
        if self._session is None:
            raise UsageError("The runner is closed", fix="make a new one")
        if not names:  # the session would take it for all of them
            return {}
        try:
            if self._exotic:
                return self._run_values(feed, names)
            return dict(zip(names, self._session.run(names, dict(feed)), strict=True))
        except EdgepassError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise translate(error, None, "ONNX Runtime failed while running the model") from error

    def close(self) -> None:
        """Free the session, and the temporary file of its weights if there is one."""
        self._session = None
        self._kept.clear()
        if self._closer is not None:
            self._closer()

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _load(
        self,
        model: ir.Model,
        options: Any,
        save_optimized: Path | None,
        inline_limit: int,
        share_weights: bool,
    ) -> bytes | str:
        """Bytes to make the session from, or a path when even those are too many."""
        if weight_bytes(model) <= inline_limit and not share_weights:
            return serialize(model)
        if save_optimized is not None:
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, save_optimized.name + ".data")
        outside = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if leaves_message(value)
            and value.const_value.dtype.bitwidth >= 8  # type: ignore[union-attr]
            and value.uses()  # the runtime drops the others, then misses them
        }
        if weight_bytes(model) - sum(t.nbytes for t in outside.values() if t) > inline_limit:
            folder = tempfile.TemporaryDirectory(prefix="edgepass-")
            self._closer = weakref.finalize(self, folder.cleanup)
            path = Path(folder.name) / "model.onnx"
            write_onnx(model, path, external_data=True)
            return str(path)
        placed, folder_of_weights = _in_their_files(outside if share_weights else {})
        if folder_of_weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder_of_weights))
        rest = {n: t for n, t in outside.items() if t is not None and n not in placed}
        placed |= {name: _external("in-memory", 0, tensor, name) for name, tensor in rest.items()}
        self._kept = [ort_value(t.numpy(), t.dtype) for t in rest.values()]
        options.add_external_initializers(list(rest), self._kept)
        return serialize(model, external=placed)

    def _run_values(self, feed: Mapping[str, Any], names: list[str]) -> dict[str, np.ndarray]:
        """The way through OrtValues, which takes the dtypes that numpy itself lacks."""
        import onnxruntime as ort

        dtypes = {spec.name: exotic_dtype(spec.dtype) for spec in self.inputs}
        values = {}
        for name, given in feed.items():
            array, exotic = np.ascontiguousarray(given).reshape(np.shape(given)), dtypes.get(name)
            if exotic is None:
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
            else:
                values[name] = ort_value(array, exotic)
        results = self._session.run_with_ort_values(names, values)
        return {name: to_numpy(value) for name, value in zip(names, results, strict=True)}


def _in_their_files(
    weights: Mapping[str, ir.TensorProtocol | None],
) -> tuple[dict[str, ir.ExternalTensor], Path | None]:
    """Weights that a session can map from where they lie, and the one folder that they lie in."""
    placed: dict[str, ir.ExternalTensor] = {}
    folder: Path | None = None
    for name, tensor in weights.items():
        if isinstance(tensor, MappedTensor):
            tensor.file.check_unchanged()
            path = tensor.file.path
        elif isinstance(tensor, ir.ExternalTensor):
            path = Path(os.path.realpath(tensor.path))
        else:
            continue
        if folder is None or path.parent == folder:
            folder = path.parent
            placed[name] = _external(path.name, tensor.offset or 0, tensor, name)
    return placed, folder


def _external(
    location: str, offset: int, tensor: ir.TensorProtocol, name: str
) -> ir.ExternalTensor:
    shape = ir.Shape(list(tensor.shape.numpy()))
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)


def create_session(
    source: bytes | str,
    options: Any,
    model: ir.Model | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, its refusal translated.

    Raises:
        UnsupportedOpError, ModelFileError, LoweringError: see `OrtRunner`.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled_optimizers),
        )
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise translate(error, model, "ONNX Runtime refuses the model") from error


def _session_options(entries: Mapping[str, str], threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised; the log would print it twice
    for key, value in entries.items():
        if not key.startswith(_CONFIG_PREFIXES):
            raise UsageError(
                f"{key!r} is not a session option of ONNX Runtime",
                fix=f"configuration entries start with one of {', '.join(_CONFIG_PREFIXES)}",
            )
        options.add_session_config_entry(key, str(value))
    return options


# --- dtypes that numpy lacks -----------------------------------------------------------------

_ORT_TYPES = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    "float4e2m1": "float4_e2m1fn",
}


def _spec(node: Any) -> TensorSpec:
    """ONNX Runtime's `NodeArg`; its shape is [] both for a scalar and for an unknown rank."""
    match = re.fullmatch(r"tensor\((\w+)\)", node.type)
    dtype = _ORT_TYPES.get(match.group(1), match.group(1)) if match else node.type
    shape = tuple(d if isinstance(d, int | str) else None for d in node.shape)
    return TensorSpec(node.name, dtype, shape or None)


# --- files -----------------------------------------------------------------------------------


def emit(
    model: ir.Model,
    target: Target,
    folder: Path,
    formats: Sequence[str] = ("onnx",),
    *,
    session_options: Mapping[str, str] | None = None,
    external_data: bool | None = None,
    inline_limit: int = INLINE_LIMIT,
) -> list[Path]:
    """Write the model's files into a folder and return them; the same model, the same bytes.

    `onnx`: `model.onnx`, with `model.onnx.data` beside it when weights are over `inline_limit`
    bytes or `external_data` asks for it. `ort`: `model.ort`, for runtimes without the ONNX parser.
    It holds ONNX Runtime's extended optimizations but none that bake in a memory layout, so a file
    made on x86-64 runs on arm64; float16 nodes that the host has no kernel for are stored with
    casts around them. It depends on the version of ONNX Runtime. `session_options` are the target's
    where not given.

    Raises:
        UsageError: an unknown format.
        LoweringError: ONNX Runtime refuses the model; or `ort` for one over 2 GB.
        UnsupportedOpError: a node has no kernel.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError(
            f"No such format {unknown[0]!r}" if unknown else "No format given",
            fix=f"ONNX Runtime takes: {', '.join(FORMATS)}",
        )
    entries = target.session_options if session_options is None else session_options
    big = weight_bytes(model) > inline_limit
    files: list[Path] = []
    if "onnx" in formats:
        options = {"external_data": external_data, "inline_limit": inline_limit}
        files += write_onnx(model, folder / "model.onnx", **options)  # type: ignore[arg-type]
        OrtRunner(files[0], session_options=entries).close()
    if "ort" in formats:
        if big:
            raise LoweringError(
                "The .ort format holds no model of this size",
                why=f"{weight_bytes(model):,} bytes of weights; it is one flatbuffer under 2 GB",
                fix="use the onnx format, or compress the model",
            )
        files.append(_emit_ort(model, entries, folder / "model.ort"))
    return files


def _emit_ort(model: ir.Model, entries: Mapping[str, str], path: Path) -> Path:
    import onnxruntime as ort

    options = _session_options(entries, threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    create_session(serialize(model), options, model, disabled_optimizers=_PORTABLE)
    path.write_bytes(canonicalize(path.read_bytes()))
    OrtRunner(path, session_options=entries).close()
    return path
