"""Weights as indices into codebooks, looked up once, when a runtime loads the model.

Here: the pass `palettize`. Not here: k-means (`kmeans`), evenly spaced levels (`weight_only`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.edit import Editor
from ...ir.graph import constant_tensor, is_absent, opset_of
from ...ir.quant import PerChannel, PerTensor, QuantPlan, QuantSpec
from ..base import Context, Pass, PassResult, Stage
from .folded_chain import FoldedChain
from .kmeans import assign, codebook
from .known_types import require_types
from .notes import refusal_notes
from .packed import replace_reads
from .qdq import absent
from .weight_sites import WeightSite, weight_sites

_ENTRIES_SHARE = 8
"""A weight needs that many elements for each entry of its codebooks, or it is left."""


@dataclasses.dataclass(frozen=True)
class Palettize(Pass):
    """Stores weights as indices of `bits` into codebooks found by k-means; computes in float.

    `bits`: 1 to 8. `group`: output channels that share a codebook; 0 is the whole tensor. The file
    holds `bits` an element (packed, whatever the opset) and float32 codebooks; ONNX Runtime looks
    the floats up when it loads the model, so a run takes what float takes. `exclude`: nodes,
    weights or operators to leave.
    """

    name = "palettize"
    stage = Stage.QUANTIZE
    lossless = False
    needs_weights = True

    bits: int = 4
    group: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise PassOptionError(
                f"A codebook of {self.bits} bits can't be stored",
                where=f"pass {self.name!r}, option 'bits'",
                fix="1 to 8",
            )
        if self.group < 0:
            raise PassOptionError(
                f"{self.group} channels can't share a codebook",
                where=f"pass {self.name!r}, option 'group'",
                fix="0 (one codebook a tensor), or a number of output channels",
            )

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What the pass would make of each value. Weights may be absent; nothing changes."""
        return self._plan(*self._select(model))

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """As `run`, also on an architecture without weights, whose tensors stay absent."""
        return self.run(model, context)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`."""
        require_types(model)
        sites, refused = self._select(model)
        plan = self._plan(sites, refused)
        if not sites:
            text = "nothing to palettize: no weight is large enough for its codebooks"
            return PassResult(model, False, (text, *refusal_notes(plan)))
        note = self._summary(plan, sites)
        editor, opset = Editor(), opset_of(model)
        for site in sites:
            replace_reads(site.value, list(site.reads), self._looked_up(editor, site, opset))
        return PassResult(model, True, (note, *refusal_notes(plan)))

    def _summary(self, plan: QuantPlan, sites: list[WeightSite]) -> str:
        counts = Counter(node.op_type for site in sites for node, _ in site.reads)
        text = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
        elements = sum(int(np.prod(site.shape)) for site in sites)
        entries = sum(self._groups(site) << self.bits for site in sites)
        each = self.bits + 32 * entries / elements
        return f"{plan.label}: weights of {text}; {each:.2f} bits an element with codebooks"

    def _select(self, model: ir.Model) -> tuple[list[WeightSite], list[tuple[str, str]]]:
        sites, refused = weight_sites(model, self.exclude, _ENTRIES_SHARE << self.bits)
        kept = []
        for site in sites:
            size = int(np.prod(site.shape))
            if size < _ENTRIES_SHARE * (self._groups(site) << self.bits):
                reason = f"{self._groups(site)} codebooks for {size} elements save nothing"
                refused.append((f"weight {site.value.name!r}", reason))
            else:
                kept.append(site)
        return kept, refused

    def _groups(self, site: WeightSite) -> int:
        return -(-site.shape[site.axis] // self.group) if self.group else 1

    def _plan(self, sites: list[WeightSite], refused: list[tuple[str, str]]) -> QuantPlan:
        entries = {
            site.value.name or "": QuantSpec(
                ir.DataType.UINT8,
                False,
                PerChannel(site.axis) if self.group else PerTensor(),
                zero_points=False,
                folded=True,
                bits=self.bits,
            )
            for site in sites
        }
        group = f" a group of {self.group} channels" if self.group else ""
        return QuantPlan(f"codebooks of {self.bits} bits{group}", entries, notes=tuple(refused))

    def _looked_up(self, editor: Editor, site: WeightSite, opset: int) -> ir.Value:
        """before: W      after: Gather(codebooks, indices + 2 ** bits * group)"""
        shape, count, size = site.shape, self._groups(site), 1 << self.bits
        tensor = constant_tensor(site.value)
        chain = FoldedChain(editor, site.reads[0][0], site.value)
        indices: np.ndarray | None = None
        books: np.ndarray | ir.TensorProtocol = absent(ir.DataType.FLOAT, (count * size,))
        if not is_absent(tensor):
            assert tensor is not None
            indices, books = self._clustered(tensor.numpy(), site)
        value = chain.codes(indices, self.bits, shape, opset, dtype=ir.DataType.INT32)
        if count > 1:
            spread = (shape[site.axis], *[1] * (len(shape) - site.axis - 1))
            first = np.arange(shape[site.axis], dtype=np.int32) // self.group * size
            start = chain.parameter("start", first, ir.DataType.INT32, spread)
            value = chain.add("Add", [value, start], shape, ir.DataType.INT32)
        return chain.add("Gather", [chain.constant("codebook", books), value], shape, axis=0)

    def _clustered(self, array: np.ndarray, site: WeightSite) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the array's shape, and the codebooks one after the other."""
        channels = np.moveaxis(array, site.axis, 0)
        indices = np.empty(channels.shape, np.uint8)
        books = []
        step = self.group or len(channels)
        for start in range(0, len(channels), step):
            part = channels[start : start + step]
            books.append(codebook(part, 1 << self.bits))
            indices[start : start + step] = assign(part, books[-1])
        return np.moveaxis(indices, 0, site.axis), np.concatenate(books)
