"""What a file that isn't ONNX is instead, from its first bytes, and what its owner should do.

Here: recognizing formats; nothing is unpacked or unpickled. Not here: reading ONNX (`onnx`).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

_EXPORT_FIRST = "convert it to ONNX with the exporter of its framework, and pass that"


def other_format(file: Path, head: bytes) -> tuple[str, str] | None:
    """(what the file is, what to do) if its first bytes are another format's."""
    if head[4:8] == b"ORTM":
        return (
            "an ONNX Runtime .ort file",
            "pass the .onnx it was made from; .ort is a compiled form and can't be optimized again",
        )
    if head[:4] == b"PK\x03\x04":
        return _zip_format(file)
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _EXPORT_FIRST
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return (
            "a Python pickle, probably a torch checkpoint",
            "edgepass unpickles nothing: load it yourself and pass the module with example inputs",
        )
    if len(head) > 8 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 30:
        return (
            "a safetensors file: weights without a graph",
            "pass the module that these weights belong to, with example inputs",
        )
    if head[:4] == b"GGUF":
        return "a GGUF file: weights without a graph", _EXPORT_FIRST
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return "an HDF5 file, probably a Keras model", _EXPORT_FIRST
    if head[:2] == b"\x1f\x8b":
        return "compressed with gzip", "unpack it first"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself", "run `git lfs pull` in its repository"
    if head.lstrip()[:1] in (b"{", b"<"):
        return "text (JSON or XML)", "pass the binary .onnx file"
    return None


def _zip_format(file: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(file) as archive:  # names only, nothing is unpacked
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript archive", "pass the original nn.Module with example inputs"
    if any("exported_program" in name or name.endswith("archive_format") for name in names):
        return (
            "a torch.export archive (.pt2)",
            "load it with `torch.export.load` and pass the ExportedProgram",
        )
    if any(name.endswith("data.pkl") for name in names):
        return (
            "a torch checkpoint",
            "edgepass unpickles nothing: load it yourself and pass the module with example inputs",
        )
    if any(name.endswith(".onnx") for name in names):
        return "a zip archive with an .onnx in it", "unpack it first"
    return "a zip archive", "pass the .onnx file"
