"""The profiles there are: those that ship, and those that this machine's user has made.

Here: finding one by name, by path, or for a target. Not here: what a profile is (`profile`), making
one (`calibrate`, `timings`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ..errors import ProfileError
from ..targets.registry import cpu_flags
from ..targets.target import Target
from .profile import Profile, load_profile

_SHIPPED = Path(__file__).parents[1] / "targets" / "devices"


@dataclasses.dataclass(frozen=True)
class ProfileFile:
    """A profile and where it lies; `shipped` with edgepass, or made by the user."""

    path: Path
    profile: Profile
    shipped: bool


def user_folder() -> Path:
    """Where `edgepass calibrate` saves: `$EDGEPASS_PROFILES`, or the user's data folder."""
    chosen = os.environ.get("EDGEPASS_PROFILES")
    if chosen:
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "edgepass" / "profiles"


def all_profiles() -> tuple[list[ProfileFile], list[ProfileError]]:
    """The user's profiles and the shipped ones, by name; and why others can't be read."""
    found, broken = [], []
    for path, shipped in _files():
        try:
            found.append(ProfileFile(path, _load(path, path.stat().st_mtime_ns), shipped))
        except ProfileError as error:
            broken.append(error)
    return found, broken


def find_profile(name: str | Path) -> Profile:
    """A profile by name (the user's before the shipped), or by the path of its file.

    Raises:
        ProfileError: there is none, or it can't be read.
    """
    text = str(name)
    if text.endswith(".json") or os.sep in text:
        return load_profile(name)
    known = {path.stem: path for path, _ in reversed(list(_files()))}
    if text in known:
        path = known[text]
        return _load(path, path.stat().st_mtime_ns)
    near = difflib.get_close_matches(text, known, 2)
    raise ProfileError(
        f"There is no profile {text!r}",
        why="neither shipped nor in " + str(user_folder()),
        fix=(f"did you mean {' or '.join(near)}? " if near else "")
        + f"there are: {', '.join(sorted(known))}; `edgepass calibrate` makes one",
    )


def profile_for(target: Target) -> Profile | None:
    """The profile for a target: one of this very CPU, the user's first, else the one it names.

    One made on another CPU is not taken: its name or its instruction sets differ.
    """
    for path, _ in _files():
        try:
            profile = _load(path, path.stat().st_mtime_ns)
        except ProfileError:
            continue  # `edgepass profiles` says so
        if profile.target == target.name and is_this_cpu(profile):
            return profile
    return find_profile(target.profile) if target.profile else None


def board_profiles(arch: str = "aarch64") -> list[Profile]:
    """The shipped profiles of devices with that architecture's CPU, by name."""
    from ..targets.registry import targets

    wanted = [
        target.profile
        for target in targets().values()
        if target.profile and target.hardware.arch == arch and "gpu" not in target.hardware.features
    ]
    return [find_profile(name) for name in dict.fromkeys(wanted)]


def is_this_cpu(profile: Profile) -> bool:
    """Whether a profile was measured on a CPU like this machine's."""
    recorded = profile.host.get("features")
    same = profile.host.get("cpu") == cpu_name()
    return same and (recorded is None or tuple(recorded) == cpu_features())


_TELLING = {
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
}
"""Instruction sets that kernels are chosen by."""


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this machine's CPU that matter here, sorted, as Linux names them."""
    return tuple(sorted(_TELLING & cpu_flags()))


@functools.cache
def cpu_name() -> str:
    """This machine's CPU as Linux names it, else what Python knows of it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    for key in ("model name", "Model", "Hardware"):
        for line in text.splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    return platform.machine()


def _files() -> Iterator[tuple[Path, bool]]:
    folder = user_folder()
    if folder.is_dir():
        for path in sorted(folder.glob("*.json"), key=lambda p: -p.stat().st_mtime_ns):
            yield path, False
    for path in sorted(_SHIPPED.glob("*.json")):
        yield path, True


@functools.lru_cache(maxsize=64)
def _load(path: Path, changed: int) -> Profile:
    return load_profile(path)
