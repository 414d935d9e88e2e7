"""Refusing a compression that makes a model slower than it was in float.

Here: `require_faster`, by timing where the target is this machine, else by the cost model. Not
here: the timing itself (`speed`), the prediction (`architecture`, `cost.latency`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cost.latency import ASSUMED, Latency
from .errors import SlowerError
from .passes.base import Pass
from .passes.spec import format_passes
from .speed import Speed

SLOWER = 1.03
"""How many times the time of float is refused: less is within what timings of one model differ."""
A_CALL_MS = 0.02
"""And by how much more: in models that run in some hundredths of a millisecond the difference is
that of a few calls, not of arithmetic."""
_SURE_S = 2.0
"""Seconds for timing once more what is about to be refused."""


def promises_speed(passes: Sequence[Pass]) -> list[Pass]:
    """The passes that are there to make a model faster."""
    return [item for item in passes if item.faster]


def require_faster(
    passes: Sequence[Pass],
    speed: Speed | None,
    again: Callable[[float], Speed | None],
    predicted: Callable[[], tuple[Latency, Latency]],
    target: str,
    warn: Callable[[str], None],
) -> Speed | None:
    """Refuse a result of `passes` that is slower than float, unless none promises speed.

    `speed` is what was measured against the original, `again` measures for so many seconds more,
    `predicted` gives the latency of float and that of the result where nothing was measured. A
    prediction that is *assumed* refuses nothing: it is told to `warn`.

    Returns the timing to go on with.

    Raises:
        SlowerError: slower by more than 3 %, measured twice; or predicted so, with every kernel of
            both known, by a profile of the device.
    """
    promised = promises_speed(passes)
    if not promised:
        return speed
    if speed is not None:
        if not _is_slower(speed):
            return speed
        surer = again(_SURE_S) or speed
        if not _is_slower(surer):
            return surer
        raise _refusal(promised, str(surer), "measured on this machine", target)
    before, after = predicted()
    if before.ms is None or after.ms is None or before.unknown or after.unknown:
        return None
    if after.ms > SLOWER * before.ms:
        text = f"float {before}, {format_passes(promised)} {after}"
        if after.label == ASSUMED:
            warn(f"may be slower than float on {target!r}: {text}")
            return None
        raise _refusal(promised, text, f"predicted ({after.label})", target)
    return None


def _is_slower(speed: Speed) -> bool:
    excess = speed.candidate_ms * (1 - speed.ratio)
    return speed.ratio * SLOWER < 1 and excess > A_CALL_MS


def _refusal(passes: Sequence[Pass], text: str, how: str, target: str) -> SlowerError:
    return SlowerError(
        f"{format_passes(passes)} makes this model slower than float",
        where=f"target {target!r}, {how}",
        why=text,
        fix='recipe="int8-weights" makes the file as small at the speed of float; force=True '
        "(--allow-slower) compiles it all the same",
    )
