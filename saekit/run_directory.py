"""The run directory: where each file is, how a new directory is made, and how a finished or broken one is read."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.config import RunConfig
from saekit.errors import UsageError
from saekit.files import TEMPORARY, disk_errors, given_path, parse_json, sha256_of, write_json, write_text
from saekit.lock import locked
from saekit.run_file import parse_config, read_toml

_VARIANTS = "variants"
_LOCK = "run.lock"
_HALF_BEGUN = f".run.toml{TEMPORARY.removeprefix('.')}"  # of a run that was killed while it wrote its first file


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run, or of one of its variants; `docs/files.md` says what each file holds."""

    path: Path
    variant: str = ""

    @classmethod
    def at(cls, path: Path | str) -> RunDirectory:
        """The run directory at `path`, which may be that of a variant. UsageError if there is none."""
        place = given_path(path)
        if not place.is_dir():
            raise UsageError(f"{path}: there is no such directory. Give a run directory, such as runs/NAME.")
        whole = place.resolve()
        directory = cls(place, whole.name if whole.parent.name == _VARIANTS else "")
        if not any(file.is_file() for file in (directory.run_toml, directory.summary, directory.history)):
            raise UsageError(
                f"{path}: is not a run directory: it has none of run.toml, summary.json and metrics.jsonl. "
                "Give a directory that `saekit run` made."
            )
        return directory

    @property
    def name(self) -> str:
        """The name of the run, or `RUN/VARIANT`."""
        place = self.path.resolve()
        return f"{place.parents[1].name}/{self.variant}" if self.variant else place.name

    def of_variant(self, name: str) -> RunDirectory:
        """The directory of a variant, or this one if `name` is empty."""
        return RunDirectory(self.variants / name, name) if name else self

    @property
    def variants(self) -> Path:
        """Holds a directory for each variant."""
        return self.path / _VARIANTS

    @property
    def run_toml(self) -> Path:
        """The resolved configuration, runnable as it is."""
        return self.path / "run.toml"

    @property
    def provenance(self) -> Path:
        """Versions, hashes, seed and command line."""
        return self.path / "provenance.json"

    @property
    def history(self) -> Path:
        """The logged values, one line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def sae(self) -> Path:
        """The trained SAE in SAELens's layout."""
        return self.path / "sae"

    @property
    def graph(self) -> Path:
        """The feature graph of the SAE, if the run file asks for one."""
        return self.path / "graph.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Everything that a resume needs."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """What the terminal shows at the end. Its presence marks a finished run."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The self-contained HTML report."""
        return self.path / "report.html"

    @property
    def checksums(self) -> Path:
        """The SHA-256 of what a finished run left, as `sha256sum --check` reads them."""
        return self.path / "SHA256SUMS"

    def analysis(self, name: str) -> Path:
        """The directory of one analyzer."""
        return self.path / "analysis" / name

    def result(self, name: str) -> Path:
        """The `Result` of one analyzer."""
        return self.analysis(name) / "result.json"

    @classmethod
    @contextlib.contextmanager
    def create(cls, config: RunConfig, where: str | None) -> Iterator[RunDirectory]:
        """A new directory that is locked in the block: `where` if given (it must be absent or empty), otherwise one named by
        date and recipe.

        It is withdrawn if the run fails with a UsageError before it began, so that the corrected command can use it."""
        path = cls._dated(config) if where is None else given_path(where, "--directory: ")
        taken = UsageError(f"--directory {where}: exists and is not empty. Choose another, or use --resume {where}.")
        with disk_errors(path):
            is_new = not path.exists()
            if not is_new and (not path.is_dir() or (_names(path) and _LOCK not in _names(path))):
                raise taken
            path.mkdir(parents=True, exist_ok=True)
        directory = cls(path)
        try:
            with directory.locked():
                if _names(path) - {_LOCK}:
                    raise taken
                for leftover in path.glob(_HALF_BEGUN):
                    leftover.unlink()
                write_text(directory.run_toml, config.to_toml())
                try:
                    yield directory
                except UsageError:
                    directory._withdraw()
                    raise
        except UsageError:
            if is_new:
                with contextlib.suppress(OSError):  # not empty: something else is in it
                    path.rmdir()
            raise

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from writing here in the block; UsageError if one does. Variants share the lock of their run."""
        whole = self.path.resolve().parents[1] if self.variant else self.path
        return locked(whole / _LOCK, wait=False)

    def begin(self, config: RunConfig) -> None:
        """Make the directory of a variant; a run's own was made by `create`."""
        if self.variant:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.run_toml, config.to_toml())

    @staticmethod
    def _dated(config: RunConfig) -> Path:
        now = datetime.datetime.now()
        digest = hashlib.sha256((config.to_toml() + now.isoformat()).encode()).hexdigest()[:4]
        word = re.sub(r"[^\w.-]+", "-", config.recipe or "run")[:60]
        return Path(config.directory) / f"{now:%Y-%m-%d}-{word}-{digest}"

    def _withdraw(self) -> None:
        """Remove the files and directories of a run that never began; whatever else there is stays."""
        begun = {self.run_toml.name, self.provenance.name, _LOCK}
        if not {path.name for path in self.path.rglob("*") if not path.is_dir()} <= begun:
            return
        variants = self.variant_directories()
        for one in (*variants, self):
            one.run_toml.unlink(missing_ok=True)
            one.provenance.unlink(missing_ok=True)
        for path in (*(one.path for one in variants), self.variants):
            with contextlib.suppress(OSError):  # absent, or not empty
                path.rmdir()

    @classmethod
    @contextlib.contextmanager
    def resume(cls, where: str) -> Iterator[tuple[RunDirectory, RunConfig]]:
        """The directory of an earlier run, which is locked in the block, and its configuration."""
        directory = cls(given_path(where, "--resume: "))
        if not directory.path.is_dir():
            raise UsageError(f"--resume {where}: there is no such directory. Name one that an earlier run printed.")
        place = directory.path.absolute()
        if place.parent.name == _VARIANTS and cls(run := place.parent.parent).run_toml.is_file():
            raise UsageError(f"--resume {where}: is a variant of the run {run}. Resume the whole run: --resume {run}.")
        if not directory.run_toml.is_file():
            raise UsageError(
                f"--resume {where}: has no run.toml: it is not a run directory, or its run never began. Start the run "
                "without --resume."
            )
        with directory.locked():
            config = parse_config(read_toml(directory.run_toml), str(directory.run_toml))
            for leftover in directory.path.rglob(TEMPORARY):  # from a run that was killed while it wrote
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
            yield directory, config

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary, or None if the run has not finished."""
        return _naming_texts(_read_object(self.summary, [], "")) or None

    def seal(self) -> None:
        """Write the checksums of a finished run and of its variants. What has its own, or is made from the rest, is left out."""
        for one in (self, *self.variant_directories()):
            files = [one.run_toml, one.provenance, one.history, one.summary, *sorted((one.path / "analysis").rglob("*"))]
            lines = [f"{sha256_of(path)}  {path.relative_to(one.path).as_posix()}\n" for path in files if path.is_file()]
            write_text(one.checksums, "".join(lines))

    def unseal(self) -> None:
        """Remove the checksums before a finished run's failed parts are made again."""
        for one in (self, *self.variant_directories()):
            one.checksums.unlink(missing_ok=True)

    def changed(self) -> Iterator[str]:
        """A sentence for each file that is not as the finished run left it; none without checksums."""
        if not self.checksums.is_file():
            return
        fix = f"Bring it back from a copy; if it was changed on purpose, remove {self.checksums.name}."
        for line in self.checksums.read_bytes().decode("utf-8", errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            path = self.path / name
            if not name or not path.is_file():
                yield f"{name or line} is missing, and {self.checksums.name} has its checksum. {fix}"
            elif sha256_of(path) != digest:
                yield f"{name} has changed since the run ended: {self.checksums.name} has another checksum. {fix}"

    def write_analysis(self, name: str, result: Any) -> None:
        """Write one analyzer's `Result`."""
        with disk_errors(self.analysis(name)):
            self.analysis(name).mkdir(parents=True, exist_ok=True)
        write_json(self.result(name), result.to_json())

    def variant_directories(self) -> list[RunDirectory]:
        """Those that were begun: in the order of the summary, or by name if there is no summary."""
        found = sorted(path.parent.name for path in self.variants.glob(f"*/{self.run_toml.name}"))
        order = list(_dict(_read_object(self.summary, [], "").get("variants")))
        found.sort(key=lambda name: order.index(name) if name in order else len(order))
        return [self.of_variant(name) for name in found]


@dataclass
class RunFiles:
    """The readable content of a run directory.

    summary: summary.json, or {} for a run that has not finished.
    history: one dictionary for each logged step.
    config: run.toml as text.
    provenance: provenance.json.
    analyses: the result.json of each analyzer by its name, in the form of `Result.to_json`.
    variants: the files of each variant by its name.
    problems: a sentence for each thing that is missing or damaged.
    """

    directory: RunDirectory
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    variants: dict[str, RunFiles] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunFiles:
    """Read a run directory for showing; what is damaged is noted and skipped. UsageError if it is not a run directory."""
    directory = RunDirectory.at(path)
    run = RunFiles(directory)
    run.summary = _naming_texts(_read_object(directory.summary, run.problems, "the run has not finished"))
    run.provenance = _read_object(directory.provenance, run.problems, "what made this run is not known")
    run.variants = {one.variant: read_run(one.path) for one in directory.variant_directories()}
    if not run.variants:
        run.history = read_history(directory.history, run.problems)
    if directory.run_toml.is_file():
        run.config = directory.run_toml.read_bytes().decode("utf-8", errors="replace")
    else:
        run.problems.append("run.toml is missing: the configuration is not known.")
    for file in sorted(directory.path.glob(str(directory.result("*").relative_to(directory.path)))):
        content = _read_object(file, run.problems, "it is left out")
        if content:
            run.analyses[file.parent.name] = _as_result(content, "/".join(file.parts[-3:]), run.problems)
    run.problems += directory.changed()
    return run


def read_history(path: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl. Half a line at the end is what a killed run leaves, and is not a problem."""
    problems = [] if problems is None else problems
    if not path.is_file():
        problems.append(f"{path.name} is missing: there are no curves to draw.")
        return []
    history: list[dict[str, Any]] = []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    damaged = 0
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            history.append(row)
        elif position < len(lines) - 1:
            damaged += 1
    if damaged:
        problems.append(f"{path.name}: {damaged} of {len(lines)} lines cannot be read and are left out.")
    return history


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.match(_HALF_BEGUN)}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_object(path: Path, problems: list[str], without: str) -> dict[str, Any]:
    name = "/".join(path.parts[-3:]) if path.name == "result.json" else path.name
    try:
        value = parse_json(path.read_bytes().decode("utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"{name} is missing: {without}.")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read ({error}): {without}.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} does not hold a JSON object: {without}.")
        return {}
    return value


def _naming_texts(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with texts alone in its `headline` and in those of its variants: they are names, and looked up."""
    summary = dict(summary)
    if "headline" in summary:
        names = summary["headline"]
        summary["headline"] = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if isinstance(summary.get("variants"), dict):
        summary["variants"] = {name: _naming_texts(_dict(own)) for name, own in summary["variants"].items()}
    return summary


def _as_result(content: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """`content` with each part in the shape that `Result.to_json` promises; anything else is left out."""
    shapes: dict[str, type] = {"scalars": dict, "tables": dict, "figures": dict, "files": list, "notes": list, "headline": list}
    result: dict[str, Any] = {}
    for key, shape in shapes.items():
        value = content.get(key)
        if value is not None and not isinstance(value, shape):
            problems.append(f"{name}: {key} is not a JSON {'object' if shape is dict else 'array'} and is left out.")
        result[key] = value if isinstance(value, shape) else shape()
    for key, table in list(result["tables"].items()):
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            problems.append(f"{name}: table {key!r} is not a list of rows and is left out.")
            del result["tables"][key]
    for key, figure in list(result["figures"].items()):
        if not isinstance(figure, dict) or not isinstance(figure.get("data"), list):
            problems.append(f"{name}: figure {key!r} is not a plotly figure and is left out.")
            del result["figures"][key]
    return result
