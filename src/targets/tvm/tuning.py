"""MetaSchedule within a trial budget, for what the deterministic schedules do not cover.

Here: tuning named functions of a scheduled module and putting the best found in their place. Not
here: the schedules themselves. Results depend on the machine and its load: a tuned library is
neither reproducible nor meant to be compiled for another CPU than the one it was tuned on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from typing import Any

from ...errors import LoweringError
from .crosscompile import architecture_of, host_architecture


def tune(module: Any, target: Any, trials: int, names: tuple[str, ...]) -> Any:
    """`module` with the functions in `names` tuned, at most `trials` measurements in all.

    A function for which nothing valid was found stays as it is.

    Raises:
        LoweringError: the target is not this machine, or MetaSchedule failed.
    """
    triple = str(target.attrs.get("mtriple", ""))
    if architecture_of(triple) != host_architecture():
        raise LoweringError(
            "MetaSchedule measures on this machine, and the target is another one",
            where=triple,
            why="tuning_trials is above 0 for a cross-compiled target",
            fix="set tuning_trials=0: the deterministic schedules need no measurement",
        )
    if not names:
        return module
    import tvm

    functions = {var.name_hint: func for var, func in module.functions.items()}
    tunable = {name: functions[name] for name in names if name in functions}
    part = tvm.IRModule({tvm.ir.GlobalVar(name): func for name, func in tunable.items()})
    return _put_back(module, _measured(part, target, trials))


def _measured(part: Any, target: Any, trials: int) -> Any:
    from tvm import relax
    from tvm.s_tir import meta_schedule

    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
    sized = _with_cores(target)
    with (
        tempfile.TemporaryDirectory(prefix="edgepass-tune-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            database = meta_schedule.relax_integration.tune_relax(
                mod=part,
                params={},
                target=sized,
                work_dir=folder,
                max_trials_global=trials,
                seed=1,
            )
            with sized, database:
                return relax.transform.MetaScheduleApplyDatabase(enable_warning=False)(part)
        except Exception as error:  # it starts worker processes, and anything of theirs comes up
            raise LoweringError(
                "MetaSchedule failed",
                where=str(target),
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}",
                fix="set tuning_trials=0; apache-tvm-ffi 0.1.14.post1 is the version seen to work",
            ) from error


def _with_cores(target: Any) -> Any:
    """MetaSchedule refuses a CPU target that does not say how many cores it has."""
    import tvm

    fields = dict(target.export())
    fields["num-cores"] = 1
    return tvm.target.Target(fields)


def _put_back(module: Any, tuned: Any) -> Any:
    import tvm

    replaced = tvm.IRModule(module.functions, attrs=module.attrs)
    names = {var.name_hint: var for var in replaced.get_global_vars()}
    for var, func in tuned.functions.items():
        if func.attrs is not None and func.attrs.get("tirx.is_scheduled", False):
            replaced.update_func(names[var.name_hint], func)
    return replaced
