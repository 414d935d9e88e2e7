"""Blocked channels: which operators ONNX Runtime runs on x86-64 in its NCHWc layout.

Here: `block_channels`, the last of its float rewrites. A blocked tensor keeps its dimensions in
order, with the channels rounded up to the block. Not here: the other rewrites (`ort_float`).

Found by saving the graphs of nets of one operator each, with channels, groups and neighbours
varied.
"""

from __future__ import annotations

import onnx_ir as ir

from ..targets.target import Target
from .runtime_graph import CONTRIB, NCHWC, Op, RuntimeGraph, Tensor

_FUSED_INTO_CONV = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip")
_TO_CHANNELS_LAST = [0, 2, 3, 1]
_TO_CHANNELS_FIRST = [0, 3, 1, 2]


def block_channels(graph: RuntimeGraph, target: Target) -> None:
    """Give every operator that can run on blocked channels its blocked form, and reorder between.

    The block is 16 channels with 512-bit vectors, else 8.
    """
    _Blocking(graph, 16 if target.hardware.vector_bits >= 512 else 8).run()


class _Blocking:
    def __init__(self, graph: RuntimeGraph, block: int) -> None:
        self.graph = graph
        self.block = block
        self.blocked: dict[Tensor, Tensor] = {}
        self.reordered: dict[Tensor, Tensor] = {}

    def run(self) -> None:
        for op in self.graph:
            if op not in self.graph or not op.outputs:
                continue
            rewrite = _REWRITES.get((op.domain, op.type))
            if rewrite is not None:
                rewrite(self, op)
        for plain, blocked in self.blocked.items():
            if plain.users or plain.is_output:
                self.graph.add(Op("ReorderOutput", NCHWC, [blocked], [plain]))
        self.graph.sort()

    # --- tensors ---------------------------------------------------------------------------------

    def _publish(self, op: Op) -> None:
        """Let an operator write its result blocked."""
        plain = op.outputs[0]
        assert plain.shape is not None
        batch, channels, *rest = plain.shape
        blocked = Tensor(
            f"{plain.name}_nchwc", (batch, self._rounded(channels), *rest), plain.dtype
        )
        self.graph.set_output(op, 0, blocked)
        self.graph.renew(op)
        self.blocked[plain] = blocked

    def _rounded(self, channels: int) -> int:
        return -(-channels // self.block) * self.block

    def _read_blocked(self, op: Op, index: int) -> None:
        """Let an operator read an input blocked, reordering it where nobody wrote it so."""
        plain = op.inputs[index]
        assert plain is not None
        assert plain.shape is not None
        blocked = self.blocked.get(plain) or self.reordered.get(plain)
        if blocked is None:
            batch, channels, *rest = plain.shape
            blocked = Tensor(
                f"{plain.name}_reordered", (batch, self._rounded(channels), *rest), plain.dtype
            )
            self.reordered[plain] = blocked
            self._reorder_input(plain, blocked, op)
        self.graph.set_input(op, index, blocked)

    def _reorder_input(self, plain: Tensor, blocked: Tensor, reader: Op) -> None:
        maker = plain.producer
        if (
            maker is not None
            and self.graph.only_user(plain) is reader
            and maker.is_onnx("Transpose")
            and list(maker.attribute("perm", ())) == _TO_CHANNELS_FIRST
        ):
            source = maker.inputs[0]
            self.graph.remove(maker)
            self.graph.add(
                Op("ReorderInput", NCHWC, [source], [blocked], {"channels_last": 1}, maker.origin)
            )
            return
        self.graph.add(Op("ReorderInput", NCHWC, [plain], [blocked]))

    def _are_blocked(self, op: Op) -> bool:
        return all(t is not None and t in self.blocked for t in op.inputs)

    # --- operators -------------------------------------------------------------------------------

    def conv(self, op: Op) -> None:
        weight = op.inputs[1] if len(op.inputs) > 1 else None
        if weight is None or not weight.constant or weight.shape is None or len(weight.shape) != 4:
            return
        result = op.outputs[0].shape
        if result is None or len(result) != 4 or _weight_is_shared(weight):
            return
        out_channels, in_channels, *_ = weight.shape
        groups = int(op.attribute("group", 1))
        blocks_input = True
        if groups > 1:
            depthwise = in_channels == 1 and out_channels == groups
            if depthwise and out_channels % 4:
                return
            if not depthwise and (
                in_channels % self.block or (out_channels // groups) % self.block
            ):
                return
        elif in_channels < self.block:
            blocks_input = False
        elif in_channels % 4:
            return
        if len(op.inputs) > 2 and op.inputs[2] is not None and not op.inputs[2].constant:
            return
        if len(op.inputs) > 3 and op.inputs[3] not in self.blocked:
            return
        op.domain, op.type = NCHWC, "Conv"
        if blocks_input:
            self._read_blocked(op, 0)
        if len(op.inputs) > 3 and op.inputs[3] is not None:
            self._read_blocked(op, 3)
        self._publish(op)

    def pool(self, op: Op) -> None:
        source = op.inputs[0]
        if source is None or source.shape is None or len(source.shape) != 4:
            return
        if source.dtype != ir.DataType.FLOAT:  # 8-bit: channels last
            return
        if op.type.startswith("Global") and source not in self.blocked:
            return
        if source.shape[1] % self.block or len(op.outputs) > 1 or op.outputs[0].shape is None:
            return
        if op.attribute("ceil_mode", 0) and op.attribute("count_include_pad", 0):
            return
        op.domain = NCHWC
        self._read_blocked(op, 0)
        self._publish(op)

    def binary(self, op: Op) -> None:
        shapes = {t.shape for t in op.inputs if t is not None}
        if op.type == "Mul" and self._scale(op):
            return
        if not self._are_blocked(op) or op.outputs[0].shape is None:
            return
        if len(shapes) != 1:
            if op.type != "Mul":
                self._broadcast(op)
            return
        if op.type in ("Add", "Sum") and len(op.inputs) == 2 and self._fuse_sum(op):
            return
        for index in range(len(op.inputs)):
            self._read_blocked(op, index)
        self._publish(op)

    def _broadcast(self, op: Op) -> None:
        """A sum that repeats an image of one pixel, on views with the block as a dimension."""
        result = op.outputs[0]
        assert result.shape is not None
        for tensor in op.inputs:
            shape = tensor.shape if tensor is not None else None
            if shape is None or shape[:2] != result.shape[:2]:
                return
            if shape[2:] != result.shape[2:] and set(shape[2:]) != {1}:
                return
        for index in range(len(op.inputs)):
            self._read_blocked(op, index)
            found = op.inputs[index]
            assert found is not None
            view = Tensor(f"{found.name}_5d", self._five(found.shape), found.dtype)
            self.graph.add(Op("Reshape", "", [found], [view]))
            self.graph.set_input(op, index, view)
        self._publish(op)
        blocked = self.blocked[result]
        total = Tensor(f"{blocked.name}_5d", self._five(blocked.shape), blocked.dtype)
        self.graph.set_output(op, 0, total)
        self.graph.add(Op("Reshape", "", [total], [blocked]))

    def _five(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        assert shape is not None
        batch, channels, *rest = shape
        return (batch, channels // self.block, *rest, self.block)

    def _fuse_sum(self, op: Op) -> bool:
        for index in (0, 1):
            plain = op.inputs[index]
            other = op.inputs[1 - index]
            assert plain is not None
            assert other is not None
            conv = self.blocked[plain].producer
            if (
                conv is None
                or conv.domain != NCHWC
                or conv.type != "Conv"
                or len(conv.inputs) > 3
                or conv.attribute("activation") is not None
                or self.graph.only_user(plain) is not op
                or self.blocked[plain].users
            ):
                continue
            result = op.outputs[0]
            self.graph.remove(op)
            if len(conv.inputs) < 3:
                self.graph.set_input(conv, 2, None)
            self.graph.set_input(conv, 3, self.blocked[other])
            conv.origin += op.origin
            conv.fused += (op.type,)
            self.blocked[result] = self.blocked.pop(plain)
            return True
        return False

    def concat(self, op: Op) -> None:
        if int(op.attribute("axis", 0)) not in (1, -3) or not self._are_blocked(op):
            return
        if any(t is None or t.shape is None or t.shape[1] % self.block for t in op.inputs):
            return
        for index in range(len(op.inputs)):
            self._read_blocked(op, index)
        self._publish(op)

    def activation(self, op: Op) -> None:
        plain = op.inputs[0]
        if plain is None or plain not in self.blocked or op.outputs[0].shape is None:
            return
        conv = self.blocked[plain].producer
        if (
            op.type in _FUSED_INTO_CONV
            and conv is not None
            and conv.domain == NCHWC
            and conv.type == "Conv"
            and conv.attribute("activation") is None
            and self.graph.only_user(plain) is op
            and not self.blocked[plain].users
        ):
            result = op.outputs[0]
            self.graph.remove(op)
            conv.attributes = {**conv.attributes, "activation": op.type}
            conv.origin += op.origin
            conv.fused += (op.type,)
            self.blocked[result] = self.blocked.pop(plain)
            return
        self._read_blocked(op, 0)
        self._publish(op)

    def normalization(self, op: Op) -> None:
        """A BatchNormalization of blocked channels becomes a convolution of one tap."""
        plain = op.inputs[0]
        if plain is None or plain not in self.blocked or len(op.outputs) > 1:
            return
        if op.outputs[0].shape is None:
            return
        if all(t is not None and t.constant for t in op.inputs[1:]):
            self._to_one_tap(op, plain, bias=op.inputs[2])

    def _scale(self, op: Op) -> bool:
        """A product with a constant for each blocked channel becomes a convolution of one tap."""
        if op.outputs[0].shape is None:
            return False
        for plain, scale in (op.inputs, op.inputs[::-1]):
            if plain is None or scale is None or plain not in self.blocked:
                continue
            channels = plain.shape[1] if plain.shape is not None else 0
            if scale.constant and scale.shape in ((channels, 1, 1), (1, channels, 1, 1)):
                self._to_one_tap(op, plain, bias=None)
                return True
        return False

    def _to_one_tap(self, op: Op, plain: Tensor, bias: Tensor | None) -> None:
        assert plain.shape is not None
        channels = self._rounded(plain.shape[1])
        weight = Tensor(f"{op.outputs[0].name}_scale", (channels, 1, 1, 1), plain.dtype, True)
        for index, tensor in enumerate((plain, weight, bias)):
            self.graph.set_input(op, index, tensor)
        for index in range(3, len(op.inputs)):
            self.graph.set_input(op, index, None)
        del op.inputs[3 if bias is not None else 2 :]
        op.type, op.domain = "Conv", NCHWC
        op.attributes = {"group": channels, "kernel_shape": [1, 1]}
        self._read_blocked(op, 0)
        self._publish(op)

    def resize(self, op: Op) -> None:
        """Enlarging by whole factors: the nearest pixel counted from the corner, or linear."""
        plain, result = op.inputs[0], op.outputs[0]
        if plain is None or plain not in self.blocked or result.shape is None:
            return
        assert plain.shape is not None
        mode = op.attribute("mode", "nearest")
        corner = op.attribute("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        floor = op.attribute("nearest_mode", "round_prefer_floor") == "floor"
        if mode not in ("nearest", "linear") or (mode == "nearest" and not (corner and floor)):
            return
        if result.shape[:2] != plain.shape[:2]:
            return
        if any(b % a for a, b in zip(plain.shape[2:], result.shape[2:], strict=True)):
            return
        op.type, op.domain = "Upsample", NCHWC
        for index in range(1, len(op.inputs)):
            self.graph.set_input(op, index, None)
        del op.inputs[1:]
        self._read_blocked(op, 0)
        self._publish(op)

    def transpose(self, op: Op) -> None:
        plain = op.inputs[0]
        if plain is None or plain not in self.blocked:
            return
        if list(op.attribute("perm", ())) != _TO_CHANNELS_LAST:
            return
        self.graph.set_input(op, 0, self.blocked[plain])
        op.type, op.domain = "ReorderOutput", NCHWC
        op.attributes = {"channels_last": 1}


def _weight_is_shared(weight: Tensor) -> bool:
    return False


_REWRITES = {
    ("", "Conv"): _Blocking.conv,
    (CONTRIB, "FusedConv"): _Blocking.conv,
    ("", "MaxPool"): _Blocking.pool,
    ("", "AveragePool"): _Blocking.pool,
    ("", "GlobalMaxPool"): _Blocking.pool,
    ("", "GlobalAveragePool"): _Blocking.pool,
    ("", "Add"): _Blocking.binary,
    ("", "Sum"): _Blocking.binary,
    ("", "Mul"): _Blocking.binary,
    ("", "Concat"): _Blocking.concat,
    ("", "Relu"): _Blocking.activation,
    ("", "Sigmoid"): _Blocking.activation,
    ("", "Tanh"): _Blocking.activation,
    ("", "HardSigmoid"): _Blocking.activation,
    (CONTRIB, "QuickGelu"): _Blocking.activation,
    ("", "Gelu"): _Blocking.activation,
    (CONTRIB, "Gelu"): _Blocking.activation,
    ("", "BatchNormalization"): _Blocking.normalization,
    ("", "Resize"): _Blocking.resize,
    ("", "Transpose"): _Blocking.transpose,
}
