"""MetaSchedule within a trial budget, for what the deterministic schedules do not cover.

Here: tuning named functions of a scheduled module and putting the best found in their place. Not
here: the schedules themselves. Results depend on the machine and its load: a tuned library is
neither reproducible nor meant to be compiled for another CPU than the one it was tuned on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from ...errors import LoweringError
from .crosscompile import architecture_of, host_architecture

_WORKER_SECONDS = 120.0
# A worker's first task includes `import tvm`: 5 s measured on an idle machine, 30 on a busy one,
# which is where MetaSchedule's own limit lies; work lost to it counts as a trial.

SEEN_TO_WORK = "apache-tvm 0.27.0.post1 with apache-tvm-ffi 0.1.14.post1 (0.1.15 crashes in it)"


def tune(
    module: Any, target: Any, trials: int, names: Sequence[str]
) -> tuple[Any, tuple[str, ...]]:
    """`module` with the functions in `names` tuned, and those whose code was replaced.

    `trials` measurements are shared among the functions. One with symbolic shapes, or for which
    nothing faster was found, stays as it is.

    Raises:
        LoweringError: the target is not this machine, or MetaSchedule failed.
    """
    import tvm

    triple = str(target.attrs.get("mtriple", ""))
    if architecture_of(triple) != host_architecture():
        raise LoweringError(
            "MetaSchedule measures on this machine, and the target is another one",
            where=triple,
            why="tuning_trials is above 0 for a cross-compiled target",
            fix="set tuning_trials=0: the deterministic schedules need no measurement",
        )
    variables = {var.name_hint: var for var in module.get_global_vars()}
    chosen = [name for name in names if _is_static(module[variables[name]])]
    tuned = tvm.IRModule(module.functions, attrs=module.attrs)
    replaced = []
    for position, name in enumerate(chosen):
        share = trials // len(chosen) + (position < trials % len(chosen))
        if share:
            best = _best(module[variables[name]], target, share)
            before = module[variables[name]]
            if best is not None and _seconds(best, target) < _seconds(before, target):
                tuned.update_func(variables[name], best)
                replaced.append(name)
    return tuned, tuple(replaced)


def load_intrinsics() -> None:
    """Import TVM's tensor intrinsics in seconds; here and in MetaSchedule's worker processes.

    Each of some hundred definitions calls `inspect.stack()`, and for frames of the import system,
    which have no file, that looks through every loaded module: two minutes measured.
    """
    original = inspect.getmodule
    inspect.getmodule = lambda *_arguments: None
    try:
        importlib.import_module("tvm.s_tir.tensor_intrin")
    finally:
        inspect.getmodule = original


def _is_static(function: Any) -> bool:
    """Whether every parameter is a buffer of known sizes."""
    return all(
        hasattr(parameter, "shape") and all(hasattr(size, "value") for size in parameter.shape)
        for parameter in function.params
    )


def _best(function: Any, target: Any, trials: int) -> Any:
    """The function under the fastest schedule measured, or None."""
    import tvm
    from tvm.s_tir import meta_schedule

    load_intrinsics()
    for name in ("tvm.s_tir.meta_schedule", "tvm.s_tir.meta_schedule.logging"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cores = {**{key: value for key, value in target.export().items() if value}, "num-cores": 1}
    sized = tvm.target.Target(cores)
    bare = function.without_attr("tirx.is_scheduled")
    with (
        tempfile.TemporaryDirectory(prefix="edgepass-tune-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            database = meta_schedule.tune_tir(
                bare,
                sized,
                folder,
                max_trials_global=trials,
                num_trials_per_iter=min(trials, 64),
                builder=meta_schedule.builder.LocalBuilder(
                    max_workers=1, timeout_sec=_WORKER_SECONDS, initializer=load_intrinsics
                ),
                runner=meta_schedule.runner.LocalRunner(
                    timeout_sec=_WORKER_SECONDS, initializer=load_intrinsics
                ),
                cost_model="xgb" if importlib.util.find_spec("xgboost") else "random",
                num_tuning_cores=1,
                seed=1,
            )
            schedule = meta_schedule.tir_integration.compile_tir(database, bare, sized)
        except Exception as error:  # it starts worker processes, and anything of theirs comes up
            raise LoweringError(
                "MetaSchedule failed",
                where=str(function.attrs.get("global_symbol", "")),
                why=f"{type(error).__name__}: {str(error).strip()[-200:]}",
                fix=f"set tuning_trials=0; seen to work: {SEEN_TO_WORK}",
            ) from error
    if schedule is None:
        return None  # nothing that was tried compiled and ran
    return schedule.mod["main"].with_attr(dict(function.attrs))


def _seconds(function: Any, target: Any) -> float:
    """The fastest of several runs of one function on zeros, after a warm-up."""
    import numpy as np
    import tvm

    named = function.with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": named}), target=target)
    arrays = [
        tvm.runtime.tensor(np.zeros([int(size) for size in parameter.shape], parameter.dtype))
        for parameter in function.params
    ]
    timer = built.mod.time_evaluator("main", tvm.cpu(), number=5, repeat=5)
    return float(min(timer(*arrays).results))
