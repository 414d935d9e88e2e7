"""Many devices under one runtime, fitted together, and a new one from a few timings of its own.

Here: `fit_fleet`, which learns from a table of whole-model timings how the rates of devices vary,
and `Fleet.adapt`, which makes a profile of a device from as few as ten timings. Not here: what the
rates are (`fleet_terms`), one device from its own timings (`timings`).

Logarithms of a device's rates are Gaussian over the fleet: mean and covariance are learned from all
devices by expectation maximization around each device's most likely rates (Laplace's approximation;
Gelman et al., Bayesian Data Analysis, ch. 13). Errors of models are Student's t, so that a timing
that went wrong counts little. numpy alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError
from .features import Features
from .fleet_nets import KnownNets
from .fleet_terms import NAMES, RATES, Design, design, setting
from .profile import Correction, HeldOut, Interval, Profile, Setting

Array = NDArray[np.float64]

NOISE = 0.08
"""The deviation of a model's time from what rates say, relative."""
FREEDOM = 4.0
"""Degrees of freedom of the errors: about one in ten is more than twice `NOISE` off."""
LEAST = 3
"""Timings of a device, by thread count, without which it can't be adapted to."""
_SPREAD = 0.4  # of a rate beside the device's speed, before anything is learned
_COMMON = 0.3  # variance of what all rates of a device share
_PRIOR_WEIGHT = 8.0  # devices that the assumed covariance counts for
_DRIFT = 0.4  # by how much rates may differ from where fitting starts, beside the speed
_MISFIT = 0.1  # deviation of what all devices have in common in one model
_LOOSER = 4.0  # variance of rates where the runtime differs
_LOOSER_NOISE = 0.03
_OFTEN = 6  # devices with a number of threads, for a typical one to be told
_FLEET_COUNT = 10  # held-out models that the fleet's interval counts for

_UNPROVED: Mapping[str, Interval] = {"": Interval(1 / 1.5, 1.5)}
"""Where nothing was held out: twice as wide as what was found for ncnn's boards."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One model on one device: `threads`, milliseconds.

    `block` tells apart runs with equally many threads (on other cores, say).
    """

    device: str
    threads: int
    model: str
    ms: float
    block: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        """What runs under the same conditions."""
        return self.device, self.threads, self.block


