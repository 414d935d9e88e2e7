"""The profiles that ship, and the devices whose targets name them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import edgepass
from edgepass.cost.fleet import Fleet, is_fleet
from edgepass.cost.kernels import kernels
from edgepass.cost.microbench_builder import NetBuilder
from edgepass.cost.profile import Profile, load_profile
from edgepass.cost.profiles import board_profiles
from edgepass.targets.registry import get_target, targets
from edgepass.targets.target import Target

FOLDER = Path(edgepass.__file__).parent / "targets" / "devices"
FILES = sorted(FOLDER.glob("*.json"))
DEVICES = [target for target in targets().values() if target.profile]
CPUS = [t for t in DEVICES if t.hardware.arch == "aarch64" and "gpu" not in t.hardware.features]


def _net() -> ir.Model:
    b = NetBuilder("net", seed=1)
    y = b.unary("Relu", b.conv(b.input((1, 3, 64, 64)), 32, 3, 2))
    for _ in range(3):
        y = b.unary("Relu", b.conv(y, 64, 3))
    return b.model(b.gemm(b.reduce("ReduceMean", y, (2, 3), keep=False), 10))


@pytest.fixture(scope="module")
def net() -> edgepass.Architecture:
    return edgepass.Architecture(_net())


def _names(items: list[Target]) -> list[str]:
    return [item.name for item in items]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_profile_is_sound(path: Path) -> None:
    profile = load_profile(path)
    assert profile.name == path.stem
    assert profile.runtime
    assert profile.source
    assert profile.target in targets()
    assert path.stat().st_size < 2_500_000
    if is_fleet(profile):
        assert Fleet.from_profile(profile).intervals
        return
    for setting in profile.settings:
        assert setting.held_out, "no held-out error"
        for proof in setting.held_out.values():
            assert proof.models >= 5
            assert 0 < proof.median_error < 0.35
        for interval in setting.intervals.values():
            assert interval.low < 1 < interval.high


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_profile_has_a_device(path: Path) -> None:
    profile = load_profile(path)
    measured_here = profile.measured == "kernels"  # of a class of hosts: found by the CPU's name
    a_prior = profile.runtime == "torch.compile"  # nothing is lowered to it: to start others from
    assert (
        is_fleet(profile) or measured_here or a_prior or path.stem in {t.profile for t in DEVICES}
    )


def test_five_boards_and_the_nano_ship() -> None:
    names = set(_names(DEVICES))
    assert {"jetson-nano-cpu", "jetson-nano-gpu", "raspberry-pi-4"} <= names
    assert len(CPUS) >= 6
    assert [p for p in board_profiles() if p.name == "jetson-nano-gpu"] == []
    assert len(board_profiles()) == len(CPUS)


@pytest.mark.parametrize("target", DEVICES, ids=_names(DEVICES))
def test_a_devices_estimate_is_calibrated(target: Target, net: edgepass.Architecture) -> None:
    report = net.estimate(target.name, ["fp32"])["fp32"]
    time = report.latency
    assert time.label == "calibrated"
    assert time.profile == target.profile
    assert time.device
    assert time.runtime
    assert time.held_out
    assert 0 < time.low_ms < time.ms < time.high_ms
    assert any(time.device in note and time.runtime in note for note in report.notes)
    assert report.boards == ()


@pytest.mark.parametrize("target", DEVICES, ids=_names(DEVICES))
def test_a_device_has_the_kernels_that_its_profile_prices(target: Target) -> None:
    profile = load_profile(FOLDER / f"{target.profile}.json")
    fitted = kernels(_net(), get_target(profile.target))
    assert [(k.op, k.type) for k in kernels(_net(), target)] == [(k.op, k.type) for k in fitted]


def test_arm64_is_assumed_and_gives_the_range_over_boards(net: edgepass.Architecture) -> None:
    report = net.estimate("arm64", ["fp32"])["fp32"]
    assert report.latency.label == "assumed"
    times = [item.ms for item in report.boards]
    assert len(times) == len(CPUS)
    assert times == sorted(times)
    assert times[-1] > 3 * times[0]
    assert {item.profile for item in report.boards} == {t.profile for t in CPUS}
    assert all("GPU" not in item.device for item in report.boards)
    note = next(note for note in report.notes if "measured boards" in note)
    assert report.boards[0].device in note
    assert report.boards[-1].runtime in note


def test_faster_boards_are_faster(net: edgepass.Architecture) -> None:
    def ms(name: str) -> float:
        return net.estimate(name, ["fp32"])["fp32"].latency.ms

    assert ms("snapdragon-855-plus") < ms("raspberry-pi-4") < ms("raspberry-pi-zero-2-w")
    assert ms("jetson-nano-gpu") < ms("jetson-nano-cpu")


def test_integers_that_a_profile_lacks_are_assumed(net: edgepass.Architecture) -> None:
    found = net.estimate("jetson-nano-cpu", ["fp32", "int8"])
    plain, narrow = found["fp32"].latency, found["int8"].latency
    assert (plain.label, narrow.label) == ("calibrated", "assumed")
    assert narrow.assumed > 0.5
    assert narrow.held_out == ""  # what was proved is not of this
    assert any(f"{narrow.assumed:.0%} of the time" in note for note in found["int8"].notes)
    # priced from the device's own floats: a Cortex-A57 has no dot products, so a modest gain
    assert 0.3 * plain.ms < narrow.ms < 1.2 * plain.ms
    assert narrow.high_ms / narrow.ms > 1.5 > plain.high_ms / plain.ms
    b = NetBuilder("products", seed=1)
    products = b.model(b.gemm(b.unary("Relu", b.gemm(b.input((8, 512)), 512)), 512))
    dynamic = edgepass.estimate(products, "jetson-nano-cpu", ["dynamic-int8"]).rows[0].latency
    assert dynamic.assumed > 0.2
    assert dynamic.low_ms < dynamic.ms < dynamic.high_ms


def test_integers_of_a_board_are_calibrated(net: edgepass.Architecture) -> None:
    found = net.estimate("raspberry-pi-4", ["int8"])["int8"]
    assert found.latency.label == "calibrated"
    assert found.latency.assumed < 0.1


def test_the_nanos_gpu_refuses_integers_and_says_why(net: edgepass.Architecture) -> None:
    found = net.estimate("jetson-nano-gpu", ["fp32", "int8"])
    assert "8-bit integers" in found.failed["int8"]


def test_another_runtimes_times_are_named(net: edgepass.Architecture) -> None:
    notes = net.estimate("raspberry-pi-4", ["fp32"])["fp32"].notes
    assert any("ncnn" in note and "onnxruntime" in note for note in notes)
    notes = net.estimate("jetson-nano-cpu", ["fp32"])["fp32"].notes
    assert not any("ncnn" in note for note in notes)


def test_a_profile_of_other_kernels_is_named(net: edgepass.Architecture) -> None:
    notes = net.estimate("x86_64", ["fp32"], profile="jetson-nano-cpu")["fp32"].notes
    assert any("arm64" in note and "x86_64" in note for note in notes)


def test_more_threads_take_no_longer(net: edgepass.Architecture) -> None:
    for name in ("raspberry-pi-4", "khadas-vim3"):
        one, four = (net.estimate(name, ["fp32"], threads=n)["fp32"].latency for n in (1, 4))
        assert four.ms < one.ms
        assert (one.threads, four.threads) == (1, 4)


def test_devices_differ_from_arm64_in_facts_of_hardware_only() -> None:
    arm64 = get_target("arm64")
    for target in CPUS:
        assert target.quantization == arm64.quantization
        assert target.opset == arm64.opset
        assert target.hardware.memory_gb_per_s > 0
    without = [t for t in CPUS if "dotprod" not in t.hardware.features]
    assert {"jetson-nano-cpu", "raspberry-pi-4", "khadas-vim3"} <= set(_names(without))
    for target in without:
        rates = target.hardware.macs_per_cycle
        assert rates["int8"] < 2 * rates["float32"]


def test_profiles_are_profiles() -> None:
    assert all(isinstance(profile, Profile) for profile in board_profiles())
