"""The ladder counts what was right, what broke, and what mended."""

import numpy as np
import pytest

import edgepass
from edgepass.errors import UsageError


class Constant:
    """Answers from a list of logits, in order."""

    def __init__(self, *answers):
        self.answers = answers

    def run(self, feed):
        logits = np.zeros(3, np.float32)
        logits[self.answers[int(feed["i"])]] = 1
        return {"logits": logits}


SAMPLES = [{"i": np.array(i)} for i in range(4)]
LABELS = [0, 1, 2, 0]


def test_accuracy_and_flips():
    original = Constant(0, 1, 2, 1)
    worse = Constant(0, 2, 1, 0)
    result = edgepass.evaluate(original, {"same": original, "worse": worse}, SAMPLES, LABELS)
    assert [r.accuracy for r in result.rungs] == [0.75, 0.75, 0.5]
    assert (result["worse"].broken, result["worse"].mended) == (2, 1)
    assert (result["same"].broken, result["same"].error) == (0, 0)
    assert result["worse"].error == 1
    assert "0.5000 right, 2 broken, 1 mended" in str(result)
    assert result.table().row_count == 3


def test_another_judge():
    result = edgepass.evaluate(
        Constant(0, 1, 2, 1), {}, SAMPLES, LABELS, judge=lambda outputs, label: label == 0
    )
    assert result.rungs[0].accuracy == 0.5


def test_labels_must_fit():
    with pytest.raises(UsageError, match="4 samples and 3 labels"):
        edgepass.evaluate(Constant(0), {}, SAMPLES, LABELS[:3])


def test_the_name_is_a_function_whatever_was_imported_before():
    import edgepass.evaluation.ladder

    assert callable(edgepass.evaluate)
