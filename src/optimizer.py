"""The leanest equivalent of a model for a target, with a ledger and a check of equality.

Here: `optimize` and what it returns. It is `compile` with the lossless recipe and without what
takes time or memory beyond that: weights stay in the file until they are written, no artifact
is made, and nothing is timed. Not here: the passes (`pipelines`), a whole artifact (`api.compile`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .api import require_placed, session_options
from .errors import EdgepassError, UsageError
from .frontends import load_model, load_notes, to_supported_opset
from .ir.graph import absent_weights, constant_array, node_count
from .ir.mapped import MappedFile, MappedTensor
from .passes.base import Context, Pass, Rewrite
from .passes.driver import run_passes
from .passes.equality import Certificate, Certifier
from .passes.ledger import Ledger
from .passes.probe import NumericError, default_dims, numeric_error, sample_inputs, trial_dims
from .pipelines import epilogue, parse_recipe
from .targets.onnx_file import write_onnx
from .targets.registry import get_target
from .targets.support import place
from .targets.target import Target

TOLERANCE = 1e-5
"""What counts as equal: the largest difference relative to the range of an output."""
_BIG_BYTES = 64 << 20
"""Of files over this the source runs after the passes, not beside them: time for memory."""
_ILL_CONDITIONED = 1e-2
"""Where the runtime's own optimizations change the source by more than a result differs, that
counts as equal up to this."""


@dataclasses.dataclass(frozen=True)
class Equality:
    """Whether the result computes what the source does, on generated inputs.

    `error` is the worst over all inputs, source and result run without the runtime's own
    optimizations. `own_error` is what rounding alone does to the source: the worse of those
    optimizations and of inputs and weights that differ in the last digit; taken only where `error`
    is over 1e-5. `reason` says why nothing was checked.
    """

    error: NumericError | None
    feeds: int
    reason: str = ""
    own_error: NumericError | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the error is below 1e-5, or below 1e-2 and the source's own; None if unknown."""
        if self.error is None:
            return None
        own = 0.0 if self.own_error is None else min(self.own_error.relative, _ILL_CONDITIONED)
        return self.error.relative <= max(TOLERANCE, own)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        error = None if self.error is None else self.error.relative
        own = None if self.own_error is None else self.own_error.relative
        return {
            "holds": self.holds,
            "error": error,
            "own_error": own,
            "feeds": self.feeds,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        if self.error is None:
            return f"equality not checked: {self.reason}"
        word = "equal" if self.holds else "NOT EQUAL"
        text = (
            f"{word} to the source: {self.error.relative:.1e} of the output's range at most, over "
            f"{self.feeds} generated input{'s' * (self.feeds != 1)}"
        )
        if self.own_error is not None:
            text += (
                f" (rounding alone, by ONNX Runtime's own optimizations or in the last digit of "
                f"inputs and weights, changes the source by {self.own_error.relative:.1e})"
            )
        return text


@dataclasses.dataclass
class Optimized:
    """What `optimize` returns: the graph, the ledger with every rewrite, and the equality check.

    `model` is that of the file, where one was written. `certificates` has one for each rewrite,
    where they were asked for.
    """

    model: ir.Model
    target: Target
    nodes_before: int
    ledger: Ledger
    equality: Equality
    notes: list[str]
    files: list[Path] = dataclasses.field(default_factory=list)
    certificates: list[Certificate] | None = None
    sources: list[MappedFile] = dataclasses.field(default_factory=list, repr=False)

    @property
    def nodes(self) -> int:
        """Nodes of all graphs, Constant nodes not counted."""
        return node_count(self.model)

    @property
    def rewrites(self) -> list[Rewrite]:
        """Every firing of a rule, in order: rule, node, source line."""
        return [item for row in self.ledger.rows for item in row.rewrites]

    def save_onnx(self, path: str | Path) -> list[Path]:
        """Write the model as `path`, with `path` + `.data` beside it when it is over 1.5 GB.

        Raises:
            UsageError: the path is a folder or in none.
            ModelFileError: the source file changed since it was read.
        """
        return _write(self.model, Path(path), self.sources)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "target": self.target.name,
            "nodes": [self.nodes_before, self.nodes],
            "equality": self.equality.as_dict(),
            "ledger": self.ledger.as_dict(),
            "notes": self.notes,
            "files": [str(file) for file in self.files],
            "certificates": None
            if self.certificates is None
            else [item.as_dict() for item in self.certificates],
        }

    def rules_table(self) -> Any:
        """A `rich.table.Table`: each rule, how often it fired, and where first."""
        from rich.table import Table

        found: dict[str, list[Rewrite]] = collections.defaultdict(list)
        for item in self.rewrites:
            found[item.rule].append(item)
        table = Table(title="Rules", title_justify="left", show_edge=False, pad_edge=False)
        for heading in ("rule", "times", "first at", "source"):
            table.add_column(heading, justify="right" if heading == "times" else "left")
        for rule, items in sorted(found.items(), key=lambda pair: -len(pair[1])):
            table.add_row(rule, str(len(items)), items[0].node, items[0].source)
        return table

    def certificates_table(self) -> Any:
        """A `rich.table.Table`: for each rule and method, what its certificates found."""
        from rich.table import Table

        found: dict[tuple[str, str], list[Certificate]] = collections.defaultdict(list)
        for item in self.certificates or ():
            found[item.rule, item.method].append(item)
        table = Table(title="Certificates", title_justify="left", show_edge=False, pad_edge=False)
        for heading in ("rule", "method", "equal", "differ", "unchecked", "cases", "worst error"):
            table.add_column(heading, justify="left" if heading in ("rule", "method") else "right")
        for (rule, method), items in sorted(found.items()):
            verdicts = collections.Counter(item.holds for item in items)
            table.add_row(
                rule,
                method,
                *(str(verdicts[verdict]) for verdict in (True, False, None)),
                str(sum(item.cases for item in items)),
                f"{max(item.worst_error for item in items):.1e}",
            )
        return table

    def __str__(self) -> str:
        head = f"{self.nodes_before} > {self.nodes} nodes for {self.target.name}"
        return "\n".join([head, str(self.ledger), str(self.equality), *self.notes])


