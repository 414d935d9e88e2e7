"""Every error a user can meet, and the exit code each gives the command line.

A message has four parts: *what* went wrong, *where* (node, op, shape, the user's source line),
*why*, and *what to do*. `Diagnostic` holds them; `EdgepassError` carries one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One finding. `where` and `why` may be empty where there is nothing to add."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.what} [{self.code}]"]
        lines += [
            f"  {label}: {text}"
            for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix))
            if text
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """The five fields, for `--json`."""
        return dataclasses.asdict(self)


class EdgepassError(Exception):
    """Base of all errors that edgepass raises on purpose.

    `code` names the kind in messages and `--json`; `exit_code` is what the command line returns.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.diagnostic = Diagnostic(code=self.code, what=what, where=where, why=why, fix=fix)
        super().__init__(str(self.diagnostic))


class UsageError(EdgepassError):
    """The call itself is wrong: an argument missing or contradictory."""

    code = "usage"
    exit_code = 2


class ModelFileError(EdgepassError):
    """The model can't be read: truncated, not ONNX, or not there."""

    code = "model-file"
    exit_code = 10


class WeightsAbsentError(EdgepassError):
    """Something needs the weights of an architecture that has none."""

    code = "weights-absent"
    exit_code = 11


class UnsafePathError(EdgepassError):
    """External data points outside the model's folder."""

    code = "unsafe-path"
    exit_code = 12


class InvalidGraphError(EdgepassError):
    """The graph breaks a structural rule: cyclic, dangling, duplicate names, ill-typed."""

    code = "invalid-graph"
    exit_code = 13


class ShapeError(InvalidGraphError):
    """A node's shapes or types contradict its operator."""

    code = "shape"
    exit_code = 14


class UnsupportedOpError(EdgepassError):
    """A node that the target, its lowering or an opset conversion has no answer for."""

    code = "unsupported-op"
    exit_code = 15


class CalibrationError(EdgepassError):
    """Calibration or run inputs have wrong names, shapes, dtypes, or NaN."""

    code = "calibration"
    exit_code = 16


class UnknownTargetError(EdgepassError):
    """No target of that name."""

    code = "unknown-target"
    exit_code = 17


class UnknownPassError(EdgepassError):
    """No pass or recipe of that name."""

    code = "unknown-pass"
    exit_code = 18


class PassOptionError(EdgepassError):
    """A pass has no such option, or its value does not fit."""

    code = "pass-option"
    exit_code = 19


class PluginError(EdgepassError):
    """A plugin can't be loaded, or claims a name that is taken."""

    code = "plugin"
    exit_code = 20


class PassFailedError(EdgepassError):
    """A pass raised, or left a graph that does not verify."""

    code = "pass-failed"
    exit_code = 21


class MissingDependencyError(EdgepassError):
    """An optional dependency or a tool (torch, tvm, a cross compiler, qemu) is not there."""

    code = "missing-dependency"
    exit_code = 22


class ArtifactError(EdgepassError):
    """A saved artifact is missing, incomplete, or does not reproduce its golden output."""

    code = "artifact"
    exit_code = 23


class LoweringError(EdgepassError):
    """The back-end (ONNX Runtime or TVM) refused the graph."""

    code = "lowering"
    exit_code = 24


class StrictTargetError(EdgepassError):
    """`strict=True`, and a node falls off the target's fast path."""

    code = "strict-target"
    exit_code = 25


class ArchitectureError(EdgepassError):
    """A torch module or `package.module:callable` can't be built or exported."""

    code = "architecture"
    exit_code = 26


class NumericsError(EdgepassError):
    """A result differs from its reference by more than is allowed."""

    code = "numerics"
    exit_code = 27


class ProfileError(EdgepassError):
    """A latency profile can't be read, found or fitted, or does not fit what is asked of it."""

    code = "profile"
    exit_code = 28


class RegressionError(EdgepassError):
    """A candidate is not within the limits that an evaluation was given."""

    code = "regression"
    exit_code = 29


class SlowerError(EdgepassError):
    """A compression that is there for speed makes the model slower than it is in float."""

    code = "slower"
    exit_code = 30
