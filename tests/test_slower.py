"""compile refuses int8 that is slower than float, and only that."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass import api
from edgepass.cost.latency import ASSUMED, CALIBRATED, Latency
from edgepass.errors import SlowerError
from edgepass.passes.quantize.dynamic_int8 import DynamicInt8
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.slower import require_faster
from edgepass.speed import Speed

FAST = Speed(10.0, 5.0, 2.0, 20)
SLOW = Speed(10.0, 12.0, 10 / 12, 20)
TINY = Speed(0.030, 0.036, 30 / 36, 1000)


def never(*_: object) -> object:
    raise AssertionError("was asked for")


def latency(ms: float, label: str = CALIBRATED, unknown: int = 0) -> Latency:
    return Latency(ms, ms / 2, ms * 2, label, kernels=3, unknown=unknown)


def check(passes, speed, again=never, predicted=never, warn=never):
    return require_faster(passes, speed, again, predicted, "a board", warn)


def test_what_is_faster_is_kept_without_asking_twice():
    assert check([StaticInt8()], FAST) is FAST


def test_what_is_slower_twice_is_refused_with_the_measurement():
    with pytest.raises(SlowerError, match=r"12\.000 ms, original 10\.000 ms") as caught:
        check([StaticInt8()], SLOW, again=lambda seconds: SLOW)
    assert "measured" in caught.value.diagnostic.where
    assert "force=True" in caught.value.diagnostic.fix


def test_a_second_timing_may_acquit():
    assert check([DynamicInt8()], SLOW, again=lambda seconds: FAST) is FAST


def test_a_few_calls_more_in_a_tiny_model_are_no_reason():
    assert check([StaticInt8()], TINY) is TINY


def test_passes_that_promise_no_speed_are_not_asked():
    assert check([WeightOnly()], SLOW) is SLOW


@pytest.mark.parametrize(("after", "refused"), [(10.2, False), (10.4, True)])
def test_a_calibrated_prediction_refuses(after: float, refused: bool):
    def predicted() -> tuple[Latency, Latency]:
        return latency(10.0), latency(after)

    if not refused:
        assert check([StaticInt8()], None, predicted=predicted) is None
        return
    with pytest.raises(SlowerError, match="calibrated"):
        check([StaticInt8()], None, predicted=predicted)


def test_an_assumed_prediction_warns_and_one_with_unknown_kernels_says_nothing():
    said: list[str] = []
    check(
        [StaticInt8()],
        None,
        predicted=lambda: (latency(10.0, ASSUMED), latency(20.0, ASSUMED)),
        warn=said.append,
    )
    assert len(said) == 1
    assert "a board" in said[0]
    check([StaticInt8()], None, predicted=lambda: (latency(10.0), latency(20.0, unknown=1)))


def test_compile_refuses_and_force_keeps(monkeypatch: pytest.MonkeyPatch):
    """The timing is a stand-in: what is tested is what compile makes of it."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 16]))
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    node = ir.node("MatMul", [x, w], name="product")
    node.outputs[0].name = "y"
    main = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17})
    graph = ir.Model(main, ir_version=9)
    samples = [{"x": np.random.default_rng(i).normal(size=(1, 16)).astype("f")} for i in range(20)]
    slow = dataclasses.replace(SLOW, what="x86_64")
    monkeypatch.setattr(api, "compare", lambda *args, **kwargs: slow)
    with pytest.raises(SlowerError):
        edgepass.compile(graph.clone(), "host", recipe="int8", calibration=samples)
    kept = edgepass.compile(graph.clone(), "host", recipe="int8", calibration=samples, force=True)
    assert kept.speed is slow
    assert any("SLOWER" in note for note in kept.notes)
    lossless = edgepass.compile(graph.clone(), "host")
    assert lossless.speed is slow
