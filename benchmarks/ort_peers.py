"""ONNX Runtime's own quantizers under names, as edgepass's peers in benchmarks.

Here: `PEERS` (defaults, and the variants worth trying) and `quantize`. Not here: what is made of
the files (`quantization`, `int8_zoo`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Feed = Mapping[str, np.ndarray]
_WEIGHTED = ["Conv", "MatMul", "Gemm"]
_ENOUGH = 64
"""Calibration samples for the observers that keep every value in memory."""


def _static(
    samples: int | None = None, **options: Any
) -> Callable[[Path, Path, Sequence[Feed]], None]:
    def run(source: Path, out: Path, calibration: Sequence[Feed]) -> None:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        enums = {
            "quant_format": QuantFormat,
            "calibrate_method": CalibrationMethod,
            "activation_type": QuantType,
            "weight_type": QuantType,
        }
        chosen = {k: getattr(enums[k], v) if k in enums else v for k, v in options.items()}
        quantize_static(source, out, _reader(calibration[:samples]), **chosen)

    return run


def _dynamic(**options: Any) -> Callable[[Path, Path, Sequence[Feed]], None]:
    def run(source: Path, out: Path, calibration: Sequence[Feed]) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, out, **options)

    return run


def _blocks(block_size: int, bits: int) -> Callable[[Path, Path, Sequence[Feed]], None]:
    def run(source: Path, out: Path, calibration: Sequence[Feed]) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        made = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=block_size, is_symmetric=False
        )
        made.process()
        onnx.save(made.model.model, out)

    return run


_U8S8 = {"activation_type": "QUInt8", "weight_type": "QInt8"}
STATIC = "static"
PEERS: dict[str, Callable[[Path, Path, Sequence[Feed]], None]] = {
    STATIC: _static(),
    "static u8s8 per-channel": _static(**_U8S8, per_channel=True),
    "static u8s8 per-channel, Conv MatMul Gemm": _static(
        **_U8S8, per_channel=True, op_types_to_quantize=_WEIGHTED
    ),
    "static u8s8 per-tensor, Conv MatMul Gemm": _static(**_U8S8, op_types_to_quantize=_WEIGHTED),
    "static per-channel, reduced range": _static(**_U8S8, per_channel=True, reduce_range=True),
    "static QOperator u8u8": _static(
        quant_format="QOperator", activation_type="QUInt8", weight_type="QUInt8"
    ),
    "static entropy, Conv MatMul Gemm": _static(
        _ENOUGH, **_U8S8, per_channel=True, op_types_to_quantize=_WEIGHTED,
        calibrate_method="Entropy",
    ),
    "static percentile, Conv MatMul Gemm": _static(
        _ENOUGH, **_U8S8, per_channel=True, op_types_to_quantize=_WEIGHTED,
        calibrate_method="Percentile",
    ),
    "dynamic": _dynamic(),
    "dynamic per-channel": _dynamic(per_channel=True),
    "dynamic MatMul Gemm": _dynamic(op_types_to_quantize=["MatMul", "Gemm"]),
    "dynamic LSTM": _dynamic(op_types_to_quantize=["LSTM"]),
    "int4 block 32": _blocks(32, 4),
    "int4 block 16": _blocks(16, 4),
}  # fmt: skip


def quantize(name: str, model: Path, out: Path, calibration: Sequence[Feed]) -> None:
    """Write what a peer makes of a model, prepared by ONNX Runtime's own preprocessing.

    Raises:
        Exception: whatever the peer raises.
    """
    model, out = model.resolve(), out.resolve()
    # The quantizer leaves files of weights where it runs.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), quiet():
        source, prepared = Path(folder) / "source.onnx", Path(folder) / "prepared.onnx"
        if "per-channel" in name:
            model = _with_axes(model, source)
        PEERS[name](_preprocess(model, prepared), out, calibration)


_AXES = 13
"""The opset from which DequantizeLinear has an axis, which scales per channel need."""


def _with_axes(model: Path, out: Path) -> Path:
    """The model in an opset that has scales per channel, as the quantizer's log advises."""
    import onnx
    from onnx import version_converter

    loaded = onnx.load(model)
    versions = [entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")]
    if versions[0] >= _AXES:
        return model
    onnx.save(version_converter.convert_version(loaded, 17), out)
    return out


def _preprocess(model: Path, out: Path) -> Path:
    """The model after `quant_pre_process`, with as much of it as it survives."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    for options in ({}, {"skip_symbolic_shape": True}, {"skip_optimization": True}):
        with contextlib.suppress(Exception):
            quant_pre_process(model, out, **options)
            return out
    return model


def _reader(calibration: Sequence[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[Feed] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            feed = next(self.rest, None)
            return None if feed is None else dict(feed)

    return Reader()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the quantizers' advice on standard output and in the log."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
