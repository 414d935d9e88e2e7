"""Cleanup of what fusion leaves behind: operators that became dead, equal or neighbours."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ..base import Context, Pass, PassResult, Rewrite, Stage
from ..cleanup.algebra import Algebra
from ..cleanup.dead_code import DeadCode
from ..cleanup.duplicates import Duplicates
from ..cleanup.folding import FoldConstants
from ..cleanup.identities import Identities
from ..cleanup.movement import Movement


@dataclasses.dataclass(frozen=True)
class Tidy(Pass):
    """Runs the cleanup passes again between the rounds of fusion.

    Mul(Reshape(Gemm(x, W)), 1)   ->   Reshape(Gemm(x, W)), once a fusion made the factor 1
    """

    stage: ClassVar[Stage] = Stage.FUSE
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        notes: list[str] = []
        rewrites: list[Rewrite] = []
        modified = False
        for item in (
            FoldConstants(),
            Identities(),
            Movement(),
            Algebra(),
            Duplicates(),
            DeadCode(),
        ):
            result = item.run(model, context)
            modified |= result.modified
            notes += result.notes
            rewrites += result.rewrites
        return PassResult(model, modified, tuple(notes), tuple(rewrites))
