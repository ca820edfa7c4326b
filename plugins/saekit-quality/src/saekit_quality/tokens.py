"""Contexts and responses as token ids that fit an encoder: what is cut, in which order, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saekit import UsageError

TooLong = Literal["truncate", "refuse"]


@dataclass(frozen=True)
class Tokenised:
    """Token ids of each pair of context and response.

    ids: without padding.
    types: the segment of each token, for encoders that want it, as BERT does: 0, or 1 in the response.
    contexts_cut, responses_cut: how many have lost a part.
    """

    ids: list[list[int]]
    types: list[list[int]]
    contexts_cut: int
    responses_cut: int


def tokenise(
    contexts: Sequence[str], responses: Sequence[str], tokenizer: Any, max_tokens: int, too_long: TooLong = "truncate"
) -> Tokenised:
    """Each context and its response as one row, with the special tokens that the tokenizer puts around a pair.

    Where the tokenizer puts nothing between the two, as GPT-2's does, a line break stands between them. What is too long loses the
    beginning of its context; a response that is too long by itself also loses its end. too_long: "refuse" allows the first and not
    the second. UsageError then, for an empty response, and if `max_tokens` leaves no room for a token.
    """
    before, between, after = _specials(tokenizer)
    if contexts and not between:
        contexts = [f"{context}\n" if context else "" for context in contexts]
    room = max_tokens - len(before) - len(between) - len(after)
    if room < 1:
        raise UsageError(
            f"max_tokens: {max_tokens} leaves no room beside the special tokens. Give it at least {max_tokens - room + 1}."
        )
    for number, response in enumerate(responses, 1):
        if not response.strip():
            raise UsageError(f"response {number} is empty. Leave it out, or write what was said.")
    first, second = (
        tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for texts in (contexts, responses)
    )
    ids, types, contexts_cut, responses_cut = [], [], 0, 0
    for number, (context, response) in enumerate(zip(first, second, strict=True), 1):
        if len(response) > room:
            if too_long == "refuse":
                raise UsageError(
                    f"response {number} has {len(response)} tokens, and there is room for {room}. Raise max_tokens if the encoder "
                    'can take more, or set too_long to "truncate".'
                )
            responses_cut += 1
        response = response[:room]
        kept = context[max(0, len(context) - (room - len(response))) :]
        contexts_cut += len(kept) < len(context)
        ids.append([*before, *kept, *between, *response, *after])
        left = len(before) + len(kept) + len(between)
        types.append([0] * left + [1] * (len(ids[-1]) - left))
    return Tokenised(ids, types, contexts_cut, responses_cut)


def _specials(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before, between and after the two texts of a pair."""
    pair = tokenizer("a", "a")
    places = pair.sequence_ids(0)
    one, two = (len(places) - places[::-1].index(0), places.index(1))
    ids = pair["input_ids"]
    return ids[: places.index(0)], ids[one:two], ids[len(places) - places[::-1].index(1) :]
