"""Whether a profile still tells the truth: a few networks measured again.

Here: `check_profile`. Not here: making a profile (`calibrate`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CalibrationError
from .calibrate import Prepare, ProgressCall, ready_networks, reference_network
from .calibrate_fit import kernel_times, profiling_overhead
from .latency import main_dtype
from .microbench import Bench, NetTime
from .profile import Profile

_BATCH = 3
_STEP = 7
"""From one network to the next: families differ. They are among those that a profile is fitted on,
so that a deviation is the machine's or the file's, not that of a network unlike the others."""
TOLERANCE = 0.12
"""How far the median may be off."""
_CLASS_FACTOR = 2.5
"""How far a class of kernels may be off that takes `_CLASS_SHARE` of the time."""
_CLASS_SHARE = 0.04


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """How far a profile is off now. Ratios are predicted over measured, medians over networks.

    `spread`: the half-width of the middle 80 % of the networks' ratios, in logarithms. `by_class`:
    the ratio of the summed kernels of each class that took a good part of the time. `machine`:
    the reference's time now over that recorded; None where none was.
    """

    profile: str
    networks: int
    ratio: float
    spread: float
    by_class: Mapping[str, float]
    machine: float | None = None

    @property
    def stale(self) -> bool:
        """Whether the profile should be made again."""
        return bool(self.reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        found = []
        if abs(math.log(self.ratio)) > math.log1p(TOLERANCE):
            found.append(f"predictions are {self.ratio - 1:+.0%} off in the median")
        if self.spread > 3 * TOLERANCE:
            found.append(f"predictions scatter by {self.spread:.0%}")
        bound = math.log(_CLASS_FACTOR)
        for name, ratio in self.by_class.items():
            if abs(math.log(max(ratio, 1e-9) / self.ratio)) > bound:
                found.append(f"{name} is predicted at {ratio:.2f} times what it takes")
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            **dataclasses.asdict(self),
            "by_class": dict(self.by_class),
            "stale": self.stale,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.profile}: predicted over measured {self.ratio:.2f} in the median of "
            f"{self.networks} networks, 80 % of them within {self.spread:.0%}"
        ]
        if self.machine is not None:
            lines.append(f"the machine takes {self.machine:.2f} times what it took then")
        verdict = "stale: calibrate again" if self.stale else "ok"
        return "\n".join([*lines, *self.reasons, verdict])


def check_profile(
    profile: Profile,
    recipes: Mapping[str, Prepare],
    *,
    threads: int | None = None,
    budget_s: float = 20.0,
    progress: ProgressCall | None = None,
) -> CheckResult:
    """Measure some of the networks that profiles are fitted on, for about `budget_s` seconds.

    `recipes` are as for `calibrate_host`; `threads` the profile's least where not given.

    Raises:
        CalibrationError: nothing could be measured.
    """
    count = threads or min(setting.threads for setting in profile.settings)
    end = time.monotonic() + budget_s
    nets: list[NetTime] = []
    done = 0
    with Bench([count], reference=reference_network(recipes)) as bench:
        while not done or time.monotonic() < end:
            chosen = range(1 + done * _STEP, 1 + (done + _BATCH) * _STEP, _STEP)
            nets += bench.run(ready_networks(recipes, chosen))
            done += _BATCH
            if progress is not None:
                left = max(0, int(end - time.monotonic()))
                progress(int(budget_s) - left, int(budget_s), f"{done} networks measured")
        now = bench.speed(count)
    recorded = profile.host.get("reference_ms")
    return compare_nets(profile, nets, count, now / float(recorded) if recorded else None)


def compare_nets(
    profile: Profile, nets: list[NetTime], threads: int, machine: float | None = None
) -> CheckResult:
    """Predictions against networks that were measured.

    Raises:
        CalibrationError: there are none.
    """
    if not nets:
        raise CalibrationError(
            "Nothing was measured",
            why="ONNX Runtime refused every network",
            fix="check that `import onnxruntime` works and runs a model",
        )
    setting = profile.setting(threads)
    overhead = profiling_overhead(nets)
    ratios = []
    totals: dict[str, list[float]] = {}
    everything = 0.0
    for net in nets:
        found = [kernel.features for kernel in net.kernels]
        made = profile.predict(found, threads, dtype=main_dtype(found))
        ratios.append(made.ms / net.ms)
        times = kernel_times(setting, found)
        for kernel, features, ms in zip(net.kernels, found, times, strict=True):
            if math.isnan(ms):
                continue
            truth = max(0.0, kernel.ms - overhead)
            total = totals.setdefault(features.keys[0], [0.0, 0.0])
            total[0] += float(ms) * setting.scale
            total[1] += truth
            everything += truth
    by_class = {
        key: predicted / truth
        for key, (predicted, truth) in sorted(totals.items())
        if truth > _CLASS_SHARE * everything
    }
    logs = np.log(ratios)
    low, middle, high = np.quantile(logs, [0.1, 0.5, 0.9])
    return CheckResult(
        profile.name,
        len(nets),
        float(math.exp(middle)),
        float(high - low) / 2,
        by_class,
        machine,
    )
