"""A latency profile of this machine: measure random networks, fit every class of kernels, prove it.

Here: `calibrate_host`, and networks made ready to be timed. How they are timed is for `microbench`
to say, what networks there are for `microbench_nets`, the fit and its proof for `calibrate_fit`.
Not here: fitting whole-model timings (`timings`), re-measuring (`check`).
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import CalibrationError, UsageError
from .calibrate_fit import fit_setting
from .microbench import Bench, NetTime
from .microbench_nets import REFERENCE, synthetic_net
from .profile import Profile
from .profiles import cpu_features, cpu_name

Array = NDArray[np.float64]
Prepare = Callable[[ir.Model], tuple[ir.Model, Mapping[str, str]] | None]
"""Applies a recipe to a network without weights, which it leaves as it is: a runnable model, and
session options; or None for a network that teaches nothing about the recipe."""
ReadyNet = tuple[str, str, ir.Model, Mapping[str, str]]
"""Name, recipe, runnable model, session options."""
ProgressCall = Callable[[int, int, str], None]

BATCH = 8
"""Networks that take turns: enough to outlast a slow spell, few enough to stay in memory."""
NETWORK_BYTES = 0.5e9
"""What the sessions of one network hold at the most, all recipes and two thread counts together."""
FIT_SHARE = 0.1
"""The part of the budget that fitting is left."""
_TOO_SLOW = 1.25


def calibrate_host(
    recipes: Mapping[str, Prepare],
    *,
    name: str,
    target: str,
    threads: Sequence[int] = (1,),
    budget_s: float = 540.0,
    progress: ProgressCall | None = None,
) -> Profile:
    """Measure this machine for about `budget_s` seconds and fit a profile.

    `recipes`: what is done to each network before it is timed ("fp32", "int8", ...). `threads`: the
    counts to measure. Deterministic but for time: the same networks in the same order, as many as
    the budget allows.

    Raises:
        UsageError: no thread counts.
        CalibrationError: nothing could be measured.
    """
    import onnxruntime as ort

    started = time.monotonic()
    end = started + budget_s * (1 - FIT_SHARE)
    tell = progress or _silent
    nets: list[NetTime] = []
    count = 0
    if not threads or min(threads) < 1:
        raise UsageError(f"Thread counts must be above zero: {list(threads)}")
    size = batch_size(available_bytes())
    with Bench(threads, reference=reference_network(recipes)) as bench:
        while True:
            spent = time.monotonic() - started
            if count and time.monotonic() + spent / count * size > end:
                break
            tell(int(spent), int(budget_s), f"{count} networks measured")
            nets += bench.run(ready_networks(recipes, range(count, count + size)))
            count += size
        speeds = {count: bench.speed(count) for count in threads}
    tell(int(time.monotonic() - started), int(budget_s), "fitting")
    if not nets:
        raise CalibrationError(
            "Nothing was measured",
            why="ONNX Runtime refused every network",
            fix="check that `import onnxruntime` works and runs a model",
        )
    nets = without_drift(nets, speeds)
    return Profile(
        name=name,
        device=cpu_name(),
        runtime="onnxruntime",
        target=target,
        source=f"micro-benchmarks: kernels of {count} random networks, {', '.join(recipes)}",
        settings=tuple(fit_setting(nets, n) for n in sorted(set(threads))),
        runtime_version=str(ort.__version__),
        date=datetime.date.today().isoformat(),
        host=_host(speeds[min(threads)]),
        kernels=_sample(nets),
        notes=(f"{sum(len(net.kernels) for net in nets)} kernels timed",),
    )


def batch_size(available: float | None) -> int:
    """How many networks to hold at once in that many bytes of free memory; None: not known."""
    return BATCH if available is None else int(min(BATCH, max(1, available / 2 // NETWORK_BYTES)))


def available_bytes() -> float | None:
    """Memory that can be had without swapping, as Linux reports it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else None


def reference_network(recipes: Mapping[str, Prepare]) -> ir.Model | None:
    """The network that tells how fast the machine is, under the first recipe."""
    made = next(iter(recipes.values()))(synthetic_net(REFERENCE).model)
    return None if made is None else made[0]


def ready_networks(recipes: Mapping[str, Prepare], indices: Iterable[int]) -> list[ReadyNet]:
    """Networks by number under every recipe, as a bench takes them."""
    found = []
    for index in indices:
        net = synthetic_net(index)
        for recipe, prepare in recipes.items():
            made = prepare(net.model)
            if made is not None:
                found.append((net.name, recipe, *made))
    return found


def _host(speed: float) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "features": list(cpu_features()),
        "cores": os.cpu_count() or 1,
        "machine": platform.machine(),
        "system": platform.system(),
        "reference_ms": speed,
    }


def without_drift(nets: Sequence[NetTime], speeds: Mapping[int, float]) -> list[NetTime]:
    """Times as they would be if the machine had always run at its usual speed.

    `speeds`: milliseconds of the reference by number of threads. What was measured while the
    reference took over `_TOO_SLOW` times as long is left out, unless that is most of it: a kernel
    bound by memory slows down differently then.
    """
    found = []
    ratios = [
        net.reference_ms / speeds[net.threads] if speeds.get(net.threads) else 1.0 for net in nets
    ]
    calm = sum(ratio <= _TOO_SLOW for ratio in ratios) > 0.6 * len(nets)
    for net, ratio in zip(nets, ratios, strict=True):
        if ratio > _TOO_SLOW and calm:
            continue
        speed = speeds.get(net.threads, 0.0)
        factor = 1.0 / ratio if ratio > 0 else 1.0
        kernels = tuple(dataclasses.replace(k, ms=k.ms * factor) for k in net.kernels)
        found.append(
            dataclasses.replace(net, ms=net.ms * factor, reference_ms=speed, kernels=kernels)
        )
    return found


def _sample(nets: Sequence[NetTime], count: int = 48) -> list[dict[str, Any]]:
    """Networks to measure again when the profile is checked: their times, spread over all."""
    step = max(1, len(nets) // count)
    return [
        {"net": net.net, "recipe": net.recipe, "threads": net.threads, "ms": net.ms}
        for net in nets[::step]
    ]


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""
