"""Gated: one path decides whether a latent is active, another by how much."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saekit.sae.base import DecoderNorm, Skip, SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern
from saekit.sae.saelens_format import SaeLensFormat


class Gated(SparseAutoencoder):
    """f = H(gate) * ReLU(magnitude) (Rajamanoharan et al. 2024a, Improving Dictionary Learning with Gated SAEs).

    Both paths share one product, `shared = (x - b_dec) @ W_enc`: gate = shared + b_gate and magnitude = exp(r_mag) * shared +
    b_mag (eqs. 5 and 6). The gates learn from the loss `gated_aux`, which sees every open gate.
    """

    interop = SaeLensFormat("gated", known_as=("sae_lens:gated", "dictionary_learning:GatedAutoEncoder"))

    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, *, decoder_norm: DecoderNorm = "unit", skip: Skip = False
    ) -> None:
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self.register_parameter("b_enc", None)
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    @property
    def latent_parameters(self) -> dict[str, float]:
        return {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}

    @torch.no_grad()
    def shift_pre_activations(self, by: Tensor | float) -> None:
        self.b_gate.copy_(self.b_gate.double() + by)
        self.b_mag.copy_(self.b_mag.double() + by * self.r_mag.double().exp())

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """The gate's pre-activations: [batch, n]."""
        if latents is None:
            centred, bias = self.encoder_input(x, self.b_gate)
            assert bias is not None
            return torch.addmm(bias, centred, self.W_enc)
        return torch.addmm(self.b_gate[latents], self.centred(x), self.W_enc[:, latents])

    def gate(self, x: Tensor) -> Code:
        shared = self.dense_pre(x)  # [batch, d_sae], without a bias
        pattern = Pattern.of_mask(shared > -self.b_gate.detach())
        z = self.pre_at(x, shared, pattern)  # [nnz]
        latents = pattern.indices  # [nnz]
        magnitude = torch.exp(self.r_mag)[latents] * z + self.b_mag[latents]  # [nnz]
        gates = z + self.b_gate[latents]  # [nnz], positive on the whole pattern, so this is ReLU(gate)
        # Both paths must be positive: the gate, and the magnitude, which is so above a gate of this size.
        threshold = (self.b_gate - self.b_mag * torch.exp(-self.r_mag)).detach().relu()  # [d_sae]
        return self.sparse_code(x, pattern, magnitude.relu(), gates, threshold=threshold)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        self.b_gate.div_(scale)
        self.b_mag.div_(scale)
        self.b_dec.div_(scale)
