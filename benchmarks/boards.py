"""A new board from ten of its own models, and the profiles of boards that ship.

    python benchmarks/boards.py --table ncnn_boards.csv [--draws 20] [--all] [--write FOLDER]

The table has a row a board, model and number of threads (columns device, block, model, family,
int8, unit, threads, powersave, min_ms); what runs on the CPU with 20 models or more is used.
Printed are

1. from the table alone: a board is left out, with all boards of its chip; ten of its models at one
   number of threads are drawn, and the others predicted (`edgepass.cost.fleet_near`); beside it one
   scalar times another board's times, that of the board that fits the ten best, by the mean or by
   the median error;
2. from graphs (`board_nets.py`), as `edgepass calibrate --from --prior fleet-ncnn` does: the same
   boards left out, ten of their networks given, and the others, which other boards have run,
   predicted; beside it one scalar;
3. the same, and besides a family of networks left out of everything; the family is predicted from
   ten of the board's other models, and from all of them. `--all` does so for every board, not only
   for those with a profile.

`--write` fits the profiles, each with its error on families held out, and the fleet's.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import board_nets
import numpy as np

from edgepass.cost.features import Features
from edgepass.cost.fleet import Fleet, Timing, fit_fleet
from edgepass.cost.fleet_near import TimesPrior
from edgepass.cost.fleet_terms import in_integers
from edgepass.cost.kernels import kernels
from edgepass.cost.latency import describe
from edgepass.cost.profile import HeldOut, Interval
from edgepass.targets.registry import get_target

ALIKE = (
    r"RK356[68]",
    r"RK3399",
    r"RK3328|RK3228H",
    r"Kunpeng 920",
    r"2K1000",
    r"FT-2000",
    r"Orin",
    r"BCM2710A1|BCM2837",
)
"""Boards of one chip, or of chips that differ in the clock: left out together."""
LEAST = 20  # models that a board has run
TEN = 10
SHIPPED = {
    # profile: how the table names the board, cores
    "raspberry-pi-3b-plus": ("Raspberry Pi 3 Model B+", "4x Cortex-A53 1.4 GHz"),
    "raspberry-pi-4": ("Raspberry Pi 4 Model B", "4x Cortex-A72 1.8 GHz"),
    "raspberry-pi-zero-2-w": ("Raspberry Pi Zero 2 W", "4x Cortex-A53 1.0 GHz"),
    "jetson-orin-nano": ("NVIDIA Jetson Orin Nano", "6x Cortex-A78AE 1.5 GHz"),
    "jetson-agx-orin": ("NVIDIA Jetson AGX Orin", "12x Cortex-A78AE 2.2 GHz"),
    "rock-3a": ("Rock3A", "Rockchip RK3568, 4x Cortex-A55 2.0 GHz"),
    "rk3399": ("Rockchip RK3399", "2x Cortex-A72 1.8 GHz"),
    "khadas-vim3": ("Khadas VIM3", "Amlogic A311D, 4x Cortex-A73 2.2 GHz"),
    "snapdragon-855-plus": ("Qualcomm SM8150-AC", "Kryo 485 2.96 GHz"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one board took with one number of threads on one kind of its cores."""

    device: str
    block: str
    threads: int
    powersave: int
    ms: Mapping[str, float]

    @property
    def chip(self) -> str:
        for pattern in ALIKE:
            if re.search(pattern, self.device, re.IGNORECASE):
                return pattern
        return self.device

    @property
    def timings(self) -> Iterator[Timing]:
        for model, ms in self.ms.items():
            yield Timing(self.device, self.threads, model, ms, self.block)


def read_runs(path: Path) -> tuple[list[Run], dict[str, str]]:
    """Runs on CPUs, and the family of each model."""
    blocks: dict[tuple[str, str], list[dict[str, str]]] = collections.defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["unit"] == "cpu" and float(row["min_ms"]) > 0:
                blocks[row["device"], row["block"]].append(row)
    runs = [
        Run(
            device,
            block,
            int(rows[0]["threads"]),
            int(rows[0]["powersave"]),
            {row["model"]: float(row["min_ms"]) for row in rows},
        )
        for (device, block), rows in blocks.items()
    ]
    runs = [run for run in runs if len(run.ms) >= LEAST]
    families = {r["model"]: r["family"] for rows in blocks.values() for r in rows}
    count = collections.Counter(model for run in runs for model in run.ms)
    rare = {model for model, times in count.items() if times < LEAST}
    runs = [
        dataclasses.replace(run, ms={k: v for k, v in run.ms.items() if k not in rare})
        for run in runs
    ]
    return runs, families


