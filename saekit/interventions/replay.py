"""`Replay`: run only the layers above a site again, with another activation at the site."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.sites import Site, decoder_blocks, hook_points
from saekit.errors import UsageError
from saekit.interventions.kv_cache import Past, cache_of, first_positions, keeps_past, of_layers


class _Done(BaseException):
    """Ends a forward when everything is recorded. Not an `Exception`, so that a model which catches those passes it on."""


_WORTH = 64  # the least number of tokens that a second forward must save


@dataclass
class Recording:
    """One forward, from which the layers above the site can be run again.

    tokens: [n, T].
    mask: [n, T] or None.
    activation: [n, T, d], at the site.
    entered: [n, T, d'], the input of the site's own block; None if that block does not run again.
    past: keys and values [n, heads, T, width] of each layer that runs again, by its number; None if not recorded.
    below: the same of the layers before the site.
    """

    tokens: Tensor
    mask: Tensor | None
    activation: Tensor
    entered: Tensor | None = None
    past: Past | None = None
    below: Past | None = None


@dataclass
class _Found:
    """What a forward has recorded so far."""

    activation: Tensor | None = None
    entered: Tensor | None = None
    past: Past = field(default_factory=dict)
    below: set[int] = field(default_factory=set)  # layers that had run when the site was reached


class Replay:
    """Runs the layers of `model` above `site` again and again on other activations.

    Blocks below the site return their input unchanged; the model's own forward takes care of masks, positions and the
    final norm. If the site is inside a block, that block runs again on its recorded input. If no list of blocks is
    found, or the site is outside of it, the whole model runs with only the activation replaced, and the results are the
    same. Gradients begin at the given activation.

    Hooks belong to the model, not to a thread: hold the subject's `lock` if another thread may use the model.
    """

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model, self.site = model, site
        self._blocks = _blocks(model)
        holding = [i for i, block in enumerate(self._blocks) if any(m is site.module for m in block.modules())]
        self._own: nn.Module | None = None  # the block that runs again from its recorded input
        self._first = 0  # the first block that runs again
        if holding:
            number = holding[0]
            whole = site.module is self._blocks[number]
            self._first = number + 1 if whole and site.side == "output" else number
            self._own = None if whole else self._blocks[number]
        self._given = [0] * self._first  # for each skipped block the length of the tuple that it returns; 0 for a tensor
        signature = inspect.signature(model.forward).parameters
        self._takes_mask = "attention_mask" in signature
        self._takes_cache = {"past_key_values", "use_cache"} <= set(signature)
        self._keeps_past = bool(self._blocks) and keeps_past(model)

    @property
    def skips(self) -> int:
        """How many blocks are skipped."""
        return self._first

    @torch.no_grad()
    def record(
        self, tokens: Tensor, mask: Tensor | None = None, *, past: bool = False, below: bool = False
    ) -> Recording:
        """Run the model on `tokens` [n, T] as far as needed, without gradients.

        mask: [n, T], True for tokens and False for padding; None if there is no padding.
        past: keep the keys and values that `run_last` needs.
        below: keep those that `branch` needs.

        Both need rows of one length, so no mask, and a Hugging Face model with a cache. UsageError if the forward does
        not reach the site."""
        if mask is not None and (past or below):
            raise ValueError("keys and values are kept for rows of one length only: leave the mask out")
        past, below = past and self._keeps_past, below and self._keeps_past
        found = None if mask is not None else self._from_common_start(tokens, past, below)
        if found is None:
            found = self._found(tokens, mask, None if not (past or below) else (), past=past, below=below)
        length, layers = tokens.shape[1], range(self._first, len(self._blocks))
        return Recording(
            tokens,
            mask,
            found.activation,  # type: ignore[arg-type]
            found.entered,
            of_layers(found.past, layers, length) if past else None,
            of_layers(found.past, found.below | set(range(self._first)), length) if below else None,
        )

    @torch.no_grad()
    def branch(self, recording: Recording, tokens: Tensor, rows: Tensor, shared: int) -> Tensor:
        """The activation at the site of texts that begin like recorded ones, [N, T' - shared, d]; only the rest is run.

        tokens: [N, T']. The first `shared` are those of the recording's `rows` [N]; both texts continue after them.
            Needs a recording with `below`."""
        if recording.below is None:
            raise ValueError("the recording has no keys and values: see Recording.below")
        begun = (first_positions(recording.below, shared), shared, rows)
        return self._found(tokens[:, shared:], None, begun, past=False).activation  # type: ignore[return-value]

    def _from_common_start(self, tokens: Tensor, past: bool, below: bool) -> _Found | None:
        """`_found`, with the common beginning of all rows run only once; None if that saves nothing or is impossible."""
        n, length = tokens.shape
        different = (tokens[:, : length - 1] != tokens[:1, : length - 1]).any(0).nonzero()
        shared = int(different[0]) if len(different) else length - 1
        if not self._keeps_past or (n - 1) * shared < _WORTH:
            return None
        start = self._found(tokens[:1, :shared], None, (), past=past, below=True)
        if of_layers(start.past, start.below | set(range(self._first)), shared) is None:
            return None
        rows = tokens.new_zeros(n)
        found = self._found(tokens[:, shared:], None, (start.past, shared, rows), past=past, below=below)
        assert start.activation is not None and found.activation is not None
        found.activation = torch.cat([start.activation.expand(n, -1, -1), found.activation], 1)
        if start.entered is not None and found.entered is not None:
            found.entered = torch.cat([start.entered.expand(n, -1, -1), found.entered], 1)
        return found

    def _found(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        begun: tuple[Past, int, Tensor] | tuple[()] | None,
        *,
        past: bool,
        below: bool = False,
    ) -> _Found:
        """A forward up to the site, and with `past` up to the keys and values of the last block.

        begun: what came before, as (keys and values, number of positions, rows); () for nothing; None for a forward
            without a cache.
        below: keep the keys and values of the layers below as well."""
        found, last = _Found(), len(self._blocks) - 1

        def finish() -> None:
            if found.activation is not None and (not past or last in found.past):
                raise _Done

        def seen(layer: int, keys: Tensor, values: Tensor) -> None:
            if found.activation is None:
                found.below.add(layer)
            if below or layer >= self._first:
                found.past[layer] = keys, values
            finish()

        def at_site(activation: Tensor) -> Tensor:
            if found.activation is None:
                # The rest of the forward may change a tensor in place.
                found.activation = activation.clone() if past else activation
                finish()
            return activation

        def at_own(entered: Tensor) -> Tensor:
            if found.entered is None:
                found.entered = entered.clone()
            return entered

        cache = None
        if begun is not None:
            before, length, rows = begun or ({}, 0, None)
            cache = cache_of(before, length, rows, layers=len(self._blocks), device=tokens.device, seen=seen)
        with ExitStack() as stack:
            if self._own is not None:
                stack.enter_context(Site(self.site.name, self._own, "input", lenient=True).replaced(at_own))
            for number in range(self._first):
                stack.callback(self._blocks[number].register_forward_hook(self._noted(number)).remove)
            stack.enter_context(self.site.replaced(at_site))
            with suppress(_Done):
                self._forward(tokens, mask, cache)
        if found.activation is None:
            raise self.site.not_reached()
        return found

    def run(self, recording: Recording, activation: Tensor, rows: Tensor | None = None) -> Any:
        """What the model returns with `activation` [N, T, d] at the site.

        rows: [N], the row of the recording that each row varies; None for the same row."""
        tokens, mask, entered = (
            value if rows is None or value is None else value[rows]
            for value in (recording.tokens, recording.mask, recording.entered)
        )
        with self._skipping(activation, entered):
            return self._forward(tokens, mask, None)  # type: ignore[arg-type]

    def run_last(self, recording: Recording, activation: Tensor, rows: Tensor | None = None) -> Any:
        """The same for the last position alone, `activation` [N, 1, d], with the recorded keys and values of the others.

        The last position does not affect earlier ones, so this is what `run` returns there. Needs a recording with
        `past`."""
        if recording.past is None:
            raise ValueError("the recording has no keys and values: see Recording.past")
        tokens = recording.tokens[:, -1:]
        entered = None if recording.entered is None else recording.entered[:, -1:]
        if rows is not None:
            tokens, entered = tokens[rows], None if entered is None else entered[rows]
        before = recording.tokens.shape[1] - 1
        past = first_positions(recording.past, before)
        cache = cache_of(past, before, rows, layers=len(self._blocks), device=tokens.device)
        with self._skipping(activation, entered):
            return self._forward(tokens, None, cache)

    def _forward(self, tokens: Tensor, mask: Tensor | None, cache: Any) -> Any:
        options: dict[str, Any] = {}
        if mask is not None or self._takes_mask:
            before = 0 if cache is None else int(cache.get_seq_length())
            here = tokens.new_ones(len(tokens), before + tokens.shape[1]) if mask is None else mask
            options["attention_mask"] = here.to(tokens.device, torch.long)
        if self._takes_cache:
            options["use_cache"] = cache is not None
            options["past_key_values"] = cache
        return self.model(tokens, **options)

    @contextmanager
    def _skipping(self, activation: Tensor, entered: Tensor | None) -> Iterator[None]:
        """Inside, blocks below the site return their input, and the site has `activation`."""
        with ExitStack() as stack:
            for number in range(self._first):
                stack.enter_context(own_forward(self._blocks[number], _handing_on(self._given[number])))
            if self._own is not None and entered is not None:
                there = Site(self.site.name, self._own, "input", lenient=True)
                stack.enter_context(there.replaced(lambda _: entered))
            stack.enter_context(self.site.replaced(lambda _: activation))
            yield

    def _noted(self, number: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._given[number] = 0 if isinstance(output, Tensor) else len(output)

        return note


@contextmanager
def own_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` runs `forward` instead of its own; its hooks stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


def _handing_on(items: int) -> Callable[..., Any]:
    """A block's forward that returns its input, in a tuple of `items` items if the block returns one."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        hidden = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
        return (hidden, *[None] * (items - 1)) if items else hidden

    return forward


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks; none if there is no such list, or for a TransformerLens model, which has its own hooks."""
    if hook_points(model):
        return []
    try:
        return list(decoder_blocks(model)[1])
    except UsageError:
        return []
