"""Sites: the places in a model where an activation is read or replaced, and their names.

A hook point is named in one of three ways:

* residual-stream names, on any model with its decoder blocks in one `nn.ModuleList`: `blocks.2.hook_out` (or
  `hook_resid_post`) is the output of block 2, `blocks.2.hook_in` (or `hook_resid_pre`) its input;
* the path of a submodule: `transformer.h.2`, `model.layers.2.mlp`, `0.1`. `:input` means its input instead of its
  output; `[0]` or `[name]` means one item of a tuple, a dictionary or a dataclass; `.` is the model itself;
* on a TransformerLens bridge or HookedTransformer, any of its hook names.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from saekit.errors import UsageError, near_names

RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_(out|resid_post|in|resid_pre)")
_PATH = re.compile(r"(?P<path>[^:\[\]]+)(?P<input>:input)?(?:\[(?P<item>\w+)\])?")


class _Stop(BaseException):
    """Ends a forward at a site. It is not an `Exception`, so that a model which catches those does not swallow it."""


class Captured:
    """What `Site.capture` reads: `value` is the activation of the latest forward, [n, T, d]."""

    def __init__(self, site: Site):
        self._site = site
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The activation; UsageError if no forward has reached the site."""
        if self._value is None:
            raise self._site.not_reached()
        return self._value

    def take(self) -> Tensor | None:
        """The activation, which is then forgotten; None if no forward has reached the site since the last call."""
        value, self._value = self._value, None
        return value


