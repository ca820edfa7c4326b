"""Shared by the tests: small random encoders on disk, and judged responses whose criteria are planted in their tokens."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel

SMALL = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random RoBERTa of 16 dimensions."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("roberta")
    config = RobertaConfig(
        **SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40
    )
    RobertaModel(config).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random GPT-2 of 16 dimensions."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("gpt2")
    GPT2Model(GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=40)).save_pretrained(place)
    return place


def responses(n: int, criteria: int, seed: int = 0, tokens: int = 8) -> list[dict[str, Any]]:
    """Judged responses: criterion c holds where token 5 + c is among them; three annotators err in one vote of ten."""
    draws = torch.Generator().manual_seed(seed)
    good = torch.rand(n, criteria, generator=draws) < 0.5
    ids = torch.randint(5 + criteria, 60, (n, tokens), generator=draws)
    ids[:, :criteria] = torch.where(good, torch.arange(5, 5 + criteria), ids[:, :criteria])
    wrong = torch.rand(n, 3, criteria, generator=draws) < 0.1
    votes = (good[:, None] ^ wrong).float()
    votes[torch.rand(n, 3, criteria, generator=draws) < 0.05] = torch.nan
    mask = torch.ones(tokens, dtype=torch.long)
    return [{"input_ids": ids[i], "attention_mask": mask, "votes": votes[i]} for i in range(n)]


@pytest.fixture
def kit() -> types.SimpleNamespace:
    """The functions above: test files import nothing from one another."""

    def loader(n: int, criteria: int, batch_size: int, seed: int = 0, shuffle: bool = True) -> DataLoader[Any]:
        rows: Any = responses(n, criteria, seed)
        return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)

    return types.SimpleNamespace(responses=responses, loader=loader)
