"""The built-in trackers: a JSON line for each logged step, event files for TensorBoard, a run of Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import Field

from saekit.errors import UsageError
from saekit.files import to_jsonable, write_text
from saekit.hookspecs import hookimpl
from saekit.protocols import RunInfo, Training
from saekit.result import Result


class JsonLines:
    """Writes `metrics.jsonl` in the run directory: step, tokens, seconds, and every logged value.

    After a resume the file is cut back to the checkpoint, so that no step is in it twice.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path: Path | None = None
        self._started = time.perf_counter()

    @hookimpl
    def run_started(self, run: RunInfo) -> None:
        self._path = run.directory.history

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        assert self._path is not None
        kept = [line for line in _whole_lines(self._path) if line["step"] < trainer.number]
        if kept:
            self._started -= kept[-1]["seconds"]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))  # whole, or as it was
        self._file = self._path.open("a", encoding="utf-8")

    @hookimpl
    def logged(self, number: int, values: dict[str, float]) -> None:
        assert self._file is not None
        line = {"step": number, "seconds": round(time.perf_counter() - self._started, 3), **to_jsonable(values)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    @hookimpl
    def run_finished(self) -> None:
        self._close()

    @hookimpl
    def run_failed(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard:
    """Event files in `tensorboard/` of the run directory: `tensorboard --logdir RUN/tensorboard`.

    Logged values keep their names; held-out metrics are under `held_out/`, an analyzer's scalars under `analysis/NAME/`. A
    resumed run continues the same series: what came after the checkpoint is purged.
    """

    def __init__(self) -> None:
        _must_be_installed("tensorboard")
        self._run: RunInfo | None = None
        self._writer: Any = None
        self._step = 0

    @hookimpl
    def run_started(self, run: RunInfo) -> None:
        self._run = run

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        self._step = trainer.number
        self._open(purge_step=trainer.number)

    @hookimpl
    def logged(self, number: int, values: dict[str, float]) -> None:
        self._step = number
        self._write(values)

    @hookimpl
    def checkpoint_saved(self) -> None:
        self._open().flush()

    @hookimpl
    def evaluated(self, metrics: dict[str, float | None]) -> None:
        self._write({f"held_out/{name}": value for name, value in metrics.items()})

    @hookimpl
    def analysed(self, name: str, result: Result) -> None:
        self._write({f"analysis/{name}/{key}": value for key, value in to_jsonable(dict(result.scalars)).items()})

    @hookimpl
    def run_finished(self) -> None:
        self.close()

    @hookimpl
    def run_failed(self) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still buffered, and close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self, purge_step: int | None = None) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            assert self._run is not None
            self._writer = SummaryWriter(str(self._run.directory.path / "tensorboard"), purge_step=purge_step)
            text = self._run.directory.run_toml.read_text(encoding="utf-8")
            self._writer.add_text("run.toml", "".join(f"    {line}\n" for line in text.splitlines()))
        return self._writer

    def _write(self, values: dict[str, Any]) -> None:
        writer = self._open()
        for name, value in _numbers(values).items():
            writer.add_scalar(name, value, self._step)


class WeightsAndBiases:
    """A run of Weights & Biases, kept in `wandb/` of the run directory; nothing is sent unless `mode = "online"`.

    To send it later: `wandb sync RUN/wandb/offline-run-*`. Charts are drawn over `step`; held-out metrics and analyzers' scalars
    are in the run's summary. A resumed run keeps its id; the steps after its checkpoint are there twice.
    """

    def __init__(
        self,
        *,
        project: Annotated[str, Field(min_length=1, description="The project that the run belongs to.")] = "saekit",
        entity: Annotated[str | None, Field(description="The user or team that owns the project; you by default.")] = None,
        mode: Annotated[
            Literal["offline", "online"], Field(description="offline: files in the run directory; online: sent as it goes.")
        ] = "offline",
    ) -> None:
        _must_be_installed("wandb")
        self._settings: dict[str, Any] = {"project": project, "entity": entity, "mode": mode}
        self._id = uuid.uuid4().hex[:8]
        self._run: RunInfo | None = None
        self._there: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The run's id at Weights & Biases, which a resumed run keeps."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._id = state["id"]

    @hookimpl
    def run_started(self, run: RunInfo) -> None:
        self._run = run

    @hookimpl
    def training_started(self) -> None:
        self._open()

    @hookimpl
    def logged(self, number: int, values: dict[str, float]) -> None:
        self._open().log({"step": number, **_numbers(values)})

    @hookimpl
    def evaluated(self, metrics: dict[str, float | None]) -> None:
        self._open().summary.update({f"held_out/{name}": value for name, value in _numbers(metrics).items()})

    @hookimpl
    def analysed(self, name: str, result: Result) -> None:
        scalars = _numbers(to_jsonable(dict(result.scalars)))
        self._open().summary.update({f"analysis/{name}/{key}": value for key, value in scalars.items()})

    @hookimpl
    def run_finished(self) -> None:
        self.close()

    @hookimpl
    def run_failed(self) -> None:
        self.close(exit_code=1)

    def close(self, exit_code: int = 0) -> None:
        """Write what is still buffered, and end the run there."""
        there, self._there = self._there, None
        if there is not None:
            there.finish(exit_code=exit_code)

    def _open(self) -> Any:
        if self._there is None:
            import wandb

            assert self._run is not None
            directory = self._run.directory.path
            self._there = wandb.init(
                **self._settings,
                id=self._id,
                name=self._run.directory.name,
                dir=directory,
                config=to_jsonable(self._run.config.model_dump(by_alias=True)),
                resume="allow" if self._settings["mode"] == "online" else None,
                reinit="create_new",  # several runs may live in one process
                settings=wandb.Settings(console="off", silent=True),  # the terminal belongs to the view
            )
            self._there.define_metric("step")
            self._there.define_metric("*", step_metric="step")
        return self._there


def _must_be_installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"tracker.{package}: needs the package {package}, which is not installed: pip install \"saekit[{package}]\""
        )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The values that can be drawn: those that are defined, and are numbers."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier part of the run, without a last line that was cut off."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or "step" not in line or "seconds" not in line:
            break
        lines.append(line)
    return lines
