"""`prepared`: tensors that take long to make, such as the weights of a small model, kept in the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.activations.progress import tell_harvest
from saekit.checked_tensors import load_checked, save_checked
from saekit.errors import SaekitError
from saekit.files import TEMPORARY
from saekit.lock import locked

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 4  # files of a name, the newest, whole ones and partial ones
_PARTIAL = "partial"


class Preparation:
    """What whoever makes the tensors is given.

    so_far: what was last saved, by this process or by one that was stopped; None at the beginning.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.so_far: dict[str, Tensor] | None = None if path is None else _read(path)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep this, so that a process that is stopped can be gone on from here. Where nothing can be written, nothing is kept."""
        if self._path is not None:
            with contextlib.suppress(OSError, SaekitError):
                save_checked(self._path, tensors, {})

    def tell(self, done: int, total: int) -> None:
        """`done` of `total` steps are done: the view of the run shows it."""
        tell_harvest(done, total)


def prepared(
    name: str, made_of: Mapping[str, Any], make: Callable[[Preparation], Mapping[str, Tensor]], *, directory: Path | None = None
) -> dict[str, Tensor]:
    """The tensors that `make` gives, from the cache if they are there.

    name: of the files, such as that of the plugin. made_of: everything that the tensors follow from, as JSON can hold it: options,
    seeds, a number for the version of the code. directory: where they are kept, by default the user's cache directory.

    Of several processes that need a name, one makes it and the others wait. One that is stopped goes on at its last `save`. A
    damaged file is made again. Where nothing can be written, the tensors are made each time. The newest files of a name are kept.

    >>> import torch
    >>> prepared("squares", {"n": 3}, lambda preparation: {"squares": torch.arange(3) ** 2})["squares"]
    tensor([0, 1, 4])
    """
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    directory = cache_directory() if directory is None else directory
    path = directory / f"{name}-{digest}.safetensors"
    partial = directory / f"{name}-{digest}.{_PARTIAL}"
    with contextlib.ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(directory / f"{name}.lock", wait=True))
        except (OSError, SaekitError):  # it works without a cache, only more slowly
            return dict(make(Preparation(None)))
        found = _read(path)
        if found is None:
            found = dict(make(Preparation(partial)))
            with contextlib.suppress(OSError, SaekitError):
                save_checked(path, found, {})
                partial.unlink(missing_ok=True)
                _tidy(directory, name)
        return found


def cache_directory() -> Path:
    """Where the files are: `prepared/` in saekit's directory in the user's cache."""
    import platformdirs

    return platformdirs.user_cache_path("saekit", appauthor=False) / "prepared"


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        tensors, facts = load_checked(path)
    except SaekitError:  # absent or damaged
        return None
    return None if facts is None else tensors


def _tidy(directory: Path, name: str) -> None:
    """Remove what killed processes left behind, and all but the newest files of a name. The caller holds its lock."""
    for kind in ("safetensors", _PARTIAL):
        written = sorted(directory.glob(f"{name}-*.{kind}"), key=os.path.getmtime, reverse=True)
        for path in (*written[_KEPT:], *directory.glob(f".{name}-*.{kind}{TEMPORARY.removeprefix('.*')}")):
            path.unlink(missing_ok=True)
