"""`SparseAutoencoder`: what every architecture shares. An architecture states only its difference, the gate.

    pre  = (x - b_dec) @ W_enc + b_enc      [batch, d_sae]
    code = gate(pre)                        rows of active latents
    x'   = code @ W_dec + b_dec             [batch, d_out]

A transcoder rebuilds another site than it reads: it takes x as it is, since b_dec lives elsewhere, and may have a linear
path beside its latents, x' = code @ W_dec + b_dec + x @ W_skip^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.errors import OptionError
from saekit.sae.code import Code, DenseCode, SparseCode
from saekit.sae.kernels import Pattern, decode_sparse, encode_selected, zero_shift

DECODER_NORMS = ("unit", "free")
INITIAL_NORM = 0.1
DecoderNorm = Annotated[
    Literal["unit", "free"], Field(description="unit: decoder rows are kept at norm 1; free: left alone.")
]
"""The type of the option `decoder_norm`, for the constructors of architectures."""
Skip = Annotated[
    bool, Field(description="For a transcoder: add a learned linear map of the input to what the latents rebuild.")
]
"""The type of the option `skip`, for the constructors of architectures."""


class SparseAutoencoder(nn.Module):
    """A dictionary with an encoder. Subclasses implement `gate` (and override what differs).

    d_in, d_sae, d_out: widths of what is read, of the code, and of what is rebuilt. A transcoder is one that is given its
    d_out, though it be equal to d_in; without it, what is read is rebuilt.
    decoder_norm: "unit" keeps every decoder row at norm 1 (as Bricken et al. 2023 and Gao et al. 2024 do, with the
    gradient along the row removed), "free" leaves it alone.
    skip: whether a transcoder has the linear path W_skip (Paulo, Shabalin and Belrose 2025). It begins at zero.

    Parameters have SAELens's names and shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out],
    W_skip [d_out, d_in] (None without it).
    W_enc lies latent-major in memory (its transpose is contiguous), since its gradient is made latent by latent.
    """

    saelens_name: ClassVar[str | None] = None
    """The architecture of sae_lens that computes the same from what `to_saelens` gives; None where it has none."""
    saelens_transcoder: ClassVar[str | None] = None
    """The same for a transcoder."""
    saelens_skip_transcoder: ClassVar[str | None] = None
    """The same for a transcoder with `skip`."""
    known_as: ClassVar[tuple[str, ...]] = ()
    """What other libraries call the architectures that this one can take over: `("sae_lens:topk",)`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass with another gate computes something else, so it inherits no name in other libraries."""
        super().__init_subclass__(**kwargs)
        for name in ("saelens_name", "saelens_transcoder", "saelens_skip_transcoder", "known_as"):
            if name not in vars(cls):
                setattr(cls, name, getattr(SparseAutoencoder, name))

    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, *, decoder_norm: DecoderNorm = "unit", skip: Skip = False
    ) -> None:
        super().__init__()
        if decoder_norm not in DECODER_NORMS:
            raise ValueError(f"decoder_norm must be one of {DECODER_NORMS}, not {decoder_norm!r}")
        if skip and d_out is None:
            raise OptionError(
                "skip", "is for a transcoder. From what is read to itself a linear path would learn the identity."
            )
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self.transcoder = d_out is not None
        self.decoder_norm = decoder_norm
        self.reads_centred = not self.transcoder  # a transcoder's b_dec lives at another site
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in).t())  # [d_in, d_sae]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None

    @property
    def fixed_latents(self) -> Tensor:
        """Latents [n] whose decoder rows nothing may move, be it a callback; none unless an architecture says so."""
        return torch.empty(0, dtype=torch.long, device=self.W_dec.device)

    def path_state(self) -> dict[str, Any]:
        """Plain values that decide how, not what, is computed; a checkpoint keeps them, so that a resumed run rounds
        alike. Empty unless the architecture chooses between ways of computing."""
        return {}

    def load_path_state(self, state: dict[str, Any]) -> None:
        """Restore what `path_state` gave."""

    def options(self) -> dict[str, Any]:
        """The options this SAE was built with, so that it can be built again: what `sae/cfg.json` keeps."""
        own: dict[str, Any] = {"decoder_norm": self.decoder_norm}
        # Left out where there is none, so that an architecture that does not take `skip` need not know of it.
        return own if self.W_skip is None else {**own, "skip": True}

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, sample: Tensor) -> None:
        """Random decoder rows, the encoder their transpose, b_dec the mean of `sample` [n, d_out], W_skip zero.

        The tied start is that of Gao et al. (2024, section 2.4 and appendix A.1), which has fewer dead latents. The
        encoder's columns begin at norm `INITIAL_NORM`, and so do decoder rows that are left alone: a small start, as in
        Conerly et al. (2024, update of April), lets latents grow towards what they are for instead of first unlearning
        what they were drawn as. A transcoder's encoder has random directions of its own: the two sites share none."""
        rows = nn.functional.normalize(torch.randn(self.d_sae, self.d_out, generator=generator), dim=1)
        self.W_dec.copy_(rows if self.decoder_norm == "unit" else INITIAL_NORM * rows)
        columns = rows
        if self.transcoder:
            columns = nn.functional.normalize(torch.randn(self.d_sae, self.d_in, generator=generator), dim=1)
        self.W_enc.copy_(INITIAL_NORM * columns.t())
        if self.b_enc is not None:  # an architecture may have other biases in its place
            self.b_enc.zero_()
        self.b_dec.copy_(sample.mean(0))
        if self.W_skip is not None:
            self.W_skip.zero_()

    def centred(self, x: Tensor) -> Tensor:
        """x less the decoder's bias, [batch, d_in]; of a transcoder, x as it is."""
        return x - self.b_dec if self.reads_centred else x

    def encoder_input(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the encoder multiplies [batch, d_in], and what it adds [d_sae] to that product, for the encoder's own `bias`.

        The first carries b_dec's value only; its gradient goes through the second, which saves a product with W_enc."""
        if not self.reads_centred:
            return x, bias
        shift = zero_shift(self.b_dec, self.W_enc)
        return x - self.b_dec.detach(), shift if bias is None else bias + shift

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations of some latents (all if None), with gradients: [batch, n] for x of [batch, d_in]."""
        if latents is None:
            centred, bias = self.encoder_input(x, self.b_enc)
            assert bias is not None  # as b_enc is not, or this is overridden
            return torch.addmm(bias, centred, self.W_enc)
        return torch.addmm(self.b_enc[latents], self.centred(x), self.W_enc[:, latents])

    def encode(self, x: Tensor) -> Code:
        """The code of x [batch, d_in]."""
        return self.gate(x)

    def gate(self, x: Tensor) -> Code:
        """From the input to the code. Two ways to make one:

        - compressed: `pre = self.dense_pre(x)`, a `Pattern` of the active entries, their values from
          `self.pre_at(x, pre, pattern)`, and `self.sparse_code(x, pattern, values)`;
        - whole: `self.dense_code(x, activations)`, with activations [batch, d_sae] that carry their own gradient, made from
          `self.pre_activations(x)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement gate(x).")

    @torch.no_grad()
    def dense_pre(self, x: Tensor) -> Tensor:
        """All pre-activations without a gradient: [batch, d_sae]. The one dense product of a sparse step."""
        centred = self.centred(x)
        return centred @ self.W_enc if self.b_enc is None else torch.addmm(self.b_enc, centred, self.W_enc)

    def pre_at(self, x: Tensor, pre: Tensor, pattern: Pattern) -> Tensor:
        """The entries of `pre` [batch, d_sae] at `pattern`, with their gradient: [nnz]."""
        if pattern.k:
            chosen = pre.gather(1, pattern.indices.view(-1, pattern.k)).reshape(-1)
        else:
            chosen = pre[pattern.rows, pattern.indices]
        centred, bias = self.encoder_input(x, self.b_enc)
        return encode_selected(centred, self.W_enc, bias, chosen, pattern)

    def sparse_code(self, x: Tensor, pattern: Pattern, values: Tensor, gates: Tensor | None = None) -> SparseCode:
        """The code with `values` [nnz] at `pattern`; see `SparseCode.gates` for the last."""
        return SparseCode(pattern, values, lambda wanted: self.pre_activations(x, wanted), gates)

    def dense_code(self, x: Tensor, activations: Tensor) -> DenseCode:
        """The code held whole: activations [batch, d_sae], with their gradient."""
        return DenseCode(activations, lambda wanted: self.pre_activations(x, wanted))

    def decode(self, code: Code) -> Tensor:
        """What the latents rebuild: [batch, d_out]. Without `skip` it is the whole reconstruction."""
        if isinstance(code, SparseCode):
            return decode_sparse(code.values, self.W_dec, self.b_dec, code.pattern)
        return torch.addmm(self.b_dec, code.dense(), self.W_dec)

    def skipped(self, x: Tensor) -> Tensor:
        """What goes past the latents: x @ W_skip^T, [batch, d_out]; a zero without `skip`."""
        return x.new_zeros(()) if self.W_skip is None else nn.functional.linear(x, self.W_skip)

    def reconstruct(self, x: Tensor, code: Code) -> Tensor:
        """The reconstruction from x [batch, d_in] and its code, with what goes past the latents: [batch, d_out]."""
        decoded = self.decode(code)
        return decoded if self.W_skip is None else decoded + self.skipped(x)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction: [batch, d_in] -> [batch, d_out]."""
        return self.reconstruct(x, self.encode(x))

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Called after backward. With unit decoder rows: removes each row's gradient along the row, which the
        normalisation would undo anyway and which would only fill Adam's moments."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            # A batched product of rows: unlike (grad * W_dec).sum(1), it writes nothing of the dictionary's size.
            along = torch.bmm(self.W_dec.grad.unsqueeze(1), self.W_dec.unsqueeze(2)).squeeze(2)  # [d_sae, 1]
            self.W_dec.grad.addcmul_(self.W_dec, along, value=-1.0)

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Called after the optimiser's step, and once before the first."""
        if self.decoder_norm == "unit":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min_(1e-12))

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """From an SAE of `scale * x` to the SAE of x that rebuilds the same: activations and biases shrink by `scale`.

        Holds for gates that are homogeneous (a positive factor passes through them): ReLU and top-k are."""
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    @torch.no_grad()
    def unscale(self, scale: float, target_scale: float) -> None:
        """From an SAE that makes `target_scale * target` of `scale * x` to the one that makes the target of x.

        Activations are then in the target's units, so that decoder rows keep their norm; for an SAE, whose two scales
        are one, this is `rescale`."""
        if scale != target_scale:
            self.W_enc.mul_(scale / target_scale)
            if self.W_skip is not None:
                self.W_skip.mul_(scale / target_scale)
        self.rescale(target_scale)

    @property
    def saelens_architecture(self) -> str | None:
        """What sae_lens calls this very SAE, or None where it has no counterpart there.

        Of a transcoder without `skip` whose two sites are equally wide, an SAE that does not take b_dec from its input
        computes the same."""
        if self.W_skip is not None:
            return self.saelens_skip_transcoder
        if not self.transcoder:
            return self.saelens_name
        return self.saelens_transcoder or (self.saelens_name if self.d_out == self.d_in else None)

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(the architecture's own keys of cfg.json, tensors) in sae_lens's layout."""
        cfg = {"apply_b_dec_to_input": self.reads_centred}
        tensors: dict[str, Tensor] = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip
        return cfg, tensors

    @classmethod
    def options_from_saelens(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an SAE that another library made, from its keys in sae_lens's words (`k`, ...).

        Called for the names in `known_as`. Decoder rows are left at the norms they have."""
        return {"decoder_norm": "free"}

    @classmethod
    def state_from_saelens(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict, from tensors in sae_lens's layout: the way back of `to_saelens`."""
        return dict(tensors)