def optimize(
    model: Any,
    target: str | Target = "host",
    output: str | Path | None = None,
    *,
    recipe: str = "optimize",
    passes: Sequence[Pass] = (),
    check: bool = True,
    certify: bool = False,
    portable: bool = False,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Optimized:
    """Simplify and fuse a model for a target; results stay equal.

    Args:
        model, example_inputs, dynamic_shapes, input_shapes: as `compile` takes them. Of a file,
            weights are read only when they are needed: leave it as it is until the result is saved.
        target: a name (`edgepass targets` lists them), `host`, or a `Target`.
        output: an `.onnx` path to write; the check then runs what was written.
        recipe, passes: other passes than the lossless ones, and passes of your own.
        check: compare with the source on generated inputs (ONNX Runtime, its optimizations off).
            The source runs on a second thread while the passes do.
        certify: also check every single rewrite: the region before against the region after.
        portable: standard operators only, so that any runtime reads the result.
        dims: sizes of symbolic dimensions for these checks.
        progress: called with (done, total, what).

    Raises:
        EdgepassError: its subclasses say what, where, why and what to do.
    """
    device = get_target(target)
    place_to_write = None if output is None else _writable(Path(output), model)

    def source() -> ir.Model:
        return load_model(
            model,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            input_shapes=input_shapes,
            weights_required=False,
            map_weights=True,
        )

    graph = source()
    before = node_count(graph)
    sizes = default_dims(graph, dims)
    tell = progress or (lambda done, total, what: None)
    certifier = Certifier(dims=dims) if certify else None
    context = Context(device, None, sizes, tell, certify=certifier, portable=portable)
    chosen = [*parse_recipe(recipe), *passes, *epilogue()]
    with _Reference(graph, source, dims, wanted=check) as reference:
        mapped = _mapped_files(graph)
        big = sum(file.stamp[1] for file in mapped) > _BIG_BYTES
        if not big:
            reference.start(graph)
        notes = [*load_notes(graph), *to_supported_opset(graph)]
        graph, ledger = run_passes(graph, chosen, context, quick=True)
        require_placed(place(device, graph))
        files = [] if place_to_write is None else _write(graph, place_to_write, mapped)
        if files:  # what was folded is in the file now, and need not be in memory too
            graph = load_model(files[0], weights_required=False, map_weights=True)
        if big:
            gc.collect()  # graphs are cyclic
            for file in mapped:
                file.release()
            reference.start(source())
        equality = reference.compare(graph, session_options(device, graph))
    certificates = None if certifier is None else certifier.certificates
    return Optimized(graph, device, before, ledger, equality, notes, files, certificates, mapped)


class _Reference:
    """The source's results on generated inputs, computed on a thread of its own.

    ONNX Runtime lets Python go on while it runs, so that on two cores this takes no time.
    """

    def __init__(
        self,
        model: ir.Model,
        again: Callable[[], ir.Model],
        dims: Mapping[str, int] | None,
        *,
        wanted: bool,
    ) -> None:
        self._again = again
        self._results: list[dict[str, np.ndarray]] = []
        self._feeds: Sequence[Mapping[str, np.ndarray]] = ()
        self._alternatives: list[tuple[dict[str, np.ndarray], ...]] = []
        self._thread: threading.Thread | None = None
        self.reason = "" if wanted else "it was not asked for"
        if not wanted:
            return
        if missing := absent_weights(model):
            self.reason = f"{len(missing)} weights have no data"
            return
        self._alternatives = _feeds(model, dims)

    def start(self, model: ir.Model) -> None:
        """Begin to run the source, which may be changed once this returns."""
        if not self._alternatives:
            return
        from .targets.onnxruntime import OrtRunner

        try:
            self._runner = OrtRunner(model, optimize=False, share_weights=True)
        except EdgepassError as error:
            self.reason = f"ONNX Runtime does not take the source: {error.diagnostic.what}"
            return
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> _Reference:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:  # a process that ends while ONNX Runtime runs is aborted
            self._thread.join()

    def _run(self) -> None:
        refusal = ""
        with self._runner:
            for alternative in self._alternatives:
                for feed in alternative:
                    try:
                        self._results.append(self._runner.run(feed))
                    except EdgepassError as error:
                        refusal = refusal or error.diagnostic.why or error.diagnostic.what
                        break
                if self._results:
                    self._feeds = alternative[: len(self._results)]
                    return
        self.reason = f"the source runs on none of the random inputs tried: {refusal}"

    def compare(self, result: ir.Model, options: Mapping[str, str]) -> Equality:
        """Wait for the source's results, and hold those of the optimized model against them."""
        if self._thread is None:
            return Equality(None, 0, self.reason)
        self._thread.join()
        if not self._results:
            return Equality(None, 0, self.reason)
        from .targets.onnxruntime import OrtRunner

        errors = []
        with OrtRunner(
            result, optimize=False, share_weights=True, session_options=options
        ) as runner:
            for feed, expected in zip(self._feeds, self._results, strict=False):
                errors.append(numeric_error(expected, runner.run(feed)))
        worst = max(errors, key=lambda error: error.relative)
        own = self._own_error() if TOLERANCE < worst.relative < math.inf else None
        return Equality(worst, len(errors), own_error=own)

    def _own_error(self) -> NumericError:
        """What rounding does to the source's results: the runtime's own optimizations, or inputs
        and weights that differ in their last digit."""
        from .targets.onnxruntime import OrtRunner

        errors = []
        for optimize in (True, False):
            model, change = self._again(), _same if optimize else _nudged
            for value in model.graph.initializers.values():
                array = constant_array(value)
                sizes = any(user.op_type in ("Resize", "Upsample") for user in value.consumers())
                if array is not None and array.dtype.kind == "f" and not sizes:
                    value.const_value = ir.Tensor(change(array), name=value.name)
            with OrtRunner(model, optimize=optimize) as runner:
                for feed, expected in zip(self._feeds, self._results, strict=False):
                    changed = {name: change(array) for name, array in feed.items()}
                    errors.append(numeric_error(expected, runner.run(changed)))
        return max(errors, key=lambda error: error.relative)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _nudged(array: np.ndarray) -> np.ndarray:
    """The next number up or down, at random, where the array holds floats."""
    if array.dtype.kind != "f":
        return array
    up = np.random.default_rng(0).integers(0, 2, array.shape).astype(bool)
    nudged: np.ndarray = np.nextafter(array, np.where(up, np.inf, -np.inf).astype(array.dtype))
    return nudged


def _mapped_files(model: ir.Model) -> list[MappedFile]:
    """The files that weights are mapped from, each once."""
    found = {
        tensor.file.path: tensor.file
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, MappedTensor)
    }
    return list(found.values())


