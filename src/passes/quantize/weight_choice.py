"""Which weights a weight-only recipe stores, in which form, and who reads them.

Here: `find_weights`, a pure function of graph, options and target that reads no weight. Not here:
the numbers (`weight_codes`), changing the graph (`weight_writer`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from ...ir.graph import (
    attribute,
    constant_tensor,
    describe_node,
    graph_tree,
    is_onnx_op,
)
from ...ir.ops import weight_channel_axis
from ...ir.quant import PerBlock, PerChannel, QuantSpec
from . import nbits, tables
from .grids import Grid

MIN_ELEMENTS = 256
"""Smaller weights save less than their scales and nodes cost."""
_RECURRENT = ("LSTM", "GRU", "RNN")
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", *_RECURRENT)


class Form(enum.Enum):
    """How a weight is stored: blocks for kernels, a DequantizeLinear that ONNX Runtime turns into
    such a kernel, operators folded at load (8 bits, or packed below), rows of a lookup table."""

    BLOCKS = "blocks"
    DEQUANTIZE = "dequantize"
    FOLDED = "folded"
    PACKED = "packed"
    ROWS = "rows"


@dataclasses.dataclass(frozen=True)
class Read:
    """A node that reads a weight; `through` is the Transpose in between, if there is one."""

    node: ir.Node
    index: int
    through: ir.Node | None = None


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A constant, its form and spec, and the reads that it serves.

    `transposed`: of a matrix, outputs are the rows. `axis`: where output channels lie.
    """

    value: ir.Value
    form: Form
    spec: QuantSpec
    reads: tuple[Read, ...]
    transposed: bool = False

    @property
    def axis(self) -> int:
        """The axis of the constant that holds outputs."""
        match self.spec.granularity:
            case PerChannel(axis):
                return axis
            case PerBlock(_, axis):
                return 1 - axis
        raise NotImplementedError(str(self.spec.granularity))

    @property
    def shape(self) -> tuple[int, ...]:
        """The constant's own."""
        tensor = constant_tensor(self.value)
        assert tensor is not None
        return tuple(int(d) for d in tensor.shape.numpy())

    @property
    def grid(self) -> Grid:
        """Bits, block and zero points of its matrix [in, out]."""
        found = self.spec.granularity
        size = found.size if isinstance(found, PerBlock) else 0
        return Grid(self.spec.width, size, self.spec.symmetric)

    @property
    def products(self) -> tuple[ir.Node, ...]:
        """The nodes that multiply by it."""
        return tuple(r.node for r in self.reads if r.node.op_type != "Gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a caller may choose; see `WeightOnly`. `bits_of` is by node, weight or operator."""

    bits: int
    block: int
    zero_points: bool
    others: int
    tables: int
    bits_of: Mapping[str, int]
    exclude: tuple[str, ...]
    portable: bool


@dataclasses.dataclass
class Found:
    """Weights to store, and (node, reason) for what could be stored and is not."""

    weights: list[StoredWeight] = dataclasses.field(default_factory=list)
    refused: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def find_weights(model: ir.Model, choice: Choice) -> Found:
    """The weights of a model and its subgraphs, in graph order."""
    found = Found()
    reads: dict[ir.Value, list[tuple[str, bool, Read]]] = {}
    for node in (n for graph in graph_tree(model.graph) for n in graph):
        for value, kind, transposed, read in _reads(node):
            reason = _refusal(node, value, kind, choice)
            if reason:
                found.refused.append((describe_node(node), reason))
            elif reason is not None:
                continue
            else:
                reads.setdefault(value, []).append((kind, transposed, read))
    for value, readers in reads.items():
        found.weights += _forms(model, value, readers, choice)
    return found


# --- who reads what ----------------------------------------------------------------------------


def _reads(node: ir.Node) -> Iterator[tuple[ir.Value, str, bool, Read]]:
    """The constants that a node reads as weights: (constant, kind, transposed, read)."""
    if is_onnx_op(node, "Gather"):
        value = node.inputs[0]
        if (
            constant_tensor(value) is not None
            and value is not None
            and not attribute(node, "axis", 0)
        ):
            yield value, "table", True, Read(node, 0)
        return
    if not is_onnx_op(node, *_OPERATORS):
        return
    matrix = _matrix(node)
    if matrix is not None:
        yield matrix
        return
    indices = (1, 2) if node.op_type in _RECURRENT else (0, 1) if node.op_type == "MatMul" else (1,)
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and constant_tensor(value) is not None:
            yield value, "other", False, Read(node, index)


def _matrix(node: ir.Node) -> tuple[ir.Value, str, bool, Read] | None:
    """The matrix that a product's data is multiplied by, if it is one that kernels take."""
    if not is_onnx_op(node, "MatMul", "Gemm") or not nbits.is_plain(node):
        return None
    value = node.inputs[1]
    if value is None or constant_tensor(node.inputs[0]) is not None:
        return None
    through, transposed = None, node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    maker = value.producer()
    if maker is not None and is_onnx_op(maker, "Transpose") and not transposed:
        value, through, transposed = maker.inputs[0], maker, True
    tensor = constant_tensor(value)
    if value is None or tensor is None or len(tensor.shape) != 2:
        return None
    columns = int(tensor.shape.numpy()[0 if transposed else 1])
    if node.op_type == "Gemm" and not nbits.bias_fits(node, columns):
        return None
    return value, "matrix", transposed, Read(node, 1, through)


def _refusal(node: ir.Node, value: ir.Value, kind: str, choice: Choice) -> str | None:
    """Why a weight stays as it is; '' where that goes without saying; None where it does not."""
    tensor = constant_tensor(value)
    assert tensor is not None
    if kind == "table" and (
        len(tensor.shape) < 1
        or tensor.dtype != ir.DataType.FLOAT
        or tensor.size < tables.MIN_ELEMENTS
        or value.is_graph_output()
    ):
        return ""
    if {node.op_type, node.name or "", value.name or ""} & set(choice.exclude):
        return "excluded by option"
    if tensor.dtype != ir.DataType.FLOAT:
        return "its weight is not float32"
    if tensor.size < MIN_ELEMENTS:
        return f"its weight has fewer than {MIN_ELEMENTS} elements"
    return None


# --- forms -------------------------------------------------------------------------------------


def _forms(
    model: ir.Model, value: ir.Value, readers: list[tuple[str, bool, Read]], choice: Choice
) -> Iterator[StoredWeight]:
    """What a constant is stored as: once where its readers can share a form, else for each."""
    gathers = [read for kind, _, read in readers if kind == "table"]
    tensor = constant_tensor(value)
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    for transposed in (False, True):
        reads = [read for kind, t, read in readers if kind == "matrix" and t == transposed]
        if not reads:
            continue
        tied = gathers if transposed else []
        stored = _matrix_form(model, value, shape, reads, tied, transposed, choice)
        if tied and len(stored.reads) > len(reads):
            gathers = []
        yield stored
    if gathers:
        yield _table_form(model, value, shape, gathers, choice)
    others = [read for kind, _, read in readers if kind == "other"]
    by_axis: dict[int, list[Read]] = {}
    for read in others:
        axis = weight_channel_axis(read.node, read.index)
        assert axis is not None
        by_axis.setdefault(axis % len(shape), []).append(read)
    for axis, some in by_axis.items():
        bits = _bits(value, some, choice, choice.others)
        yield _folded(value, tuple(some), axis, bits, choice.zero_points)


def _matrix_form(
    model: ir.Model,
    value: ir.Value,
    shape: tuple[int, ...],
    reads: list[Read],
    tied: list[Read],
    transposed: bool,
    choice: Choice,
) -> StoredWeight:
    along = 1 if transposed else 0
    depth = shape[along]
    bits = _bits(value, [*reads, *tied], choice, choice.tables if tied else choice.bits)
    block = choice.block or (default_block(depth) if bits == 8 else DEFAULT_BLOCK)
    per_column = bits == 8 and not choice.block and not choice.zero_points
    if choice.portable or bits not in nbits.WIDTHS:
        if per_column:
            return _folded(value, (*reads, *tied), 1 - along, 8, False, transposed)
        return StoredWeight(
            value,
            Form.PACKED,
            _spec(bits, block, along, choice.zero_points, folded=True),
            (*reads, *tied),
            transposed,
        )
    plain = not tied and not transposed and all(r.node.graph is model.graph for r in reads)
    if per_column and plain:
        spec = QuantSpec(ir.DataType.INT8, True, PerChannel(1))
        return StoredWeight(value, Form.DEQUANTIZE, spec, tuple(reads))
    shared = tied if nbits.fits_rows(Grid(bits, block), depth) else []
    spec = _spec(bits, block, along, choice.zero_points)
    return StoredWeight(value, Form.BLOCKS, spec, (*reads, *shared), transposed)


def _table_form(
    model: ir.Model, value: ir.Value, shape: tuple[int, ...], reads: list[Read], choice: Choice
) -> StoredWeight:
    bits = _bits(value, reads, choice, choice.tables)
    matrix = len(shape) == 2
    if bits == 8 and matrix and all(r.node.graph is model.graph for r in reads):
        spec = QuantSpec(ir.DataType.INT8, True, PerChannel(1), zero_points=False)
        return StoredWeight(value, Form.ROWS, spec, tuple(reads))
    block = choice.block or DEFAULT_BLOCK
    if matrix and not choice.portable and nbits.fits_rows(Grid(bits, block), shape[1]):
        spec = _spec(bits, block, 1, choice.zero_points)
        return StoredWeight(value, Form.BLOCKS, spec, tuple(reads), transposed=True)
    if matrix and bits != 8:
        spec = _spec(bits, block, 1, choice.zero_points, folded=True)
        return StoredWeight(value, Form.PACKED, spec, tuple(reads), transposed=True)
    return _folded(value, tuple(reads), 0, bits, choice.zero_points)


def _folded(
    value: ir.Value,
    reads: tuple[Read, ...],
    axis: int,
    bits: int,
    zero_points: bool,
    transposed: bool = False,
) -> StoredWeight:
    if bits == 8:
        spec = QuantSpec(ir.DataType.INT8, True, PerChannel(axis), zero_points=False, folded=True)
        return StoredWeight(value, Form.FOLDED, spec, reads, transposed)
    spec = QuantSpec(
        ir.DataType.UINT8,
        not zero_points,
        PerChannel(axis),
        zero_points=zero_points,
        folded=True,
        bits=bits,
    )
    return StoredWeight(value, Form.PACKED, spec, reads, transposed)


DEFAULT_BLOCK = 32
"""Elements that share a scale where the option leaves it open."""


def default_block(depth: int) -> int:
    """The block of 8-bit weights where the option leaves it open: up to 128, no padding."""
    fitting = [size for size in (128, 64, 32, 16) if depth % size == 0]
    return fitting[0] if fitting else DEFAULT_BLOCK


def _spec(bits: int, block: int, along: int, zero_points: bool, folded: bool = False) -> QuantSpec:
    return QuantSpec(
        ir.DataType.UINT8,
        not zero_points,
        PerBlock(block, along),
        zero_points=zero_points,
        padded=True,
        folded=folded,
        bits=bits,
    )


def _bits(value: ir.Value, reads: list[Read], choice: Choice, default: int) -> int:
    """The most that an option asks for, by the weight's name, a reader's, or its operator's."""
    names = [value.name or "", *(r.node.name or "" for r in reads)]
    for keys in (names, [r.node.op_type for r in reads]):
        asked = [choice.bits_of[key] for key in keys if key in choice.bits_of]
        if asked:
            return max(asked)
    return default
