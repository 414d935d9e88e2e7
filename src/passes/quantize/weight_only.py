"""Weights stored in 8 bits or fewer, arithmetic in float: smaller files.

Here: the pass `weight_only`, its options and its plan. Not here: which weights in which form
(`weight_choice`), numbers (`weight_codes`), writing (`weight_writer`), codebooks (`palettize`),
quantized arithmetic (`static_int8`, `dynamic_int8`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_ir as ir

from ...errors import PassOptionError, UsageError
from ...ir.graph import constant_tensor, is_absent, opset_of
from ...ir.quant import PerBlock, QuantPlan, QuantSpec
from ...targets.target import Runtime
from ..base import Context, Pass, PassResult, Stage
from . import nbits
from .awq import scale_channels
from .capture import require_samples
from .known_types import require_types
from .notes import refusal_notes
from .weight_budget import spread_bits
from .weight_choice import DEFAULT_BLOCK, MIN_ELEMENTS, Choice, Form, StoredWeight, find_weights
from .weight_codes import Method, Rounding, choose_codes, second_moments
from .weight_writer import write_weights

_WIDTHS = range(2, 9)
_INT8_INPUTS, _FLOAT_INPUTS = 4, 0  # accuracy levels of MatMulNBits


@dataclasses.dataclass(frozen=True)
class WeightOnly(Pass):
    """Stores weights in 8 bits or fewer and computes in float.

    `bits`: of matrices (MatMul, Gemm), 2 to 8. ONNX Runtime multiplies by 2, 4 and 8 bits as they
    are; other widths, and everything on TVM, are packed in the file and unpacked at load.
    `block`: elements of a column that share a scale, a power of two from 16; 0 leaves it open (32;
    in 8 bits the whole column). `zero_points`: ranges need not be even about zero. `others`,
    `tables`: bits of what is no matrix (convolutions, recurrent layers) and of embeddings, tied
    ones included. `bits_of`: exceptions, as "name:bits" of a node, a weight or an operator.
    `average_bits`: bits of matrices within a mean, most where products suffer most.

    `method`: rtn (ranges of least error), minmax, hqq, gptq, awq, awq-gptq; the last three need
    calibration data. `act_order`, `damping` and `rounds` (of improving codes and scales in turns)
    are gptq's; `sequential`: later layers are calibrated behind the stored weights of earlier ones.
    `float_inputs`: kernels multiply in float32, not by inputs rounded to 8 bits. `exclude`: nodes,
    weights or operators to leave.
    """

    name = "weight_only"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    bits: int = 8
    block: int = 0
    exclude: tuple[str, ...] = ()
    method: Method = Method.RTN
    zero_points: bool | None = None
    others: int = 8
    tables: int = 8
    bits_of: tuple[str, ...] = ()
    average_bits: float = 0.0
    act_order: bool = False
    damping: float = 0.01
    rounds: int = 2
    sequential: bool = False
    float_inputs: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "method", Method(self.method))
        except ValueError:
            raise self._wrong("method", f"{self.method!r}", ", ".join(Method)) from None
        for option in ("bits", "others", "tables"):
            if getattr(self, option) not in _WIDTHS:
                raise self._wrong(option, f"{getattr(self, option)} bits", "2 to 8")
        if self.block and (self.block < 16 or self.block & (self.block - 1)):
            fix = "0, or a power of two from 16"
            raise self._wrong("block", f"blocks of {self.block} elements", fix)
        if self.average_bits and not 2 <= self.average_bits <= 8:
            raise self._wrong(
                "average_bits", f"{self.average_bits} bits on average", "2 to 8, or 0"
            )
        if self.damping <= 0:
            raise self._wrong("damping", f"a damping of {self.damping}", "above 0, as 0.01")
        if self.rounds < 0:
            raise self._wrong("rounds", f"{self.rounds} rounds", "0 or more")
        if self.method is Method.HQQ and self.zero_points is False:
            fix = "leave zero_points out, or choose another method"
            raise self._wrong("zero_points", "hqq and no zero points, which it fits", fix)
        self._exceptions()

    def _wrong(self, option: str, what: str, fix: str) -> PassOptionError:
        return PassOptionError(
            f"Weights can't be stored with {what}",
            where=f"pass {self.name!r}, option {option!r}",
            fix=fix,
        )

    def _exceptions(self) -> dict[str, int]:
        found = {}
        for item in self.bits_of:
            key, _, bits = item.rpartition(":")
            if not key or not bits.isdigit() or int(bits) not in _WIDTHS:
                raise self._wrong("bits_of", repr(item), '"name:bits", with 2 to 8 bits')
            found[key] = int(bits)
        return found

    # --- running ---------------------------------------------------------------------------------

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value. Weights may be absent; nothing changes."""
        weights, refused = self._select(model, context)
        return self._plan(weights, refused)

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, also on an architecture without weights, whose tensors stay absent."""
        return self._apply(model, dataclasses.replace(context, calibration=None))

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`.

        Raises:
            UsageError: the opset is below 13, or the method needs calibration data.
            CalibrationError: it is empty, or does not fit the model.
        """
        if not self.method.needs_data:
            context = dataclasses.replace(context, calibration=None)
            return self._apply(model, context)
        why = f"{self.method} looks at what the weights are multiplied by"
        require_samples(context.calibration, self.name, why)
        return self._apply(model, context)

    def _apply(self, model: ir.Model, context: Context) -> PassResult:
        notes: list[str] = []
        if self.method.scales and context.calibration:
            weights, _ = self._select(model, context)
            grids = {n: w.grid for w in weights if w.form in _CODED for n in w.products}
            notes += scale_channels(model, grids, context.calibration)
        weights, refused = self._select(model, context)
        plan = self._plan(weights, refused)
        if not weights:
            text = f"nothing to store in {self.bits} bits: no weight of {MIN_ELEMENTS} elements"
            return PassResult(model, bool(notes), (*notes, text, *refusal_notes(plan)))
        rounding = Rounding(
            method=self.method,
            act_order=self.act_order,
            damping=self.damping,
            rounds=self.rounds,
            sequential=self.sequential,
        )
        coded = [w for w in weights if w.form in _CODED]
        codes = choose_codes(model, coded, rounding, context)
        notes.append(_summary(plan, weights))
        if context.target is not None and context.target.runtime is Runtime.TVM:
            notes.append("TVM unpacks weights as it compiles: its library is as large as in float")
        accuracy = _FLOAT_INPUTS if self.float_inputs else _INT8_INPUTS
        write_weights(model, weights, codes, accuracy)
        return PassResult(model, True, (*notes, *refusal_notes(plan)))

    # --- choosing --------------------------------------------------------------------------------

    def _choice(self, context: Context, extra: dict[str, int] | None = None) -> Choice:
        tvm = context.target is not None and context.target.runtime is Runtime.TVM
        zero_points = self.method is Method.HQQ if self.zero_points is None else self.zero_points
        return Choice(
            bits=self.bits,
            block=self.block,
            zero_points=zero_points,
            others=self.others,
            tables=self.tables,
            bits_of={**(extra or {}), **self._exceptions()},
            exclude=self.exclude,
            portable=tvm or context.portable,
        )

    def _select(
        self, model: ir.Model, context: Context
    ) -> tuple[list[StoredWeight], list[tuple[str, str]]]:
        if opset_of(model) < 13:
            raise UsageError(
                f"Opset {opset_of(model)} has no per-channel DequantizeLinear",
                where=f"pass {self.name!r}",
                fix="load the model with edgepass.load, which converts old opsets",
            )
        require_types(model)
        found = find_weights(model, self._choice(context))
        if self.average_bits:
            chosen = self._spread(model, found.weights, context)
            found = find_weights(model, self._choice(context, chosen))
        return found.weights, found.refused

    def _spread(
        self, model: ir.Model, weights: list[StoredWeight], context: Context
    ) -> dict[str, int]:
        """Bits by the name of each weight that only products read."""
        free = [w for w in weights if w.products and len(w.shape) == 2 and w.form is not Form.ROWS]
        free = [w for w in free if all(r.node.op_type != "Gather" for r in w.reads)]
        moments = {}
        if context.calibration and not any(is_absent(constant_tensor(w.value)) for w in free):
            moments = second_moments(model, free, context.calibration)
        chosen = spread_bits(free, moments, nbits.WIDTHS, self.average_bits)
        return {item.value.name or "": bits for item, bits in chosen.items()}

    def _plan(self, weights: list[StoredWeight], refused: list[tuple[str, str]]) -> QuantPlan:
        forms: dict[str, set[QuantSpec]] = {}
        read: Counter[str] = Counter()
        for item in weights:
            name = item.value.name or ""
            forms.setdefault(name, set()).add(item.spec)
            sources = {
                (r.node, r.index) if r.through is None else (r.through, 0) for r in item.reads
            }
            read[name] += len(sources)
        block = f" block {self.block or DEFAULT_BLOCK}" if self.block or self.bits < 8 else ""
        values = {w.value for w in weights}
        return QuantPlan(
            label=f"weights int{self.bits}{block}",
            entries={w.value.name or "": w.spec for w in weights},
            copies={name: len(found) for name, found in forms.items() if len(found) > 1},
            kept=frozenset(
                v.name or ""
                for v in values
                if len(v.uses()) > read[v.name or ""] or v.is_graph_output()
            ),
            notes=tuple(refused),
        )


_CODED = (Form.BLOCKS, Form.PACKED)


def _summary(plan: QuantPlan, weights: list[StoredWeight]) -> str:
    """`weights int4 block 32: 36 MatMul, 1 Gather (8 bits)`."""
    counts: Counter[tuple[str, int]] = Counter()
    for item in weights:
        for node in dict.fromkeys(read.node for read in item.reads):
            counts[node.op_type, item.spec.width] += 1
    text = ", ".join(f"{n} {op} in {bits} bits" for (op, bits), n in sorted(counts.items()))
    elements = sum(_elements(item) for item in weights)
    stored = sum(_elements(item) * _bits_stored(item) for item in weights)
    return f"{plan.label}: weights of {text}; {stored / elements:.2f} bits an element with scales"


def _elements(item: StoredWeight) -> int:
    total = 1
    for dim in item.shape:
        total *= dim
    return total


def _bits_stored(item: StoredWeight) -> float:
    """Bits an element, its share of scales and zero points included."""
    each = 32.0 + (item.spec.width if item.spec.zero_points else 0)
    found = item.spec.granularity
    if isinstance(found, PerBlock):
        return item.spec.width + each / found.size
    return item.spec.width + each * item.shape[item.axis] / _elements(item)
