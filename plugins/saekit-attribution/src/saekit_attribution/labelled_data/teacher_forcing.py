"""From a pair of answers to a `Sample`: tokens, the first one in which the answers differ, positions aligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saekit import OptionError
from saekit_attribution.labelled_data.document import Pair, Skipped
from saekit_attribution.labelled_data.samples import Sample

SEAM = "The tokens of prompt and response merge at the seam"
SAME_PROMPT = "The prompt equals the base prompt: the difference to the base run is zero by causality"


def prepare(
    pair: Pair,
    tokenizer: Any,
    context: int | None,
    max_tokens_to_check: int = 20,
    *,
    joiner: str | None = None,
    chat_template: bool = False,
    reference: Literal["zero", "base"] = "zero",
) -> Sample | Skipped:
    """Teacher-force both answers of a pair up to the first token in which they differ.

    context: the most positions that the model takes, None for no limit. joiner: what stands between prompt and
    response; by default a space where neither has white space there, and nothing after a chat template. chat_template:
    the prompt is a user's turn, put into the tokenizer's chat template. reference: "base" needs prompts that differ.

    The text begins with BOS where the tokenizer has one. UsageError where `chat_template` is asked of a tokenizer that
    has none.
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
    """The tokens of prompt and response, cut between the two; None where a token reaches over the seam."""
    if chat_template:
        prompt = templated(tokenizer, prompt)
    if joiner is None:
        joiner = "" if chat_template or prompt[-1:].isspace() or response[:1].isspace() else " "
    whole = tokenised(tokenizer, prompt + joiner + response, bos=not chat_template)
    alone = tokenised(tokenizer, prompt, bos=not chat_template)
    if whole[: len(alone)] != alone:
        return None
    return _Tokens(alone, whole[len(alone) :])


def templated(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's turn, with what begins the answer. UsageError where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError("chat_template", "the model's tokenizer has no chat template. Leave it out.")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def tokenised(tokenizer: Any, text: str, *, bos: bool) -> tuple[int, ...]:
    """The ids of a text; a chat template writes BOS itself."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer.bos_token_id if bos else None
    return tuple(ids) if first is None else (first, *ids)


def _first_difference(response: Sequence[int], base: Sequence[int], within: int) -> int | str:
    """The first place at which the tokens differ, or the reason why there is none."""
    for at, (one, other) in enumerate(zip(response[:within], base[:within], strict=False)):
        if one != other:
            return at
    if min(len(response), len(base)) < within and len(response) != len(base):
        return "One response is the beginning of the other, so they differ by where they end and by no token"
    return f"No differing tokens found in first {within} positions"


def _aligned(prompt: Sequence[int], base: Sequence[int], shared: int) -> tuple[int, ...]:
    """For each position of the prompt and of `shared` tokens after it, the position in the base that says the same.

    Prompts are matched from both ends; -1 for what stands between the matched ends, where text was put in."""
    shorter = min(len(prompt), len(base))
    start = next((i for i in range(shorter) if prompt[i] != base[i]), shorter)
    end = next((i for i in range(shorter - start) if prompt[-1 - i] != base[-1 - i]), shorter - start)
    offset = len(base) - len(prompt)
    inserted = len(prompt) - start - end
    rest = range(len(prompt) - end, len(prompt) + shared)
    return (*range(start), *([-1] * inserted), *(i + offset for i in rest))
