"""Runs models inside the emulated machine; `emulator` starts it there with one folder as argument.

Here: the guest's half of the exchange, for ONNX Runtime sessions and TVM libraries. Not here:
anything that knows edgepass. This file is executed by the guest's Python, where only numpy,
onnxruntime and tvm_ffi exist, so it imports nothing else and stays one file.

The folder holds `jobs.json` (a list of jobs) and `<job>-<step>.npz` (the feeds, arrays keyed by
position, names in the JSON). For each job the guest writes `out-<job>-<step>.npz` and, last, by
rename, `result-<job>.json`: a job without one is the job that the process died in.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
Step = Callable[[Arrays], Arrays]

_ALIGNMENT = 64  # bytes; what TVM's generated code may assume of a tensor it is given
_CPU = 1  # DLPack's kDLCPU
_POOLED_ALLOCATOR = 2  # the relax virtual machine's own default


def onnxruntime_step(job: Mapping[str, Any]) -> Step:
    """A session on one thread, as a function from named inputs to named outputs."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: warnings would bury them in what the host shows
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "disabled": levels.ORT_DISABLE_ALL,
    }[job["optimization"]]
    for key, value in job["session_config"].items():
        options.add_session_config_entry(key, value)
    if job["save_optimized"]:
        options.optimized_model_filepath = job["save_optimized"]
    session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def step(feed: Arrays) -> Arrays:
        outputs = dict(zip(names, session.run(None, feed), strict=True))
        for name, value in outputs.items():
            if not isinstance(value, np.ndarray):
                raise TypeError(f"output {name!r} is a {type(value).__name__}, not a tensor")
            if value.dtype.hasobject:  # strings: an npz holds them without pickle as numpy's own
                outputs[name] = value.astype(np.str_)
        return outputs

    return step


def tvm_step(job: Mapping[str, Any]) -> Step:
    """A relax virtual machine's `main`, as a function from named inputs to named outputs.

    Only TVM's runtime library is loaded, through tvm_ffi: measured in emulation, `import tvm`
    takes 7 s and this 1.6 s (bytecode compiled).
    """
    tvm_ffi = importlib.import_module("tvm_ffi")
    libraries = Path(str(tvm_ffi.__file__)).parent.parent / "tvm" / "lib"
    ctypes.CDLL(str(libraries / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
    extra = libraries / "libtvm_runtime_extra.so"  # sort, random: a model may call them
    if extra.exists():
        ctypes.CDLL(str(extra), ctypes.RTLD_GLOBAL)
    library = Path(job["model"])
    signature = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    machine = tvm_ffi.load_module(str(library))["vm_load_executable"]()
    machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
    main = machine["main"]
    inputs = [entry["name"] for entry in signature["inputs"]]
    names = [entry["name"] for entry in signature["outputs"]]

    def step(feed: Arrays) -> Arrays:
        if set(feed) != set(inputs):
            raise KeyError(f"the library takes {inputs}, the feed has {sorted(feed)}")
        for entry in signature["inputs"]:
            given = feed[entry["name"]].dtype
            if given != np.dtype(entry["dtype"]):
                raise TypeError(f"input {entry['name']!r} is {given}, not {entry['dtype']}")
        result = main(*(tvm_ffi.from_dlpack(_aligned(feed[name])) for name in inputs))
        tensors = [result] if isinstance(result, tvm_ffi.Tensor) else list(result)
        return {
            name: np.array(np.from_dlpack(tensor))
            for name, tensor in zip(names, tensors, strict=True)
        }

    return step


def _aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous, writable copy whose data starts at a multiple of `_ALIGNMENT`."""
    buffer = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    view = buffer[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


_RUNTIMES: dict[str, Callable[[Mapping[str, Any]], Step]] = {
    "onnxruntime": onnxruntime_step,
    "tvm": tvm_step,
}


def run(folder: Path, index: int, job: Mapping[str, Any]) -> list[list[str]]:
    """Run one job's steps, writing each one's outputs; returns the output names of each step."""
    step = _RUNTIMES[job["runtime"]](job)
    written: list[list[str]] = []
    carried: Arrays = {}
    for number, names in enumerate(job["feeds"]):
        with np.load(folder / f"{index}-{number}.npz", allow_pickle=False) as stored:
            feed = {name: stored[str(position)] for position, name in enumerate(names)}
        outputs = step({**carried, **feed})
        carried = {
            target: outputs[source] for source, target in job["carry"].items() if source in outputs
        }
        arrays: Any = {str(position): array for position, array in enumerate(outputs.values())}
        np.savez(folder / f"out-{index}-{number}.npz", **arrays)
        written.append(list(outputs))
    return written


def main(folder: Path) -> None:
    """Run every job of the folder; a job's exception ends that job only."""
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text(encoding="utf-8"))):
        result: dict[str, Any] = {"steps": [], "error": "", "trace": ""}
        try:
            result["steps"] = run(folder, index, job)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
            result["trace"] = traceback.format_exc()
        partial = folder / f"result-{index}.partial"
        partial.write_text(json.dumps(result), encoding="utf-8")
        os.replace(partial, folder / f"result-{index}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