def described() -> dict[str, list[Features]]:
    """The kernels of the networks, and of those that the table has in 8 bits."""
    target = get_target("arm64")
    found: dict[str, list[Features]] = {}
    for name in board_nets.NETS:
        parts = [describe(kernel) for kernel in kernels(board_nets.build(name), target)]
        found[name] = [part for part in parts if part is not None]
        found[f"{name}_int8"] = [in_integers(part) for part in found[name]]
    return found


def figures(errors: Sequence[float]) -> str:
    off = np.abs(np.array(errors))
    share = [100 * float((off <= bound).mean()) for bound in (0.1, 0.2)]
    return f"{100 * float(np.median(off)):5.1f} / {share[0]:3.0f} / {share[1]:3.0f}"


# --- from the table alone -------------------------------------------------------------------------


def table_only(runs: Sequence[Run], draws: int) -> None:
    """Print the errors of boards left out, by number of threads."""
    models = sorted({model for run in runs for model in run.ms})
    logs = np.array([[np.log(run.ms.get(model, np.nan)) for model in models] for run in runs])
    errors: dict[str, dict[str, list[float]]] = {
        name: collections.defaultdict(list)
        for name in ("near boards", "one scalar, mean", "one scalar, median")
    }
    random = np.random.default_rng(0)
    for chip in dict.fromkeys(run.chip for run in runs):
        others = np.array([run.chip != chip for run in runs])
        prior = TimesPrior.fit(logs[others], _weights([r for r in runs if r.chip != chip]))
        for index, run in enumerate(runs):
            if run.chip != chip:
                continue
            present = np.flatnonzero(~np.isnan(logs[index]))
            for _ in range(draws):
                drawn = random.permutation(present)
                known, rest = drawn[:TEN], drawn[TEN:]
                truth = logs[index, rest]
                found = {"near boards": prior.predict(known, logs[index, known])[rest]}
                found.update(_one_scalar(logs[others], known, logs[index, known], rest))
                for name, values in found.items():
                    off = np.exp(values - truth) - 1.0
                    for group in ("all", str(run.threads) if run.threads <= 8 else "more"):
                        errors[name][group] += off[~np.isnan(off)].tolist()
    chips = len({run.chip for run in runs})
    print(f"\nFrom the table: {len(runs)} runs of {len({r.device for r in runs})} boards,")
    print(f"{chips} chips; median absolute error / within 10 % / within 20 %, {draws} draws of ten")
    for name, groups in errors.items():
        print(f"  {name}")
        for group in ("all", *sorted(set(groups) - {"all"})):
            text = "all" if group == "all" else f"{group} threads"
            print(f"    {text:14} {figures(groups[group])}   n = {len(groups[group])}")


def _one_scalar(others: Any, known: Any, logs: Any, rest: Any) -> dict[str, Any]:
    """Another board's times by a scalar: of the board that fits the ten best."""
    apart = logs - others[:, known]
    speeds = np.nanmedian(apart, axis=1)
    off = np.abs(apart - speeds[:, None])
    off[np.isnan(apart).sum(1) > 2] = np.inf
    return {
        f"one scalar, {name}": others[best, rest] + speeds[best]
        for name, best in (
            ("mean", int(np.nanargmin(np.nanmean(off, axis=1)))),
            ("median", int(np.nanargmin(np.nanmedian(off, axis=1)))),
        )
    }


def _weights(runs: Sequence[Run]) -> Any:
    count = collections.Counter(run.device for run in runs)
    return np.array([count[run.device] ** -0.5 for run in runs])


# --- from graphs ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proof:
    """A family held out of a run: `given` models, logarithms of predicted over true times."""

    run: Run
    model: str
    given: str
    error: float


def graph_based(
    runs: Sequence[Run],
    chosen: Sequence[Run],
    models: Mapping[str, Sequence[Features]],
    families: Mapping[str, str],
    draws: int,
) -> list[Proof]:
    """Errors of families of networks held out, on boards held out of the fleet."""
    random = np.random.default_rng(0)
    proofs = []
    for chip in dict.fromkeys(run.chip for run in chosen):
        others = [t for run in runs if run.chip != chip for t in run.timings]
        for family in sorted({families[model] for model in models if model in families}):
            kept = {m: k for m, k in models.items() if families.get(m, "") != family}
            fleet = fit_fleet(others, kept)
            for run in chosen:
                held = [m for m in run.ms if m in models and families[m] == family]
                if run.chip == chip and held:
                    proofs += list(_predicted(fleet, run, kept, models, held, random, draws))
    return proofs


def _predicted(
    fleet: Fleet,
    run: Run,
    kept: Mapping[str, Sequence[Features]],
    models: Mapping[str, Sequence[Features]],
    held: Sequence[str],
    random: np.random.Generator,
    draws: int,
) -> Iterator[Proof]:
    names = np.array([model for model in run.ms if model in kept])
    samples = [("all", names)]
    samples += [("ten", random.permutation(names)[:TEN]) for _ in range(draws)]
    for given, drawn in samples:
        yield from _from(fleet, run, models, drawn, held, given)


