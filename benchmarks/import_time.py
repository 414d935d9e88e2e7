"""`import edgepass`: seconds in fresh processes, and that no heavy package comes with it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from host import describe_host

HEAVY = ("torch", "tvm", "onnxruntime", "onnx", "onnx_ir", "networkx", "sympy")


def seconds(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    print(describe_host())
    bare = statistics.median(seconds("pass") for _ in range(7))
    ours = statistics.median(seconds("import edgepass") for _ in range(7))
    print(f"import edgepass: {ours - bare:.3f} s over a bare interpreter's {bare:.3f} s")
    code = f"import edgepass, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    subprocess.run([sys.executable, "-c", code], check=True)
    first = statistics.median(seconds("import edgepass; edgepass.compile") for _ in range(3))
    print(f"edgepass.compile looked up: {first - bare:.3f} s")


if __name__ == "__main__":
    main()
