"""The artifact folder: byte-reproducible, verified, replaced as one step, read without trust."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from edgepass.artifact import load, relative_difference, save_artifact
from edgepass.atomic import remove_leftovers, replacing
from edgepass.errors import ArtifactError, CalibrationError, UnsafePathError, UsageError
from edgepass.manifest import is_artifact
from edgepass.npz import read_npz, write_npz
from edgepass.targets.feed import input_specs, output_specs
from edgepass.targets.onnxruntime import emit
from edgepass.targets.target import Hardware, Runtime, Target

TARGET = Target(name="test", description="", hardware=Hardware(arch="x86_64"))


def dense(scale: float = 1.0) -> ir.Model:
    """y = x @ w of 16 x 8 weights."""
    data = (np.arange(128, dtype=np.float32).reshape(16, 8) - 64) * scale
    x = ir.Value(name="x", shape=ir.Shape(["n", 16]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(data, name="w"))
    node = ir.node("MatMul", [x, w], name="product")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["n", 8]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


FEED = {"x": np.arange(32, dtype=np.float32).reshape(2, 16) / 7}


def save(path: Path, model: ir.Model | None = None, **options) -> Path:
    model = model or dense()
    arguments = {
        "write_model": lambda folder: emit(model, TARGET, folder),
        "target": TARGET,
        "recipe": "default",
        "inputs": input_specs(model),
        "outputs": output_specs(model),
        "cost": {"macs": 128},
        "golden_input": FEED,
    }
    return save_artifact(path, **(arguments | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_saved_and_loaded_it_runs(tmp_path: Path):
    folder = save(tmp_path / "a" / "out")
    artifact = load(folder)
    expected = FEED["x"] @ dense().graph.initializers["w"].const_value.numpy()
    np.testing.assert_allclose(artifact.run(FEED)["y"], expected, rtol=1e-5)
    assert artifact.verify() == {"y": 0.0}
    assert [str(spec) for spec in artifact.inputs] == ["x: float32[n,16]"]
    assert artifact.manifest["cost"] == {"macs": 128}
    assert set(artifact.manifest["files"]) == {"model.onnx", "golden.npz"}
    with pytest.raises(CalibrationError, match="'x' is float32"):
        artifact.run({"x": FEED["x"].astype(np.float64)})


def test_two_saves_are_byte_for_byte_equal(tmp_path: Path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    assert contents(first) == contents(second)
    assert str(tmp_path).encode() not in b"".join(contents(first).values())


def test_big_weights_lie_beside_the_model(tmp_path: Path):
    model = dense(2.0)
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((16, 1024), np.float32), name="w")
    model.graph.outputs[0].shape = ir.Shape(["n", 1024])
    write = partial(emit, model, TARGET, inline_limit=100)
    artifact = load(save(tmp_path / "out", model, write_model=write))
    assert "model.onnx.data" in artifact.manifest["files"]
    np.testing.assert_allclose(artifact.run(FEED)["y"][:, 0], FEED["x"].sum(1), rtol=1e-5)


def test_an_artifact_is_replaced_and_nothing_else_is(tmp_path: Path):
    save(tmp_path / "out")
    save(tmp_path / "out", dense(3.0))
    expected = FEED["x"] @ dense(3.0).graph.initializers["w"].const_value.numpy()
    np.testing.assert_allclose(load(tmp_path / "out").run(FEED)["y"], expected, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    mine = tmp_path / "mine"
    mine.mkdir()
    save(mine)  # empty: nothing to lose
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(UsageError, match="is not an artifact"):
        save(photos)
    assert contents(photos) == {"cat.jpg": b"meow"}
    save(photos, force=True)
    assert is_artifact(photos)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot become an artifact"):
        save(tmp_path / "file")


def test_a_wrong_golden_output_fails_the_save_and_keeps_the_old_one(tmp_path: Path):
    before = contents(save(tmp_path / "out"))
    wrong = {"y": np.zeros((2, 8), np.float32)}
    with pytest.raises(ArtifactError, match=r"output 'y'[\s\S]*is allowed"):
        save(tmp_path / "out", dense(2.0), golden_output=wrong)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_or_interrupt_while_writing_keeps_the_old_one(tmp_path: Path):
    before = contents(save(tmp_path / "out"))

    def interrupted(folder: Path) -> list[Path]:
        emit(dense(2.0), TARGET, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", write_model=interrupted)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED_AT = ["emit", "json.dumps", "os.fsync", "atomic._exchange:before", "atomic._exchange:after"]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize("point", KILLED_AT)
def test_killed_at_any_point_one_whole_artifact_is_there(tmp_path: Path, point: str):
    """The child kills itself with SIGKILL at one step of replacing the artifact."""
    old = contents(save(tmp_path / "out"))
    script = textwrap.dedent(
        """
        import json, os, signal, sys
        sys.path.insert(0, sys.argv[1])
        import test_artifact as t
        from edgepass import artifact, atomic

        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        point, folder = sys.argv[2], t.Path(sys.argv[3])
        if point == "emit":
            emit = t.emit
            t.emit = lambda *a, **k: (emit(*a, **k), die())
        elif point == "json.dumps":
            artifact.json.dumps = die
        elif point == "os.fsync":
            os.fsync = die
        else:
            exchange = atomic._exchange
            before = point.endswith("before")
            atomic._exchange = die if before else lambda *a: (exchange(*a), die())
        t.save(folder, t.dense(5.0))
        """
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), point]
    ended = subprocess.run([*arguments, str(tmp_path / "out")], check=False)
    assert ended.returncode == -signal.SIGKILL
    if point.endswith("after"):
        assert contents(tmp_path / "out") != old
    else:
        assert contents(tmp_path / "out") == old
    assert load(tmp_path / "out").verify() == {"y": 0.0}
    assert len(list(tmp_path.iterdir())) == 2, "the leftover of the killed process"
    save(tmp_path / "out", dense(5.0))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_an_atomic_exchange_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edgepass.atomic._exchange", lambda first, second: False)
    save(tmp_path / "out")
    save(tmp_path / "out", dense(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    os.rename(tmp_path / "out", tmp_path / ".out.edgepass-123-old")  # killed between the renames
    remove_leftovers(tmp_path / "out")
    assert load(tmp_path / "out").verify() == {"y": 0.0}


def test_a_folder_being_written_is_no_leftover(tmp_path: Path):
    with replacing(tmp_path / "out") as fresh:
        (fresh / "file").write_text("x")
        assert remove_leftovers(tmp_path / "out") == []
        assert fresh.is_dir()
    assert contents(tmp_path / "out") == {"file": b"x"}


def damage_missing(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def damage_truncated(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])


def damage_flipped(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx").write_bytes(data)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_version(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(format_version=99))


def damage_escaping(folder: Path) -> None:
    entry = {"sha256": "0", "bytes": 1}
    edit_manifest(folder, lambda m: m["files"].update({"../secret": entry}))


def damage_link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


def damage_key(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.pop("session_options"))


def damage_unhashed(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(model="/bin/true"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "'model.onnx' is missing"),
        (damage_truncated, "bytes, .* are expected"),
        (damage_flipped, "does not have the hash"),
        (damage_manifest, r"manifest\.json: "),
        (damage_version, "format version 99 is unknown"),
        (damage_escaping, r"'\.\./secret', outside the artifact"),
        (damage_link, "outside the artifact"),
        (damage_key, "no proper 'session_options'"),
        (damage_unhashed, "no hash of '/bin/true'"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage, message: str):
    folder = save(tmp_path / "out")
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"model.onnx": 1}},
        {"golden": {}},
        {"golden": {"file": ["x"], "tolerance": 1}},
        {"inputs": [1]},
        {"inputs": [{"name": "x"}]},
        {"outputs": [{"name": "x", "dtype": "float32", "shape": 3}]},
        {"model": 5},
        {"format": "other"},
    ],
)
def test_a_malformed_manifest_is_an_artifact_error(tmp_path: Path, change: dict):
    folder = save(tmp_path / "out")
    edit_manifest(folder, lambda m: m.update(change))
    with pytest.raises(ArtifactError, match="manifest"):
        load(folder)


def test_not_an_artifact(tmp_path: Path):
    with pytest.raises(ArtifactError, match="no such artifact"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="it has no manifest"):
        load(tmp_path)


def test_weights_outside_the_artifact_are_not_read(tmp_path: Path):
    """A model file whose external data points elsewhere, with a manifest that fits it."""
    folder = save(tmp_path / "out")
    model = dense()
    data = np.ones((16, 8), np.float32)
    (tmp_path / "secret.bin").write_bytes(data.tobytes())
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "../secret.bin",
        0,
        data.nbytes,
        ir.DataType.FLOAT,
        shape=ir.Shape([16, 8]),
        name="w",
        base_dir=str(folder),
    )
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    raw = (folder / "model.onnx").read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    edit_manifest(folder, lambda m: m["files"].update({"model.onnx": entry}))
    with pytest.raises(UnsafePathError, match="secret"):
        load(folder).run(FEED)


OTHER_ARCH = "x86_64" if platform.machine() in ("aarch64", "arm64") else "aarch64"


@pytest.mark.parametrize("arch", ["riscv64", OTHER_ARCH])
def test_a_library_for_another_machine_says_how_to_run_it(tmp_path: Path, arch: str):
    target = Target(
        name="arm64/tvm", description="", hardware=Hardware(arch=arch), runtime=Runtime.TVM
    )

    def write(folder: Path) -> list[Path]:
        (folder / "model.so").write_bytes(b"ELF")
        return [folder / "model.so"]

    output = {"y": np.zeros((2, 8), np.float32)}
    folder = save(tmp_path / "out", target=target, write_model=write, golden_output=output)
    artifact = load(folder)
    assert not artifact.runs_here
    assert "apache-tvm" in artifact.manifest["versions"]
    assert artifact.verify(output) == {"y": 0.0}
    hint = "--emulate arm64" if arch == "aarch64" else "copy it to the device"
    with pytest.raises(ArtifactError, match=hint):
        artifact.run(FEED)


def test_nothing_to_run_is_an_error(tmp_path: Path):
    with pytest.raises(ArtifactError, match="Nothing was written"):
        save(tmp_path / "out", write_model=lambda folder: [])


# --- arrays on disk --------------------------------------------------------------------------


def test_npz_keeps_every_dtype(tmp_path: Path):
    arrays = {
        "f": np.array([1.5, np.nan], np.float32),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.uint8),
        "brain": np.array([[1.5, -2]], ml_dtypes.bfloat16),
        "text": np.array(["a", "bc"], object),
        "order": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "a/b:c": np.array([True]),
    }
    write_npz(tmp_path / "a.npz", arrays)
    write_npz(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    back = read_npz(tmp_path / "a.npz")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert name == "text" or back[name].dtype == array.dtype
    np.savez(tmp_path / "numpy.npz", x=arrays["f"])
    np.testing.assert_array_equal(read_npz(tmp_path / "numpy.npz")["x"], arrays["f"])


def test_npz_is_read_without_trust(tmp_path: Path):
    path = tmp_path / "x.npz"
    with pytest.raises(CalibrationError, match="no file"):
        read_npz(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(CalibrationError, match="not a readable"):
        read_npz(path)
    np.savez(path, x=np.array([{"code": 1}], object))
    with pytest.raises(CalibrationError, match="Python objects"):
        read_npz(path)
    np.savez(path, x=np.zeros(4, np.float32))
    claimed = path.read_bytes().replace(b"'shape': (4,), }    ", b"'shape': (4000000,),")
    assert claimed != path.read_bytes()
    path.write_bytes(claimed)
    with pytest.raises(CalibrationError, match="not a readable"):
        read_npz(path)


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([0.0, 10.0], [0.0, 9.0], 0.1),
        ([5.0, 5.0], [5.0, 4.5], 0.1),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([0.0, 1.0], [0.0, np.nan], np.inf),
        ([0.0, 1.0], [0.0], np.inf),
        ([True, False], [True, True], np.inf),
    ],
)
def test_relative_difference(expected, actual, difference: float):
    found = relative_difference(np.array(expected), np.array(actual))
    assert found == pytest.approx(difference)
