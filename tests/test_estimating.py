"""What an estimate says besides its numbers: budgets, advice, profiles, and the truth beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass import architecture, calibrating
from edgepass.cli import main
from edgepass.cost.advice import advice
from edgepass.cost.budget import Answer
from edgepass.cost.kernels import kernels
from edgepass.cost.latency import latency
from edgepass.cost.microbench_builder import NetBuilder, shape_of
from edgepass.cost.profile import ClassModel, HeldOut, Interval, Profile, Setting
from edgepass.cost.profiles import all_profiles, cpu_name, find_profile, profile_for
from edgepass.errors import CalibrationError, ProfileError, UsageError
from edgepass.ir.random_weights import fill_random_weights
from edgepass.measuring import measure
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.registry import get_target

MS_A_MAC = 1e-6


def convolutions(side: int = 16) -> ir.Model:
    """Two convolutions without weights, a mean and a classifier."""
    b = NetBuilder("net", seed=1)
    y = b.unary("Relu", b.conv(b.input((1, 3, side, side)), 16, 3))
    y = b.conv(y, 32, 3, 2)
    return b.model(b.gemm(b.reduce("ReduceMean", y, (2, 3), keep=False), 10))


def by_macs(name: str = "board", **facts: object) -> Profile:
    """A profile in which a MAC takes a nanosecond and everything else nothing."""
    roots = ("convolution", "matmul", "elementwise", "reduction", "movement", "pooling", "softmax")
    classes = {f"{root}:float32": ClassModel({"macs": MS_A_MAC}) for root in roots}
    setting = Setting(
        1,
        classes,
        intervals={"": Interval(0.8, 1.25, 0.0)},
        held_out={"": HeldOut(20, 0.04, 0.9, 1.0)},
    )
    given = {"device": "a board", "runtime": "onnxruntime", "target": "x86_64", "source": "a test"}
    return Profile(name=name, settings=(setting,), **{**given, **facts})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where this user's profiles are."""
    monkeypatch.setenv("EDGEPASS_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture
def net(tmp_path: Path) -> Path:
    model = convolutions()
    fill_random_weights(model)
    write_onnx(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


# --- latency by a profile ----------------------------------------------------------------------


def test_a_profile_prices_the_sum_of_kernels() -> None:
    report = edgepass.estimate(convolutions(), "x86_64", ["fp32"], profile=by_macs())["fp32"]
    time = report.latency
    assert time.label == "calibrated"
    assert time.ms == pytest.approx(report.macs * MS_A_MAC)
    assert (time.low_ms, time.high_ms) == pytest.approx((0.8 * time.ms, 1.25 * time.ms))
    assert time.device == "a board"
    assert any("median error 4.0%" in note for note in report.notes)


def test_what_no_class_prices_is_assumed_and_says_so() -> None:
    only = {"convolution:float32": ClassModel({"macs": 1e-3 * MS_A_MAC})}
    profile = Profile("x", "d", "onnxruntime", "x86_64", "s", (Setting(1, only),))
    report = edgepass.estimate(convolutions(), "x86_64", ["fp32"], profile=profile)["fp32"]
    assert 0 < report.latency.assumed < 1
    assert any("operators that the profile lacks: assumed" in note for note in report.notes)


def test_kernels_unlike_those_that_were_seen_widen_the_interval() -> None:
    seen = ClassModel({"macs": MS_A_MAC}, None, {"in": 8.0}, {"in": 9.0})
    setting = Setting(1, {"convolution:float32": seen}, intervals={"": Interval(0.9, 1.1, 2.0)})
    profile = Profile("x", "d", "onnxruntime", "x86_64", "s", (setting,))
    time = latency(kernels(convolutions(), get_target("x86_64")), get_target("x86_64"), 1, profile)
    assert time.novel > 0.9
    assert time.high_ms / time.ms > 1.1**2.5


# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "answer"), [(0.5, Answer.MISSED), (1.1, Answer.UNKNOWN), (2.0, Answer.MET)]
)
def test_a_budget_is_met_missed_or_cannot_be_told(share: float, answer: Answer) -> None:
    ms = edgepass.estimate(convolutions(), "x86_64", ["fp32"], profile=by_macs())["fp32"].latency.ms
    budget = edgepass.Budget(latency_ms=share * ms)
    found = edgepass.estimate(convolutions(), "x86_64", ["fp32"], profile=by_macs(), budget=budget)
    (verdict,) = found.verdicts("fp32")
    assert verdict.answer is answer
    assert verdict.gap == pytest.approx((1 - share) * ms)
    assert ("straddles" in verdict.text) == (answer is Answer.UNKNOWN)


def test_size_and_memory_have_verdicts_with_their_gaps() -> None:
    budget = edgepass.Budget(size_mb=0.001, memory_mb=1)
    found = edgepass.estimate(convolutions(), "x86_64", ["fp32"], budget=budget)
    size, memory = found.verdicts("fp32")
    assert size.answer is Answer.MISSED
    assert size.gap == pytest.approx(found["fp32"].file_bytes / 1e6 - 0.001)
    assert memory.answer is Answer.MET
    assert found.as_dict()["recipes"][0]["budget"]["answer"] == "missed"


@pytest.mark.parametrize("wrong", [{}, {"size_mb": 0}, {"latency_ms": -1.0}])
def test_a_budget_without_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        edgepass.Budget(**wrong)


def test_compile_holds_what_it_measured_against_the_budget(net: Path) -> None:
    budget = edgepass.Budget(latency_ms=1e4, size_mb=1e-3)
    compiled = edgepass.compile(net, "host", budget=budget, time_budget_s=0.05)
    time, size = compiled.verdicts
    assert time.answer is Answer.MET
    assert "measured" in time.text
    assert size.answer is Answer.MISSED
    assert size.text in compiled.notes


def test_compile_for_a_device_that_is_not_here_goes_by_the_prediction(net: Path) -> None:
    budget = edgepass.Budget(latency_ms=1e4)
    compiled = edgepass.compile(net, "arm64", budget=budget, time_budget_s=0)
    assert "assumed" in compiled.verdicts[0].text


# --- advice ------------------------------------------------------------------------------------


def told(model: ir.Model, recipe: str = "fp32") -> dict[str, str]:
    report = edgepass.estimate(model, "x86_64", [recipe])[recipe]
    return {item.kind: item.text for item in report.advice}


def test_one_kernel_that_takes_most_of_the_time_is_named() -> None:
    b = NetBuilder("one", seed=1)
    x = b.conv(b.input((1, 64, 56, 56)), 256, 3)
    found = told(b.model(b.conv(b.unary("Relu", x), 8, 1)))
    assert "Conv" in found["dominating-kernel"]


def test_activations_larger_than_weights_are_told() -> None:
    b = NetBuilder("wide", seed=1)
    found = told(b.model(b.conv(b.input((1, 8, 256, 256)), 8, 3)))
    assert "compressing weights saves little memory" in found["activation-bound"]


def test_moving_data_is_told() -> None:
    b = NetBuilder("moving", seed=1)
    x = b.input((1, 64, 64, 32))
    for _ in range(4):
        x = b.unary("Abs", b.transpose(x, 0, 3, 1, 2))
    found = told(b.model(x))
    assert "Transpose" in found["layout"]


def test_conversions_left_between_float_operators_are_told() -> None:
    b = NetBuilder("pairs", seed=1)
    x = b.input((1, 32, 64, 64))
    scale, zero = ir.tensor(np.float32(0.1)), ir.tensor(np.uint8(0))
    given = [
        ir.Value(name=name, const_value=t, type=ir.TensorType(t.dtype), shape=ir.Shape(()))
        for name, t in (("scale", scale), ("zero", zero))
    ]
    for _ in range(3):
        q = b.op("QuantizeLinear", [x, *given], [shape_of(x)], ir.DataType.UINT8)[0]
        x = b.unary("Softplus", b.op("DequantizeLinear", [q, *given], [shape_of(x)])[0])
    model = b.model(x)
    for value in given:
        model.graph.register_initializer(value)
    found = kernels(model, get_target("x86_64"))
    assert sum(k.type == "QuantizeLinear" for k in found) == 3
    time = latency(found, get_target("x86_64"))
    assert "conversions" in [item.kind for item in advice(found, time, None, 1)]


def test_an_assumed_latency_of_this_machine_says_how_to_calibrate_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(architecture, "profile_for", lambda _: None)
    notes = edgepass.estimate(convolutions(), "host", ["fp32"])["fp32"].notes
    assert any("edgepass calibrate" in note for note in notes)
    other = edgepass.estimate(convolutions(), "arm64", ["fp32"])["fp32"].notes
    assert not any("edgepass calibrate" in note for note in other)


# --- profiles ----------------------------------------------------------------------------------


def test_a_users_profile_is_found_by_name_and_for_this_machine(folder: Path) -> None:
    target = get_target("x86_64")
    by_macs("elsewhere", host={"cpu": "another"}).save(folder / "elsewhere.json")
    assert profile_for(target) is None
    by_macs("mine", host={"cpu": cpu_name()}).save(folder / "mine.json")
    assert profile_for(target).name == "mine"
    assert find_profile("elsewhere").host["cpu"] == "another"
    with pytest.raises(ProfileError, match="mine"):
        find_profile("min")


def test_a_damaged_profile_is_said_and_harms_nothing(folder: Path) -> None:
    folder.mkdir()
    (folder / "bad.json").write_text("{")
    (folder / "newer.json").write_text('{"format": 99}')
    good, broken = all_profiles()
    assert {item.profile.name for item in good if not item.shipped} == set()
    assert len(broken) == 2
    assert profile_for(get_target("x86_64")) is None
    assert "Estimate" not in str(edgepass.estimate(convolutions(), "x86_64", ["fp32"]).failed)


def test_profiles_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_macs("mine").save(folder / "mine.json")
    assert main(["profiles", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mine"]["shipped"] is False
    assert rows["jetson-nano-cpu"]["shipped"] is True
    assert rows["jetson-nano-cpu"]["settings"][0]["held_out"][""]["median_error"] < 0.05
    assert main(["profiles", "mine"]) == 0
    assert "convolution:float32" in capsys.readouterr().out


# --- the truth beside the prediction -----------------------------------------------------------


def test_measuring_puts_the_truth_beside_the_prediction() -> None:
    found = measure(convolutions(), "host", ["fp32", "int8"], budget_s=0.02)
    assert [row.recipe for row in found.rows] == ["fp32", "int8"]
    for row in found.rows:
        assert row.ms > 0
        assert row.file_bytes == pytest.approx(row.predicted.file_bytes, rel=0.01)
        assert row.as_dict()["label"] == "measured"
    assert found.rows[1].file_bytes < found.rows[0].file_bytes


def test_another_machine_is_not_measured_here() -> None:
    with pytest.raises(UsageError, match="can't be measured"):
        measure(convolutions(), "arm64")
    with pytest.raises(UsageError, match="on the device itself"):
        calibrating.calibrate("arm64")


def test_calibrating_serves_the_next_estimate(
    folder: Path, net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--threads", "1", "--budget", "10", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert Path(made["path"]).parent == folder
    assert made["host"]["cpu"] == cpu_name()
    assert [setting["threads"] for setting in made["settings"]] == [1]
    report = edgepass.estimate(net, "host", ["fp32"])["fp32"]
    assert report.latency.label == "calibrated"
    assert report.latency.profile == made["name"]


def test_a_target_without_a_profile_has_none_to_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "profile_for", lambda _: None)
    with pytest.raises(CalibrationError, match="calibrate"):
        calibrating.check("host")


@pytest.mark.parametrize("text", ["0", "one", "", "1,-2"])
def test_thread_counts_that_make_no_sense(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--threads", text]) != 0
    assert "--threads" in capsys.readouterr().err


# --- the command line --------------------------------------------------------------------------


def test_estimate_prints_saves_a_picture_and_answers_a_budget(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "out" / "costs.png"
    code = main(
        ["estimate", str(net), "--target", "x86_64", "--recipes", "fp32,int8,prune50+int8",
         "--budget", "size_mb=0.0001", "--plot", str(picture), "--per-kernel"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "missed" in printed
    assert "prune50+int8" in printed
    assert "most time: Conv" in printed


@pytest.mark.parametrize("text", ["speed=3", "latency_ms", "latency_ms=fast", "size_mb=-1"])
def test_a_budget_that_cannot_be_read(
    text: str, net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(net), "--budget", text]) != 0
    assert "size_mb" in capsys.readouterr().err


def test_an_unknown_kind_of_picture_is_refused_before_anything_is_lost(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(net), "--plot", str(tmp_path / "costs.docx")]) != 0
    assert ".png" in capsys.readouterr().err
