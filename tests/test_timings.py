"""Profiles from whole-model timings: tables, fits on invented devices, what is held out, JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.cli import main
from edgepass.cost.features import Features, Operand, features
from edgepass.cost.profile import Profile, load_profile
from edgepass.cost.timings import TimedModel, _Fit, fit_timings, hold_out, read_timings
from edgepass.errors import ProfileError
from edgepass.targets.onnx_file import write_onnx

# --- tables --------------------------------------------------------------------------------------


def table(folder: Path, text: str) -> Path:
    path = folder / "timings.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_read_with_what_is_optional(tmp_path: Path) -> None:
    rows = read_timings(
        table(
            tmp_path,
            "model,latency_ms,family,threads,dims\n"
            "a/resnet@224.onnx,12.5,,,\n"
            "b.onnx,3,nets,4,batch=2; length=128\n",
        )
    )
    assert [(r.line, r.model, r.ms, r.family, r.threads, dict(r.dims)) for r in rows] == [
        (2, "a/resnet@224.onnx", 12.5, "resnet", 1, {}),
        (3, "b.onnx", 3.0, "nets", 4, {"batch": 2, "length": 128}),
    ]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (",1.5,,", "model"),
        ("a.onnx,,,", "latency_ms"),
        ("a.onnx,fast,,", "latency_ms"),
        ("a.onnx,-1,,", "latency_ms"),
        ("a.onnx,0,,", "latency_ms"),
        ("a.onnx,nan,,", "latency_ms"),
        ("a.onnx,inf,,", "latency_ms"),
        ("a.onnx,1,0,", "threads"),
        ("a.onnx,1,2.5,", "threads"),
        ("a.onnx,1,1,batch", "dims"),
        ("a.onnx,1,1,batch=0", "dims"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, row: str, named: str
) -> None:
    with pytest.raises(ProfileError, match=named) as error:
        read_timings(table(tmp_path, f"model,latency_ms,threads,dims\nok.onnx,1,,\n{row}\n"))
    assert "line 3" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column"),
        ("file,latency_ms\na,1\n", "'model'"),
        ("model,ms\na,1\n", "'latency_ms'"),
        ("model,latency_ms\n", "empty"),
    ],
)
def test_a_table_without_what_it_needs(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        read_timings(table(tmp_path, text))


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="can't be read"):
        read_timings(tmp_path / "nothing.csv")


# --- invented devices ----------------------------------------------------------------------------


def conv(channels: int, size: int, out: int, area: int = 3, groups: int = 1) -> Features:
    return features(
        "Conv",
        "",
        [
            Operand((1, channels, size, size)),
            Operand((out, channels // groups, area, area), constant=True),
        ],
        [Operand((1, out, size, size))],
    )


def relu(channels: int, size: int) -> Features:
    shape = (1, channels, size, size)
    return features("Relu", "", [Operand(shape)], [Operand(shape)])


def product(rows: int, depth: int, columns: int) -> Features:
    return features(
        "Gemm",
        "",
        [Operand((rows, depth)), Operand((depth, columns), constant=True)],
        [Operand((rows, columns))],
    )


Rates = dict[str, tuple[float, float]]  # a family: milliseconds a million MACs, and a megabyte
SLOW: Rates = {
    "convolution/spatial": (0.5, 0.2),
    "convolution/pointwise": (0.6, 0.2),
    "convolution/depthwise": (2.0, 0.5),
    "matmul/weights": (0.8, 0.3),
    "elementwise/plain": (0.0, 0.9),
}
FAST: Rates = {name: (macs / 9, nbytes / 5) for name, (macs, nbytes) in SLOW.items()}


def time_of(kernels: list[Features], rates: Rates) -> float:
    total = 0.0
    for k in kernels:
        macs, nbytes = rates[k.family]
        moved = sum(k.amount(name) for name in ("read", "written", "weights"))
        total += 0.01 + macs * k.amount("macs") / 1e6 + nbytes * moved / 1e6
    return total


def models(count: int, rates: Rates, noise: float = 0.01, seed: int = 0) -> list[TimedModel]:
    """Nets of `count // 3` families, each of a style of its own."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        family = index % max(3, count // 3)
        style = np.random.default_rng(1000 + family).dirichlet(np.ones(4) * 2)
        kernels = []
        for _ in range(int(rng.integers(10, 40))):
            channels, size = int(2 ** rng.integers(4, 9)), int(2 ** rng.integers(2, 6))
            kind = rng.choice(4, p=style)
            if kind == 0:
                kernels.append(conv(channels, size, channels))
            elif kind == 1:
                kernels.append(conv(channels, size, 2 * channels, 1))
            elif kind == 2:
                kernels.append(conv(channels, size, channels, 3, channels))
            else:
                kernels.append(product(size * size, channels, 2 * channels))
            kernels.append(relu(channels, size))
        ms = time_of(kernels, rates) * float(np.exp(rng.normal(0, noise)))
        found.append(TimedModel(f"net{index}", kernels, ms, f"family{family}"))
    return found


