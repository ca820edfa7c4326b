"""That handing Adam a transposed parameter changes no bit of it, and that it is not copied."""

import pytest
import torch
from torch import nn

from saekit.training.optimiser import Adam


@pytest.mark.parametrize("fused", [True, False])
def test_equals_torch_adam(fused: bool) -> None:
    def trained(optimiser: type[torch.optim.Adam]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        parameters = [
            nn.Parameter(torch.randn(7, 5, generator=generator).t()),  # lies transposed, as W_enc does
            nn.Parameter(torch.randn(4, 6, generator=generator)),
            nn.Parameter(torch.randn(3, generator=generator)),
            nn.Parameter(torch.randn(6, 6, generator=generator)[::2, ::2]),  # contiguous neither way
        ]
        adam = optimiser(parameters, lr=0.01, betas=(0.8, 0.95), fused=fused)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            parameters[0].grad = parameters[0].grad.t().contiguous().t()
            adam.step()
        moments = [adam.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq", "step")]
        return [p.detach().contiguous() for p in parameters] + [m.contiguous() for m in moments]

    for ours, theirs in zip(trained(Adam), trained(torch.optim.Adam), strict=True):
        assert torch.equal(ours, theirs)
