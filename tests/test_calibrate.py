"""Calibration of this machine: networks, timing, fitting, intervals, the check."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.cost.calibrate import batch_size, calibrate_host, without_drift
from edgepass.cost.calibrate_fit import fit_level, fit_setting, kernel_times, profiling_overhead
from edgepass.cost.check import compare_nets
from edgepass.cost.microbench import Bench, NetTime
from edgepass.cost.microbench_builder import NetBuilder, shape_of
from edgepass.cost.microbench_fit import fit_class, non_negative
from edgepass.cost.microbench_nets import FAMILIES, synthetic_net
from edgepass.cost.microbench_trace import KernelTime, typical
from edgepass.cost.operand import Operand
from edgepass.cost.profile import Profile, load_profile
from edgepass.frontends import load_model
from edgepass.ir.graph import absent_weights
from edgepass.ir.random_weights import fill_random_weights
from edgepass.measuring import apply_recipe
from edgepass.passes.base import Context
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target


def _filled(model: ir.Model) -> ir.Model:
    fill_random_weights(model)
    return model


def _small_net(name: str = "small") -> ir.Model:
    b = NetBuilder(name, seed=1)
    x = b.input((1, 3, 16, 16))
    y = b.unary("Relu", b.conv(x, 16, 3))
    y = b.conv(y, 32, 3, 2)
    return b.model(b.gemm(b.reduce("ReduceMean", y, (2, 3), keep=False), 10))


# --- networks ----------------------------------------------------------------------------------


def test_a_number_always_names_the_same_network() -> None:
    for index in (1, 6, 40):
        first, second = synthetic_net(index), synthetic_net(index)
        assert [(n.op_type, n.name) for n in first.model.graph] == [
            (n.op_type, n.name) for n in second.model.graph
        ]
        assert first.macs == second.macs > 0
    assert synthetic_net(1).name != synthetic_net(2).name


def test_the_families_take_turns() -> None:
    assert {synthetic_net(index).family for index in range(34)} == set(FAMILIES)


@pytest.mark.parametrize("index", [0, 3, 8, 10, 15, 19, 25, 27, 31])
def test_networks_run_and_have_the_shapes_they_say(index: int) -> None:
    net = synthetic_net(index)
    declared = {value.name: shape_of(value) for value in net.model.graph.outputs}
    model = _filled(net.model)
    assert not absent_weights(model)
    with OrtRunner(model, threads=1) as runner:
        feed = {
            spec.name: np.zeros([int(d) for d in spec.shape or ()], spec.dtype)
            for spec in runner.inputs
        }
        results = runner.run(feed)
    assert {name: array.shape for name, array in results.items()} == declared
    assert all(np.isfinite(array).all() for array in results.values())


# --- random weights ----------------------------------------------------------------------------


def test_random_weights_depend_on_names_alone() -> None:
    first, second = _filled(_small_net()), _filled(_small_net())
    for name, value in first.graph.initializers.items():
        other = second.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())


def test_random_pairs_fuse_as_calibrated_ones_do(tmp_path) -> None:
    target = get_target("x86_64")
    sample = {"input_1": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}
    made = []
    for calibrated in (True, False):
        model = load_model(_small_net(), weights_required=False)
        if calibrated:
            model = apply_recipe(_filled(model), "int8", Context(target, [sample], {}))
        else:
            model = _filled(StaticInt8().preview(model, Context(target, None, {})).model)
        path = tmp_path / f"{calibrated}.onnx"
        OrtRunner(model, threads=1, save_optimized=path).close()
        made.append(Counter(node.op_type for node in ir.load(path).graph))
    assert made[0]["QLinearConv"] == 1  # the first, of three channels, stays float
    assert made[0] == made[1]


# --- timing ------------------------------------------------------------------------------------


def test_typical_is_the_mean_of_the_fastest_third() -> None:
    assert typical([9.0, 1.0, 2.0, 50.0, 3.0, 7.0]) == 1.5
    assert math.isnan(typical([]))


def test_a_bench_reports_kernels_with_their_shapes() -> None:
    with Bench([1, 2], rounds=1, reference=_filled(_small_net())) as bench:
        nets = bench.run([("small", "fp32", _filled(_small_net()), {})])
    assert [net.threads for net in nets] == [1, 2]
    for net in nets:
        assert net.ms > 0
        assert net.reference_ms > 0
        convs = [k for k in net.kernels if k.type == "Conv"]
        assert [k.outputs[0].shape for k in convs] == [(1, 16, 16, 16), (1, 32, 8, 8)]
        assert all(k.ms > 0 for k in net.kernels)
        macs = [k.features.amounts["macs"] for k in convs]
        assert macs == [16 * 256 * 27, 32 * 64 * 16 * 9]
        gemm = next(k for k in net.kernels if k.type == "Gemm")
        assert gemm.inputs[0] == Operand((1, 32))
        assert gemm.inputs[1] is not None
        assert gemm.inputs[1].constant


def test_a_network_that_is_refused_is_left_out() -> None:
    b = NetBuilder("broken", seed=1)
    x = b.input((1, 4))
    broken = b.model(b.op("NoSuchOperator", [x], [(1, 4)])[0])
    with Bench([1], rounds=1) as bench:
        nets = bench.run(
            [("broken", "fp32", broken, {}), ("ok", "fp32", _filled(_small_net()), {})]
        )
    assert [net.net for net in nets] == ["ok"]


# --- fitting -----------------------------------------------------------------------------------


def test_non_negative_least_squares() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.uniform(0, 1, (60, 5))
    truth = np.array([2.0, 0.0, 0.5, 0.0, 1.0])
    np.testing.assert_allclose(non_negative(matrix, matrix @ truth), truth, atol=1e-6)
    found = non_negative(matrix, matrix @ np.array([1.0, -1.0, 1.0, 0.0, 0.0]))
    assert (found >= 0).all()
    gradient = matrix.T @ (matrix @ found - matrix @ np.array([1.0, -1.0, 1.0, 0.0, 0.0]))
    assert (gradient > -1e-6).all()  # the conditions of Karush, Kuhn and Tucker
    assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-6


def _matmul(generator: np.random.Generator) -> KernelTime:
    """A product whose speed depends smoothly on its columns, plus 2 us of launch."""
    rows, depth, columns = (int(2 ** generator.uniform(4, 9)) for _ in range(3))
    speed = 30e6 * (0.4 + 0.6 * math.log2(columns) / 9)
    ms = rows * depth * columns / speed + 0.002
    return KernelTime(
        "MatMul",
        "",
        (Operand((1, rows, depth)), Operand((depth, columns), constant=True)),
        (Operand((1, rows, columns)),),
        {},
        ms,
    )


def test_a_class_predicts_kernels_it_has_not_seen() -> None:
    generator = np.random.default_rng(1)
    kernels = [_matmul(generator) for _ in range(240)]
    seen, unseen = kernels[:180], kernels[180:]
    model = fit_class([k.features for k in seen], np.array([k.ms for k in seen]))
    assert all(value >= 0 for value in model.terms.values())
    assert model.correction is not None
    predicted, _ = model.predict([k.features for k in unseen])
    off = np.abs(predicted / np.array([k.ms for k in unseen]) - 1)
    assert np.median(off) < 0.02
    assert np.mean(off < 0.1) > 0.95


def _nets(count: int = 40, overhead: float = 0.003, slow: float = 1.0) -> list[NetTime]:
    generator = np.random.default_rng(2)
    nets = []
    for index in range(count):
        kernels = [_matmul(generator) for _ in range(int(generator.integers(6, 20)))]
        ms = slow * math.fsum(k.ms for k in kernels)
        timed = tuple(dataclasses.replace(k, ms=k.ms * slow + overhead) for k in kernels)
        nets.append(NetTime(f"made-{index}", "fp32", 1, ms, ms, timed, 2.0))
    return nets


def _profile(nets: list[NetTime]) -> Profile:
    return Profile("made", "here", "onnxruntime", "x86_64", "a test", (fit_setting(nets, 1),))


def test_a_setting_is_fitted_without_the_profilers_own_time() -> None:
    nets = _nets()
    assert profiling_overhead(nets) == pytest.approx(0.003, abs=2e-4)
    setting = fit_setting(nets, 1)
    features = [k.features for k in nets[0].kernels]
    total = setting.scale * kernel_times(setting, features).sum()
    assert total == pytest.approx(nets[0].ms, rel=0.05)
    proof = setting.held_out["float32"]
    assert proof.models == len(nets)
    assert proof.median_error < 0.05
    interval = setting.intervals["float32"]
    assert interval.low < 1 < interval.high


def test_drift_is_taken_out_by_the_reference() -> None:
    net = _nets(1)[0]

    def slowed(factor: float) -> NetTime:
        kernels = tuple(dataclasses.replace(k, ms=k.ms * factor) for k in net.kernels)
        return dataclasses.replace(
            net, ms=net.ms * factor, reference_ms=2.0 * factor, kernels=kernels
        )

    found = without_drift([slowed(1.2)], {1: 2.0})[0]
    assert found.ms == pytest.approx(net.ms)
    assert [k.ms for k in found.kernels] == pytest.approx([k.ms for k in net.kernels])
    # what was measured in a very slow spell is left out, as long as enough is left
    assert len(without_drift([slowed(1.0), slowed(1.1), slowed(2.0)], {1: 2.0})) == 2
    assert len(without_drift([slowed(2.0), slowed(1.1)], {1: 2.0})) == 2


# --- the check ---------------------------------------------------------------------------------


def test_a_true_profile_passes_the_check_and_a_stale_one_does_not() -> None:
    profile = _profile(_nets())
    result = compare_nets(profile, _nets(12), 1)
    assert not result.stale
    assert result.ratio == pytest.approx(1.0, abs=0.05)
    assert str(result).endswith("ok")
    slower = compare_nets(profile, _nets(12, slow=1.4), 1)
    assert slower.stale
    assert slower.ratio == pytest.approx(1 / 1.4, rel=0.08)
    assert "stale" in str(slower)
    assert slower.as_dict()["stale"] is True


def test_the_check_names_the_class_that_is_wrong() -> None:
    nets = _nets()
    relu = KernelTime("Relu", "", (Operand((1, 64, 56, 56)),), (Operand((1, 64, 56, 56)),), {}, 0.2)
    nets = [dataclasses.replace(net, ms=net.ms + 0.2, kernels=(*net.kernels, relu)) for net in nets]
    profile = _profile(nets)
    setting = profile.settings[0]
    classes = {
        key: dataclasses.replace(model, terms={n: 4 * c for n, c in model.terms.items()})
        if ":Relu:" in key
        else model
        for key, model in setting.classes.items()
    }
    assert any(":Relu:" in key for key in classes)
    wrong = dataclasses.replace(profile, settings=(dataclasses.replace(setting, classes=classes),))
    result = compare_nets(wrong, nets[:12], 1)
    assert any("Relu" in reason for reason in result.reasons)


# --- all of it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibrating_writes_a_profile_that_loads_and_predicts(tmp_path) -> None:
    profile = calibrate_host(
        {"fp32": lambda model: (_filled(model), {})},
        name="quick",
        target="x86_64",
        threads=(1,),
        budget_s=1.0,
    )
    assert profile.host["reference_ms"] > 0
    assert profile.runtime_version
    again = load_profile(profile.save(tmp_path / "quick.json"))
    assert again.settings[0].classes.keys() == profile.settings[0].classes.keys()
    kernel = _matmul(np.random.default_rng(0))
    predicted = again.predict([kernel.features], 1)
    assert 0 < predicted.low_ms < predicted.ms < predicted.high_ms


def test_few_networks_are_held_at_once_where_memory_is_short() -> None:
    assert batch_size(None) == batch_size(64e9) == 8
    assert batch_size(3e9) == 3
    assert batch_size(1e8) == 1


def test_what_runs_take_beyond_their_kernels_is_found() -> None:
    generator = np.random.default_rng(0)
    sums, counts = generator.uniform(1, 30, 200), generator.uniform(10, 400, 200)
    walls = (1.03 * sums - 0.001 * counts) * generator.normal(1, 0.02, 200)
    walls[:20] *= 1.5  # a busy machine
    scale, per_kernel = fit_level(sums, counts, walls)
    assert scale == pytest.approx(1.03, abs=0.01)
    assert per_kernel == pytest.approx(-0.001, abs=3e-4)
    assert fit_level(np.ones(2), np.ones(2), 9 * np.ones(2)) == (9.0, 0.0)
