"""A small writer of TensorIR statements: loops, register tiles, vector loads and stores.

Kernels are written out as the loops they should be, already vectorized and tiled, instead of being
derived by `s_tir.Schedule` primitives: it gives the same code in a fraction of the compile time and
makes tails (rows, columns, channels that do not fill a tile) ordinary code. Every tensor is
addressed by a flat element offset. What is computed lives in the kernel modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

# A TensorIR expression or a Python number. tvm has no type stubs and is imported lazily.
Expr = Any


class KernelBuilder:
    """Collects the statements of one PrimFunc.

    `lanes` is the number of float32 values of a vector register. Offsets are int64 expressions in
    elements.
    """

    def __init__(self, lanes: int, threads: int = 1) -> None:
        from tvm import tirx

        self.tirx = tirx
        self.lanes = lanes
        self.threads = threads
        self._params: list[Any] = []
        self._frames: list[list[Any]] = [[]]

    # Tensors ---------------------------------------------------------------------------------
    def param(self, name: str, shape: Sequence[int], dtype: str = "float32") -> Any:
        """A tensor argument of the kernel; returns its flat view."""
        shape = tuple(int(extent) for extent in shape)
        buffer = self.tirx.decl_buffer(
            [self.int64(extent) for extent in shape], dtype, name, layout=None
        )
        self._params.append(buffer)
        if len(shape) == 1:
            return buffer
        elements = 1
        for extent in shape:
            elements *= extent
        data = self.tirx.op.buffer_data(buffer)
        flat = self.tirx.decl_buffer(
            [self.int64(elements)], dtype, name + "_flat", data=data, layout=None
        )
        self.emit(self.tirx.DeclBuffer(flat, data=data))
        return flat

    def alloc(self, elements: int, *, registers: bool, dtype: str = "float32") -> Any:
        """Scratch memory of this scope: registers (constant offsets only) or the heap."""
        scope = "local" if registers else "global"
        name = "acc" if registers else "scratch"
        buffer = self.tirx.decl_buffer(
            [self.int64(elements)], dtype, name, scope=scope, layout=None
        )
        self.emit(self.tirx.AllocBuffer(buffer))
        return buffer

    def load(self, buffer: Any, offset: Expr, lanes: int, dtype: str = "float32") -> Expr:
        """`lanes` consecutive elements from `offset` (a scalar if `lanes` is 1)."""
        if lanes == 1:
            return self.tirx.BufferLoad(buffer, [self.index(offset)])
        return buffer.vload([self.index(offset)], f"{dtype}x{lanes}")

    def store(self, buffer: Any, offset: Expr, value: Expr) -> None:
        """Store a scalar or a vector at `offset`."""
        self.emit(buffer.vstore([self.index(offset)], value))

    # Values ----------------------------------------------------------------------------------
    def int64(self, value: int) -> Expr:
        return self.tirx.IntImm("int64", int(value))

    def index(self, value: Expr) -> Expr:
        return self.int64(value) if isinstance(value, int) else value

    def splat(self, value: Expr, lanes: int) -> Expr:
        """A float constant or a scalar expression in all lanes."""
        if isinstance(value, (int, float)):
            value = self.tirx.FloatImm("float32", float(value))
        return value if lanes == 1 else self.tirx.Broadcast(value, lanes)

    def let(self, value: Expr, lanes: int, dtype: str = "float32") -> Expr:
        """Name an expression, so that using it twice computes it once."""
        var = self.tirx.Var("t", dtype if lanes == 1 else f"{dtype}x{lanes}")
        self.emit(self.tirx.Bind(var, value))
        return var

    # Statements ------------------------------------------------------------------------------
    def emit(self, stmt: Any) -> None:
        self._frames[-1].append(stmt)

    @contextlib.contextmanager
    def loop(self, extent: int, *, parallel: bool = False, start: int = 0) -> Iterator[Expr]:
        """A loop over `range(start, start + extent)`; no loop at all for an extent of one."""
        if extent == 1:
            # A scope of its own keeps two such blocks from sharing a buffer's definition.
            self._frames.append([])
            yield self.int64(start)
            self.emit_block(self._frames.pop())
            return
        var = self.tirx.Var("i", "int64")
        self._frames.append([])
        yield var + start if start else var
        body = self._sequence(self._frames.pop())
        kind = (
            self.tirx.ForKind.PARALLEL
            if parallel and self.threads > 1
            else self.tirx.ForKind.SERIAL
        )
        self.emit(self.tirx.For(var, self.int64(0), self.int64(extent), kind, body))

    @contextlib.contextmanager
    def when(self, condition: Expr | None) -> Iterator[None]:
        """An `if` without else; nothing at all where the condition is None (always true)."""
        self._frames.append([])
        yield
        frame = self._frames.pop()
        if condition is None:
            self.emit_block(frame)
        else:
            self.emit(self.tirx.IfThenElse(condition, self._sequence(frame), None))

    def emit_block(self, statements: list[Any]) -> None:
        self._frames[-1].extend(statements)

    def finish(self, name: str) -> Any:
        """The PrimFunc. Marked opaque, so that Relax fuses nothing into it."""
        from tvm import tirx
        from tvm.s_tir import SBlock, SBlockRealize

        # Relax's analyses expect the one block that scheduled functions have at their root.
        root = SBlock([], [], [], "root", self._sequence(self._frames[0]))
        body = SBlockRealize([], True, root)
        func = tirx.PrimFunc(self._params, body)
        return func.with_attr(
            {
                "tirx.noalias": True,
                "s_tir": True,
                "global_symbol": name,
                "op_pattern": 8,
                "tirx.is_scheduled": True,
            }
        )

    def _sequence(self, statements: list[Any]) -> Any:
        if len(statements) == 1:
            return statements[0]
        return self.tirx.SeqStmt(statements)
