"""Weights with many zeros stored as what is not zero and a bit for each place.

Here: the pass `pack_zeros`. Not here: making zeros (`prune.sparsify`), numbers of few bits
(`quantize.packed`), unpacking, which the runtime does by plain operators when it loads the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from ...ir.edit import Editor
from ...ir.graph import constant_tensor, graphs, is_absent, opset_of
from ...targets.target import Runtime
from ..base import Context, Pass, PassResult, Stage
from ..quantize.folded_chain import FoldedChain
from ..quantize.packed import replace_reads
from ..quantize.qdq import absent

_OPSET = 13
_MIN_ELEMENTS = 1024
_NODES = 8
"""Of one chain; each with its result's shape takes about 160 bytes and six times the name."""
_WORTH = 0.95
"""A weight is packed when this share of its bytes is more than it then takes."""
_DTYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
_READERS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"),
    *("FusedConv", "FusedGemm", "FusedMatMul", "Attention", "ConvInteger", "MatMulInteger"),
    *("DequantizeLinear", "Cast", "Transpose"),
)


@dataclasses.dataclass(frozen=True)
class PackZeros(Pass):
    """Stores weights with many zeros in less: their other elements, and one bit for each element.

    The runtime puts them together once, when it loads the model; in memory they are as large as
    ever, and a run takes as long. Only weights that take less are packed. `assumed`: the share of
    zeros in weights without data, for estimates.
    """

    name = "pack_zeros"
    stage = Stage.LOWER
    idempotent = True

    assumed: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.assumed < 1.0:
            raise PassOptionError(
                f"A share of {self.assumed} can't be zero",
                where="pass 'pack_zeros', option 'assumed'",
                fix="0 <= assumed < 1",
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`."""
        target = context.target
        if target is not None and target.runtime is Runtime.TVM:
            note = "not packed: TVM compiles whole weights into its library"
            return PassResult(model, False, (note,))
        if opset_of(model) < _OPSET:
            return PassResult(model, False, (f"not packed: opset {opset_of(model)} is below 13",))
        editor = Editor()
        before = after = count = 0
        for value in list(_weights(model)):
            tensor = constant_tensor(value)
            assert tensor is not None
            chosen = self._chosen(tensor, _NODES * (160 + 6 * len(value.name or "")))
            if chosen is None:
                continue
            common, others = chosen
            before += tensor.nbytes
            after += _packed_bytes(tensor, others)
            count += 1
            _pack(editor, value, common, others)
        if not count:
            return PassResult(model, False, ("no weight has enough zeros to be stored in less",))
        text = f"{count} weights stored without their zeros: {after / before:.0%} of their bytes"
        return PassResult(model, True, (text, "put together at load: in memory as large as ever"))

    def _chosen(self, tensor: ir.TensorProtocol, nodes_bytes: int) -> tuple[int, int] | None:
        """What most elements are, and how many are not; None where packing does not pay."""
        if is_absent(tensor):
            common, others = 0, tensor.size - round(self.assumed * tensor.size)
        else:
            array = tensor.numpy()
            common = _most_common(array)
            others = int(np.count_nonzero(array != common))
        if _packed_bytes(tensor, others) + nodes_bytes >= _WORTH * tensor.nbytes:
            return None
        return common, others


def _packed_bytes(tensor: ir.TensorProtocol, others: int) -> int:
    return -(-tensor.size // 8) + (others + 1) * tensor.dtype.bitwidth // 8


def _most_common(array: np.ndarray) -> int:
    """Zero, or the code of zero in unsigned bytes."""
    if array.dtype != np.uint8:
        return 0
    return int(np.bincount(array.reshape(-1), minlength=256).argmax())


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers that only operators with a use for whole weights read."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = constant_tensor(value)
            if tensor is None or tensor.dtype not in _DTYPES or tensor.size < _MIN_ELEMENTS:
                continue
            users = [use.node for use in value.uses()]
            if not users or value.is_graph_output():
                continue
            if all(user.op_type in _READERS for user in users):
                yield value


def _pack(editor: Editor, value: ir.Value, common: int, others: int) -> None:
    """before: W      after: Reshape(Gather([0, others of W], CumSum(bits) * bits), shape of W)"""
    tensor = constant_tensor(value)
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    count = math.prod(shape)
    reads = [(use.node, use.idx) for use in value.uses()]
    chain = FoldedChain(editor, reads[0][0], value)
    mask: np.ndarray | None = None
    if is_absent(tensor):
        stored = chain.constant("others", absent(tensor.dtype, (others + 1,)))
    else:
        flat = tensor.numpy().reshape(-1)
        mask = flat != common
        first = np.full(1, common, flat.dtype)
        listed = ir.Tensor(np.concatenate([first, flat[mask]]), dtype=tensor.dtype)
        stored = chain.constant("others", listed)
    byte, index = ir.DataType.UINT8, ir.DataType.INT32
    eights = -(-count // 8)
    packed = None if mask is None else np.packbits(mask, bitorder="little")
    bits = chain.parameter("bits", packed, byte, (eights, 1))
    places = chain.shared(np.arange(8, dtype=np.uint8)[None])
    bits = chain.add("BitShift", [bits, places], (eights, 8), byte, direction="RIGHT")
    bits = chain.add("Mod", [bits, chain.shared(np.array(2, np.uint8))], (eights, 8), byte)
    bits = chain.reshape(chain.cast(bits, index), (eights * 8,))
    place = chain.add("CumSum", [bits, chain.shared(np.array(0, np.int64))], (eights * 8,), index)
    place = chain.add("Mul", [place, bits], (eights * 8,), index)
    whole = chain.add("Gather", [stored, place], (eights * 8,), tensor.dtype, axis=0)
    if eights * 8 != count:
        ends = [chain.shared(np.array([end], np.int64)) for end in (0, count)]
        whole = chain.add("Slice", [whole, *ends], (count,), tensor.dtype)
    editor.modified = True
    replace_reads(value, reads, chain.reshape(whole, shape))
