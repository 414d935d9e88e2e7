"""edgepass: a model-conversion compiler pass framework for on-device machine learning.

    import edgepass
    compiled = edgepass.compile("model.onnx", target="arm64", recipe="int8", calibration=samples)
    print(compiled.ledger)
    compiled.save("out/")
    edgepass.load("out/").run({"input": x})
    edgepass.estimate(architecture, target="arm64", recipes=["fp32", "fp16", "int8"])

Every name below is imported when first used, so that `import edgepass` stays fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime's wheel reports usage unless told not to before it is imported; edgepass does not.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .api import bisect as bisect
    from .api import compile as compile
    from .architecture import Architecture as Architecture
    from .architecture import estimate as estimate
    from .artifact import Artifact as Artifact
    from .artifact import load as load
    from .compiled import Compiled as Compiled
    from .cost.budget import Budget as Budget
    from .cost.profile import Profile as Profile
    from .errors import EdgepassError as EdgepassError
    from .evaluation.evaluation import Evaluation as Evaluation
    from .evaluation.evaluation import evaluate as evaluate
    from .evaluation.internals import Internals as Internals
    from .evaluation.internals import inspect as inspect
    from .evaluation.metrics import PerSample as PerSample
    from .evaluation.report import Report as Report
    from .ir.match import any_of as any_of
    from .ir.match import const as const
    from .ir.match import op as op
    from .ir.match import var as var
    from .optimizer import Optimized as Optimized
    from .optimizer import optimize as optimize
    from .passes.base import Context as Context
    from .passes.base import Pass as Pass
    from .passes.base import PassResult as PassResult
    from .passes.base import Stage as Stage
    from .passes.registry import load_plugin as load_plugin
    from .passes.registry import passes as list_passes
    from .passes.registry import register_pass as register_pass
    from .passes.rules import RewriteRule as RewriteRule
    from .passes.rules import RuleGroup as RuleGroup
    from .passes.rules import explain as explain
    from .search.mixed import Mixed as Mixed
    from .search.prune_scan import PruneScan as PruneScan
    from .search.prune_scan import prune_scan as prune_scan
    from .search.prune_search import Pruned as Pruned
    from .search.prune_search import prune as prune
    from .search.result import SweepResult as SweepResult
    from .search.sensitivity import Sensitivity as Sensitivity
    from .search.sensitivity import sensitivity as sensitivity
    from .search.sweep import sweep as sweep
    from .targets.registry import get_target as get_target
    from .targets.registry import register_target as register_target
    from .targets.registry import targets as list_targets
    from .targets.target import Hardware as Hardware
    from .targets.target import OpSupport as OpSupport
    from .targets.target import QuantScheme as QuantScheme
    from .targets.target import Target as Target

_HOMES = {
    "bisect": ("api", "bisect"),
    "compile": ("api", "compile"),
    "Architecture": ("architecture", "Architecture"),
    "estimate": ("architecture", "estimate"),
    "Budget": ("cost.budget", "Budget"),
    "Profile": ("cost.profile", "Profile"),
    "Optimized": ("optimizer", "Optimized"),
    "optimize": ("optimizer", "optimize"),
    "Artifact": ("artifact", "Artifact"),
    "load": ("artifact", "load"),
    "Compiled": ("compiled", "Compiled"),
    "EdgepassError": ("errors", "EdgepassError"),
    "Evaluation": ("evaluation.evaluation", "Evaluation"),
    "evaluate": ("evaluation.evaluation", "evaluate"),
    "PerSample": ("evaluation.metrics", "PerSample"),
    "Report": ("evaluation.report", "Report"),
    "Internals": ("evaluation.internals", "Internals"),
    "inspect": ("evaluation.internals", "inspect"),
    "any_of": ("ir.match", "any_of"),
    "const": ("ir.match", "const"),
    "op": ("ir.match", "op"),
    "var": ("ir.match", "var"),
    "Context": ("passes.base", "Context"),
    "Pass": ("passes.base", "Pass"),
    "PassResult": ("passes.base", "PassResult"),
    "Stage": ("passes.base", "Stage"),
    "load_plugin": ("passes.registry", "load_plugin"),
    "list_passes": ("passes.registry", "passes"),
    "register_pass": ("passes.registry", "register_pass"),
    "RewriteRule": ("passes.rules", "RewriteRule"),
    "RuleGroup": ("passes.rules", "RuleGroup"),
    "explain": ("passes.rules", "explain"),
    "Mixed": ("search.mixed", "Mixed"),
    "Sensitivity": ("search.sensitivity", "Sensitivity"),
    "sensitivity": ("search.sensitivity", "sensitivity"),
    "PruneScan": ("search.prune_scan", "PruneScan"),
    "prune_scan": ("search.prune_scan", "prune_scan"),
    "Pruned": ("search.prune_search", "Pruned"),
    "prune": ("search.prune_search", "prune"),
    "SweepResult": ("search.result", "SweepResult"),
    "sweep": ("search.sweep", "sweep"),
    "get_target": ("targets.registry", "get_target"),
    "register_target": ("targets.registry", "register_target"),
    "list_targets": ("targets.registry", "targets"),
    "Hardware": ("targets.target", "Hardware"),
    "OpSupport": ("targets.target", "OpSupport"),
    "QuantScheme": ("targets.target", "QuantScheme"),
    "Target": ("targets.target", "Target"),
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edgepass' has no attribute {name!r}")
    module, attribute = home
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
