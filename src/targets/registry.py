"""Targets by name: `get_target("arm64/tvm")`. A name can be taken once.

Here: the built-in targets, those registered by plugins, and the `/runtime` suffix. Not here: what a
target is (`target`), passes and rules (`passes.registry`).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import platform
from pathlib import Path
from types import ModuleType

from ..errors import PluginError, UnknownTargetError
from .target import Runtime, Target

ENTRY_POINT_GROUP = "edgepass.plugins"
"""Where an installed distribution names a module with passes, rules and targets of its own."""

_targets: dict[str, tuple[Target, str]] = {}
_loaded = False


def register_target(target: Target, *, owner: str = "") -> Target:
    """Make a target known by its name.

    Raises:
        PluginError: another target has the name; both owners are named.
    """
    _load_built_in()
    return _register(target, owner or "a call of register_target")


def _register(target: Target, owner: str) -> Target:
    present = _targets.get(target.name)
    if present is not None and present[0] != target:
        raise PluginError(
            f"Two targets are called {target.name!r}",
            where=f"{present[1]} and {owner}",
            why="`target=...` could not tell them apart",
            fix="derive yours with `replace(name=...)`",
        )
    _targets[target.name] = (target, owner)
    return target


def targets() -> dict[str, Target]:
    """All known targets by name."""
    _load_built_in()
    return {name: item[0] for name, item in sorted(_targets.items())}


def get_target(name: str | Target) -> Target:
    """The target of that name; `host` is this machine; `arm64/tvm` picks the runtime.

    Raises:
        UnknownTargetError: no such target, or not with that runtime.
    """
    if isinstance(name, Target):
        return name
    known = targets()
    base, _, runtime = name.partition("/")
    base = host_name() if base == "host" else base
    full = f"{base}/{runtime}" if runtime and runtime != Runtime.ONNXRUNTIME else base
    if full in known:
        return known[full]
    near = difflib.get_close_matches(full, known, 2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownTargetError(
        f"There is no target {name!r}",
        why="no built-in target or plugin has that name",
        fix=f"{hint}targets are: {', '.join(known)}; derive your own with `replace(name=...)`",
    )


def host_name() -> str:
    """The name of the built-in target that fits this machine.

    Raises:
        UnknownTargetError: a machine that is neither x86-64 nor arm64.
    """
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "x86_64-avx512" if {"avx512f", "avx512_vnni"} <= cpu_flags() else "x86_64"
    if machine in ("aarch64", "arm64"):
        return "arm64"
    raise UnknownTargetError(
        f"This machine ({machine}) has no built-in target",
        fix="name one of the targets, or describe the machine with a Target of your own",
    )


def runs_on_host(target: Target) -> bool:
    """Whether this machine has the target's architecture and the vector width it is made for."""
    try:
        host = get_target("host").hardware
    except UnknownTargetError:
        return False
    same = target.hardware.arch == host.arch
    return same and target.hardware.vector_bits <= host.vector_bits


def is_measurable(target: Target) -> bool:
    """Whether this machine can time what the target would run: it has its CPU and its runtime."""
    return target.runtime is Runtime.ONNXRUNTIME and runs_on_host(target)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux reports; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)  # "Features" is what arm64 says
    words = (value for key, _, value in named if key.strip() in ("flags", "Features"))
    return frozenset(next(words, "").split())


def _load_built_in() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    from . import arm64, boards, cuda, riscv64, vulkan, x86_64

    for module in (arm64, x86_64, boards, cuda, vulkan, riscv64):
        for target in module.TARGETS:
            _register(target, module.__name__)
    for plugin in plugin_modules():
        for item in vars(plugin).values():
            if isinstance(item, Target):
                _register(item, plugin.__name__)


@functools.cache
def plugin_modules() -> tuple[ModuleType, ...]:
    """The modules that installed distributions name in the entry point group `edgepass.plugins`.

    Raises:
        PluginError: one of them can't be imported; its distribution is named.
    """
    modules = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            modules.append(importlib.import_module(entry.module))
        except Exception as error:
            owner = entry.dist.name if entry.dist is not None else "an installed distribution"
            raise PluginError(
                f"The plugin {entry.value!r} can't be imported",
                where=f"entry point {entry.name!r} of {owner}",
                why=f"{type(error).__name__}: {error}",
                fix=f"update or remove {owner}",
            ) from error
    return tuple(modules)
