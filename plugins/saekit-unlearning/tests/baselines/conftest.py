"""A random GPT-2 of three small blocks with the organism's tokenizer, and a few of the organism's facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saekit_unlearning.baselines.material import Material
from saekit_unlearning.data import UnlearningData, organism_data
from saekit_unlearning.passages import Site

from saekit import Subject, TrainedPositions, load_subject, organism
from saekit.testing.tiny import tiny_network

ENTITIES = 4
"""Of each domain."""


@pytest.fixture(scope="session")
def facts() -> UnlearningData:
    """A few entities of each domain, of whose near ones half are shown."""
    data, some = organism_data(), {e for domain in organism.DOMAINS for e in organism.entities(domain)[:ENTITIES]}
    texts = tuple(text for text in data.texts if text.entity in some)
    questions = tuple(question for question in data.questions if question.entity in some)
    return replace(data, texts=texts, questions=questions).divided(0.5, 0, ["near"])


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    place = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(organism.directory())
    model = tiny_network("gpt2", len(tokenizer), initializer_range=0.2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model.save_pretrained(place)  # type: ignore[operator]
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> Subject:
    """After the second of three blocks, in float64. No test changes it."""
    return load_subject(str(tiny_directory), "blocks.1.hook_out", dtype=torch.float64)


@pytest.fixture(scope="session")
def material(tiny: Subject, facts: UnlearningData) -> Material:
    general = torch.randint(2, 2000, (12, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return Material.of(Site(tiny, TrainedPositions()), facts.forget, facts.retain, general, batch=8, general_batch=4)
