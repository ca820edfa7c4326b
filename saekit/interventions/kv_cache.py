"""Recorded keys and values of the beginning of a text, given to a Hugging Face model in place of its own cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Past = dict[int, tuple[Tensor, Tensor]]  # by the number of the layer: keys and values [n, heads, T, width]

_ATTENDING = {"full_attention", "sliding_attention"}


def keeps_past(model: nn.Module) -> bool:
    """Whether the model takes a cache and would keep nothing but keys and values in it."""
    if not {"past_key_values", "use_cache"} <= set(inspect.signature(model.forward).parameters):
        return False
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENDING
    return not (others or getattr(config, "is_encoder_decoder", False) or getattr(model, "_is_stateful", False))


def cache_of(
    past: Past,
    length: int,
    rows: Tensor | None,
    *,
    layers: int,
    device: torch.device,
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Any:
    """A cache for one forward. It begins with `past`, of `length` positions, and keeps nothing of the forward.

    rows: [N], the row of `past` that each row of the forward continues; None for the same row.
    seen: called for each layer with its number, keys and values, including those of the past. Since nothing is kept,
        only one layer's keys and values are in memory at a time."""
    from transformers import DynamicCache

    cache = DynamicCache()  # made without a configuration, so that the mask alone decides about a sliding window
    nothing = torch.zeros(1, 1, length, 1, device=device)
    for number in range(layers if length else 0):
        cache.update(nothing, nothing, number)  # sets how many positions came before

    def update(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if length:
            before = past[layer] if rows is None else tuple(part[rows] for part in past[layer])
            keys, values = torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)
        if seen is not None:
            seen(layer, keys, values)
        return keys, values

    cache.update = update  # type: ignore[method-assign, assignment]
    return cache


def first_positions(past: Past, n: int) -> Past:
    """The keys and values of the first `n` positions."""
    return {layer: (keys[..., :n, :], values[..., :n, :]) for layer, (keys, values) in past.items()}


def of_layers(past: Past, layers: Iterable[int], length: int) -> Past | None:
    """The keys and values of `layers`; None if one of them has none over `length` positions."""
    chosen = {layer: past[layer] for layer in layers if layer in past}
    whole = all(part.shape[-2] == length for parts in chosen.values() for part in parts)
    return chosen if whole and len(chosen) == len(set(layers)) else None
