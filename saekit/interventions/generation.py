"""Texts with and without an intervention, from the same prompts and the same random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.sites import hook_points
from saekit.errors import UsageError
from saekit.interventions.attach import Attachment, attach_all
from saekit.numerics import seeded
from saekit.seeds import seed_from


@dataclass(frozen=True)
class GeneratedPair:
    """The continuation of one prompt without and with the intervention. Tokens end with the first EOS, if there is one."""

    prompt: str
    before: str
    after: str
    before_tokens: list[int]
    after_tokens: list[int]


def paired_generation(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int] | Tensor],
    attachments: Attachment | Iterable[Attachment],
    *,
    max_new_tokens: int = 40,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 1,
) -> list[GeneratedPair]:
    """Generate from every prompt without the attachments, then with them, through the model's own `generate`.

    model: a Hugging Face model or a TransformerLens bridge, in evaluation mode.
    prompts: texts, tokenised with the tokenizer's defaults, or token ids.
    attachments: made by `attach`, not yet entered.
    do_sample: sample from the whole distribution at `temperature`; otherwise take the likeliest token.
    seed: fixes the random numbers together with the prompt's tokens, the same before and after. So a prompt's pair does
        not depend on the other prompts or their order, and the same prompt twice gives the same pair twice.
    batch_size: prompts at once (padded on the left) in greedy generation; sampling goes one by one. Rounding depends on
        the batch, so only 1 gives a prompt's pair bit for bit whatever the other prompts.

    UsageError for a model that cannot generate or is in training mode, and for an empty prompt.
    """
    attached = [attachments] if isinstance(attachments, Attachment) else list(attachments)
    _check(model, attached, max_new_tokens, temperature, batch_size)
    tokens = [_tokens(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    size = 1 if do_sample else batch_size
    generator = _Generator(model, tokenizer, max_new_tokens, temperature if do_sample else None)
    pairs: list[GeneratedPair] = []
    for start in range(0, len(tokens), size):
        batch = tokens[start : start + size]
        own_seed = _seed(seed, batch[0])
        before = generator(batch, own_seed)
        with attach_all(attached):
            after = generator(batch, own_seed)
        for prompt, row, plain, changed in zip(prompts[start : start + size], batch, before, after, strict=True):
            text = prompt if isinstance(prompt, str) else tokenizer.decode(row)
            words = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (plain, changed)]
            pairs.append(GeneratedPair(text, words[0], words[1], plain, changed))
    return pairs


class _Generator:
    """A model's own `generate`, with sampling, EOS and padding set here and not by the model's defaults."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_new_tokens: int, temperature: float | None) -> None:
        self.model, self.max_new_tokens, self.temperature = model, max_new_tokens, temperature
        self.device = next(model.parameters()).device
        own = getattr(getattr(model, "original_model", model), "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ends = getattr(tokenizer, "eos_token_id", None) if ends is None else ends
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad: int = pad if pad is not None else (self.ends or [0])[0]

    def __call__(self, batch: list[list[int]], seed: int) -> list[list[int]]:
        """The tokens after each prompt, up to and including the first EOS."""
        width = max(map(len, batch))
        rows = [[self.pad] * (width - len(row)) + row for row in batch]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in batch]
        ids, attended = (torch.tensor(table, device=self.device) for table in (rows, mask))  # [n, T]
        with torch.no_grad(), seeded(seed, self.device):
            made = self._lens(ids, attended) if hook_points(self.model) else self._plain(ids, attended)
        return [self._until_end(row[width:].tolist()) for row in made]

    def _plain(self, ids: Tensor, mask: Tensor) -> Tensor:
        how: dict[str, Any] = {"do_sample": False}
        if self.temperature is not None:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        model: Any = self.model
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            **how,
        )

    def _lens(self, ids: Tensor, mask: Tensor) -> Tensor:
        model: Any = self.model
        padded: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask}
        return model.generate(
            ids,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature is not None,
            temperature=1.0 if self.temperature is None else self.temperature,
            stop_at_eos=bool(self.ends),
            eos_token_id=self.ends or None,
            return_type="tokens",
            verbose=False,
            **padded,
        )

    def _until_end(self, tokens: list[int]) -> list[int]:
        for place, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: place + 1]
        return tokens


def _check(model: nn.Module, attached: list[Attachment], new: int, temperature: float, batch_size: int) -> None:
    if not callable(getattr(model, "generate", None)):
        raise UsageError(f"paired_generation: {type(model).__name__} has no `generate`. Give a language model.")
    if model.training:
        raise UsageError("paired_generation: the model is in training mode, where dropout differs. Call model.eval().")
    for name, value in (("max_new_tokens", new), ("batch_size", batch_size), ("temperature", temperature)):
        if not value > 0:
            raise UsageError(f"paired_generation: {name} must be above 0, not {value}.")
    for attachment in attached:
        if attachment.active:
            raise UsageError(
                f"paired_generation: the SAE at {attachment.site.name!r} is attached already, so there would be no "
                "'before'. Call it outside of the attachment's block."
            )


def _tokens(tokenizer: Any, prompt: str | Sequence[int] | Tensor, number: int) -> list[int]:
    ids: Any = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    tokens = [int(token) for token in ids]
    if not tokens:
        raise UsageError(f"paired_generation: prompt {number} ({prompt!r}) has no tokens. Give it at least one.")
    return tokens


def _seed(seed: int, tokens: list[int]) -> int:
    """The seed of a prompt, which does not depend on the other prompts."""
    return seed_from(f"{seed}:{tokens}") >> 7