def _from(
    fleet: Fleet,
    run: Run,
    models: Mapping[str, Sequence[Features]],
    drawn: Iterable[str],
    held: Iterable[str],
    given: str,
) -> Iterator[Proof]:
    """Errors of a profile that is fitted as `edgepass calibrate --from --prior` does."""
    timed = [(models[model], run.ms[model]) for model in drawn]
    unproved: Any = {run.threads: {}}
    profile = fleet.adapt(
        {run.threads: timed},
        name="board",
        device=run.device,
        runtime="ncnn",
        held_out=unproved,
        intervals=unproved,
    )
    for model in held:
        found = profile.predict(models[model], run.threads)
        yield Proof(run, model, given, float(np.log(found.ms / run.ms[model])))


def known_nets(
    runs: Sequence[Run], models: Mapping[str, Sequence[Features]], draws: int
) -> list[Proof]:
    """Errors on boards left out of the fleet, of networks that the fleet's other boards have run.

    Printed beside one scalar times another board's times, over the same draws and networks.
    """
    names = sorted({model for run in runs for model in run.ms if model in models})
    logs = np.array([[np.log(run.ms.get(model, np.nan)) for model in names] for run in runs])
    random = np.random.default_rng(0)
    proofs: list[Proof] = []
    scalars: dict[str, list[float]] = collections.defaultdict(list)
    for chip in dict.fromkeys(run.chip for run in runs):
        fleet = fit_fleet([t for run in runs if run.chip != chip for t in run.timings], models)
        fleet = Fleet.from_profile(fleet.as_profile("fleet", runtime="ncnn", source="a table"))
        others = logs[np.array([run.chip != chip for run in runs])]
        for index, run in enumerate(runs):
            if run.chip != chip:
                continue
            present = np.flatnonzero(~np.isnan(logs[index]))
            for _ in range(draws):
                drawn = random.permutation(present)
                known, rest = drawn[:TEN], drawn[TEN:]
                given, held = ([names[i] for i in part] for part in (known, rest))
                proofs += list(_from(fleet, run, models, given, held, "ten"))
                for name, found in _one_scalar(others, known, logs[index, known], rest).items():
                    off = np.expm1(found - logs[index, rest])
                    scalars[name] += off[~np.isnan(off)].tolist()
    boards = len({run.device for run in runs})
    print(f"\nFrom graphs, ten of a board's models, networks known from others: {boards} boards")
    print(f"  fleet                {_of(proofs)}   n = {len(proofs)}")
    for name, errors in scalars.items():
        print(f"  {name:20} {figures(errors)}   n = {len(errors)}")
    for dtype in ("float32", "int8"):
        print(f"  fleet, {dtype:13} {_of([p for p in proofs if _dtype(p.model) == dtype])}")
    for low, high in ((1, 1), (2, 2), (4, 4), (5, 999)):
        chosen = [p for p in proofs if low <= p.run.threads <= high]
        label = f"fleet, {low} thread(s)" if low == high else "fleet, more threads"
        print(f"  {label:20} {_of(chosen)}")
    return proofs


def print_proofs(proofs: Sequence[Proof]) -> None:
    """Errors by board, and of all."""
    boards = dict.fromkeys(proof.run.device for proof in proofs)
    print(f"\nFrom graphs, families held out, {len(boards)} boards: median / 10 % / 20 %")
    for given in ("ten", "all"):
        chosen = [p for p in proofs if p.given == given]
        print(f"  from {given} of the board's other models: {_of(chosen)}   n = {len(chosen)}")
        for dtype in ("float32", "int8"):
            print(f"    {dtype:8} {_of([p for p in chosen if _dtype(p.model) == dtype])}")
    for device in boards:
        for threads in dict.fromkeys(p.run.threads for p in proofs if p.run.device == device):
            chosen = [p for p in proofs if p.run.device == device and p.run.threads == threads]
            parts = [_of([p for p in chosen if p.given == given]) for given in ("ten", "all")]
            print(f"  {device[:44]:44} {threads:3} threads   {parts[0]}   {parts[1]}")


def _of(proofs: Sequence[Proof]) -> str:
    return figures([float(np.expm1(proof.error)) for proof in proofs])


def _dtype(model: str) -> str:
    return "int8" if model.endswith("_int8") else "float32"


# --- profiles -------------------------------------------------------------------------------------