def errors(profile: Profile, samples: list[TimedModel]) -> np.ndarray:
    return np.array([abs(profile.predict(s.kernels).ms / s.ms - 1) for s in samples])


def test_a_fit_recovers_a_device_of_known_rates() -> None:
    profile = fit_timings(models(60, SLOW), name="slow", device="", runtime="")
    new = models(40, SLOW, noise=0.0, seed=7)
    assert np.median(errors(profile, new)) < 0.03
    single = [conv(128, 32, 128), conv(256, 16, 512, 1), product(256, 128, 256)]
    for kernel in single:
        truth = time_of([kernel], SLOW)
        assert profile.predict([kernel]).ms == pytest.approx(truth, rel=0.25)


def test_outliers_do_not_move_a_fit() -> None:
    samples = models(60, SLOW)
    wrong = [
        dataclasses.replace(s, ms=3 * s.ms) if i % 15 == 0 else s for i, s in enumerate(samples)
    ]
    profile = fit_timings(wrong, name="slow", device="", runtime="")
    assert np.median(errors(profile, models(40, SLOW, noise=0.0, seed=7))) < 0.05


def test_a_family_that_is_held_out_is_not_seen() -> None:
    samples = models(30, SLOW)
    before = hold_out(samples)
    changed = [dataclasses.replace(s, ms=5 * s.ms) if s.family == "family2" else s for s in samples]
    fits = [_Fit(group, None) for group in (samples, changed)]
    rows = np.array([s.family != "family2" for s in samples])
    inside = np.flatnonzero(~rows).tolist()
    first, second = (
        Profile("", "", "", "", "", (fit.setting(rows, 3.0),))
        .predict(samples[inside[0]].kernels)
        .ms
        for fit in fits
    )
    assert first == second
    after = hold_out(changed)
    assert np.allclose(before[inside], after[inside], rtol=0.2)  # widths may be chosen otherwise


def test_what_is_said_of_held_out_models_is_what_hold_out_finds() -> None:
    samples = models(30, SLOW, noise=0.05)
    proof = fit_timings(samples, name="slow", device="", runtime="").settings[0].held_out[""]
    error = np.abs(hold_out(samples) / np.array([s.ms for s in samples]) - 1)
    assert proof.models == 30
    assert proof.median_error == pytest.approx(np.median(error))
    assert proof.within_10 == pytest.approx((error <= 0.1).mean())


def test_intervals_cover_models_of_families_never_seen() -> None:
    samples = models(60, SLOW, noise=0.08)
    profile = fit_timings(samples, name="slow", device="", runtime="")
    new = [
        dataclasses.replace(s, family=f"new {s.family}") for s in models(60, SLOW, 0.08, seed=21)
    ]
    found = [(profile.predict(s.kernels), s.ms) for s in new]
    share = np.mean([p.low_ms <= ms <= p.high_ms for p, ms in found])
    assert 0.6 <= share <= 0.95
    assert 0.65 <= (profile.settings[0].held_out[""].coverage or 0.0) <= 0.92


def test_intervals_are_wider_where_kernels_are_unlike_any_seen() -> None:
    profile = fit_timings(models(30, SLOW), name="slow", device="", runtime="")
    known, far = profile.predict([conv(64, 16, 64)]), profile.predict([conv(4096, 512, 4096, 11)])
    assert far.novel > known.novel
    assert far.high_ms / far.ms > known.high_ms / known.ms


def test_ten_models_with_a_prior_do_better_than_without() -> None:
    prior = fit_timings(models(60, FAST), name="fast", device="", runtime="")
    few, new = models(10, SLOW, noise=0.05, seed=3), models(40, SLOW, noise=0.0, seed=7)
    with_prior = fit_timings(few, name="slow", device="", runtime="", prior=prior)
    without = fit_timings(few, name="slow", device="", runtime="")
    assert np.mean(errors(with_prior, new)) < np.mean(errors(without, new))
    assert "fast" in with_prior.notes[0]


