"""From a pair of answers to a `Sample`: both answers teacher-forced up to the first token in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saekit import OptionError
from saekit_attribution.labelled_data.document import Pair, Skipped

SEAM = "The tokens of prompt and response merge at the seam"
SAME_PROMPT = "The prompt equals the base prompt: the difference to the base run is zero by causality"


@dataclass(frozen=True)
class Sample:
    """One flagged variation of a question, with the base variation that it is compared with.

    tokens: the variation's prompt, then the beginning that both responses share; the last position, the decisive one,
        predicts the first token in which they differ.
    target, base: that token in the flagged and in the base response.
    base_tokens: the base prompt with the same beginning of the response; its last position predicts the same token.
    aligned: for each position of `tokens` the matching position of `base_tokens`, or -1 where the text occurs only in this prompt.
    place: (number of the result, number of the variation) in the labelled file.
    template_type: as in the file.
    token_position: which token of the response is the differing one, from 1.
    """

    tokens: tuple[int, ...]
    target: int
    base: int
    base_tokens: tuple[int, ...]
    aligned: tuple[int, ...]
    place: tuple[int, int] = (0, 0)
    template_type: str = ""
    token_position: int = 1


def teacher_forced(
    pair: Pair,
    tokenizer: Any,
    context: int | None,
    max_tokens_to_check: int = 20,
    *,
    joiner: str | None = None,
    chat_template: bool = False,
    reference: Literal["zero", "base"] = "zero",
) -> Sample | Skipped:
    """The sample of a pair of answers, or why there is none.

    context: the model's longest input, None for no limit.
    joiner: the text between prompt and response; by default a space if neither has white space there, and nothing after
        a chat template.
    chat_template: put the prompt into the tokenizer's chat template as a user's turn.
    reference: "base" needs prompts that differ.

    The text begins with BOS if the tokenizer has one. UsageError if `chat_template` is set and the tokenizer has
    no chat template.
    """

    def skipped(reason: str) -> Skipped:
        return Skipped(pair.place, pair.template_type, reason)

    flagged = _split(tokenizer, pair.prompt, pair.response, joiner, chat_template)
    base = _split(tokenizer, pair.base_prompt, pair.base_response, joiner, chat_template)
    if flagged is None or base is None:
        return skipped(SEAM)
    at = _first_difference(flagged.response, base.response, max_tokens_to_check)
    if isinstance(at, str):
        return skipped(at)
    shared = flagged.response[:at]
    tokens, base_tokens = (*flagged.prompt, *shared), (*base.prompt, *shared)
    longest = max(len(tokens), len(base_tokens))
    if context is not None and longest > context:
        return skipped(f"Longer than the model's context: more than {context} tokens before the responses differ")
    if reference == "base" and tokens == base_tokens:
        return skipped(SAME_PROMPT)
    return Sample(
        tokens=tokens,
        target=flagged.response[at],
        base=base.response[at],
        base_tokens=base_tokens,
        aligned=_aligned(flagged.prompt, base.prompt, len(shared)),
        place=pair.place,
        template_type=pair.template_type,
        token_position=at + 1,
    )


@dataclass(frozen=True)
class _Tokens:
    """The token ids of a prompt, BOS included, and those of its response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def _split(tokenizer: Any, prompt: str, response: str, joiner: str | None, chat_template: bool) -> _Tokens | None:
    """The tokens of prompt and of response; None if a token spans the seam between them."""
    if chat_template:
        prompt = in_chat_template(tokenizer, prompt)
    if joiner is None:
        joiner = "" if chat_template or prompt[-1:].isspace() or response[:1].isspace() else " "
    whole = tokenise(tokenizer, prompt + joiner + response, bos=not chat_template)
    alone = tokenise(tokenizer, prompt, bos=not chat_template)
    if whole[: len(alone)] != alone:
        return None
    return _Tokens(alone, whole[len(alone) :])


def in_chat_template(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's turn, up to where the answer begins. UsageError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError("chat_template", "the model's tokenizer has no chat template. Leave it out.")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def tokenise(tokenizer: Any, text: str, *, bos: bool) -> tuple[int, ...]:
    """The ids of a text, after BOS if `bos`; a chat template adds BOS itself."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer.bos_token_id if bos else None
    return tuple(ids) if first is None else (first, *ids)


def _first_difference(response: Sequence[int], base: Sequence[int], within: int) -> int | str:
    """The first place where the tokens differ, or the reason why there is none."""
    for at, (one, other) in enumerate(zip(response[:within], base[:within], strict=False)):
        if one != other:
            return at
    if min(len(response), len(base)) < within and len(response) != len(base):
        return "One response is the beginning of the other, so they differ in length but in no token"
    return f"No differing tokens found in first {within} positions"


def _aligned(prompt: Sequence[int], base: Sequence[int], shared: int) -> tuple[int, ...]:
    """For each position of the prompt, and of `shared` tokens after it, the matching position in the base.

    Prompts are matched from both ends; -1 for the inserted text between the matched ends."""
    shorter = min(len(prompt), len(base))
    start = next((i for i in range(shorter) if prompt[i] != base[i]), shorter)
    end = next((i for i in range(shorter - start) if prompt[-1 - i] != base[-1 - i]), shorter - start)
    offset = len(base) - len(prompt)
    inserted = len(prompt) - start - end
    rest = range(len(prompt) - end, len(prompt) + shared)
    return (*range(start), *([-1] * inserted), *(i + offset for i in rest))