def settings_of(runs: Sequence[Run], named: str) -> list[Run]:
    """A board's runs, one for each number of threads: on its big cores where it says so."""
    own = sorted((r for r in runs if r.device.startswith(named)), key=lambda r: -r.powersave)
    own = [run for run in own if run.powersave != 1]
    return sorted({run.threads: run for run in reversed(own)}.values(), key=lambda r: r.threads)


def write_profiles(
    folder: Path,
    runs: Sequence[Run],
    models: Mapping[str, Sequence[Features]],
    known_proofs: Sequence[Proof],
    proofs: Sequence[Proof],
) -> None:
    """The profiles of `SHIPPED` and the fleet's."""
    about = {
        "runtime": "ncnn",
        "runtime_version": "as published with each board",
        "date": datetime.date.today().isoformat(),
        "notes": [
            "ncnn computes float32 models in float16 where the CPU has it (Armv8.2)",
            "other runtimes differ: compare recipes and architectures, not milliseconds",
        ],
    }
    whole = fit_fleet([t for run in runs for t in run.timings], models)
    for name, (named, cores) in SHIPPED.items():
        own = settings_of(runs, named)
        chip = own[0].chip
        elsewhere = [p for p in proofs if p.run.chip != chip]
        near = [p for p in known_proofs if p.run.chip != chip]
        fleet = fit_fleet([t for run in runs if run.chip != chip for t in run.timings], models)
        samples, held_out, intervals = {}, {}, {}
        for run in own:
            known = [model for model in run.ms if model in models]
            samples[run.threads] = [(models[m], run.ms[m]) for m in known]
            mine = [p for p in proofs if p.run is run and p.given == "all"]
            intervals[run.threads] = _intervals(near, elsewhere, "all")
            held_out[run.threads] = _held_out(mine, intervals[run.threads])
        profile = fleet.adapt(
            samples,
            name=name,
            device=f"{own[0].device.split(',')[0].split('(')[0].strip()} ({cores})",
            source=f"{sum(map(len, samples.values()))} timings of ncnn's benchmark (its README), "
            f"with a prior from {len({r.device for r in runs if r.chip != chip})} other devices",
            held_out=held_out,
            intervals=intervals,
            host={"cpu": cores},
            **about,
        )
        print(profile.save(folder / f"{name}.json"))
    fleet = dataclasses.replace(whole, intervals=_intervals(known_proofs, proofs, "ten"))
    source = f"timings of ncnn's benchmark (its README) on {len({r.device for r in runs})} devices"
    print(fleet.as_profile("fleet-ncnn", source=source, **about).save(folder / "fleet-ncnn.json"))


def _intervals(known: Sequence[Proof], new: Sequence[Proof], given: str) -> dict[str, Interval]:
    """Where 80 % of the truths lay, over predictions: of known networks, and wider of new ones."""
    found = {}
    for dtype in ("float32", "int8"):
        near = [-p.error for p in known if _dtype(p.model) == dtype]
        far = [-p.error for p in new if p.given == given and _dtype(p.model) == dtype]
        low, high = np.quantile(near, (0.1, 0.9))
        widths = np.diff(np.quantile(far, (0.1, 0.9)))[0] / (high - low)
        found[dtype] = Interval(
            float(np.exp(low)), float(np.exp(high)), float(max(0.0, widths - 1.0))
        )
    return {**found, "": found["float32"]}


def _held_out(proofs: Sequence[Proof], intervals: Mapping[str, Interval]) -> dict[str, HeldOut]:
    found = {}
    for dtype in ("float32", "int8"):
        truths = np.array([-p.error for p in proofs if _dtype(p.model) == dtype])
        if not len(truths):
            continue
        off = np.abs(np.exp(-truths) - 1.0)
        low, high = intervals[dtype].around(1.0, 1.0)
        found[dtype] = HeldOut(
            models=len(truths),
            median_error=float(np.median(off)),
            within_10=float((off <= 0.1).mean()),
            within_20=float((off <= 0.2).mean()),
            coverage=float(((np.exp(truths) >= low) & (np.exp(truths) <= high)).mean()),
            method="family of networks left out; interval from other boards",
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--all", action="store_true", help="graphs on every board")
    parser.add_argument("--write", type=Path, help="a folder for the profiles")
    arguments = parser.parse_args()
    runs, families = read_runs(arguments.table)
    table_only(runs, arguments.draws)
    known = described()
    models = {name: parts for name, parts in known.items() if name in families}
    shipped = [run for named, _ in SHIPPED.values() for run in settings_of(runs, named)]
    chosen = runs if arguments.all else shipped
    known_proofs = known_nets(runs, models, min(arguments.draws, 5))
    proofs = graph_based(runs, chosen, models, families, min(arguments.draws, 5))
    print_proofs(proofs)
    if arguments.write is not None:
        write_profiles(arguments.write, runs, models, known_proofs, proofs)


if __name__ == "__main__":
    main()
