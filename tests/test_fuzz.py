"""2,000 generated graphs through the lossless recipe; `make fuzz` runs 100,000 and more."""

import dataclasses
import os
from typing import ClassVar

import numpy as np
import pytest

import fuzz
from edgepass.ir.match import op, var
from edgepass.passes.base import Stage
from edgepass.passes.rules import RewriteRule
from fuzz_graph import STEPS, fuzz_case

COUNT = int(os.environ.get("EDGEPASS_FUZZ_COUNT", "2000"))
PIECE = 100


@pytest.mark.parametrize("start", range(0, COUNT, PIECE))
def test_graphs_compute_the_same_after_the_lossless_recipe(start):
    outcomes = [fuzz.check(seed) for seed in range(start, start + PIECE)]

    wrong = [f"{o.kind} {o.seed}: {o.detail}" for o in outcomes if o.failed]
    assert not wrong, "\n".join(wrong)
    assert sum(o.kind == "equal" for o in outcomes) >= 0.97 * PIECE
    assert sum(o.nodes[1] for o in outcomes) < 0.8 * sum(o.nodes[0] for o in outcomes)


def test_a_seed_is_always_the_same_graph_and_all_steps_and_opsets_occur():
    assert fuzz_case(7)[0].SerializeToString() == fuzz_case(7)[0].SerializeToString()
    first, again = fuzz_case(7)[1], fuzz_case(7)[1]
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)
    opsets, operators, functions = set(), set(), 0
    for seed in range(300):
        model = fuzz_case(seed)[0]
        opsets.add(model.opset_import[0].version)
        operators |= {node.op_type for node in model.graph.node}
        functions += bool(model.functions)
    assert opsets == set(range(13, 25))
    assert functions
    assert {"If", "Loop", "Conv", "Softmax", "Range", "Slice", "Split", "Einsum"} <= operators
    assert len(STEPS) >= 40


@dataclasses.dataclass(frozen=True)
class AddCommutesWithMaximum(RewriteRule):
    """Max(x, y) -> Add(x, y): wrong, to see whether fuzzing says so."""

    stage: ClassVar[Stage] = Stage.CLEANUP

    def pattern(self):
        return op.Max(var("x"), var("y"))

    def rewrite(self, m, build):
        return build.Add(m["x"], m["y"])


def test_a_wrong_rule_is_found_saved_and_cut_down(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "_passes", lambda: [AddCommutesWithMaximum()])
    found = next(o for o in map(fuzz.check, range(100)) if o.failed)
    assert found.kind == "differs"

    fuzz.save(found, tmp_path)

    assert (tmp_path / f"{found.seed}.onnx").stat().st_size > 100
    report = (tmp_path / f"{found.seed}.txt").read_text()
    assert "add_commutes_with_maximum is the first to exceed" in report
    assert list(tmp_path.glob(f"{found.seed}.*/before.onnx"))


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    run = fuzz.Run(0, 4, tmp_path)
    run.loop(piece=2)
    assert run.counts["equal"] == 4
    again = fuzz.Run(0, 6, tmp_path)
    assert again.next == 4
    again.loop(piece=2)
    assert again.counts["equal"] == 6
