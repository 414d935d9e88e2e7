"""What `compile` returns: the graph, the ledger, the placement, and ways to run and save it.

Here: `Compiled`. Not here: making one (`api`), the folder on disk (`artifact`).
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .artifact import TOLERANCE, save_artifact
from .cost.budget import Verdict
from .errors import LoweringError, UsageError
from .passes.ledger import Ledger
from .speed import Speed
from .targets.feed import check_feed, input_specs, output_specs
from .targets.registry import runs_on_host
from .targets.support import Placement
from .targets.target import Runtime, Target


@dataclasses.dataclass
class Compiled:
    """A model made ready for a target.

    `model` is the final graph, `recipe` the text that made it, `ledger` one line a pass,
    `placement` how each operator runs, `notes` what the user should know, `cost` the static cost
    as plain data. `session_options` is what ONNX Runtime must be told, `speed` the time on this
    machine against the original where it could be measured. `golden_input` is a feed that the
    source model runs on, recorded with its result in the artifact; None where none is known.
    `verdicts`: one a limit of the budget that `compile` was given.
    """

    model: ir.Model
    target: Target
    recipe: str
    ledger: Ledger
    placement: Placement
    notes: list[str]
    session_options: Mapping[str, str]
    cost: Mapping[str, Any]
    dims: Mapping[str, int]
    speed: Speed | None = None
    golden_input: Mapping[str, np.ndarray] | None = None
    verdicts: tuple[Verdict, ...] = ()
    _runner: Any = None
    _folder: Any = None

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, computed on this machine.

        ONNX Runtime runs the graph of any target; a TVM library only that of this machine.

        Raises:
            CalibrationError: the feed does not fit the inputs.
            LoweringError: the library is for another machine.
        """
        overridable = [name for name in self.model.graph.initializers if name in feed]
        check_feed(input_specs(self.model), feed, optional=overridable)
        results: dict[str, np.ndarray] = self.runner().run(feed)
        return results

    def runner(self) -> Any:
        """The session or library behind `run`, made once."""
        if self._runner is None:
            self._runner = self._make_runner()
        return self._runner

    def _make_runner(self) -> Any:
        if self.target.runtime is Runtime.ONNXRUNTIME:
            from .targets.onnxruntime import OrtRunner

            return OrtRunner(self.model, session_options=self.session_options)
        if not runs_on_host(self.target):
            raise LoweringError(
                f"A library for {self.target.name} does not run on this machine",
                why=f"it is made for {self.target.hardware.arch}",
                fix="save it and use `edgepass run --emulate arm64`, or run it on the device",
            )
        from .targets.tvm.run import TvmRunner

        return TvmRunner(self._library())

    def _library(self) -> Path:
        """The shared library, compiled once per `Compiled`."""
        if self._folder is None:
            from .targets.tvm.emit import emit

            self._folder = tempfile.TemporaryDirectory(prefix="edgepass-")
            out = Path(self._folder.name) / "model.so"
            emit(self.model, tvm_target(self.target), out)
        return Path(self._folder.name) / "model.so"

    def save(
        self, path: str | Path, *, formats: Sequence[str] = ("onnx",), force: bool = False
    ) -> Path:
        """Write the artifact folder; see docs/artifact.md. Returns the folder.

        `formats`: `onnx`, `ort` or both, for ONNX Runtime; a TVM target writes its library.

        Raises:
            UsageError: the folder exists and is not an artifact, unless `force`.
            ArtifactError: what was written does not reproduce the golden output.
        """
        golden = self.golden_input
        return save_artifact(
            path,
            write_model=lambda folder: self._write(folder, formats),
            target=self.target,
            recipe=self.recipe,
            session_options=self.session_options,
            inputs=input_specs(self.model),
            outputs=output_specs(self.model),
            cost=self.cost,
            ledger=self.ledger.as_dict(),
            placement=self.placement.as_dict(),
            notes=self.notes,
            golden_input=golden,
            golden_output=None if golden is None else self._golden_output(golden),
            tolerance=TOLERANCE,
            force=force,
        )

    def _golden_output(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        if self.target.runtime is not Runtime.TVM:
            return None
        from .targets.onnxruntime import OrtRunner

        return OrtRunner(self.model, optimize=False).run(feed)

    def _write(self, folder: Path, formats: Sequence[str]) -> list[Path]:
        if self.target.runtime is Runtime.ONNXRUNTIME:
            from .targets.onnxruntime import emit

            options = self.session_options
            return emit(self.model, self.target, folder, formats, session_options=options)
        if tuple(formats) != ("onnx",):
            raise UsageError(
                f"A TVM target has no format {', '.join(formats)}",
                fix="leave `formats` out: it writes a shared library",
            )
        source = self._library()
        files = [p for p in source.parent.iterdir() if p.is_file()]
        return [Path(shutil.copyfile(file, folder / file.name)) for file in sorted(files)]

    def __str__(self) -> str:
        lines = [f"{self.recipe} for {self.target.name}", str(self.ledger)]
        if self.placement.slow:
            lines += ["off the fast path:", *(f"  {row}" for row in _slow_lines(self.placement))]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def tvm_target(target: Target) -> Any:
    """The code generator's view of a target: CPU facts by its `tvm` entry and features.

    Raises:
        UsageError: the target names a CPU that is not described.
    """
    from .targets.tvm.emit import TvmTarget
    from .targets.tvm.schedules import spec

    facts = target.tvm
    kind = str(facts.get("kind", "llvm"))
    cpus = {
        "x86_64": spec.X86_64_AVX2,
        "x86_64-avx512": spec.X86_64_AVX512,
        "arm64": spec.ARM64_NEON_DOTPROD,
        "riscv64": spec.RISCV64,
    }
    cpu = facts.get("cpu")
    if kind == "llvm" and cpu not in cpus and not isinstance(cpu, spec.CpuSpec):
        raise UsageError(
            f"{target.name!r} names the CPU {cpu!r}, which is not described",
            where="Target.tvm['cpu']",
            fix=f"use one of {', '.join(cpus)}, or a CpuSpec",
        )
    chosen = cpu if isinstance(cpu, spec.CpuSpec) else cpus.get(str(cpu))
    return TvmTarget(kind=kind, cpu=chosen, tuning_trials=int(facts.get("tuning_trials", 0)))


def _slow_lines(placement: Placement) -> list[str]:
    return [f"{row.count} {row.op_type}: {row.where}, {row.reason}" for row in placement.slow]
