"""The source `module`: activations of any nn.Module on any batches, both made by functions that the user names."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.activations.batch import Activations
from saekit.activations.harvest import NO_TARGET, HookPoint, TargetHookPoint
from saekit.activations.shuffle import stop_point
from saekit.activations.sites import resolve, run_to_sites
from saekit.errors import OptionError, RunError, SaekitError, UsageError, near_names
from saekit.seeds import derived_seed

if TYPE_CHECKING:
    MadeBy = str | Callable[..., Any]  # in Python also the function itself
else:
    MadeBy = str

_PACKAGE = str(Path(__file__).parents[2])  # saekit's own files, which a message about the user's need not name
_BATCH = 1 << 20  # `sequence` is the number of the batch times this, plus the row's place in the batch


class ModuleSource:
    """Activations of any `nn.Module` at a submodule, on batches from any iterable.

    module: a function (or class) without arguments that returns the module; it is frozen and put in evaluation mode.
    data: a function that returns a new iterable of batches, such as a DataLoader, each time it is called. It may take
        `split`, "train" or "held_out", and `seed`, which differs from pass to pass. Without `split` every n-th batch is
        held out, by its number, so the batches must come in the same order each time. A batch is a tensor, a tuple or
        list (`module(*batch)`), or a dictionary (`module(**batch)`); `args` takes some of its items. The activation
        must be [n, d] or [n, T, d]; in the second case each position becomes a row.

    Called twice with the same `seed`, `data` must give the same batches, and as many in each pass: only
    then can a run resume exactly. Shuffle with a generator seeded with `seed`. At the start the first batch is made twice;
    a warning says so if the two differ.

    In Python, `module` and `data` may be the functions themselves: derive a class that passes them on, in a file for
    `--plugin`. Resuming skips the batches that were used, without running the module.
    """

    subject = None

    def __init__(
        self,
        *,
        module: Annotated[
            MadeBy, Field(description="package.module:function or file.py:function that gives the module.")
        ],
        data: Annotated[
            MadeBy, Field(description="package.module:function or file.py:function that gives the batches.")
        ],
        hook_point: HookPoint,
        target_hook_point: TargetHookPoint = None,
        args: Annotated[
            list[int | str] | None, Field(description="The items of a batch that the module is given; all by default.")
        ] = None,
        held_out: Annotated[
            float, Field(gt=0, le=0.5, description="The share of batches held out if data takes no split.")
        ] = 0.05,
    ) -> None:
        self.module, self.data = module, data
        self.hook_point: str = hook_point
        self.target_hook_point = target_hook_point
        self.withheld = {} if target_hook_point else dict(NO_TARGET)
        self.args, self.held_out = args, held_out
        self.warnings: list[str] = []
        self._lock = threading.Lock()  # hooks belong to the module, not to a thread
        self._count: int | None = None  # batches of a pass over the training data, once one is over
        self._last: Any = None

    def peek(self) -> dict[str, Any]:
        """The names. OptionError if they cannot be imported. See `protocols.Source.peek`."""
        _made_by(self.module, "module")
        _made_by(self.data, "data")
        return {"model": _name(self.module), "hook_point": self.hook_point, "data": _name(self.data)}

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Make the module, and run it on the first batch up to the hook point."""
        self._device, self._dtype = torch.device(device), dtype
        self.warnings.clear()
        maker = _made_by(self.module, "module")
        with torch.random.fork_rng(devices=[]):  # a seed set in there must not change the run's
            made = maker if isinstance(maker, nn.Module) else _called(maker, "module", self.module)
        if not isinstance(made, nn.Module):
            raise OptionError("module", f"{_name(self.module)} gives {type(made).__name__}, not an nn.Module.")
        self.network = made.eval().requires_grad_(False).to(self._device)
        names = [self.hook_point] if self.target_hook_point is None else [self.hook_point, self.target_hook_point]
        self._sites = [resolve(self.network, name) for name in names]
        self._factory = _made_by(self.data, "data")
        self._takes = _parameters(self._factory)
        first = self._first_batch()
        again = self._first_batch()
        if not _equal(first, again):
            self.warnings.append(
                f"{_name(self.data)} gave another first batch when it was called again, so a resumed run will "
                "not go on with the same data, and what is held out may have been trained on. Shuffle by a generator "
                "seeded with a fixed number, or with the parameter seed."
            )
        shown = self._activations(first, 0)
        self.d_in = shown.x.shape[1]
        self.d_out = self.d_in if shown.target is None else shown.target.shape[1]
        self._rows = len(shown)  # activations of a batch
        self._first = _digest(_tensors(first))

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`."""
        if split not in ("train", "held_out"):
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
        height = self._height(size)
        numbered = self._endless(seed, start * height) if split == "train" else self._held_out_batches(start * height)
        yield from self._grouped(numbered, height)

    def first_pass(self, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """The blocks of the first pass over "train"; see `protocols.Source.first_pass`."""
        height = self._height(size)
        batches = enumerate(self._of_pass("train", derived_seed("pass", seed, 0)))
        yield from self._grouped(((n, batch) for n, batch in batches if n >= start * height), height)

    @property
    def pass_size(self) -> int:
        """About how many activations a pass gives. AttributeError if the data has no length."""
        data = self._called_data("train", 0)
        if not isinstance(data, Sized):
            raise AttributeError("pass_size")
        return round(len(data) * self._rows * (1.0 if "split" in self._takes else 1.0 - 1.0 / self._period))

    def identity(self) -> dict[str, Any]:
        """What determines the activations, as far as that is known; see `protocols.Source.identity`."""
        return {
            "model": _name(self.module),
            "model_digest": _digest([t for _, t in sorted(self.network.state_dict().items())]),
            "data": _name(self.data),
            "first_batch_digest": self._first,
            "hook_point": self.hook_point,
            "target_hook_point": self.target_hook_point,
            "args": self.args,
            "held_out": self.held_out if "split" not in self._takes else None,
        }

    # --- batches -----------------------------------------------------------------------------------------------

    @property
    def _period(self) -> int:
        return max(2, round(1.0 / self.held_out))

    def _height(self, size: int) -> int:
        return max(1, round(size / self._rows))  # batches a block

    def _called_data(self, split: str, seed: int) -> Iterable[Any]:
        given: dict[str, Any] = {"split": split, "seed": seed}
        if not callable(self._factory):
            return self._factory
        data = _called(self._factory, "data", self.data, **{n: given[n] for n in given if n in self._takes})
        if not isinstance(data, Iterable):
            raise OptionError("data", f"{_name(self.data)} gives {type(data).__name__}; give an iterable of batches.")
        return data

    def _of_pass(self, split: str, seed: int) -> Iterator[Any]:
        """The batches of one pass over a split, in their order."""
        data = self._called_data(split, seed)
        batches = iter(data)
        if batches is self._last:
            raise OptionError(
                "data",
                f"{_name(self.data)} gave the same iterator a second time, which has been used. Make a new one "
                "each time it is called.",
            )
        self._last = batches if batches is data else None
        if "split" in self._takes:
            return batches
        held_out = split == "held_out"
        return (batch for n, batch in enumerate(batches) if (n % self._period == 1) == held_out)

    def _first_batch(self) -> Any:
        for batch in self._of_pass("train", derived_seed("pass", 0, 0)):
            return batch
        raise OptionError("data", f"{_name(self.data)} gave no batch. Give an iterable that is not empty.")

    def _endless(self, seed: int, first: int) -> Iterator[tuple[int, Any]]:
        """The training batches number `first`, `first + 1`, ... with their numbers, pass after pass."""
        begins, number = 0, 0  # batches before this pass, and its number
        while True:
            if self._count is not None and first - begins >= self._count:
                skipped = (first - begins) // self._count
                begins, number = begins + skipped * self._count, number + skipped
            count = 0
            for batch in self._of_pass("train", derived_seed("pass", seed, number)):
                if begins + count >= first:
                    yield begins + count, batch
                else:
                    stop_point()
                count += 1
            if count == 0 or self._count not in (None, count):
                raise RunError(
                    f"{_name(self.data)} gave {count} training batches in pass {number}"
                    + (f" and {self._count} before" if self._count else "")
                    + ". Give as many in each pass."
                )
            self._count = count
            begins, number = begins + count, number + 1

    def _held_out_batches(self, first: int) -> Iterator[tuple[int, Any]]:
        for number, batch in enumerate(self._of_pass("held_out", derived_seed("held out"))):
            if number >= first:
                yield number, batch

    def _grouped(self, numbered: Iterator[tuple[int, Any]], height: int) -> Iterator[Activations]:
        """Blocks of `height` batches each; the last one may have less."""
        parts: list[Activations] = []
        for number, batch in numbered:
            rows = sum(map(len, parts))
            stop_point(rows, rows * height // max(1, len(parts)))
            parts.append(self._activations(batch, number))
            if len(parts) == height:
                whole, parts = Activations.join(parts), []
                yield whole
                del whole
        if parts:
            yield Activations.join(parts)

    # --- forward -----------------------------------------------------------------------------------------------

    def _activations(self, batch: Any, number: int) -> Activations:
        """The rows of one batch."""
        args, kwargs = self._arguments(_moved(batch, self._device))

        def forward() -> Any:
            try:
                return self.network(*args, **kwargs)
            except SaekitError:
                raise
            except Exception as error:
                raise OptionError(
                    "module",
                    f"{_name(self.module)} cannot run on a batch of {_name(self.data)} "
                    f"({_described(batch)}): {_failure(error)}. Name the items that it takes in args, such as [0].",
                ) from error

        with self._lock, torch.no_grad():
            x, *targets = run_to_sites(self._sites, forward)
        for site, found in zip(self._sites, (x, *targets), strict=True):
            if found.ndim not in (2, 3) or not found.is_floating_point() or found.shape[:-1] != x.shape[:-1]:
                raise UsageError(
                    f"hook point {site.name!r}: the activation is {_described(found)}; floating-point numbers [n, d] or "
                    "[n, T, d] are needed. Name another hook point, or bring it into that shape in a submodule."
                )
        n, length = x.shape[0], x.shape[1] if x.ndim == 3 else 1
        sequence = number * _BATCH + torch.arange(n, device=x.device)
        return Activations(
            x.flatten(0, -2).to(self._dtype),
            targets[0].flatten(0, -2).to(self._dtype) if targets else None,
            sequence=sequence.repeat_interleave(length),
            position=torch.arange(length, device=x.device).repeat(n),
        )

    def _arguments(self, batch: Any) -> tuple[list[Any], dict[str, Any]]:
        """A batch as the module's arguments."""
        if isinstance(batch, Mapping):
            named = batch if self.args is None else {str(name): self._item(batch, name) for name in self.args}
            return [], dict(named)
        if isinstance(batch, tuple | list):
            return list(batch) if self.args is None else [self._item(batch, place) for place in self.args], {}
        if self.args is not None:
            raise OptionError(
                "args", f"a batch of {_name(self.data)} is {_described(batch)} and has no items. Leave args out."
            )
        return [batch], {}

    def _item(self, batch: Any, key: int | str) -> Any:
        try:
            return batch[key]
        except (KeyError, IndexError, TypeError):
            raise OptionError(
                "args", f"a batch of {_name(self.data)} has no item {key!r}; it is {_described(batch)}."
            ) from None


def _name(made_by: Any) -> str:
    """What the user called it."""
    if isinstance(made_by, str):
        return made_by
    return f"{getattr(made_by, '__module__', '?')}:{getattr(made_by, '__qualname__', type(made_by).__name__)}"


def _made_by(what: Any, option: str) -> Any:
    """The object that `package.module:name` or `file.py:name` names; anything but a text is that object itself."""
    if not isinstance(what, str):
        return what
    where, _, name = what.rpartition(":")
    if not where or not name:
        raise OptionError(option, f"{what!r} names nothing. Write package.module:function, or file.py:function.")
    module = _from_file(Path(where).expanduser(), option) if where.endswith(".py") else _imported(where, option)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(option, f"{where} has no {part!r}.{near_names(part, vars(found))}")
        found = getattr(found, part)
    return found


def _imported(name: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        fix = "Install it, or give the path of the file: ./my_model.py:function."
        raise OptionError(option, f"{name!r} cannot be imported: {error}. {fix}") from None
    except Exception as error:
        raise OptionError(option, f"{name!r} cannot be imported: {_failure(error)}.") from error


def _from_file(path: Path, option: str) -> Any:
    """A file as a module, loaded once."""
    path = path.resolve()
    if not path.is_file():
        raise OptionError(option, f"{path}: there is no such file. Paths are relative to where the command is run.")
    name = f"saekit_module_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise OptionError(option, f"{path} cannot be loaded: {_failure(error)}.") from error
    return sys.modules[name]


def _called(function: Any, option: str, made_by: Any, **given: Any) -> Any:
    try:
        return function(**given)
    except SaekitError:
        raise
    except Exception as error:
        raise OptionError(option, f"{_name(made_by)} failed: {_failure(error)}.") from error


def _failure(error: Exception) -> str:
    """An error in the user's code, with its innermost line."""
    everything = traceback.extract_tb(error.__traceback__)
    frames = [f for f in everything if "site-packages" not in f.filename and _PACKAGE not in f.filename] or everything
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _parameters(function: Any) -> set[str]:
    """Which of `split` and `seed` a function takes."""
    try:
        return {"split", "seed"} & set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not a function, or one without a signature
        return set()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        moved = [_moved(inner, device) for inner in value]
        return tuple(moved) if isinstance(value, tuple) else moved
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _equal(a: Any, b: Any) -> bool:
    pairs = (_tensors(a), _tensors(b))
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(value: Any) -> str:
    """A batch, for messages: `list [0] float32 [8, 3], [1] int64 [8]`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        inside = ", ".join(
            f"[{key}] {_described(item) if isinstance(item, Tensor) else type(item).__name__}" for key, item in items
        )
        return f"{type(value).__name__} {inside}"
    return type(value).__name__
