"""How far the outputs of a pruned model are from those of the model it was.

Here: `held_out`, samples kept apart for it, `thinned`, and `Outputs`. Not here: what is done about
it (`structured`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample
from .feedback import Arrays, state_pairs

_EVERY = 8
_MOST = 32
_FEWEST = 16
_CHAIN = 128
"""Calls, at least, of a model that carries a state."""
_WITH_STATE = 0.1
"""Measured on a voice detector pruned in 20 ways: the four that lost 7 % or less along the chain
kept their score on four minutes of other audio (AUC within .01); of the 16 that lost 10 % or more,
13 did not."""


def held_out(samples: Sequence[Feed]) -> tuple[list[Feed], list[Feed]]:
    """Samples to learn from, and one of every eight, to judge by (32 at most).

    Fewer than 16 samples serve for both.
    """
    if len(samples) < _FEWEST:
        return list(samples), list(samples)
    judges = set(_drawn(len(samples), min(_MOST, len(samples) // _EVERY)))
    rest = [sample for i, sample in enumerate(samples) if i not in judges]
    return rest, [samples[i] for i in sorted(judges)]


def thinned(samples: Sequence[Feed], most: int) -> list[Feed]:
    """As many of the samples at most, from all parts of them, in order."""
    if len(samples) <= most:
        return list(samples)
    return [samples[i] for i in _drawn(len(samples), most)]


def _drawn(count: int, number: int) -> list[int]:
    """One index of each of so many equal parts, at random: samples of two kinds may take turns."""
    edges = np.linspace(0, count, number + 1).astype(int)
    generator = np.random.default_rng(count)
    return [int(generator.integers(a, b)) for a, b in itertools.pairwise(edges)]


class Outputs:
    """The float outputs of a model on some samples.

    Of a model that carries a state, also those of a chain of calls that starts at the first sample,
    in which each call reads the state that the one before left: what one call gets a little wrong
    may add up.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Feed]) -> None:
        self._samples = samples
        self._states: dict[str, str] = {}
        alone = self._run(model)[0]
        self._states = state_pairs([dict(s) for s in samples], alone)
        self._runs = self._run(model)

    def _run(self, model: ir.Model) -> list[list[Arrays]]:
        with OrtRunner(model, optimize=False) as runner:
            alone: list[Arrays] = [
                run_on_sample(runner, sample, None, f"calibration sample {i}")
                for i, sample in enumerate(self._samples)
            ]
            chain = list(self._chained(runner)) if self._states else []
        return [alone, chain]

    def _chained(self, runner: OrtRunner) -> Iterator[Arrays]:
        state: dict[str, np.ndarray] = {}
        for i in range(max(_CHAIN, len(self._samples))):
            sample = self._samples[i % len(self._samples)]
            found = run_on_sample(runner, {**sample, **state}, None, f"call {i} of a chain")
            state = {name: found[output] for name, output in self._states.items()}
            yield found

    @property
    def states(self) -> Mapping[str, str]:
        """The output that becomes each input on the next call."""
        return self._states

    @property
    def allowance(self) -> float:
        """The share of a bound that holds here: less for a model that carries a state, whose errors
        go on adding up after the calls that are judged."""
        return _WITH_STATE if self._states else 1.0

    @property
    def why_less(self) -> str:
        """What to say of it after a bound."""
        share = f"{_WITH_STATE:.0%} of that given"
        return f" ({share}, as the model carries a state)" if self._states else ""

    def divergence(self, model: ir.Model) -> float:
        """The squared error of another model's outputs by their variance, over the worst output.

        The variance is that of each place along the last axis (each class, each feature). 0 is the
        same model, 1 no better than the mean output; infinite where it is not finite.
        """
        found = self._run(model)
        return max(_worst(a, b) for a, b in zip(self._runs, found, strict=True))


def _worst(wanted: Sequence[Arrays], given: Sequence[Arrays]) -> float:
    """Over the float outputs."""
    worst = 0.0
    for name in wanted[0] if wanted else ():
        one, other = [a[name] for a in wanted], [a[name] for a in given]
        if all(array.dtype.kind == "f" for array in one):
            worst = max(worst, _unexplained(one, other))
    return worst


def _unexplained(wanted: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> float:
    if any(a.shape != b.shape for a, b in zip(wanted, given, strict=True)):
        return float("inf")
    width = wanted[0].shape[-1] if wanted[0].ndim else 1
    if any((a.shape[-1] if a.ndim else 1) != width for a in wanted):
        width = 1
    x, y = (
        np.concatenate([a.astype(np.float64).reshape(-1, width) for a in arrays])
        for arrays in (wanted, given)
    )
    error = float(np.square(x - y).sum())
    if not np.isfinite(error):
        return float("inf")
    around = x - (x.mean(axis=0) if len(x) > 1 else x.mean())
    variance, power = float(np.square(around).sum()), float(np.square(x).sum())
    return error / variance if variance > 1e-12 * power else float(error > 1e-12 * power)
