"""A latency profile of this machine: which recipes are measured, and how networks get to them.

Here: `calibrate` and `check`. Not here: measuring and fitting (`cost.calibrate`, `cost.check`),
profiles from timings made elsewhere (`timing_tables`).
"""

from __future__ import annotations

import functools
import os
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from .api import session_options
from .architecture import Architecture
from .cost.calibrate import Prepare, calibrate_host
from .cost.check import CheckResult, check_profile
from .cost.microbench import Bench
from .cost.microbench_nets import synthetic_net
from .cost.profile import Profile
from .cost.profiles import find_profile, profile_for
from .errors import CalibrationError, UsageError
from .ir.random_weights import fill_random_weights
from .targets.registry import get_target, is_measurable
from .targets.target import Target

ProgressCall = Callable[[int, int, str], None]

RECIPES = ("fp32", "int8")
"""What every network is measured in."""
SOME_RECIPES = ("dynamic-int8", "int4-weights")
"""What networks with matrix products are measured in besides."""
_EVERY = 3  # of those, one in so many
FASTER = 0.95
"""fp16 is measured where it takes less than this share of float32's time."""
_TRIED = (0, 1, 2, 4)  # networks on which that is found out


def calibrate(
    target: str | Target = "host",
    *,
    name: str | None = None,
    threads: Sequence[int] | None = None,
    budget_s: float = 540.0,
    progress: ProgressCall | None = None,
) -> Profile:
    """Measure this machine under ONNX Runtime for about `budget_s` seconds and fit a profile.

    Needs nothing but the base install. `threads`: the counts to measure, by default 1 and all
    cores. The profile is named after the target, and is found for it from then on once saved
    among the user's (`cost.profiles.user_folder`).

    Raises:
        UsageError: the target is another kind of machine, or is served by TVM.
        CalibrationError: nothing could be measured.
    """
    device = _measurable(target)
    return calibrate_host(
        prepared_recipes(device),
        name=name or device.name.replace("/", "-"),
        target=device.name,
        threads=tuple(threads) if threads else _default_threads(),
        budget_s=budget_s,
        progress=progress,
    )


def check(
    profile: str | Path | Profile | Target = "host",
    *,
    threads: int | None = None,
    budget_s: float = 20.0,
    progress: ProgressCall | None = None,
) -> CheckResult:
    """Measure a sample of networks again and say how far a profile is off now.

    `profile`: one by name or path, or a target, whose profile is meant.

    Raises:
        CalibrationError: the target has no profile.
        ProfileError: no such profile.
        UsageError: the profile is of another kind of machine.
    """
    found = _profile_meant(profile)
    device = _measurable(found.target)
    recipes = {recipe: functools.partial(_prepare, recipe, device) for recipe in RECIPES}
    return check_profile(found, recipes, threads=threads, budget_s=budget_s, progress=progress)


def _profile_meant(given: str | Path | Profile | Target) -> Profile:
    if isinstance(given, Profile):
        return given
    text = given.name if isinstance(given, Target) else str(given)
    if text != "host" and not isinstance(given, Target):
        return find_profile(text)
    device = get_target(given if isinstance(given, Target) else "host")
    found = profile_for(device)
    if found is None:
        raise CalibrationError(
            f"The target {device.name!r} has no profile to check",
            fix="`edgepass calibrate` makes one; `edgepass profiles` lists those there are",
        )
    return found


def _measurable(target: str | Target) -> Target:
    device = get_target(target)
    if not is_measurable(device):
        raise UsageError(
            f"The target {device.name!r} can't be measured on this machine",
            why=f"it is {device.hardware.arch} with {device.runtime}",
            fix="run `edgepass calibrate` on the device itself, or fit timings made there: "
            "`edgepass calibrate --from timings.csv`",
        )
    return device


def _default_threads() -> tuple[int, ...]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return tuple(sorted({1, cores or 1}))


def prepared_recipes(target: Target) -> dict[str, Prepare]:
    """The recipes to measure on a target, by name; fp16 where it is faster there."""
    recipes: dict[str, Prepare] = {
        name: functools.partial(_prepare, name, target) for name in RECIPES
    }
    halves = functools.partial(_prepare, "fp16", _with_halves(target))
    if _is_faster(halves, recipes["fp32"]):
        recipes["fp16"] = halves
    for name in SOME_RECIPES:
        recipes[name] = functools.partial(_prepare_products, name, target)
    return recipes


def _prepare(recipe: str, target: Target, model: ir.Model) -> tuple[ir.Model, Mapping[str, str]]:
    """The network as the recipe leaves it, with random weights, and the session's options."""
    ready = _imported(model).prepared(recipe, target)
    fill_random_weights(ready)
    return ready, session_options(target, ready)


@functools.lru_cache(maxsize=1)
def _imported(model: ir.Model) -> Architecture:
    """The network as recipes share it, one at a time: models are told apart by identity."""
    return Architecture(model)


def _prepare_products(
    recipe: str, target: Target, model: ir.Model
) -> tuple[ir.Model, Mapping[str, str]] | None:
    """As `_prepare`; None for a network with no more than one matrix product with weights, and
    for most of the others: there are fewer kinds of kernels to learn."""
    if zlib.crc32((model.graph.name or "").encode()) % _EVERY:
        return None
    weights = model.graph.initializers
    products = [
        node
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm")
        and any(value is not None and value.name in weights for value in node.inputs)
    ]
    return _prepare(recipe, target, model) if len(products) > 1 else None


def _with_halves(target: Target) -> Target:
    return target.replace(float_dtypes=(*target.float_dtypes, ir.DataType.FLOAT16))


def _is_faster(candidate: Prepare, plain: Prepare) -> bool:
    """Whether networks take less time; a runtime without such kernels is no faster."""
    ratios = []
    for index in _TRIED:
        models = []
        for name, prepare in (("plain", plain), ("candidate", candidate)):
            made = prepare(synthetic_net(index).model)
            if made is not None:
                models.append((str(index), name, *made))
        with Bench([1]) as bench:
            times = {net.recipe: net.ms for net in bench.run(models, profile=False)}
        if len(times) == 2:
            ratios.append(times["candidate"] / times["plain"])
    return bool(ratios) and statistics.median(ratios) < FASTER
