"""Names of passes and rules: the built-in ones, entry points, and plugin files.

Here: `register_pass`, `find_pass`, `load_plugin`. A name can be taken once; a second claim fails
and names both owners. Not here: recipes (`pipelines`), targets (`targets.registry`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from ..errors import PluginError, UnknownPassError
from ..targets.registry import plugin_modules, register_target
from ..targets.target import Target
from .base import Pass
from .rules import RewriteRule

PassClass = TypeVar("PassClass", bound=type[Pass])

_FOLDERS = ("cleanup", "prune", "sparsify", "low_rank", "depth", "fuse", "quantize", "lower")
"""Every module in these folders of this package is searched for passes."""

_passes: dict[str, type[Pass]] = {}
_loaded = False


def register_pass(cls: PassClass) -> PassClass:
    """Make a pass known by its name, for recipes and the command line. Works as a decorator.

    Raises:
        PluginError: another class has the name.
    """
    _claim(_passes, cls.name, cls, "pass")
    return cls


def passes() -> dict[str, type[Pass]]:
    """All known passes by name, in order of stage and name."""
    _load_built_in()
    return dict(sorted(_passes.items(), key=lambda item: (item[1].stage, item[0])))


def rules() -> dict[str, type[RewriteRule]]:
    """All known rewrite rules by name. A rule is a pass too."""
    return {name: cls for name, cls in passes().items() if issubclass(cls, RewriteRule)}


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name; `-` and `_` are the same.

    Raises:
        UnknownPassError: with the nearest names.
    """
    known = passes()
    found = known.get(name.replace("-", "_"))
    if found is None:
        raise UnknownPassError(
            f"There is no pass or recipe {name!r}",
            why="no built-in pass, plugin or recipe has that name",
            fix=_suggest(
                name,
                list(known),
                "`edgepass passes` lists them; "
                "a pass of your own is made known with `--plugin file.py` or `register_pass`",
            ),
        )
    return found


def find_rule(name: str) -> type[RewriteRule]:
    """The rule class of that name.

    Raises:
        UnknownPassError: with the nearest names.
    """
    known = rules()
    found = known.get(name.replace("-", "_"))
    if found is None:
        raise UnknownPassError(
            f"There is no rule {name!r}",
            fix=_suggest(name, list(known), f"rules are: {', '.join(known)}"),
        )
    return found


def load_plugin(source: str | Path) -> list[str]:
    """Load a plugin: a Python file, or the dotted name of a module. Returns what it added.

    Every `Pass` (rules included) and every `Target` that the module itself defines is
    registered. Loading the same file twice adds nothing.

    Raises:
        PluginError: the file is not there, raises, defines nothing, or claims a taken name.
    """
    path = Path(source)
    if path.suffix == ".py" or path.exists():
        module = _import_file(path)
    else:
        try:
            module = importlib.import_module(str(source))
        except Exception as error:
            raise PluginError(
                f"The plugin module {str(source)!r} can't be imported",
                why=f"{type(error).__name__}: {error}",
                fix="check the name, or give the path of a .py file",
            ) from error
    return _register_module(module, str(source))


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PluginError(
            f"The plugin {str(path)!r} is not a file",
            fix="give the path of a Python file that defines passes, rules or targets",
        )
    name = f"edgepass_plugin_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        frame = inspect.trace()[-1]
        raise PluginError(
            f"The plugin {str(path)!r} raised while it was loaded",
            where=f"{frame.filename}:{frame.lineno}",
            why=f"{type(error).__name__}: {error}",
            fix="mend the plugin; `python " + str(path) + "` shows the same error",
        ) from error
    return module


def _register_module(module: ModuleType, origin: str) -> list[str]:
    _load_built_in()
    added = []
    for item in vars(module).values():
        if isinstance(item, Target):
            register_target(item, owner=origin)
            added.append(item.name)
        if not inspect.isclass(item) or item.__module__ != module.__name__:
            continue
        if inspect.isabstract(item):
            continue
        if issubclass(item, Pass):
            register_pass(item)
            added.append(item.name)
    if not added:
        raise PluginError(
            f"The plugin {origin!r} defines no pass, rule or target",
            fix="define a frozen dataclass derived from edgepass.Pass, or a Target at top level",
        )
    return added


def _load_built_in() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for name in _built_in_modules():
        module = importlib.import_module(name)
        for item in vars(module).values():
            if (
                inspect.isclass(item)
                and item.__module__ == module.__name__
                and not inspect.isabstract(item)
                and not item.__name__.startswith("_")
                and issubclass(item, Pass)
            ):
                register_pass(item)
    for plugin in plugin_modules():
        _register_module(plugin, plugin.__name__)


def _built_in_modules() -> list[str]:
    names = [f"{__package__}.legalize"]
    for folder in _FOLDERS:
        package = importlib.import_module(f".{folder}", __package__)
        names += [m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return names


def _claim(table: dict[str, type], name: str, cls: type, kind: str) -> None:
    owner = table.get(name)
    if owner is not None and owner is not cls:
        raise PluginError(
            f"Two {kind}s are called {name!r}",
            where=f"{_owner(owner)} and {_owner(cls)}",
            why="a recipe could not tell them apart",
            fix="set another `name` on one of the classes",
        )
    table[name] = cls


def _owner(cls: type) -> str:
    try:
        return f"{cls.__qualname__} in {inspect.getsourcefile(cls)}"
    except TypeError:
        return f"{cls.__module__}.{cls.__qualname__}"


def _suggest(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, 2)
    return f"did you mean {' or '.join(near)}? {otherwise}" if near else otherwise
