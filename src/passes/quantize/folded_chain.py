"""Nodes with constant inputs, which a runtime computes once, when it loads a model.

Here: `FoldedChain`, that writes them, and codes of few bits packed into bytes and taken apart
again. Not here: what they mean (`stored`, `packed`, `palettize`).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor, inherit_metadata
from ...ir.graph import fresh_name
from .qdq import absent, pack

_SUB_BYTE_OPSET = 21
"""Cast takes 4-bit elements from here on."""


class FoldedChain:
    """Nodes with constant inputs, in front of the graph that holds a constant `value`.

    `reader` gives them its source line; names derive from the constant's.
    """

    def __init__(self, editor: Editor, reader: ir.Node, value: ir.Value) -> None:
        graph = value.graph
        if graph is None and (maker := value.producer()) is not None:
            graph = maker.graph
        graph = graph if graph is not None else reader.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph
        self._editor = editor
        self._reader = reader
        self.anchor = next(iter(graph))
        self._base = value.name or "weight"

    def constant(self, suffix: str, data: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """A new initializer."""
        return self._editor.initializer(self.anchor, f"{self._base}/{suffix}", data)

    def parameter(
        self, suffix: str, data: np.ndarray | None, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """A new initializer of a shape; absent without data."""
        if data is None:
            return self.constant(suffix, absent(dtype, shape))
        return self.constant(suffix, pack(np.ascontiguousarray(data).reshape(shape), dtype))

    def cast(self, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The value in another element type, float32 unless told."""
        assert value.shape is not None
        return self.add("Cast", [value], value.shape.numpy(), dtype, to=int(dtype))

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value],
        shape: tuple[int, ...],
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | str,
    ) -> ir.Value:
        """One more node; its result."""
        node = ir.Node(
            "", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1
        )
        inherit_metadata([self._reader], [node])
        result = node.outputs[0]
        result.type, result.shape = ir.TensorType(dtype), ir.Shape(list(shape))
        result.name = node.name = fresh_name(self.graph, f"{self._base}/{op_type.lower()}")
        self._editor.insert_before(self.anchor, node)
        return result

    # --- few bits --------------------------------------------------------------------------------

    def codes(
        self,
        codes: np.ndarray | None,
        bits: int,
        shape: tuple[int, ...],
        opset: int,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        signed: bool = False,
    ) -> ir.Value:
        """Unsigned codes of 1 to 8 bits, stored in that many bits each, as a value of `dtype`.

        `signed`: less 2 ** (bits - 1). Eight bits are a tensor of bytes, four a tensor of that type
        where the opset has it. Others are the bits of eight codes in `bits` bytes, one byte for
        each place, taken apart by shifts and summed by the worth of their places.
        """
        if bits == 8 or (bits == 4 and opset >= _SUB_BYTE_OPSET):
            return self.cast(self._plain(codes, bits, shape, signed), dtype)
        count = math.prod(shape)
        eights = -(-count // 8)
        stored = (eights, 1, bits)
        if codes is None:
            data: np.ndarray | ir.TensorProtocol = absent(ir.DataType.UINT8, stored)
        else:
            data = pack_places(codes, bits)
        apart = (eights, 8, bits)
        worth = [1 << place for place in range(bits)]
        if signed:  # what is stored is the code with its top bit turned: two's complement
            worth[-1] = -worth[-1]
            data = data if codes is None else data ^ _top(bits)
        value = self.add(
            "BitShift",
            [
                self.constant(f"bits{bits}", data),
                self.shared(np.arange(8, dtype=np.uint8)[:, None]),
            ],
            apart,
            ir.DataType.UINT8,
            direction="RIGHT",
        )
        two = self.shared(np.array(2, np.uint8))
        value = self.cast(self.add("Mod", [value, two], apart, ir.DataType.UINT8), dtype)
        value = self.add("Mul", [value, self.shared(np.array(worth, dtype.numpy()))], apart, dtype)
        last = self.shared(np.array([2], np.int64))
        value = self.add("ReduceSum", [value, last], (eights, 8), dtype, keepdims=0)
        if eights * 8 != count:
            value = self.reshape(value, (eights * 8,))
            ends = [self.shared(np.array([end], np.int64)) for end in (0, count)]
            value = self.add("Slice", [value, *ends], (count,), dtype)
        return self.reshape(value, shape)

    def _plain(
        self, codes: np.ndarray | None, bits: int, shape: tuple[int, ...], signed: bool
    ) -> ir.Value:
        dtype = {
            (8, False): ir.DataType.UINT8,
            (8, True): ir.DataType.INT8,
            (4, False): ir.DataType.UINT4,
            (4, True): ir.DataType.INT4,
        }[bits, signed]
        name = dtype.name.lower()
        if codes is None:
            return self.constant(name, absent(dtype, shape))
        less = (1 << (bits - 1)) if signed else 0
        array = (np.asarray(codes, np.int16).reshape(shape) - less).astype(
            np.int8 if signed else np.uint8
        )
        return self.constant(name, pack(array, dtype))

    def reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """The value in another shape."""
        assert value.dtype is not None
        to = self.shared(np.array(shape, np.int64))
        return self.add("Reshape", [value, to], shape, value.dtype)

    def shared(self, array: np.ndarray) -> ir.Value:
        """An initializer of a few numbers that chains of one graph have in common."""
        text = "x".join(str(number) for number in array.reshape(-1)[:8])
        name = f"const/{array.dtype}{array.ndim}/{text}"
        found = self.graph.initializers.get(name)
        tensor = None if found is None else found.const_value
        if found is not None and tensor is not None and np.array_equal(tensor.numpy(), array):
            return found
        return self._editor.initializer(self.anchor, name, array)


def pack_places(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of `bits`, flat, as bytes [eights, 1, bits]: bit i of byte j is place j of code i."""
    flat = np.zeros(-(-codes.size // 8) * 8, np.uint8)
    flat[: codes.size] = codes.reshape(-1)
    places = (flat.reshape(-1, 8, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    packed: np.ndarray = np.packbits(places, axis=1, bitorder="little")
    return packed


def _top(bits: int) -> np.ndarray:
    """What turns the top bit of every code."""
    turned = np.zeros(bits, np.uint8)
    turned[-1] = 0xFF
    return turned


def pack_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """Flat codes of 2 or 4 bits, the first in the lowest bits of a byte; the end padded."""
    each = 8 // width
    flat = np.zeros(-(-codes.size // each) * each, np.uint8)
    flat[: codes.size] = codes.reshape(-1)  # row-major, whatever lies in memory
    packed = np.zeros(len(flat) // each, np.uint8)
    for i in range(each):
        packed |= flat[i::each] << np.uint8(i * width)
    return packed