def test_what_ten_models_lack_is_priced_from_the_prior() -> None:
    prior = fit_timings(models(60, FAST), name="fast", device="", runtime="")
    plain = [
        TimedModel(f"net{i}", [conv(64, 8 + i, 64), relu(64, 8 + i)] * 5, 0.0) for i in range(10)
    ]
    ten = [dataclasses.replace(s, ms=time_of(list(s.kernels), SLOW)) for s in plain]
    profile = fit_timings(ten, name="slow", device="", runtime="", prior=prior)
    lacking = profile.predict([product(256, 256, 256)])
    assert lacking.unknown == 0
    assert lacking.ms > prior.predict([product(256, 256, 256)]).ms


def test_too_few_timings_and_a_prior_without_rates() -> None:
    with pytest.raises(ProfileError, match="no timings"):
        fit_timings([], name="x", device="", runtime="")
    with pytest.raises(ProfileError, match="too few"):
        fit_timings(models(2, SLOW), name="x", device="", runtime="")
    empty = dataclasses.replace(
        fit_timings(models(9, SLOW), name="x", device="", runtime=""), settings=()
    )
    fitted = fit_timings(models(9, SLOW), name="x", device="", runtime="").settings[0]
    empty = dataclasses.replace(empty, settings=(dataclasses.replace(fitted, classes={}),))
    with pytest.raises(ProfileError, match="no rates"):
        fit_timings(models(9, SLOW), name="x", device="", runtime="", prior=empty)


def test_a_setting_for_each_number_of_threads() -> None:
    one = models(9, SLOW)
    four = [dataclasses.replace(s, ms=s.ms / 3, threads=4) for s in one]
    profile = fit_timings(one + four, name="slow", device="", runtime="")
    assert [s.threads for s in profile.settings] == [1, 4]
    kernels = one[0].kernels
    ratio = profile.predict(kernels, 1).ms / profile.predict(kernels, 4).ms
    assert ratio == pytest.approx(3, rel=0.05)


def test_json_round_trip(tmp_path: Path) -> None:
    samples = models(30, SLOW)
    profile = fit_timings(samples, name="slow", device="a board", runtime="onnxruntime")
    again = load_profile(profile.save(tmp_path / "slow.json"))
    assert again.settings[0].held_out.keys() == {""}
    for sample in samples:
        found, same = profile.predict(sample.kernels), again.predict(sample.kernels)
        assert same.ms == pytest.approx(found.ms, rel=1e-3)
        assert same.high_ms == pytest.approx(found.high_ms, rel=1e-3)


# --- the command ---------------------------------------------------------------------------------


def write_net(path: Path, hidden: int) -> None:
    """Two products without stored weights, an activation between."""
    floats = ir.TensorType(ir.DataType.FLOAT)

    def weight(name: str, *shape: int) -> ir.Value:
        data = np.zeros(shape, np.float32)
        return ir.Value(name=name, type=floats, const_value=ir.tensor(data, name=name))

    x = ir.Value(name="x", shape=ir.Shape([1, 16]), type=floats)
    first, second = weight("first", 16, hidden), weight("second", hidden, 4)
    nodes = [ir.node("MatMul", [x, first])]
    nodes.append(ir.node("Relu", nodes[-1].outputs))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], second]))
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"h{i}"
    y = nodes[-1].outputs[0]
    y.shape, y.type = ir.Shape([1, 4]), floats
    graph = ir.Graph(
        [x], [y], nodes=nodes, initializers=[first, second], opset_imports={"": 17}, name="net"
    )
    write_onnx(ir.Model(graph, ir_version=8), path)


def tiny_table(folder: Path, speed: float) -> Path:
    lines = ["model,latency_ms"]
    for hidden in (32, 64, 128, 256):
        write_net(folder / f"net{hidden}.onnx", hidden)
        lines.append(f"net{hidden}.onnx,{speed * hidden}")
    return table(folder, "\n".join(lines) + "\n")


def test_calibrate_from_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPASS_PROFILES", str(tmp_path / "profiles"))
    path = tiny_table(tmp_path, 0.001)
    assert main(["calibrate", "--from", str(path), "--name", "tiny"]) == 0
    profile = load_profile(tmp_path / "profiles" / "tiny.json")
    assert profile.measured == "models"
    assert profile.settings[0].held_out[""].models == 4
    path.write_text(path.read_text(encoding="utf-8").replace("0.0", "0.1"), encoding="utf-8")
    assert main(["calibrate", "--from", str(path), "--name", "next", "--prior", "tiny"]) == 0
    assert "tiny" in load_profile(tmp_path / "profiles" / "next.json").notes[0]


def test_calibrate_from_a_table_names_the_line_of_a_lost_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPASS_PROFILES", str(tmp_path / "profiles"))
    path = table(tmp_path, "model,latency_ms\nlost.onnx,1\n")
    assert main(["calibrate", "--from", str(path)]) != 0
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "profiles").exists()
