"""The original's outputs, computed once for all candidates where that is worth it.

Here: `Reference`. Not here: how outputs are kept by feed (`evaluation.runners.Remembered`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.runners import Remembered

WORTH_S = 0.005
"""A run that is quicker than this is repeated: reading its outputs back takes about as long."""
MOST_BYTES = 1_000_000_000
"""Of outputs that are kept; the samples after that are run for every candidate."""


class Reference:
    """A runner whose outputs are kept in a folder, as far as that saves time and fits.

    `begin` starts again at the first sample.
    """

    def __init__(
        self,
        runner: Any,
        folder: Path,
        *,
        worth_s: float = WORTH_S,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.runner = runner
        self.inputs = runner.inputs
        self._folder, self._worth_s, self._most = folder, worth_s, most_bytes
        self._kept: Remembered | None = None
        self._decided = False
        self._bytes = 0

    def begin(self) -> None:
        """The samples come from the start again."""
        self._bytes = 0

    def run(self, feed: Mapping[str, np.ndarray], /) -> Mapping[str, np.ndarray]:
        """Outputs by name, as the runner gives them, or gave them for the same feed."""
        if not self._decided:
            return self._decide(feed)
        if self._kept is None or self._bytes > self._most:
            found: Mapping[str, np.ndarray] = self.runner.run(feed)
            return found
        outputs = self._kept.run(feed)
        self._bytes += sum(array.nbytes for array in outputs.values())
        return outputs

    def _decide(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Run once to warm up, once to time."""
        self.runner.run(feed)
        started = time.perf_counter()
        outputs: Mapping[str, np.ndarray] = self.runner.run(feed)
        self._decided = True
        if time.perf_counter() - started >= self._worth_s:
            self._kept = Remembered(self.runner, self._folder)
        return outputs
