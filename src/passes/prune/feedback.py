"""Models that carry a state: an output of one call is an input of the next.

Here: `state_pairs`, which outputs those are. Not here: what is measured along a chain of calls
(`divergence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Arrays = Mapping[str, np.ndarray]


def state_pairs(samples: Sequence[Arrays], results: Sequence[Arrays]) -> dict[str, str]:
    """The output that becomes each input, by names; empty for a model that carries no state.

    Told by form: floats of one shape on every sample, as many inputs as outputs of it, in order
    (h and c of an LSTM). Something else must go in and come out as well: an image that becomes an
    image is no state.
    """
    if not samples:
        return {}
    given = _by_form(samples)
    made = _by_form(results)
    pairs = {
        name: output
        for form, names in given.items()
        if len(names) == len(made.get(form, ()))
        for name, output in zip(names, made[form], strict=True)
    }
    more = len(pairs) < len(samples[0]) and len(pairs) < len(results[0])
    return pairs if more else {}


def _by_form(arrays: Sequence[Arrays]) -> dict[tuple[object, ...], list[str]]:
    """The names of float arrays with axes by their shapes on all samples."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, first in arrays[0].items():
        if first.dtype.kind == "f" and first.ndim and all(name in a for a in arrays):
            form = (first.dtype, *(np.shape(a[name]) for a in arrays))
            found.setdefault(form, []).append(name)
    return found
