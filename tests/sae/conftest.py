"""SAEs with weights that nothing has tidied up, of every architecture that is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import saekit
from saekit.plugins import Registry

D_IN, D_SAE = 16, 64


@pytest.fixture
def random_sae() -> Callable[..., saekit.SparseAutoencoder]:
    """`random_sae(NAME, option=...)`: every tensor drawn, decoder rows of many norms, about a third of the latents
    active. d_out (of a transcoder) and centred (whether b_dec is taken from the input) may be given as well."""

    def make(name: str, *, d_out: int | None = None, centred: bool | None = None, seed: int = 0, **options: Any):
        component = Registry().find("architecture", name)
        sae = component.build(component.validate({"decoder_norm": "free", **options}, name), D_IN, D_SAE, d_out)
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in sae.state_dict().items():
            drawn = 0.6 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn.abs() if "threshold" in key else drawn)
        if centred is not None:
            sae.reads_centred = centred
        return sae.requires_grad_(False).eval()

    return make


@pytest.fixture
def inputs() -> torch.Tensor:
    """[200, D_IN]"""
    return 1.5 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(7))
