"""What the places at which latents fire look like: examples as the source renders them, as rows of a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saekit.errors import ComponentError
from saekit.examples import Example, Items, Numbers, Tokens, as_text, example_of
from saekit.runner.context import RunContext
from saekit.runner.survey import LatentSurvey, Place


def top_examples(
    context: RunContext, latents: list[int], *, n: int = 5, window: int = 12, tokens: int | None = None
) -> list[dict[str, Any]]:
    """The `n` strongest activations of each latent, at most one in a sequence, with `window` tokens on each side.

    tokens: how many held-out activations to look through; `evaluation.tokens` by default. Returns rows of a table that
        `saekit.Result` shows: see `example_rows`.
    """
    if not latents:
        return []
    return example_rows(context, LatentSurvey.of(context, tokens=tokens, top=n, window=window), latents, tokens=tokens)


def example_rows(
    context: RunContext, survey: LatentSurvey, latents: list[int], *, quantiles: int = 0, tokens: int | None = None
) -> list[dict[str, Any]]:
    """The places of some latents as rows of a table: latent, rank or quantile, activation, example (its JSON).

    survey: of the same held-out activations. quantiles: how many places to add that are spread over the quantiles of each latent's
        activations. tokens: those of the survey.
    """
    rows: list[dict[str, Any]] = []
    places: list[Place] = []
    for latent in latents:
        for rank, place in enumerate(survey.top(latent), start=1):
            rows.append({"latent": latent, "rank": rank, "activation": place.activation})
            places.append(place)
        for quantile, place in survey.quantiles(latent, quantiles) if quantiles else ():
            rows.append({"latent": latent, "quantile": round(quantile, 4), "activation": place.activation})
            places.append(place)
    for row, place, example in zip(rows, places, rendered(context, places, tokens), strict=True):
        row["example"] = _highlighted(example, place, survey.window).to_json()
    return rows


def rendered(context: RunContext, places: list[Place], tokens: int | None = None) -> list[Example]:
    """What each place of the held-out activations looks like, as the source renders it (`protocols.Source.examples`).

    A source that does not is shown by its tokens, if it has any, and otherwise by the numbers of its activations: for that the
    activations are gone through a second time, `tokens` of them."""
    if not places:
        return []
    source = context.source
    if hasattr(source, "examples") and all(place.sequence >= 0 for place in places):
        found = source.examples(_column(places, "sequence"), _column(places, "position"))
        if len(found) != len(places) or not all(isinstance(one, Example) for one in found):
            raise ComponentError(
                f"the source gave {len(found)} examples for {len(places)} places, or some are not a saekit.Example. "
                "Give one for each."
            )
        return list(found)
    return _found_again(context, places, tokens)


def _found_again(context: RunContext, places: list[Place], tokens: int | None) -> list[Example]:
    """The tokens of the sequence of each place, or else the numbers of its activation, from a second pass."""
    sequences = _column(places, "sequence").unique()
    rows = _column(places, "row").unique()
    texts: dict[int, dict[int, int]] = {}  # of each sequence, the token at each position
    numbers: dict[int, Numbers] = {}
    strings, first = getattr(context.source, "token_strings", None), 0
    for batch in context.held_out_activations(tokens or context.config.evaluation.tokens):
        if strings is not None and batch.tokens is not None and batch.sequence is not None and batch.position is not None:
            wanted = torch.isin(batch.sequence.cpu(), sequences)
            columns = (column.cpu()[wanted].tolist() for column in (batch.sequence, batch.position, batch.tokens))
            for sequence, position, token in zip(*columns, strict=True):
                texts.setdefault(sequence, {})[position] = token
        else:
            for row in rows[(rows >= first) & (rows < first + len(batch))].tolist():
                numbers[row] = Numbers.of(batch.x[row - first].cpu())
        first += len(batch)
    return [numbers[place.row] if place.row in numbers else _of_tokens(texts[place.sequence], place, strings) for place in places]


def _of_tokens(tokens: dict[int, int], place: Place, strings: Any) -> Tokens:
    positions = sorted(tokens)
    parts = strings(torch.tensor([tokens[position] for position in positions]))
    known = [place.around.get(position - place.position) for position in positions]
    return Tokens(parts=parts, at=positions.index(place.position), activations=known)


def _highlighted(example: Example, place: Place, window: int) -> Example:
    """The example with the latent's activations, and no more of it than `window` parts on each side."""
    if not isinstance(example, Tokens) or example.at is None:
        return example
    if example.activations is None:
        known = [place.around.get(position - example.at) for position in range(len(example.parts))]
        example = replace(example, activations=known)
    shown = example if isinstance(example, Items) else example.around(window)
    rounded = [None if value is None else round(value, 4) for value in shown.activations or ()]
    return replace(shown, activations=rounded)


def _column(places: list[Place], name: str) -> Tensor:
    return torch.tensor([getattr(place, name) for place in places])


def in_words(rows: list[dict[str, Any]]) -> dict[int, str]:
    """The strongest example of each latent on one line, from rows of `example_rows`."""
    return {row["latent"]: as_text(example_of(row["example"])) for row in rows if row.get("rank") == 1}
