"""The prompts by kind: read from JSON, tokenised, and checked against the model's context before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saekit import OptionError, Subject, TokenBatch, TrainedPositions

DEFAULT = Path(__file__).parent / "prompts" / "default.json"
NEUTRAL, UNRELATED = "neutral", "unrelated"
"""The kinds on which effect and damage are compared between directions."""


@dataclass(frozen=True)
class Prompt:
    """A text with its tokens, BOS first if the tokenizer has one; `kind` is its key in the file."""

    kind: str
    text: str
    tokens: tuple[int, ...]


def load_prompts(path: str | None) -> dict[str, list[str]]:
    """{kind: texts} from a JSON file, by default the plugin's. UsageError, naming file and kind, for any other content.

    The kinds "neutral" and "unrelated" must be there: effect and damage are compared on them."""
    file = DEFAULT if path is None else Path(path).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(
            "prompts", f"{file}: cannot be read: {error.strerror}. Name a JSON file {{kind: [texts]}}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise OptionError("prompts", f"{file}: is not valid JSON: {error}. Write {{kind: [texts]}}.") from None
    if not isinstance(content, dict) or not content:
        raise OptionError("prompts", f"{file}: holds no kinds of prompts. Write {{kind: [texts]}}.")
    for kind, texts in content.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise OptionError(
                "prompts",
                f"{file}: {kind!r} is not a list of texts. Give each kind at least one prompt that is not empty.",
            )
    for kind in (NEUTRAL, UNRELATED):
        if kind not in content:
            raise OptionError(
                "prompts",
                f"{file}: there is no kind {kind!r}, on which directions are compared. Add some prompts of that kind.",
            )
    return content


def tokenise(texts: dict[str, list[str]], subject: Subject, trained: TrainedPositions, new_tokens: int) -> list[Prompt]:
    """The prompts in their order. UsageError if one does not fit into the model's context with its continuation, or has no
    position that the SAE was trained on, since the others are not steered."""
    first = [] if subject.bos_token_id is None else [subject.bos_token_id]
    prompts = []
    for kind, some in texts.items():
        for text in some:
            ids = (*first, *subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            prompts.append(Prompt(kind, text, ids))
            if subject.context is not None and len(ids) + new_tokens > subject.context:
                raise OptionError(
                    "prompts",
                    f"{text[:60]!r} ({kind}) has {len(ids)} tokens, and {new_tokens} are to follow "
                    f"(max_new_tokens), but the model takes {subject.context}. Shorten the prompt or max_new_tokens.",
                )
            if not trained.in_rows(torch.tensor([ids])).any():
                raise OptionError(
                    "prompts",
                    f"{text[:60]!r} ({kind}) has no position that the SAE was trained on, so none is steered "
                    f"({len(ids)} tokens). Write a longer prompt.",
                )
    return prompts


@dataclass(frozen=True)
class PromptBatch:
    """Rows of tokens, padded on the right. numbers, kinds: of each row's prompt; no numbers for held-out text.
    `tokens.keep` leaves out padding and the positions that the SAE was not trained on, which are not steered."""

    numbers: list[int]
    kinds: list[str]
    tokens: TokenBatch


def batches(prompts: Sequence[Prompt], trained: TrainedPositions, batch_tokens: int) -> Iterator[PromptBatch]:
    """All prompts, those of similar length together, at most about `batch_tokens` tokens at a time, padding included.

    trained: which positions are steered and count."""
    some: list[int] = []
    for number in [*sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens)), None]:
        full = number is not None and (len(some) + 1) * len(prompts[number].tokens) > batch_tokens
        if some and (number is None or full):
            rows = TokenBatch.of_rows([prompts[i].tokens for i in some], trained)
            yield PromptBatch(some, [prompts[i].kind for i in some], rows)
            some = []
        if number is not None:
            some.append(number)
