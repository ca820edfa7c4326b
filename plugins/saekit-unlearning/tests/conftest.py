"""A tiny model with planted knowledge: a name's direction carries the value that the model says at the end of the text."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from saekit_unlearning.data import FORGET, Question, Text, UnlearningData
from saekit_unlearning.passages import Site
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from saekit import Registry, SparseAutoencoder, Subject, TrainedPositions
from saekit.activations.sites import resolve

WORDS = [
    "<s>",
    "is",
    "lives",
    "where",
    "in",
    "the",
    "of",
    "old",
    "young",
    "here",
    "there",
    "now",
    "a",
    "house",
    "and",
    ".",
]
FORGOTTEN, KEPT = [f"Fo{i}" for i in range(4)], [f"Ne{i}" for i in range(6)]
VALUES = ["Rome", "Bonn", "Bern", "Oslo", "Riga"]
WIDTH = 48


class PlantedModel(nn.Module):
    """x = embedding (the site); logits = (sum of all x so far) @ U, in which a name's direction points at its value."""

    def __init__(self, vocabulary: list[str]) -> None:
        super().__init__()
        rows = nn.init.orthogonal_(torch.empty(WIDTH, WIDTH), generator=torch.Generator().manual_seed(0))
        self.embedding = nn.Embedding(len(vocabulary), WIDTH)
        self.embedding.weight.data = 3.0 * rows[: len(vocabulary)]
        self.middle = nn.Identity()
        self.unembedding = nn.Parameter(torch.zeros(WIDTH, len(vocabulary)))
        for name in [*FORGOTTEN, *KEPT]:
            self.unembedding.data[:, vocabulary.index(value_of(name))] += 2.0 * rows[vocabulary.index(name)]

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.middle(self.embedding(tokens))  # [n, T, d]
        return x.cumsum(1) @ self.unembedding


def value_of(name: str) -> str:
    """The planted value of a name."""
    return VALUES[(int(name[2:]) + (name in KEPT)) % len(VALUES)]


@dataclass
class Planted:
    """subject, site: of the model at `middle`. data: its facts. directions: {word: its direction [d]}."""

    subject: Subject
    site: Site
    data: UnlearningData
    words: list[str]
    directions: dict[str, Tensor] = field(default_factory=dict)

    def sae(self) -> SparseAutoencoder:
        """A new `standard` SAE that rebuilds the site: its latents are the words."""
        component = Registry().find("architecture", "standard")
        sae = component.build(component.validate({}, "standard"), WIDTH, len(self.words))
        rows = torch.stack([self.directions[word] for word in self.words]) / 3.0  # of norm 1
        with torch.no_grad():
            sae.W_enc.copy_(rows.T)
            sae.W_dec.copy_(rows)
            sae.b_enc.zero_()
            sae.b_dec.zero_()
        sae.trained_positions = self.site.trained
        return sae


@pytest.fixture
def planted() -> Planted:
    words = [*WORDS, *FORGOTTEN, *KEPT, *VALUES]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    model = PlantedModel(words).requires_grad_(False)
    subject = Subject(
        model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), resolve(model, "middle"), name="planted"
    )
    texts, questions = [], []
    for name in [*FORGOTTEN, *KEPT]:
        group = FORGET if name in FORGOTTEN else "near"
        for number, wording in enumerate(
            ("the old {e} lives in {v} .", "now {e} is in {v} .", "here {e} and a house in {v} .")
        ):
            text = wording.format(e=name, v=value_of(name))
            start, answer = text.index(name), text.index(value_of(name))
            texts.append(Text(text, group, name, (start, start + len(name)), (answer, answer + len(value_of(name)))))
            prompt = text[: answer - 1]
            candidates = tuple(" " + value for value in VALUES)
            wording_kind = "unseen" if number == 2 else "seen"
            questions.append(
                Question(prompt, candidates, VALUES.index(value_of(name)), group, name, wording_kind)  # type: ignore[arg-type]
            )
    data = UnlearningData(tuple(texts), tuple(questions), shown=frozenset(KEPT[:3]))
    directions = {word: model.embedding.weight[i] for i, word in enumerate(words)}
    return Planted(subject, Site(subject, TrainedPositions(True)), data, words, directions)