@dataclass(frozen=True, eq=False)
class Site:
    """One input or output tensor of a module.

    name: the hook point's name, as the user wrote it.
    side: whether it is the module's input or its output.
    item: the item of a tuple (a number), of a dictionary or dataclass (a key), or of the module's arguments (either).
    lenient: without `item`, take the first tensor of several (decoder blocks only).
    """

    name: str
    module: nn.Module
    side: Literal["input", "output"]
    item: int | str | None = None
    lenient: bool = False

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        """Read the activation in every forward inside. It is not copied and keeps its graph."""
        captured = Captured(self)

        def read(activation: Tensor) -> None:
            captured._value = activation

        with self.heard_by(read):
            yield captured

    @contextmanager
    def heard_by(self, function: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `function` with the activation in every forward inside. It is not copied and keeps its graph."""

        def hear(activation: Tensor) -> None:
            function(activation)

        with self._hooked(hear):
            yield

    @contextmanager
    def replaced(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the activation in every forward inside by `function(activation)`: [n, T, d] -> [n, T, d].

        The other items of a tuple are not touched. UsageError if the function returns another shape.
        """

        def replace(activation: Tensor) -> Tensor:
            new = function(activation)
            if new.shape != activation.shape:
                raise UsageError(
                    f"hook point {self.name!r}: the replacement has shape {list(new.shape)}, "
                    f"the activation {list(activation.shape)}. Return a tensor of the same shape."
                )
            return new.to(activation.dtype)

        with self._hooked(replace):
            yield

    @contextmanager
    def _hooked(self, visit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Call `visit` with every activation inside. What it returns, unless None, replaces the activation."""

        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            key = self._key(output)
            new = visit(output if key is None else _item(output, key))
            if new is None:
                return None
            return new if key is None else _with_item(output, key, new)

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
            key = self._argument(arguments)
            new = visit(arguments[key])
            if new is None:
                return None
            if isinstance(key, int):
                return (*args[:key], new, *args[key + 1 :]), kwargs
            return args, {**kwargs, key: new}

        if self.side == "output":
            handle = self.module.register_forward_hook(on_output)
        else:
            handle = self.module.register_forward_pre_hook(on_input, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _key(self, output: Any) -> int | str | None:
        """Which item of `output` is the activation; None if the output itself is."""
        items = _items(output)
        if items is None:
            if not isinstance(output, Tensor):
                raise UsageError(f"hook point {self.name!r}: the module returns {_described(output)}, not a tensor.")
            if self.item is not None:
                raise UsageError(f"hook point {self.name!r}: the module returns one tensor. Leave [{self.item}] out.")
            return None
        if self.item is None:
            if self.lenient:
                for key, value in items.items():
                    if isinstance(value, Tensor):
                        return key
            raise UsageError(
                f"hook point {self.name!r}: the module returns {_described(output)}, not one tensor. "
                f"Name an item, for example {self.name}[{_first_tensor(items)}]."
            )
        if not isinstance(items.get(self.item), Tensor):
            raise UsageError(
                f"hook point {self.name!r}: there is no tensor [{self.item}] in what the module returns, "
                f"{_described(output)}. Name another item, for example [{_first_tensor(items)}]."
            )
        return self.item

    def _argument(self, arguments: dict[int | str, Any]) -> int | str:
        """Which argument of the module is the activation: the named one, or the first floating-point tensor."""
        if self.item is None:
            for key, value in arguments.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    return key
        elif isinstance(arguments.get(self.item), Tensor):
            return self.item
        what = "floating-point tensor" if self.item is None else f"tensor [{self.item}]"
        raise UsageError(
            f"hook point {self.name!r}: there is no {what} among the module's arguments {_described(arguments)}. "
            f"Name one of them, for example [{_first_tensor(arguments)}], or another hook point."
        )

    def not_reached(self) -> UsageError:
        """The error for a forward that never reached this site."""
        return UsageError(
            f"hook point {self.name!r}: the model's forward never calls this module "
            f"({type(self.module).__name__}). Name a module that it calls."
        )


def run_to_site(site: Site, forward: Callable[[], Any]) -> Tensor:
    """Run `forward` up to `site` and return the activation there; the layers above never run.

    UsageError if the forward ends without reaching the site.
    """
    return run_to_sites([site], forward)[0]


def run_to_sites(sites: Sequence[Site], forward: Callable[[], Any]) -> list[Tensor]:
    """Run `forward` until it has reached all `sites`, in any order, and return their activations in the order of `sites`.

    The layers above the last site never run. If a module is called several times, its first call counts. UsageError
    if the forward ends without reaching one of the sites.
    """
    found: dict[int, Tensor] = {}

    def reader(number: int) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            if number not in found:
                # The layers up to the other sites may change a tensor in place.
                found[number] = activation if len(found) == len(sites) - 1 else activation.clone()
                if len(found) == len(sites):
                    raise _Stop

        return read

    with ExitStack() as hooks:
        for number, site in enumerate(sites):
            hooks.enter_context(site._hooked(reader(number)))
        try:
            forward()
        except _Stop:
            return [found[number] for number in range(len(sites))]
    raise next(site for number, site in enumerate(sites) if number not in found).not_reached()


def resolve(model: nn.Module, name: str) -> Site:
    """The site with this hook point's name. UsageError, with similar names, if the model has none."""
    hooks = hook_points(model)
    if name in hooks:
        return Site(name, hooks[name], "output")
    residual = RESIDUAL.fullmatch(name)
    if residual:
        path, blocks = decoder_blocks(model, name)
        number = int(residual[1])
        if number >= len(blocks):
            raise UsageError(
                f"hook point {name!r}: there is no block {number}; the model has {len(blocks)} ({path}), "
                f"0 to {len(blocks) - 1}."
            )
        return Site(name, blocks[number], "output" if residual[2] in ("out", "resid_post") else "input", lenient=True)
    parts = _PATH.fullmatch(name)
    modules = {**dict(model.named_modules()), ".": model}
    module = modules.get(parts["path"]) if parts else None
    if parts is None or module is None:
        raise UsageError(f"hook point {name!r}: {_unknown(model, parts['path'] if parts else name, modules)}")
    item = parts["item"]
    return Site(
        name,
        module,
        "input" if parts["input"] else "output",
        int(item) if item and item.isdigit() else item,
        lenient=any(module is block for _, blocks in _block_lists(model) for block in blocks),
    )


def hook_points(model: nn.Module) -> dict[str, nn.Module]:
    """The hooks of a TransformerLens model by name, aliases included; empty for any other model."""
    hooks = getattr(model, "hook_dict", None)
    return dict(hooks) if isinstance(hooks, Mapping) else {}


def decoder_blocks(model: nn.Module, name: str = "blocks") -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's decoder blocks, found by structure.

    The list is the outermost `nn.ModuleList` of modules with submodules and parameters. If there are several, it is
    the one with the number of layers in the configuration. UsageError if there is none, or still more than one; `name`
    is for the message.
    """
    found = _block_lists(model)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"hook point {name!r}: no list of decoder blocks was found in {type(model).__name__}. "
            "Name a submodule by its path instead."
        )
    paths = ", ".join(f"{path} ({len(blocks)} x {type(blocks[0]).__name__})" for path, blocks in found)
    raise UsageError(
        f"hook point {name!r}: {type(model).__name__} has several lists that could be its decoder blocks: {paths}. "
        f"Name a submodule by its path instead, for example {found[0][0]}.0."
    )


def _block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    found: list[tuple[str, nn.ModuleList]] = []
    outermost: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in outermost):
            continue
        outermost.append(path)  # lists inside blocks, such as experts, do not count
        if len(module) and all(any(True for _ in m.children()) and any(True for _ in m.parameters()) for m in module):
            found.append((path, module))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    as_long = [(path, blocks) for path, blocks in found if len(blocks) == depth]
    return as_long or found


def _unknown(model: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why a name is unknown, with similar names."""
    known = [name for name in modules if name not in ("", ".")]
    examples = [name for name in known if name.count(".") <= 1][:3]
    for list_path, blocks in _block_lists(model)[:1]:
        sides = ("hook_in", "hook_out", "hook_resid_pre", "hook_resid_post")
        known += [f"blocks.{i}.{side}" for i in range(len(blocks)) for side in sides]
        examples = ["blocks.0.hook_out", f"{list_path}.0"]
    known += hook_points(model)
    return (
        f"{type(model).__name__} has no such hook or submodule.{near_names(path, known)} "
        f"A name is like {', '.join(examples) or '0'}, with :input or [item] after a submodule."
    )


def _items(value: Any) -> dict[int | str, Any] | None:
    """The items of a tuple, list, dictionary or dataclass by their key; None for anything else."""
    if isinstance(value, Mapping):
        return {**dict(enumerate(value.values())), **value} if hasattr(value, "to_tuple") else dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def _item(value: Any, key: int | str) -> Any:
    return (_items(value) or {})[key]


def _with_item(value: Any, key: int | str, new: Tensor) -> Any:
    """A copy of `value` with one item replaced; the other items are the same objects."""
    if isinstance(value, Mapping):
        changed = copy.copy(value)
        changed[list(value)[key] if isinstance(key, int) and key not in value else key] = new  # type: ignore[index]
        return changed
    if isinstance(value, (tuple, list)):
        items = [new if i == key else item for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return dataclasses.replace(value, **{str(key): new})


def _first_tensor(items: Mapping[int | str, Any]) -> int | str:
    """The key of the first tensor, for examples in messages: a name rather than a number if an item has both."""
    tensors = [key for key, value in items.items() if isinstance(value, Tensor)]
    names = [key for key in tensors if isinstance(key, str)]
    return (names or tensors or [0])[0]


def _described(value: Any) -> str:
    """What a module returns, for messages: `tuple [0] Tensor [1, 4, 32], [1] None`."""
    if isinstance(value, Tensor):
        return f"Tensor {list(value.shape)}"
    items = value if isinstance(value, Mapping) else _items(value)
    if items is None:
        return type(value).__name__
    inside = ", ".join(
        f"[{key}] {_described(v) if isinstance(v, Tensor) else type(v).__name__}" for key, v in items.items()
    )
    return f"{type(value).__name__} {inside}"
