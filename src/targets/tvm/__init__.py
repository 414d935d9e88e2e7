"""Lowering to TVM: a graph in, a shared library for a CPU (or GPU code) out.

Here: the public names. `importer` reads the graph into Relax, `schedules` makes CPU loops fast,
`emit` compiles and links, `run` executes on the host. Importing this package does not load TVM.
"""

from ...ir.sizing import fix_dims, symbolic_dims
from .emit import TvmEmitReport, TvmTarget, emit
from .importer import to_relax, unsupported_nodes
from .run import TvmRunner

__all__ = [
    "TvmEmitReport",
    "TvmRunner",
    "TvmTarget",
    "emit",
    "fix_dims",
    "symbolic_dims",
    "to_relax",
    "unsupported_nodes",
]
