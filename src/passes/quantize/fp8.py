"""Weights stored in 8-bit floats, widened once, when a runtime loads the model.

Here: the pass `fp8`. Not here: 16-bit floats (`half`), integers (`weight_only`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.edit import Editor
from ...ir.graph import constant_tensor, is_absent, opset_of
from ...ir.quant import PerChannel, QuantPlan, QuantSpec
from ..base import Context, Pass, PassResult, Stage
from .folded_chain import FoldedChain
from .known_types import require_types
from .notes import refusal_notes
from .numbers import MIN_SCALE
from .packed import replace_reads
from .qdq import absent
from .weight_sites import WeightSite, weight_sites

_MIN_ELEMENTS = 256
_OPSET = 19


class Fp8Format(enum.StrEnum):
    """Bits of exponent and mantissa."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"

    @property
    def dtype(self) -> ir.DataType:
        """The ONNX element type."""
        e4m3 = self is Fp8Format.E4M3
        return ir.DataType.FLOAT8E4M3FN if e4m3 else ir.DataType.FLOAT8E5M2

    @property
    def greatest(self) -> float:
        """The greatest finite number."""
        return 448.0 if self is Fp8Format.E4M3 else 57344.0

    @property
    def table(self) -> np.ndarray:
        """The float32 that each byte stands for; 0 for what is no finite number."""
        values = np.arange(256, dtype=np.uint8).view(self.dtype.numpy()).astype(np.float32)
        table: np.ndarray = np.where(np.isfinite(values), values, np.float32(0))
        return table


@dataclasses.dataclass(frozen=True)
class Fp8(Pass):
    """Stores weights in 8-bit floats, with a scale for each output channel.

    `format`: e4m3 (4 bits of exponent, 3 of mantissa) or e5m2; Micikevicius et al., "FP8 Formats
    for Deep Learning" (2022). ONNX Runtime widens them when it loads the model, so a run takes what
    float takes. `exclude`: nodes, weights or operators to leave.
    """

    name = "fp8"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    format: Fp8Format = Fp8Format.E4M3
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "format", Fp8Format(self.format))
        except ValueError:
            raise PassOptionError(
                f"There is no 8-bit float {self.format!r}",
                where=f"pass {self.name!r}, option 'format'",
                fix="e4m3 or e5m2",
            ) from None

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value. Weights may be absent; nothing changes."""
        sites, refused = weight_sites(model, self.exclude, _MIN_ELEMENTS)
        return self._plan(sites, refused)

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, also on an architecture without weights, whose tensors stay absent."""
        return self.run(model, context)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`."""
        require_types(model)
        sites, refused = weight_sites(model, self.exclude, _MIN_ELEMENTS)
        plan = self._plan(sites, refused)
        if not sites:
            text = f"nothing to store: no weight of {_MIN_ELEMENTS} elements"
            return PassResult(model, False, (text, *refusal_notes(plan)))
        counts = Counter(node.op_type for site in sites for node, _ in site.reads)
        editor = Editor()
        for site in sites:
            by = self._widened(editor, site, opset_of(model))
            replace_reads(site.value, list(site.reads), by)
        text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
        return PassResult(
            model,
            True,
            (
                f"{plan.label}: weights of {text}",
                _arithmetic(context, self.format),
                *refusal_notes(plan),
            ),
        )

    def _plan(self, sites: list[WeightSite], refused: list[tuple[str, str]]) -> QuantPlan:
        entries = {
            site.value.name or "": QuantSpec(
                ir.DataType.INT8, True, PerChannel(site.axis), zero_points=False, folded=True
            )
            for site in sites
        }
        return QuantPlan(f"weights {self.format}", entries, notes=tuple(refused))

    def _widened(self, editor: Editor, site: WeightSite, opset: int) -> ir.Value:
        """before: W      after: Mul(Cast(W8), scale)

        Before opset 19 the bits are bytes, and a table of 256 floats stands for the Cast.
        """
        shape = site.shape
        chain = FoldedChain(editor, site.reads[0][0], site.value)
        tensor = constant_tensor(site.value)
        spread = (shape[site.axis], *[1] * (len(shape) - site.axis - 1))
        stored: np.ndarray | ir.TensorProtocol = absent(self.format.dtype, shape)
        scale = None
        if not is_absent(tensor):
            assert tensor is not None
            array = tensor.numpy()
            others = tuple(i for i in range(array.ndim) if i != site.axis)
            peak = np.abs(array).max(axis=others)
            scale = np.where(peak > MIN_SCALE, peak / self.format.greatest, 1.0)
            scale = np.maximum(scale, MIN_SCALE).astype(np.float32)
            limit = self.format.greatest
            small = np.clip(array / scale.reshape(spread), -limit, limit)
            stored = ir.Tensor(small.astype(self.format.dtype.numpy()), dtype=self.format.dtype)
        if opset >= _OPSET:
            value = chain.cast(chain.constant(self.format.value, stored))
        else:
            if isinstance(stored, ir.Tensor):
                stored = stored.numpy().view(np.uint8)
            else:
                stored = absent(ir.DataType.UINT8, shape)
            value = chain.cast(chain.constant(self.format.value, stored), ir.DataType.INT32)
            table = chain.shared(self.format.table)
            value = chain.add("Gather", [table, value], shape, axis=0)
        factor = chain.parameter("scale", scale, ir.DataType.FLOAT, spread)
        return chain.add("Mul", [value, factor], shape)


def _arithmetic(context: Context, form: Fp8Format) -> str:
    target = context.target
    if target is not None and form.dtype in target.float_dtypes:
        return f"{target.name} lists {form}, but ONNX has no {form} products: arithmetic is float32"
    return f"{form} is storage here: weights are widened at load, arithmetic is float32"
