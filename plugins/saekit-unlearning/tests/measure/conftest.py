"""A planted world: a linear model in which each entity's fact is one direction, and an SAE with one latent for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from saekit_unlearning.answers import Examination
from saekit_unlearning.data import FORGET, Question, Text, UnlearningData
from saekit_unlearning.edits import Codes
from saekit_unlearning.methods import Seen
from saekit_unlearning.passages import Site
from torch import Tensor, nn

from saekit import Subject, TokenBatch
from saekit.activations.sites import resolve
from saekit.builtin.architectures.standard import Standard

settings.register_profile("unlearning", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unlearning")

EACH = 6  # entities of a group
GROUPS = (FORGET, "near", "far")
ENTITIES = [f"{group}{i}" for group in GROUPS for i in range(EACH)]
VALUES = ["red", "blue", "green", "white"]
WORDINGS = ["of", "by", "from"]  # the last one is never seen
WORDS = [*WORDINGS, *ENTITIES, *VALUES]
LATENTS = len(ENTITIES) + len(WORDINGS)  # a latent for each entity, then one for each wording


class Words:
    """A tokenizer of words."""

    bos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list]:
        words = text.split(" ")
        ends = list(accumulate(len(word) + 1 for word in words))
        spans = [(end - len(word) - 1, end - 1) for word, end in zip(words, ends, strict=True)]
        known = [(WORDS.index(word), span) for word, span in zip(words, spans, strict=True) if word]
        return {"input_ids": [i for i, _ in known], "offset_mapping": [span for _, span in known]}


class Linear(nn.Module):
    """Logits are linear in the activation at `site`, where each word has a direction of its own.

    hidden: entities whose fact is in a direction that no latent rebuilds, beside their own.
    """

    def __init__(self, known: Sequence[str], hidden: Sequence[str]) -> None:
        super().__init__()
        width = LATENTS + len(ENTITIES)
        self.embed, self.site = nn.Embedding(len(WORDS), width), nn.Identity()
        self.head = nn.Linear(width, len(WORDS), bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for i, word in enumerate(WORDINGS):
                self.embed.weight[WORDS.index(word), len(ENTITIES) + i] = 1.0
            for i, entity in enumerate(ENTITIES):
                row = self.embed.weight[WORDS.index(entity)]
                row[i] = 1.0
                if entity in hidden:
                    row[LATENTS + i] = 1.0
                if entity in known:
                    self.head.weight[WORDS.index(VALUES[value(i)]), (LATENTS if entity in hidden else 0) + i] = 4.0

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.site(self.embed(tokens)))


def value(entity: int) -> int:
    """The index of an entity's value. Never the first: where nothing is known, the first candidate wins."""
    return 1 + entity % 3


def data() -> UnlearningData:
    texts, questions = [], []
    for i, entity in enumerate(ENTITIES):
        group = entity.rstrip("0123456789")
        for wording in WORDINGS:
            text = f"{wording} {entity} {VALUES[value(i)]}"
            name = (len(wording) + 1, len(wording) + 1 + len(entity))
            seen = wording != WORDINGS[-1]
            if seen:
                texts.append(Text(text, group, entity, name, (name[1] + 1, len(text))))
            candidates = tuple(f" {v}" for v in VALUES)
            prompt = f"{wording} {entity}"
            questions.append(Question(prompt, candidates, value(i), group, entity, "seen" if seen else "unseen"))
    return UnlearningData(tuple(texts), tuple(questions))


def sae() -> Standard:
    """One latent for each entity and each wording; what is hidden has none."""
    made = Standard(LATENTS + len(ENTITIES), LATENTS)
    with torch.no_grad():
        made.W_enc.zero_()
        made.W_enc[:LATENTS] = torch.eye(LATENTS)
        made.W_dec.copy_(made.W_enc.t())
    return made.double().eval()


def subject(known: Sequence[str] = ENTITIES, hidden: Sequence[str] = ()) -> Subject:
    model = Linear(known, hidden).double().eval()
    return Subject(model, Words(), resolve(model, "site"), name="planted")


def context(own: Subject | None = None) -> SimpleNamespace:
    own = own or subject()
    batch = TokenBatch.of_rows([[0, 3, 1, 9], [2, 15, 0, 4]])
    other = TokenBatch.of_rows([[0, 16, 1, 17], [2, 15, 0, 18]])  # names plants alone
    source = SimpleNamespace(
        subject=own, token_batches=lambda split, rows: iter([other if split == "train" else batch])
    )
    config = SimpleNamespace(architecture=SimpleNamespace(use="standard"))
    return SimpleNamespace(sae=sae(), source=source, config=config, seed=0, warn=lambda _: None)


def seen(own: Subject | None = None) -> Seen:
    own, made, divided = own or subject(), sae(), data().divided(0.5, 0)
    site = Site(own, made.trained_positions)
    asked = [q for q in divided.questions if q.wording == "seen" and (q.group == FORGET or q.entity in divided.shown)]
    return Seen(site, made, divided.forget, divided.retain, [[0, 16, 1]], Examination(site, asked), Codes(made), 0, "standard")


@pytest.fixture(scope="session")
def planted() -> SimpleNamespace:
    """The makers above, which a test module cannot import from here."""
    return SimpleNamespace(
        data=data,
        sae=sae,
        subject=subject,
        context=context,
        seen=seen,
        entities=ENTITIES,
        forget=list(range(EACH)),
        each=EACH,
    )
