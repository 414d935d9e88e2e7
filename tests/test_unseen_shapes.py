"""Kinds of models that trained models from other places brought along, as small graphs.

Each test is of a shape of model, its outputs or its data that once was quantized badly, slowly or
not at all. Not here: the trained models themselves, and how near int8 comes to float on them.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgepass.passes.quantize.switched import divergence_over


def test_of_single_probabilities_the_signal_is_how_they_differ_between_samples():
    reference = [[np.array([[0.01]])], [np.array([[0.99]])]]
    found = [[np.array([[0.02]])], [np.array([[0.98]])]]
    pairs = list(zip(reference, found, strict=True))
    assert divergence_over(pairs) == pytest.approx(2e-4 / (2 * 0.49**2))
    assert divergence_over(pairs[:1]) == pytest.approx(1.0)  # one by itself has but its square


def test_divergence_is_the_mean_over_outputs_and_counts_integers_and_what_is_not_finite():
    a = np.array([1.0, 3.0, np.inf])
    same = divergence_over([([a, np.array([1, 2])], [a, np.array([1, 5])])])
    assert same == pytest.approx((0.0 + 0.5) / 2)
    assert divergence_over([([a], [np.array([1.0, np.nan, np.inf])])]) == np.inf
    far = 1e6 + np.array([-1.0, 1.0])
    assert divergence_over([([far], [far + 0.1]), ([far], [far])]) == pytest.approx(0.02 / 4)
    assert divergence_over([([np.zeros(0)], [np.zeros(0)])]) == 0.0