@dataclasses.dataclass(frozen=True, eq=False)
class Fleet:
    """How the rates of devices vary: `mean` [rates] and `covariance` of their logarithms.

    `devices`: (device, threads, block) in the order of `rates`, logarithms, [devices, rates].
    `misfit`: model -> what devices have in common in it that its kernels do not explain, as a
    logarithm. `intervals`: 80 % intervals of devices adapted to, by what models compute in; as they
    are for networks that the fleet has run (`nets`), wider by `Interval.novel` for others. `noise`:
    by how much a model's time deviates from what a device's rates say, relative.
    """

    mean: Array
    covariance: Array
    devices: tuple[tuple[str, int, str], ...] = ()
    rates: Array = dataclasses.field(default_factory=lambda: np.zeros((0, len(NAMES))))
    misfit: Mapping[str, float] = dataclasses.field(default_factory=dict)
    intervals: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    nets: KnownNets | None = None
    noise: float = NOISE

    @classmethod
    def from_profile(cls, profile: Profile) -> Fleet:
        """The fleet that a profile was written for (`as_profile`), single devices left out.

        Raises:
            ProfileError: it is a profile of one device.
        """
        found = profile.host.get("fleet")
        if not isinstance(found, Mapping) or list(found.get("rates", ())) != list(NAMES):
            raise ProfileError(
                f"The profile {profile.name!r} is not one of a fleet",
                why="it does not say how devices vary, or names other rates",
                fix="give a fleet's, such as fleet-ncnn",
            )
        try:
            nets = found.get("nets")
            return cls(
                np.array(found["mean"], float).reshape(len(NAMES)),
                np.array(found["covariance"], float).reshape(len(NAMES), len(NAMES)),
                intervals=profile.settings[0].intervals,
                nets=KnownNets.from_dict(nets) if nets else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(
                "The fleet in the profile is damaged",
                where=profile.name,
                why=f"{type(error).__name__}: {error}",
                fix="take the one that ships",
            ) from error

    def as_profile(
        self, name: str, *, runtime: str, target: str = "arm64", **facts: Any
    ) -> Profile:
        """The typical device, one setting for each number of threads that six devices have, or else
        one for all.

        How devices vary is among the facts of the host, for `from_profile`.
        """
        settings = [setting(self.mean, 1)]
        counted = Counter(count for _, count in {(device, n) for device, n, _ in self.devices})
        often = sorted(threads for threads, number in counted.items() if number >= _OFTEN)
        if often:
            settings = [setting(self._typical(threads), threads) for threads in often]
        settings = [dataclasses.replace(s, intervals=dict(self.intervals)) for s in settings]
        shape: dict[str, Any] = {"rates": list(NAMES), "mean": self.mean.tolist()}
        if self.nets is not None:
            shape["nets"] = self.nets.as_dict()
        return Profile(
            name=name,
            device=f"the typical one of {len({device for device, _, _ in self.devices})}",
            runtime=runtime,
            target=target,
            settings=tuple(settings),
            measured="models",
            host={"fleet": {**shape, "covariance": self.covariance.tolist()}},
            **facts,
        )

    def _typical(self, threads: int) -> Array:
        chosen = [i for i, (_, count, _) in enumerate(self.devices) if count == threads]
        found: Array = self.rates[chosen].mean(0)
        return found

    def under_another_runtime(self) -> Fleet:
        """What is left to know of devices whose timings are not of the fleet's runtime.

        Rates may differ more than between devices, and what networks take besides does not carry
        over. By how much was chosen on one device (Jetson Nano, ONNX Runtime) with ncnn's fleet.
        """
        return dataclasses.replace(
            self, covariance=self.covariance * _LOOSER, nets=None, noise=_LOOSER_NOISE
        )

    def adapt_rates(self, rows: Design, ms: Array, misfit: Array | None = None) -> Array:
        """Logarithms of a device's most likely rates, given models and their milliseconds."""
        offset = np.zeros(len(ms)) if misfit is None else misfit
        logs = np.log(ms)
        start = self.mean + np.median(logs - offset - np.log(rows.times(self.mean)))
        found, _, _ = _most_likely(
            start[None],
            self.mean,
            self.covariance,
            rows,
            logs[None],
            offset,
            rounds=12,
            noise=self.noise,
        )
        result: Array = found[0]
        return result

    def fit_device(
        self, models: Sequence[Sequence[Features]], ms: Array
    ) -> tuple[Array, Correction | None]:
        """Logarithms of a device's rates, and what known networks take besides."""
        rows = design(models)
        position = np.full(len(ms), -1) if self.nets is None else self.nets.find(models)
        chosen = position >= 0
        if self.nets is None or not chosen.any():
            return self.adapt_rates(rows, ms), None
        misfit = np.where(chosen, self.nets.misfit[position], 0.0)
        rates = self.adapt_rates(rows, ms, misfit)
        wanted = self.nets.times.predict(position[chosen], np.log(ms[chosen]))
        return rates, self.nets.correction(wanted - np.log(self.nets.rows.times(rates)))

    def adapt(
        self,
        samples: Mapping[int, Sequence[tuple[Sequence[Features], float]]],
        *,
        name: str,
        device: str,
        runtime: str,
        target: str = "arm64",
        source: str = "",
        held_out: Mapping[int, Mapping[str, HeldOut]] | None = None,
        intervals: Mapping[int, Mapping[str, Interval]] | None = None,
        **facts: Any,
    ) -> Profile:
        """A device's profile from threads -> (kernels of a model, milliseconds).

        Without `held_out` and `intervals` (both by threads), each model is left out in turn and
        predicted by the others; intervals are the fleet's, as much narrower or wider as those
        errors say.

        Raises:
            ProfileError: there are no samples, or a time is not above zero.
        """
        if not samples or any(not items for items in samples.values()):
            raise ProfileError("No timings to fit a profile to", where=device, fix="give some")
        settings: list[Setting] = []
        for threads, items in sorted(samples.items()):
            models, ms = [kernels for kernels, _ in items], np.array([value for _, value in items])
            if not (np.isfinite(ms).all() and (ms > 0).all()):
                raise ProfileError(
                    "A timing is not above zero", where=device, fix="leave that model out"
                )
            if held_out is None or intervals is None:
                proofs, widths = self._proof(models, ms)
            else:
                proofs, widths = dict(held_out[threads]), dict(intervals[threads])
            made = self._setting(models, ms, threads)
            settings.append(dataclasses.replace(made, held_out=proofs, intervals=widths))
        return Profile(
            name=name,
            device=device,
            runtime=runtime,
            target=target,
            source=source or f"{sum(map(len, samples.values()))} timings of models",
            settings=tuple(settings),
            measured="models",
            **facts,
        )

    def _setting(self, models: Sequence[Sequence[Features]], ms: Array, threads: int) -> Setting:
        rates, whole = self.fit_device(models, ms)
        return dataclasses.replace(setting(rates, threads), whole=whole)

    def _proof(
        self, models: Sequence[Sequence[Features]], ms: Array
    ) -> tuple[dict[str, HeldOut], dict[str, Interval]]:
        """The error on models left out one at a time, and intervals by it; needs five models."""
        fleet = self.intervals or _UNPROVED
        if self._setting(models, ms, 1).whole is None:  # all networks are new to the fleet
            fleet = {name: _of_new_nets(interval) for name, interval in fleet.items()}
        if len(ms) < 5:
            return {}, dict(fleet)
        truths, inside = np.empty(len(ms)), []
        for left in range(len(ms)):
            kept = np.arange(len(ms)) != left
            made = self._setting([m for m, k in zip(models, kept, strict=True) if k], ms[kept], 1)
            made = dataclasses.replace(made, intervals=fleet)
            alone = Profile("", "", "", "", "", (made,)).predict(models[left])
            truths[left] = np.log(ms[left] / alone.ms)
            inside.append(alone.low_ms <= ms[left] <= alone.high_ms)
        off = np.abs(np.expm1(-truths))
        proof = HeldOut(
            models=len(ms),
            median_error=float(np.median(off)),
            within_10=float((off <= 0.1).mean()),
            within_20=float((off <= 0.2).mean()),
            coverage=float(np.mean(inside)),
            method="leaving out one model at a time",
        )
        return {"": proof}, {name: _scaled(interval, truths) for name, interval in fleet.items()}


def _of_new_nets(interval: Interval) -> Interval:
    """The interval where no network is known."""
    wider = 1.0 + interval.novel
    return Interval(interval.low**wider, interval.high**wider)


def _scaled(interval: Interval, truths: Array) -> Interval:
    """The interval as wide as models held out say, weighed against what the fleet says.

    80 % of a Gaussian are within 1.28 deviations, half within 0.67.
    """
    own = 1.28 / 0.67 * float(np.median(np.abs(truths)))
    before = 0.5 * float(np.log(interval.high / interval.low))
    factor = (len(truths) * own + _FLEET_COUNT * before) / ((len(truths) + _FLEET_COUNT) * before)
    return dataclasses.replace(interval, low=interval.low**factor, high=interval.high**factor)


def is_fleet(profile: Profile) -> bool:
    """Whether a profile says how devices vary, and is to be adapted rather than scaled."""
    return isinstance(profile.host.get("fleet"), Mapping)


def fit_fleet(timings: Sequence[Timing], models: Mapping[str, Sequence[Features]]) -> Fleet:
    """Learn how devices vary from timings of models whose kernels are known.

    Timings of other models are left out. Settings of one device count less the more there are.

    Raises:
        ProfileError: fewer than three devices have a timing of a known model.
    """
    names = sorted({t.model for t in timings if t.model in models})
    devices = list(dict.fromkeys(t.key for t in timings if t.model in models))
    if len({device for device, _, _ in devices}) < 3:
        raise ProfileError("A fleet needs timings of three devices or more")
    logs = np.full((len(devices), len(names)), np.nan)
    row, column = ({k: i for i, k in enumerate(keys)} for keys in (devices, names))
    for t in timings:
        if t.model in models and t.ms > 0:
            logs[row[t.key], column[t.model]] = np.log(t.ms)
    count = Counter(device for device, _, _ in devices)
    weights = np.array([count[device] ** -0.5 for device, _, _ in devices])
    fitted = fit_rates(logs, design([models[name] for name in names]), weights)
    misfit = dict(zip(names, fitted.misfit.tolist(), strict=True))
    nets = KnownNets.learn(logs, {name: models[name] for name in names}, fitted.misfit, weights)
    return Fleet(fitted.mean, fitted.covariance, tuple(devices), fitted.rates, misfit, nets=nets)


@dataclasses.dataclass(frozen=True, eq=False)
class FittedRates:
    """`mean` [rates], `covariance`, `rates` [devices, rates], `misfit` [models]; logarithms."""

    mean: Array
    covariance: Array
    rates: Array
    misfit: Array


def fit_rates(logs: Array, rows: Design, weights: Array, rounds: int = 12) -> FittedRates:
    """Rates of all devices from logarithms of milliseconds, [devices, models], NaN where absent."""
    size = len(NAMES)
    start = np.log(np.array(list(RATES.values())))
    assumed = np.eye(size) * _SPREAD**2 + _speed() * _COMMON
    covariance = assumed + _speed()
    speeds = np.nanmedian(logs - np.log(rows.times(start)), axis=1)
    rates = start + speeds[:, None] * np.diag(_speed())
    mean = np.average(rates, axis=0, weights=weights)
    misfit = np.zeros(len(rows.amounts))
    for index in range(rounds):
        rates, posterior, residual = _most_likely(
            rates, mean, covariance, rows, logs, misfit, rounds=3 if index else 8
        )
        mean = np.average(rates, axis=0, weights=weights)
        apart = rates - mean
        total = np.einsum("b,bk,bl->kl", weights, apart, apart)
        total += np.einsum("b,bkl->kl", weights, posterior)
        covariance = (total + _PRIOR_WEIGHT * assumed) / (weights.sum() + _PRIOR_WEIGHT)
        common = np.nanmedian(np.where(np.isnan(logs), np.nan, residual + misfit), axis=0)
        seen = (~np.isnan(logs) * weights[:, None]).sum(0)
        misfit = np.nan_to_num(common) * seen / (seen + (NOISE / _MISFIT) ** 2)
        shift = _explained(misfit, rows, mean, mean - start, seen > 0)
        misfit = misfit - _slope(rows, mean[None])[0] @ shift
        rates, mean = rates + shift, mean + shift
    return FittedRates(mean, covariance, rates, misfit)


def _explained(
    misfit: Array, rows: Design, mean: Array, moved: Array, seen: NDArray[np.bool_]
) -> Array:
    """How the rates of all devices should move so that models fit them better, [rates].

    Step by step, what all devices have in common would go to the misfits, which nothing that is
    learned of many devices holds back; so it is first offered to the rates. `moved`: how far the
    mean is from where it started, beside its speed.
    """
    slope = _slope(rows, mean[None])[0][seen] / _MISFIT
    held = np.linalg.inv(np.eye(len(mean)) * _DRIFT**2 + _speed() * 100.0)
    wanted = slope.T @ (misfit[seen] / _MISFIT) - held @ moved
    found: Array = np.linalg.solve(slope.T @ slope + held, wanted)
    return found.clip(-0.5, 0.5)


def _slope(rows: Design, rates: Array) -> Array:
    """Derivative of the logarithms of times by those of rates, [devices, models, rates]."""
    each = np.exp(rates @ rows.uses.T)[:, None, :] * rows.amounts[None]
    found: Array = (each / each.sum(2, keepdims=True)) @ rows.uses
    return found


def _speed() -> Array:
    """What a faster device changes: every rate that is a time, no factor."""
    times = np.array([name not in ("direct", "narrow", "direct8") for name in NAMES], float)
    found: Array = np.outer(times, times)
    return found


def _most_likely(
    start: Array,
    mean: Array,
    covariance: Array,
    rows: Design,
    logs: Array,
    offset: Array,
    rounds: int,
    noise: float = NOISE,
) -> tuple[Array, Array, Array]:
    """Rates of all devices by Gauss-Newton: [devices, rates], their covariances, residuals."""
    precision = np.linalg.inv(covariance)
    there = ~np.isnan(logs)
    known = np.nan_to_num(logs)
    rates = start
    for _ in range(rounds):
        each = np.exp(rates @ rows.uses.T)[:, None, :] * rows.amounts[None]
        times = each.sum(2)
        slope = (each / times[:, :, None]) @ rows.uses
        residual = np.where(there, known - np.log(times) - offset, 0.0)
        trust = there * (FREEDOM + 1) / (FREEDOM + (residual / noise) ** 2) / noise**2
        weighted = slope * trust[:, :, None]
        curvature = precision + np.swapaxes(weighted, 1, 2) @ slope
        gradient = (weighted * residual[:, :, None]).sum(1) - (rates - mean) @ precision
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        rates = rates + step.clip(-1.5, 1.5)
    return rates, np.linalg.inv(curvature), residual
