"""What a benchmark ran on: the line that each of them prints first."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform


def describe_host() -> str:
    """Processor, cores, Python and the versions of what is measured."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    model = line.partition(":")[2].strip()
                    break
    except OSError:
        pass
    versions = []
    for name in ("edgepass", "onnx", "onnx-ir", "onnxruntime", "torch", "apache-tvm"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    load = os.getloadavg()[0]
    return (
        f"{datetime.date.today()}, {model}, {os.cpu_count()} cores, load {load:.1f}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )
