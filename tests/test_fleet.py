"""Many devices at once: what a fleet learns, and a new device's profile from ten timings."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepass.cost.features import Features
from edgepass.cost.fleet import Fleet, Timing, fit_fleet, is_fleet
from edgepass.cost.fleet_near import TimesPrior
from edgepass.cost.fleet_terms import FACTORS, NAMES, RATES, design, in_integers, setting
from edgepass.cost.kernels import kernels
from edgepass.cost.latency import describe
from edgepass.cost.microbench_nets import synthetic_net
from edgepass.cost.profile import Interval, Profile, load_profile
from edgepass.cost.profiles import find_profile
from edgepass.errors import ProfileError
from edgepass.ir.random_weights import fill_random_weights
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.registry import get_target
from edgepass.timing_tables import profile_from_table

Array = NDArray[np.float64]
KNOWN, NEW = 24, 12  # networks that the fleet has run, and others
DEVICES = 14


def _described(index: int) -> list[Features]:
    found = kernels(synthetic_net(index).model, get_target("arm64"))
    return [part for part in map(describe, found) if part is not None]


@dataclasses.dataclass(frozen=True)
class World:
    """Devices whose rates are known: `logs` [devices, rates]; the last one is new."""

    models: dict[str, list[Features]]
    logs: Array
    times: Array  # [devices, models], milliseconds, with noise
    fleet: Fleet

    def samples(self, chosen: Sequence[int]) -> list[tuple[list[Features], float]]:
        names = list(self.models)
        return [(self.models[names[i]], float(self.times[-1, i])) for i in chosen]

    def errors(self, profile: Profile, chosen: Sequence[int]) -> Array:
        names = list(self.models)
        found = [profile.predict(self.models[names[i]]).ms for i in chosen]
        return np.abs(np.array(found) / self.times[-1, list(chosen)] - 1)


@pytest.fixture(scope="module")
def world() -> World:
    random = np.random.default_rng(0)
    models = {f"net{i}": _described(i) for i in range(KNOWN + NEW)}
    is_time = np.array([name not in FACTORS for name in NAMES], float)
    start = np.log(np.array(list(RATES.values())))
    # a slow device is slow in everything, and besides in memory or in arithmetic
    memory = np.array([name in ("read", "written", "weights", "dense", "moved") for name in NAMES])
    logs = start + random.normal(size=(DEVICES + 1, 1)) * is_time
    logs += 0.8 * random.normal(size=(DEVICES + 1, 1)) * memory
    logs += 0.15 * random.normal(size=logs.shape)
    times = design(list(models.values())).times(logs)
    times = times * np.exp(0.02 * random.normal(size=times.shape))
    seen = list(models)[:KNOWN]
    timings = [
        Timing(f"device{d}", 1, name, float(times[d, i]))
        for d in range(DEVICES)
        for i, name in enumerate(seen)
    ]
    return World(models, logs, times, fit_fleet(timings, {n: models[n] for n in seen}))


def _adapt(world: World, chosen: Sequence[int], fleet: Fleet | None = None) -> Profile:
    return (fleet or world.fleet).adapt(
        {1: world.samples(chosen)}, name="new", device="a new one", runtime="ncnn"
    )


def test_ten_timings_are_better_than_another_devices_times(world: World) -> None:
    random = np.random.default_rng(1)
    known = np.arange(KNOWN)
    own, scaled = [], []
    for _ in range(4):
        drawn = random.permutation(known)
        ten, rest = drawn[:10], drawn[10:]
        own += world.errors(_adapt(world, ten), rest).tolist()
        # the best that one scalar does: of the device that fits the ten best
        logs = np.log(world.times)
        apart = logs[-1, ten] - logs[:-1, ten]
        speeds = np.median(apart, axis=1)
        best = int(np.abs(apart - speeds[:, None]).mean(1).argmin())
        off = np.expm1(logs[best, rest] + speeds[best] - logs[-1, rest])
        scaled += np.abs(off).tolist()
    assert np.median(own) < 0.7 * np.median(scaled)


def test_networks_that_the_fleet_never_ran_are_predicted_by_rates(world: World) -> None:
    new = range(KNOWN, KNOWN + NEW)
    profile = _adapt(world, range(10))
    assert np.median(world.errors(profile, new)) < 0.12
    strangers = _adapt(world, range(KNOWN, KNOWN + 8))  # ten that the fleet does not know
    assert np.median(world.errors(strangers, range(KNOWN + 8, KNOWN + NEW))) < 0.15


def test_the_profile_says_how_right_it_is(world: World) -> None:
    profile = _adapt(world, range(10))
    proof = profile.settings[0].held_out[""]
    assert proof.models == 10
    assert proof.median_error < 0.2
    assert "one model at a time" in proof.method
    name = list(world.models)[20]
    found = profile.predict(world.models[name])
    assert found.low_ms < found.ms < found.high_ms


def test_intervals_follow_the_errors_of_models_left_out(world: World) -> None:
    fleet = dataclasses.replace(world.fleet, intervals={"": Interval(0.9, 1.11, 1.0)})
    right = _adapt(world, range(10), fleet).settings[0].intervals[""]
    random = np.random.default_rng(2)
    noisy = [(m, ms * float(np.exp(0.4 * random.normal()))) for m, ms in world.samples(range(10))]
    wrong = fleet.adapt({1: noisy}, name="x", device="x", runtime="x").settings[0].intervals[""]
    assert wrong.high > right.high
    assert wrong.low < right.low


def test_networks_unlike_any_known_have_a_wider_interval(world: World) -> None:
    fleet = dataclasses.replace(world.fleet, intervals={"": Interval(0.9, 1.11, 1.0)})
    profile = _adapt(world, range(10), fleet)
    names = list(world.models)
    known, new = (profile.predict(world.models[names[i]]) for i in (15, KNOWN + 1))
    assert new.high_ms / new.ms > 1.05 * known.high_ms / known.ms


def test_timings_of_another_runtime_are_held_less_to_the_fleet(world: World) -> None:
    loose = world.fleet.under_another_runtime()
    # arithmetic takes three times what any device of the fleet takes beside its memory
    rates = world.logs[-1] + np.log(3.0) * np.array(["winograd" in name for name in NAMES])
    everything = design(list(world.models.values()))
    ms = everything.times(rates)
    errors = []
    for fleet in (world.fleet, loose):
        found = everything.times(fleet.adapt_rates(everything.rows(range(10)), ms[:10]))
        errors.append(np.median(np.abs(found / ms - 1)[10:]))
    assert errors[1] < errors[0]
    known = _adapt(world, range(10), loose).settings[0]
    assert known.whole is None  # what ncnn takes for a network says nothing of another runtime


def test_a_fleets_profile_round_trips(world: World, tmp_path: Path) -> None:
    fleet = dataclasses.replace(world.fleet, intervals={"": Interval(0.9, 1.11, 1.0)})
    saved = fleet.as_profile("fleet-test", runtime="ncnn", source="a test").save(
        tmp_path / "f.json"
    )
    profile = load_profile(saved)
    assert is_fleet(profile)
    again = Fleet.from_profile(profile)
    first, second = _adapt(world, range(10), fleet), _adapt(world, range(10), again)
    names = list(world.models)
    for name in names[::5]:
        pair = [p.predict(world.models[name]).ms for p in (first, second)]
        assert pair[0] == pytest.approx(pair[1], rel=0.01)
    # an adapted profile survives its file too
    kept = load_profile(first.save(tmp_path / "new.json"))
    assert kept.predict(world.models[names[0]]).ms == pytest.approx(
        first.predict(world.models[names[0]]).ms, rel=1e-4
    )


def test_a_profile_of_rates_predicts_what_the_rates_say(world: World) -> None:
    made = Profile("", "", "", "", "", (setting(world.logs[0], 1),))
    names = list(world.models)
    exact = design(list(world.models.values())).times(world.logs[0])
    found = [made.predict(world.models[name]).ms for name in names]
    assert np.median(np.abs(np.array(found) / exact - 1)) < 0.02


def test_integers_are_priced_by_rates_of_their_own(world: World) -> None:
    plain = world.models["net1"]
    narrow = [in_integers(kernel) for kernel in plain]
    rates = world.logs[0].copy()
    both = design([plain, narrow])
    before = both.times(rates)
    rates[[i for i, name in enumerate(NAMES) if name.endswith("8")]] += 1.0
    after = both.times(rates)
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_misuse_is_named(world: World) -> None:
    few = [Timing(f"device{d}", 1, "net0", 1.0) for d in range(2)]
    with pytest.raises(ProfileError, match="three devices"):
        fit_fleet(few, world.models)
    with pytest.raises(ProfileError, match="No timings"):
        world.fleet.adapt({}, name="x", device="x", runtime="x")
    with pytest.raises(ProfileError, match="not above zero"):
        world.fleet.adapt({1: [(world.models["net0"], 0.0)]}, name="x", device="x", runtime="x")
    single = _adapt(world, range(10))
    assert not is_fleet(single)
    with pytest.raises(ProfileError, match="not one of a fleet"):
        Fleet.from_profile(single)
    damaged = world.fleet.as_profile("broken", runtime="x", source="x")
    fact = {**damaged.host["fleet"], "covariance": [1.0]}
    with pytest.raises(ProfileError, match="damaged"):
        Fleet.from_profile(dataclasses.replace(damaged, host={"fleet": fact}))


def test_a_table_and_a_fleet_make_a_profile(world: World, tmp_path: Path) -> None:
    rows = [(f"net{i}.onnx", float(world.times[-1, i])) for i in range(KNOWN, KNOWN + 10)]
    for i in range(KNOWN, KNOWN + 10):
        model = synthetic_net(i).model
        fill_random_weights(model)
        write_onnx(model, tmp_path / f"net{i}.onnx")
    with (tmp_path / "timings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "latency_ms"])
        writer.writerows(rows)
    prior = world.fleet.as_profile("fleet-test", runtime="ncnn", source="a test")
    made = profile_from_table(tmp_path / "timings.csv", "arm64", prior=prior)
    assert made.settings[0].held_out[""].models == 10
    assert any("fleet-test" in note for note in made.notes)
    assert any("ncnn" in note and "onnxruntime" in note for note in made.notes)
    assert np.median(world.errors(made, range(KNOWN + 10, KNOWN + NEW))) < 0.2
    with (tmp_path / "timings.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["model", "latency_ms"], *rows[:2]])
    with pytest.raises(ProfileError, match="too few"):
        profile_from_table(tmp_path / "timings.csv", "arm64", prior=prior)


# --- times alone -------------------------------------------------------------------------------


def test_times_of_near_devices_predict_a_new_ones(world: World) -> None:
    logs = np.log(world.times[:, :KNOWN])
    table = logs[:-1].copy()
    table[0, 3] = np.nan  # a gap
    prior = TimesPrior.fit(table)
    assert not np.isnan(prior.logs).any()
    ten = np.arange(10)
    found = prior.predict(ten, logs[-1, ten])
    assert np.median(np.abs(np.expm1(found - logs[-1])[10:])) < 0.15


def test_a_table_of_times_needs_devices() -> None:
    with pytest.raises(ProfileError, match="Three devices"):
        TimesPrior.fit(np.zeros((2, 4)))
    with pytest.raises(ProfileError, match="no time on any device"):
        TimesPrior.fit(np.full((4, 2), np.nan))


def test_the_fleet_that_ships_adapts(world: World) -> None:
    fleet = Fleet.from_profile(find_profile("fleet-ncnn"))
    assert fleet.nets is not None
    assert len(fleet.nets.names) >= 20
    profile = _adapt(world, range(10), fleet)
    assert np.median(world.errors(profile, range(10, KNOWN))) < 0.35
