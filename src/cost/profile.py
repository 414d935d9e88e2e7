"""A device's latency profile: fitted numbers as JSON, and the prediction that they make.

Here: `Profile` and its parts, reading and writing them, and `Profile.predict`, a sum over kernels
of a non-negative base (so much a MAC, a byte, a launch) times a learned correction near measured
kernels. Evaluating needs numpy alone. Not here: fitting (`calibrate`, `timings`, `fleet`), and what
is said of a kernel (`features`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError
from .features import Features
from .whole_model import coordinates

FORMAT = 1
"""The version of the JSON. Readers refuse a newer one."""
LEAST_SHARE = 0.2
"""Of what its class says, the least that a kernel is taken to cost (`Setting.per_kernel_ms` may be
negative)."""
CLIP = (0.2, 5.0)
"""A correction never takes a kernel further from its base than this."""


Array = NDArray[np.float64]


def similarity(left: Array, right: Array) -> Array:
    """The squared exponential kernel of rows with each other, [n, m]; widths are one."""
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None, :] - 2.0 * left @ right.T
    found: Array = np.exp(-0.5 * np.maximum(squares, 0.0))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """A smooth factor on the base, learned around known kernels (or whole models).

    With z the coordinates (in the order of `coordinates`), p_j the `points`, l the `scales` and
    w_j the `weights`: s = sum_j w_j exp(-|(z - p_j) / l|^2 / 2), and the factor is 1 + s (link
    "linear") or exp(s) ("log"), within `CLIP`. This is the mean of a Gaussian process with a
    squared exponential kernel (Rasmussen and Williams 2006, ch. 2).
    """

    coordinates: tuple[str, ...]
    scales: Array
    points: Array
    weights: Array
    link: str = "log"

    def factors(self, rows: Array) -> Array:
        """Factors of kernels, [n], from their coordinates, [n, len(coordinates)]."""
        total = self._similarity(rows) @ self.weights
        factors: Array = np.exp(total) if self.link == "log" else 1.0 + total
        return factors.clip(*CLIP)

    def novelty(self, rows: Array) -> Array:
        """How far kernels lie from every known one: 0 beside one, towards 1 far away, [n]."""
        if not len(self.points):
            return np.ones(len(rows))
        novelty: Array = 1.0 - self._similarity(rows).max(axis=1)
        return novelty

    def _similarity(self, rows: Array) -> Array:
        return similarity(rows / self.scales, self.points / self.scales)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassModel:
    """One class of kernels: milliseconds for each unit of an amount, and what was learned besides.

    `terms`: amount -> ms (`features.Features.amounts`). `low`, `high`: the range of each coordinate
    that was seen. `samples`: kernels it was fitted on. `error`: median relative error of kernels
    held out, None where it was not measured.
    """

    terms: Mapping[str, float]
    correction: Correction | None = None
    low: Mapping[str, float] = dataclasses.field(default_factory=dict)
    high: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples: int = 0
    error: float | None = None

    def predict(self, found: Sequence[Features]) -> tuple[Array, Array]:
        """Milliseconds and novelty (0 known to 1 far from anything seen) of kernels, [n] each."""
        base = np.array([sum(c * f.amount(name) for name, c in self.terms.items()) for f in found])
        outside = np.array([self._outside(f) for f in found])
        if self.correction is None:
            return base, outside
        names = self.correction.coordinates
        rows = np.array([[f.coordinates.get(name, 0.0) for name in names] for f in found])
        novelty = self.correction.novelty(rows)
        return base * self.correction.factors(rows), np.maximum(outside, novelty)

    def _outside(self, found: Features) -> float:
        """How many doublings the farthest coordinate lies outside of what was seen, at most 1."""
        worst = 0.0
        for name, value in found.coordinates.items():
            if name in self.low:
                worst = max(worst, self.low[name] - value, value - self.high[name])
        return min(1.0, worst)


@dataclasses.dataclass(frozen=True)
class Interval:
    """Where 80 % of the truths lie, as factors on the prediction.

    `novel`: how much wider, in units of the width in logarithms, where all time is in kernels of
    novelty 1, or the model is unlike all that a correction of whole models knows.
    """

    low: float
    high: float
    novel: float = 2.0

    def around(self, ms: float, novel_share: float) -> tuple[float, float]:
        """(low, high) in milliseconds."""
        wider = 1.0 + self.novel * novel_share
        return ms * self.low**wider, ms * self.high**wider


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The error on models that the fit had not seen; shares are 0 to 1.

    `coverage`: the share of truths inside the 80 % interval. `method`: how they were held out.
    """

    models: int
    median_error: float
    within_10: float
    within_20: float
    coverage: float | None = None
    method: str = ""

    def __str__(self) -> str:
        text = (
            f"median error {self.median_error:.1%}, {self.within_10:.0%} within 10 %, "
            f"{self.within_20:.0%} within 20 % of {self.models} models"
        )
        return f"{text} ({self.method})" if self.method else text


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """One way of running: the number of threads, and the classes fitted for it.

    A model takes `scale` times the sum of its kernels plus `per_kernel_ms` for each, times `whole`
    at its `whole_model.coordinates`. `intervals` and `held_out` are by what the model computes in
    ("float32", "int8"), "" for the others.
    """

    threads: int
    classes: Mapping[str, ClassModel]
    scale: float = 1.0
    per_kernel_ms: float = 0.0
    intervals: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    held_out: Mapping[str, HeldOut] = dataclasses.field(default_factory=dict)
    whole: Correction | None = None

    def find(self, found: Features) -> tuple[str, float]:
        """The class that prices a kernel, and 0 for its own, more for a relative's; '' for none.

        A family's class is a relative's only where operators of it have classes of their own.
        """
        own, family = found.keys
        if own in self.classes:
            return own, 0.0
        if family in self.classes:
            return family, 0.5 if found.family in self._divided else 0.0
        root = found.family.partition("/")[0]
        near = f"{root}:{found.dtype}"
        if near in self.classes:
            return near, 1.0
        return "", 1.0

    @functools.cached_property
    def _divided(self) -> frozenset[str]:
        """The families in which operators have classes of their own."""
        return frozenset(name.split(":")[0] for name in self.classes if name.count(":") == 2)

    def in_a_run(self, ms: Array) -> Array:
        """What kernels add to a run, from the milliseconds that their classes say."""
        found: Array = np.maximum(ms * self.scale + self.per_kernel_ms, LEAST_SHARE * ms)
        return found

    def interval(self, dtype: str) -> Interval:
        """The interval for models that compute mostly in that dtype."""
        found = self.intervals.get(dtype) or self.intervals.get("")
        return found or next(iter(self.intervals.values()), Interval(1 / 3, 3.0))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Milliseconds of one inference, and how far it can be trusted.

    `kernel_ms`: of each kernel, in order; None where nothing is known of it. Shares are of the
    predicted time, 0 to 1: `novel` in kernels unlike any that the profile has seen, `assumed` in
    classes that it lacks and that were priced by assumption. `unknown`: kernels without a price.
    """

    ms: float
    low_ms: float
    high_ms: float
    kernel_ms: tuple[float | None, ...]
    novel: float = 0.0
    assumed: float = 0.0
    unknown: int = 0
    threads: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Fitted latency of one device under one runtime.

    `source`: in words, what it was fitted on. `target`: the built-in target whose kernels it
    prices. `measured`: "kernels" (micro-benchmarks) or "models" (whole-model timings).
    `host`: facts of the machine where known. `kernels`: rows of measured kernels, for re-measuring.
    """

    name: str
    device: str
    runtime: str
    target: str
    source: str
    settings: tuple[Setting, ...]
    runtime_version: str = ""
    date: str = ""
    measured: str = "kernels"
    host: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kernels: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def setting(self, threads: int) -> Setting:
        """The setting for that many threads, or the nearest there is."""
        return min(self.settings, key=lambda s: (abs(s.threads - threads), s.threads))

    def predict(
        self,
        kernels: Sequence[Features | None],
        threads: int = 1,
        *,
        dtype: str = "float32",
        assumed: Callable[[int], tuple[float, float] | None] | None = None,
    ) -> Prediction:
        """The latency of a model from its kernels; None stands for one of unknown shape.

        `dtype`: what the model mostly computes in, for the interval. `assumed`: prices the kernel
        at a position where the profile has no class for it: ms, and by what factor they may be off.
        """
        setting = self.setting(threads)
        factor, unlike = 1.0, 0.0
        if setting.whole is not None:
            where = coordinates(kernels)[None]
            factor = float(setting.whole.factors(where)[0])
            unlike = float(setting.whole.novelty(where)[0])
        by_class: dict[str, list[int]] = {}
        penalty: dict[int, float] = {}
        times: list[float | None] = [None] * len(kernels)
        guessed, least, most = 0.0, 0.0, 0.0
        for index, found in enumerate(kernels):
            if found is None:
                continue
            name, distance = setting.find(found)
            if name:
                by_class.setdefault(name, []).append(index)
                penalty[index] = distance
                continue
            price = assumed(index) if assumed is not None else None
            if price is not None:
                times[index], spread = price
                guessed += price[0]
                least += price[0] / spread
                most += price[0] * spread
        novel = guessed
        for name, indices in by_class.items():
            chosen = [found for i in indices if (found := kernels[i]) is not None]
            ms, novelty = setting.classes[name].predict(chosen)
            ms = factor * setting.in_a_run(ms)
            for index, value, distance in zip(indices, ms, novelty, strict=True):
                times[index] = float(value)
                novel += float(value) * max(penalty[index], float(distance))
        total = math.fsum(value for value in times if value is not None)
        share = novel / total if total else 0.0
        fitted = total - guessed
        strange = (novel - guessed) / fitted if fitted > 0 else 0.0
        low, high = setting.interval(dtype).around(fitted, max(strange, unlike))
        low, high = low + least, high + most
        return Prediction(
            total,
            low,
            high,
            tuple(times),
            novel=share,
            assumed=guessed / total if total else 0.0,
            unknown=sum(value is None for value in times),
            threads=setting.threads,
        )

    # --- JSON ------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain data, numbers rounded to six significant digits."""
        found = {
            "format": FORMAT,
            **{
                name: getattr(self, name)
                for name in (
                    "name",
                    "device",
                    "runtime",
                    "runtime_version",
                    "target",
                    "date",
                    "measured",
                    "source",
                )
            },
            "host": dict(self.host),
            "notes": list(self.notes),
            "settings": [_setting_dict(setting) for setting in self.settings],
            "kernels": [dict(row) for row in self.kernels],
        }
        return dict(_rounded(found))

    def save(self, path: str | Path) -> Path:
        """Write the JSON, a line for each small list, so that two profiles can be compared.

        The file is replaced in one step.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.part")
        draft.write_text(_lines(self.as_dict()) + "\n", encoding="utf-8")
        draft.replace(path)
        return path


def load_profile(path: str | Path) -> Profile:
    """Read a profile's JSON.

    Raises:
        ProfileError: no such file, no JSON, another format, or a field is missing or wrong.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(
            "The profile can't be read",
            where=str(path),
            why=str(error.strerror or error),
            fix="`edgepass profiles` lists those there are; `edgepass calibrate` makes one",
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ProfileError(
            "The profile is not JSON", where=str(path), why=str(error), fix="calibrate again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format") if isinstance(data, dict) else None
        raise ProfileError(
            "The profile has a format that this version can't read",
            where=str(path),
            why=f"format {given!r}, expected {FORMAT}",
            fix="calibrate again, or update edgepass",
        )
    try:
        return _from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(
            "The profile is damaged",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="calibrate again",
        ) from error


def _from_dict(data: Mapping[str, Any]) -> Profile:
    settings = tuple(_read_setting(item) for item in data["settings"])
    if not settings:
        raise ValueError("it has no settings")
    texts = ("name", "device", "runtime", "target", "source", "runtime_version", "date", "measured")
    return Profile(
        **{name: str(data.get(name, "")) for name in texts},
        settings=settings,
        host=dict(data.get("host", {})),
        kernels=tuple(data.get("kernels", ())),
        notes=tuple(data.get("notes", ())),
    )


def _setting_dict(setting: Setting) -> dict[str, Any]:
    return {
        "threads": setting.threads,
        "scale": setting.scale,
        "per_kernel_ms": setting.per_kernel_ms,
        "held_out": {k: dataclasses.asdict(v) for k, v in setting.held_out.items()},
        "intervals": {k: dataclasses.asdict(v) for k, v in setting.intervals.items()},
        **({} if setting.whole is None else {"whole": correction_dict(setting.whole)}),
        "classes": {name: _class_dict(setting.classes[name]) for name in sorted(setting.classes)},
    }


def _class_dict(model: ClassModel) -> dict[str, Any]:
    found: dict[str, Any] = {
        "terms": dict(model.terms),
        "low": dict(model.low),
        "high": dict(model.high),
        "samples": model.samples,
        "error": model.error,
    }
    if model.correction is not None:
        found["correction"] = correction_dict(model.correction)
    return found


def correction_dict(correction: Correction) -> dict[str, Any]:
    """Plain data of a correction."""
    return {
        "link": correction.link,
        "coordinates": list(correction.coordinates),
        "scales": correction.scales.tolist(),
        "points": correction.points.tolist(),
        "weights": correction.weights.tolist(),
    }


def read_correction(data: Mapping[str, Any]) -> Correction:
    """The correction of plain data.

    Raises:
        KeyError, ValueError: something is missing, or lengths do not fit.
    """
    names = tuple(data["coordinates"])
    points = np.asarray(data["points"], float).reshape(-1, len(names))
    found = Correction(
        names,
        np.asarray(data["scales"], float),
        points,
        np.asarray(data["weights"], float),
        str(data.get("link", "log")),
    )
    if len(found.weights) != len(points) or len(found.scales) != len(names):
        raise ValueError("the lengths of a correction do not fit")
    return found


def _read_setting(data: Mapping[str, Any]) -> Setting:
    classes = {}
    for name, item in data["classes"].items():
        correction = item.get("correction")
        classes[name] = ClassModel(
            terms={k: float(v) for k, v in item["terms"].items()},
            correction=None if correction is None else read_correction(correction),
            low=dict(item.get("low", {})),
            high=dict(item.get("high", {})),
            samples=int(item.get("samples", 0)),
            error=item.get("error"),
        )
    return Setting(
        threads=int(data["threads"]),
        classes=classes,
        scale=float(data.get("scale", 1.0)),
        per_kernel_ms=float(data.get("per_kernel_ms", 0.0)),
        intervals={k: Interval(**v) for k, v in data.get("intervals", {}).items()},
        held_out={k: HeldOut(**v) for k, v in data.get("held_out", {}).items()},
        whole=read_correction(data["whole"]) if data.get("whole") else None,
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _lines(value: Any, indent: int = 0) -> str:
    """JSON in which what fits on one line is on one line."""
    flat = json.dumps(value)
    if len(flat) + indent <= 110 or not isinstance(value, (dict, list)):
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_lines(v, indent + 1)}" for k, v in value.items()]
        opening, closing = "{", "}"
    elif all(isinstance(item, (int, float)) for item in value):  # long rows of numbers wrap
        items = [json.dumps(value[i : i + 12])[1:-1] for i in range(0, len(value), 12)]
        opening, closing = "[", "]"
    else:
        items = [_lines(item, indent + 1) for item in value]
        opening, closing = "[", "]"
    body = f",\n{pad}".join(items)
    return f"{opening}\n{pad}{body}\n{' ' * indent}{closing}"
