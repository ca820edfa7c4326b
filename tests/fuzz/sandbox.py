"""Runs `saekit` in this process among hostile files, and sees to what no input may bring about.

No traceback, no "bug in saekit", no control character on the terminal, an exit code that is documented, an end within a minute,
and nothing written outside the run directory.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import Outcome

from saekit.cli import main
from saekit.errors import SaekitError

RUN = "run"
"""The only name in a sandbox that a command may write below."""
CODES = (0, 1, 2, 3)
SECONDS = 60
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_watched: list[Path] | None = None  # the paths that were written to, while a command runs


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _watched.append(Path(os.path.abspath(os.fsdecode(path))))
    elif event in _CHANGES and arguments[-1] == -1:  # otherwise relative to an open directory: the listing will tell
        _watched.extend(Path(os.path.abspath(os.fsdecode(a))) for a in arguments[:2] if isinstance(a, str | bytes))


sys.addaudithook(_audit)


class TooLong(BaseException):
    """A command that does not end."""


class Sandbox:
    """A directory for one input, which is the working directory, with a home and a place for temporary files beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.run, self.home, self.temporary = path, path / RUN, path / "home", path / "temporary"

    def write(self, files: Mapping[str, bytes]) -> None:
        """The files of the input, by their names."""
        for name, content in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(content)

    def saekit(self, *arguments: str | Path) -> Outcome:
        """`saekit ARGUMENTS`, which must end as any command may."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        before = sys.argv
        sys.argv = ["saekit", *map(str, arguments)]
        try:
            with self._watched(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        finally:
            sys.argv = before
            gc.unfreeze()  # a dry run puts what there is out of the collector's reach
        said = f"saekit {' '.join(map(repr, map(str, arguments)))} ended with {code}\n{out.getvalue()}{err.getvalue()}"
        assert "bug in saekit" not in said, said
        assert "Traceback" not in said, said
        assert code in CODES, said
        assert code == 0 or "rror: " in said, said
        assert not CONTROLS.search(out.getvalue() + err.getvalue()), repr(said)
        return Outcome(code, out.getvalue(), err.getvalue())

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a public function gives, or None if it refuses its input with an error for users."""
        with self._watched():
            try:
                return function(*arguments)
            except SaekitError as error:
                said = str(error)
        assert said.strip()
        return None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        global _watched
        before = self._listing()
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _watched = written = []
        try:
            yield
        finally:
            _watched = None
            signal.setitimer(signal.ITIMER_REAL, 0)
        inside = (self.run, self.temporary, Path(os.devnull))
        outside = sorted({str(path) for path in written if not any(map(path.is_relative_to, inside))})
        assert not outside, f"written outside of the run directory: {outside}"
        changed = set(self._listing()) ^ set(before)
        assert not changed, f"changed outside of the run directory: {changed}"

    def _listing(self) -> list[tuple[str, int, int]]:
        """Everything in the sandbox that is not below the run directory."""
        found = (path for path in self.path.rglob("*") if not path.is_relative_to(self.run))
        return sorted(
            (str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found if not path.is_dir()
        )


def _too_long(*_: Any) -> None:
    raise TooLong(f"no end after {SECONDS} s")


@contextlib.contextmanager
def sandbox(files: Mapping[str, bytes] | None = None) -> Iterator[Sandbox]:
    """A fresh sandbox with these files."""
    here, at = Sandbox(Path(tempfile.mkdtemp(prefix="hostile")).resolve()), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        try:
            here.write(files or {})
            here.home.mkdir()
            here.temporary.mkdir()
            patch.setenv("HOME", str(here.home))
            patch.setattr(tempfile, "tempdir", str(here.temporary))
            patch.setattr(sys, "dont_write_bytecode", True)
            os.chdir(here.path)
            yield here
        finally:
            os.chdir(at)
            shutil.rmtree(here.path, ignore_errors=True)
