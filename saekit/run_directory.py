"""The run directory: where each thing lies, and how a new one is made."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saekit.config import RunConfig, parse_config, read_toml
from saekit.errors import UsageError
from saekit.files import TEMPORARY, disk_errors, write_json, write_text

VARIANTS = "variants"


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run, or of one of its variants; see `docs/files.md` for what each holds."""

    path: Path
    variant: str = ""

    @property
    def name(self) -> str:
        """What the run is called, or `RUN/VARIANT`."""
        return f"{self.path.parents[1].name}/{self.variant}" if self.variant else self.path.name

    def of_variant(self, name: str) -> RunDirectory:
        """The directory of one SAE: of a variant, or the run's own where `name` is empty."""
        return RunDirectory(self.path / VARIANTS / name, name) if name else self

    @property
    def run_toml(self) -> Path:
        """The resolved configuration, runnable as it is."""
        return self.path / "run.toml"

    @property
    def provenance(self) -> Path:
        """Versions, hashes, seed and command line."""
        return self.path / "provenance.json"

    @property
    def sae(self) -> Path:
        """The trained SAE in SAELens's layout."""
        return self.path / "sae"

    @property
    def graph(self) -> Path:
        """The feature graph of that SAE, where the run file asks for one."""
        return self.path / "graph.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Everything a resume needs."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """What the terminal shows at the end; written last, so it marks a finished run."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The self-contained HTML report."""
        return self.path / "report.html"

    def analysis(self, name: str) -> Path:
        """The directory of one analyzer."""
        return self.path / "analysis" / name

    @classmethod
    def create(cls, config: RunConfig, where: str | None) -> RunDirectory:
        """A new directory: `where` if given (it must be absent or empty), else dated and named after the recipe."""
        if where is not None:
            path = Path(where)
            with disk_errors(path):
                taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
            if taken:
                raise UsageError(f"--directory {where}: exists and is not empty. Choose another, or use --resume {where}.")
        else:
            path = cls._dated(config)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        directory = cls(path)
        write_text(directory.run_toml, config.to_toml())
        return directory

    def begin(self, config: RunConfig) -> None:
        """Make the directory of a variant; that of a run is there already."""
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

    def withdraw(self) -> None:
        """Undo `create` for a run that turned out to be impossible before it began, so that the same command works once
        its mistake is mended."""
        begun = {self.run_toml.name, self.provenance.name}
        if {path.name for path in self.path.rglob("*") if not path.is_dir()} <= begun:
            shutil.rmtree(self.path)

    @classmethod
    def resume(cls, where: str) -> tuple[RunDirectory, RunConfig]:
        """The directory of an earlier run with its configuration."""
        directory = cls(Path(where))
        if not directory.path.is_dir():
            raise UsageError(f"--resume {where}: there is no such directory. Name one that an earlier run printed.")
        run = directory.path.absolute().parents[1:2]
        if directory.path.absolute().parent.name == VARIANTS and run and cls(run[0]).run_toml.is_file():
            raise UsageError(f"--resume {where}: is a variant of the run {run[0]}, and goes on with it: --resume {run[0]}.")
        if not directory.run_toml.is_file():
            raise UsageError(
                f"--resume {where}: has no run.toml, so it is not a run directory, or nothing was begun in it. Start the "
                "run without --resume."
            )
        config = parse_config(read_toml(directory.run_toml), str(directory.run_toml))
        for leftover in directory.path.rglob(TEMPORARY):  # of a run that was killed while it wrote
            if leftover.is_file():
                leftover.unlink(missing_ok=True)
        return directory, config

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_analysis(self, name: str, result: Any) -> None:
        """Write one analyzer's `Result`."""
        with disk_errors(self.analysis(name)):
            self.analysis(name).mkdir(parents=True, exist_ok=True)
        write_json(self.analysis(name) / "result.json", result.to_json())