def _feeds(
    model: ir.Model, dims: Mapping[str, int] | None
) -> list[tuple[dict[str, np.ndarray], ...]]:
    """Random inputs; where sizes are free, twice at different ones, in several alternatives.

    A model may refuse a size (a padding wider than the signal): then the next is tried.
    """
    found: list[tuple[dict[str, np.ndarray], ...]] = []
    for sizes in trial_dims(model, dims):
        feed = sample_inputs(model, dims=sizes)
        more = {name: size + (name not in (dims or {})) for name, size in sizes.items()}
        found.append((feed, sample_inputs(model, seed=1, dims=more)) if more != sizes else (feed,))
    return found


def _writable(path: Path, model: Any) -> Path:
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder", fix="give the name of an .onnx file")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"There is no folder {str(path.parent)!r}", fix="make it, or give another path"
        )
    if isinstance(model, str | Path) and path.exists() and os.path.samefile(path, model):
        raise UsageError(
            f"{str(path)!r} is the model itself",
            why="input files are never modified",
            fix="give another name for the result",
        )
    return path


def _write(model: ir.Model, path: Path, sources: Sequence[MappedFile]) -> list[Path]:
    """Write beside the place and move in, so that a killed run leaves an earlier file whole.

    `sources` are the files that weights may still be read from.
    """
    _writable(path, None)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.absolute().parent) as folder:
        written = write_onnx(model, Path(folder) / path.name)
        for source in sources:
            source.check_unchanged()
        moved = []
        for file in reversed(written):  # the data before the model that refers to it
            moved.append(path.with_name(file.name))
            os.replace(file, moved[-1])
        if len(written) == 1:
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + ".data").unlink()
    return moved[::-1]
