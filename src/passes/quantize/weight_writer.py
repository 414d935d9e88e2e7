"""Writing stored weights into the graph, each in its form.

Here: `write_weights`. Without codes the tensors stay absent, so that sizes are exact. Not here:
which weights (`weight_choice`), their numbers (`weight_codes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import CONTRIB_DOMAIN, constant_tensor, is_absent, opset_of
from . import nbits
from .folded_chain import FoldedChain
from .grids import Codes
from .numbers import Affine, weight_affine
from .packed import replace_reads, store_packed
from .qdq import dequantize, drop_unused_constant, store
from .stored import Shared, store_folded
from .tables import Table, write_tables
from .weight_choice import Form, Read, StoredWeight


def write_weights(
    model: ir.Model,
    weights: Sequence[StoredWeight],
    codes: Mapping[StoredWeight, Codes],
    accuracy: int,
) -> None:
    """Rewrite the model in place.

    before: MatMul(x, W) -> y      after: MatMulNBits(x, codes, scales) -> y

    `codes` holds those of BLOCKS and PACKED; `accuracy` is the kernel's accuracy level.
    """
    editor = Editor()
    opset = opset_of(model)
    affines = {w: _affine(w) for w in weights if w.form in (Form.DEQUANTIZE, Form.FOLDED)}
    transposes = [r.through for w in weights for r in w.reads if r.through is not None]
    for item in weights:
        match item.form:
            case Form.BLOCKS:
                _write_blocks(editor, item, codes.get(item), accuracy)
                model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
            case Form.DEQUANTIZE:
                _write_pair(editor, item, affines[item])
            case Form.FOLDED:
                shared: Shared = {}
                for read in _sources(item.reads):
                    store_folded(editor, *read, item.spec, affines[item], shared)
            case Form.PACKED:
                reader = item.reads[0].node
                by = store_packed(editor, item.value, reader, item.spec, codes.get(item), opset)
                replace_reads(item.value, _sources(item.reads), by)
            case Form.ROWS:
                gathers = tuple(read.node for read in item.reads)
                write_tables(model, [Table(item.value, item.spec, gathers)])
    for node in dict.fromkeys(transposes):
        result = node.outputs[0]
        if node.graph is not None and not result.uses() and not result.is_graph_output():
            editor.erase(node)
    for value in dict.fromkeys(w.value for w in weights):
        drop_unused_constant(value)


def _write_blocks(editor: Editor, item: StoredWeight, codes: Codes | None, accuracy: int) -> None:
    shape = item.shape[::-1] if item.transposed else item.shape
    first, name = item.reads[0].node, item.value.name or "weight"
    chain = FoldedChain(editor, first, item.value)
    depth, columns = shape
    stored = nbits.store_blocks(editor, chain.anchor, name, item.grid, (depth, columns), codes)
    gathers = [read.node for read in item.reads if read.node.op_type == "Gather"]
    rows = stored.codes
    if gathers:
        width = stored.codes.shape
        assert width is not None
        flat = columns, depth * item.grid.bits // 8
        rows = chain.reshape(stored.codes, flat)
    for node in dict.fromkeys(read.node for read in item.reads):
        if node in gathers:
            nbits.look_up(editor, node, stored, rows)
        else:
            nbits.multiply(editor, node, stored, accuracy)


def _write_pair(editor: Editor, item: StoredWeight, affine: Affine | None) -> None:
    stored = store(editor, item.reads[0].node, item.value, item.spec, affine)
    for read in item.reads:
        dequantize(editor, read.node, read.index, stored, item.spec)


def _sources(reads: Sequence[Read]) -> list[tuple[ir.Node, int]]:
    """Where the constant itself is read: at a node, or at the Transpose before it."""
    found = [(r.node, r.index) if r.through is None else (r.through, 0) for r in reads]
    return list(dict.fromkeys(found))


def _affine(item: StoredWeight) -> Affine | None:
    tensor = constant_tensor(item.value)
    assert tensor is not None
    return None if is_absent(tensor) else weight_affine(np.asarray(tensor.numpy()), item.spec)
