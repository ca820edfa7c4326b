"""`SparseAutoencoder`: what all architectures share. An architecture states only its difference, the gate.

    pre  = (x - b_dec) @ W_enc + b_enc      [batch, d_sae]
    code = gate(pre)                        rows of active latents
    x'   = code @ W_dec + b_dec             [batch, d_out]

A transcoder rebuilds a site other than the one it reads. It reads x as it is, since b_dec belongs to the other site, and may
have a linear path beside its latents: x' = code @ W_dec + b_dec + x @ W_skip^T.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.activations.trained_positions import TrainedPositions
from saekit.errors import OptionError, PluginError
from saekit.sae.code import Code, DenseCode, OfLatents, SparseCode
from saekit.sae.kernels import Pattern, decode_sparse, encode_selected, zero_shift

if TYPE_CHECKING:
    from saekit.protocols import Source
    from saekit.sae.saelens_format import SaeLensFormat

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
    """A dictionary with an encoder. A subclass implements `gate` and overrides whatever else differs.

    d_in, d_sae, d_out: widths of the input, the code and the reconstruction. An SAE that is given d_out is a
        transcoder, even if d_out equals d_in; without it, the SAE rebuilds its input.
    decoder_norm: "unit" keeps every decoder row at norm 1 and removes the gradient along the row (Bricken et al. 2023,
        Gao et al. 2024); "free" leaves rows alone.
    skip: whether a transcoder has the linear path W_skip (Paulo, Shabalin and Belrose 2025), which starts at zero.

    The parameters have the names and shapes of sae_lens: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out],
    b_dec [d_out], W_skip [d_out, d_in] (None without `skip`). W_enc is stored with each latent's column contiguous, since its
    gradient is computed latent by latent.

    Options are the keyword-only parameters of a subclass's constructor. It keeps each as an attribute of the same name, from
    which `options` reads it.

    trained_positions: on which positions of a text it was trained, which `sae/` keeps; see `TrainedPositions`.
    transcoder: whether d_out was given.
    reads_centred: whether the encoder subtracts b_dec from its input.
    """

    interop: ClassVar[SaeLensFormat]
    """What other libraries call the architecture. Not inherited: read it with `SaeLensFormat.of`."""
    l0_option: ClassVar[str | None] = None
    """The name of the option that sets how many latents are active in a row, such as `k`."""

    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, *, decoder_norm: DecoderNorm = "unit", skip: Skip = False
    ) -> None:
        super().__init__()
        if decoder_norm not in DECODER_NORMS:
            raise ValueError(f"decoder_norm must be one of {DECODER_NORMS}, not {decoder_norm!r}")
        SparseAutoencoder.check({"skip": skip}, transcoder=d_out is not None)
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self.transcoder = d_out is not None
        self.trained_positions = TrainedPositions()
        self.decoder_norm, self.skip = decoder_norm, skip
        self.reads_centred = not self.transcoder  # a transcoder's b_dec belongs to the other site
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in).t())  # [d_in, d_sae]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, sample: Tensor) -> None:
        """Random decoder rows, their transpose as the encoder, the mean of `sample` [n, d_out] as b_dec, and W_skip zero.

        The tied start is that of Gao et al. (2024, section 2.4 and appendix A.1) and leaves fewer latents dead. The encoder's
        columns start at norm `INITIAL_NORM`, and so do decoder rows that are left alone: after a small start, as in Conerly
        et al. (2024, update of April), latents grow into their direction instead of unlearning the one they were drawn with.
        A transcoder's encoder has random directions of its own, since its two sites share none."""
        rows = nn.functional.normalize(torch.randn(self.d_sae, self.d_out, generator=generator), dim=1)  # [d_sae, d_out]
        self.W_dec.copy_(rows if self.decoder_norm == "unit" else INITIAL_NORM * rows)
        columns = rows
        if self.transcoder:
            columns = nn.functional.normalize(torch.randn(self.d_sae, self.d_in, generator=generator), dim=1)  # [d_sae, d_in]
        self.W_enc.copy_(INITIAL_NORM * columns.t())
        for name, value in self.latent_parameters.items():
            getattr(self, name).fill_(value)
        self.b_dec.copy_(sample.mean(0))
        if self.W_skip is not None:
            self.W_skip.zero_()

    # --- from the input to the reconstruction -----------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Code:
        """The code of x [batch, d_in]."""
        return self.gate(x)

    def gate(self, x: Tensor) -> Code:
        """The code of the input x [batch, d_in], made in one of two ways:

        - sparse: take `pre = self.dense_pre(x)`, choose a `Pattern` of active entries, get their values from
          `self.pre_at(x, pre, pattern)`, and return `self.sparse_code(x, pattern, values)`;
        - dense: compute activations [batch, d_sae] from `self.pre_activations(x)`, with their gradient, and return
          `self.dense_code(x, activations)`.

        Both take `threshold`: what a pre-activation must exceed for its latent to fire here. State it if it is known.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement gate(x).")

    def decode(self, code: Code) -> Tensor:
        """What the latents rebuild: [batch, d_out]. Without `skip` this is the whole reconstruction."""
        if isinstance(code, SparseCode):
            return decode_sparse(code.values, self.W_dec, self.b_dec, code.pattern)
        return torch.addmm(self.b_dec, code.dense(), self.W_dec)

    def skipped(self, x: Tensor) -> Tensor:
        """What bypasses the latents: x @ W_skip^T [batch, d_out], or a scalar zero without `skip`."""
        return x.new_zeros(()) if self.W_skip is None else nn.functional.linear(x, self.W_skip)

    def reconstruct(self, x: Tensor, code: Code) -> Tensor:
        """The reconstruction [batch, d_out] from x [batch, d_in] and its code, including what bypasses the latents."""
        decoded = self.decode(code)
        return decoded if self.W_skip is None else decoded + self.skipped(x)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction: [batch, d_in] -> [batch, d_out]."""
        return self.reconstruct(x, self.encode(x))

    # --- what a gate is made of -------------------------------------------------------------------------------------------

    def centred(self, x: Tensor) -> Tensor:
        """x minus b_dec, or x as it is for a transcoder: [batch, d_in]."""
        return x - self.b_dec if self.reads_centred else x

    def encoder_input(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(what the encoder multiplies by W_enc [batch, d_in], what it adds to the product [d_sae]); `bias` is its own [d_sae].

        The first carries the value of b_dec alone. The gradient to b_dec goes through the second, which saves a product with
        W_enc."""
        if not self.reads_centred:
            return x, bias
        shift = zero_shift(self.b_dec, self.W_enc)
        return x - self.b_dec.detach(), shift if bias is None else bias + shift

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations of some latents (all if None) for x [batch, d_in], with gradients: [batch, n]."""
        if latents is None:
            centred, bias = self.encoder_input(x, self.b_enc)
            assert bias is not None  # an architecture without b_enc overrides this
            return torch.addmm(bias, centred, self.W_enc)  # [batch, d_sae]
        return torch.addmm(self.b_enc[latents], self.centred(x), self.W_enc[:, latents])

    @torch.no_grad()
    def dense_pre(self, x: Tensor) -> Tensor:
        """All pre-activations [batch, d_sae], without a gradient: the one dense product of a sparse step."""
        centred = self.centred(x)
        return centred @ self.W_enc if self.b_enc is None else torch.addmm(self.b_enc, centred, self.W_enc)

    def pre_at(self, x: Tensor, pre: Tensor, pattern: Pattern) -> Tensor:
        """The entries of `pre` [batch, d_sae] at `pattern` [nnz], with a gradient."""
        if pattern.k:
            chosen = pre.gather(1, pattern.indices.view(-1, pattern.k)).reshape(-1)  # [nnz]
        else:
            chosen = pre[pattern.rows, pattern.indices]  # [nnz]
        centred, bias = self.encoder_input(x, self.b_enc)
        return encode_selected(centred, self.W_enc, bias, chosen, pattern)

    def sparse_code(
        self,
        x: Tensor,
        pattern: Pattern,
        values: Tensor,
        gates: Tensor | None = None,
        *,
        threshold: Tensor | float | None = None,
    ) -> SparseCode:
        """The code with `values` [nnz] at `pattern`.

        gates: [nnz], see `SparseCode.gates`.
        threshold: what a pre-activation must exceed for its latent to fire: a number, or [d_sae], [batch, 1] or
            [batch, d_sae]. `Code.margin` counts from it. By default it is the smallest pre-activation in the row whose
            latent fires, which is right if all latents of a row share one threshold, but costs a dense product.
        """
        margins = self._margins(x, SparseCode(pattern, values.detach()), threshold)
        return SparseCode(pattern, values, lambda wanted: self.pre_activations(x, wanted), gates, margins)

    def dense_code(self, x: Tensor, activations: Tensor, *, threshold: Tensor | float | None = None) -> DenseCode:
        """The code as a dense matrix: activations [batch, d_sae], with their gradient. For `threshold` see `sparse_code`."""
        margins = self._margins(x, DenseCode(activations.detach()), threshold)
        return DenseCode(activations, lambda wanted: self.pre_activations(x, wanted), margins)

    def _margins(self, x: Tensor, active: Code, threshold: Tensor | float | None) -> OfLatents:
        """What `Code.margin` calls. active: the code without a gradient."""

        def margins(latents: Tensor | None) -> Tensor:
            least = self._smallest_active(x, active) if threshold is None else threshold
            if isinstance(least, Tensor):
                least = least.detach()
                if latents is not None and least.dim() and least.shape[-1] > 1:
                    least = least[..., latents]
            return self.pre_activations(x, latents) - least  # [batch, n]

        return margins

    @torch.no_grad()
    def _smallest_active(self, x: Tensor, active: Code) -> Tensor:
        """The smallest pre-activation in each row whose latent fires: [batch, 1]. If none does, the largest, at least 0."""
        pre = self.pre_activations(x)  # [batch, d_sae]
        rows, latents, _ = active.nonzero()
        least = pre.amax(1).clamp_min(0.0)  # [batch]
        return least.scatter_reduce(0, rows, pre[rows, latents], "amin", include_self=False).unsqueeze(1)

    # --- around training --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Called after backward. With unit decoder rows, removes the gradient along each row: normalising would undo that
        part of the step, and Adam's moments would keep it."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            # Unlike (grad * W_dec).sum(1), a batched product of rows allocates nothing of the dictionary's size.
            along = torch.bmm(self.W_dec.grad.unsqueeze(1), self.W_dec.unsqueeze(2)).squeeze(2)  # [d_sae, 1]
            self.W_dec.grad.addcmul_(self.W_dec, along, value=-1.0)

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Called after each optimiser step, and once before the first."""
        if self.decoder_norm == "unit":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min_(1e-12))

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """Turn an SAE of `scale * x` into the SAE of x that rebuilds the same: activations and biases shrink by `scale`.

        This is right for gates that are homogeneous (gate(c * z) = c * gate(z) for c > 0), such as ReLU and top-k. Others
        also divide whatever is in units of the activations: thresholds, caps."""
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    @torch.no_grad()
    def unscale(self, scale: float, target_scale: float) -> None:
        """Turn an SAE that makes `target_scale * target` of `scale * x` into one that makes the target of x.

        Activations are then in the target's units, so decoder rows keep their norm. For an SAE, whose two scales are the
        same, this is `rescale`."""
        if scale != target_scale:
            self.W_enc.mul_(scale / target_scale)
            if self.W_skip is not None:
                self.W_skip.mul_(scale / target_scale)
        self.rescale(target_scale)

    def calibrate(self, batches: Iterator[Tensor]) -> dict[str, float]:
        """Called once, after the last step and before the SAE is written: set what followed training only on average, such as
        a running threshold, to what it should be for the weights as they are now.

        batches: [n, d_in] each, training activations in the units that the SAE then reads; harvested only if they are taken.
        Returns the values that were set by name, which `sae/cfg.json` and the summary keep; empty if there is nothing to set,
        as here. It draws no random numbers, so that a resumed run ends at the same bits."""
        return {}

    def path_state(self) -> dict[str, Any]:
        """Plain values that decide by which of several ways the code is computed. A checkpoint keeps them, so that a resumed
        run rounds in the same way. Empty unless the architecture has several ways."""
        return {}

    def load_path_state(self, state: dict[str, Any]) -> None:
        """Restore what `path_state` returned."""

    # --- starting from an SAE of another architecture ---------------------------------------------------------------------

    @classmethod
    def built_on(
        cls, name: str, base: SparseAutoencoder, options: Mapping[str, Any], source: Source
    ) -> tuple[dict[str, Any], int] | None:
        """How `architecture.from` begins with a trained SAE of another architecture: (options to build with, latents to add).

        None, the default, if this architecture cannot. name: the qualified name of the base's architecture. options: those of
        the run file, checked and completed. source: opened. What is built then gets `take_over(base)`, and its `prepare`."""
        return None

    @torch.no_grad()
    def take_over(self, base: SparseAutoencoder) -> None:
        """Compute what `base`, with as many latents or fewer, computes: take its tensors, and leave the latents after its own
        silent on every input, with a column of zeros in the encoder."""
        self.reads_centred = base.reads_centred
        ours, theirs = self.state_dict(), base.state_dict()
        self.W_enc.zero_()
        self.W_dec.zero_()
        for name, tensor in theirs.items():
            part = tuple(slice(0, n) for n in tensor.shape)  # its latents are the first
            ours[name][part] = tensor

    # --- what others ask of an architecture -------------------------------------------------------------------------------

    @classmethod
    def check(cls, options: Mapping[str, Any], *, transcoder: bool) -> None:
        """OptionError if these options cannot be those of a transcoder, or of an SAE that is not one.

        Asked of the class before a run loads anything, with every option checked and completed."""
        if options.get("skip") and not transcoder:
            raise OptionError(
                "skip",
                "adds a linear map from what is read to what is rebuilt, which would learn the identity unless they are two "
                "different sites.",
            )

    @classmethod
    def option_names(cls) -> list[str]:
        """The names of the options, those that a base class takes as well first."""
        own, names = _keyword_only(cls), dict[str, None]()
        for architecture in reversed(cls.__mro__):
            names |= dict.fromkeys(name for name in _keyword_only(architecture) if name in own)
        return list(names)

    def options(self) -> dict[str, Any]:
        """The options from which this SAE can be built again, which `sae/cfg.json` keeps.

        Each is read from the attribute of its name, or from `initial_NAME` if a tensor has that name. `skip` is left out
        if it is false. Raises PluginError if the constructor has not kept an option."""
        kept = {name: _kept(self, name) for name in self.option_names()}
        return {name: value for name, value in kept.items() if name != "skip" or value}

    @property
    def latent_parameters(self) -> dict[str, float]:
        """The parameters [d_sae] by name, each with the value that a new latent starts with.

        `initialise` fills them with it, and a callback that revives a dead latent puts it back."""
        return {} if self.b_enc is None else {"b_enc": 0.0}

    @property
    def fixed_latents(self) -> Tensor:
        """Latents [n] whose decoder rows nothing may change, callbacks included. None unless an architecture says so."""
        return torch.empty(0, dtype=torch.long, device=self.W_dec.device)

    @torch.no_grad()
    def silence(self, latents: Tensor) -> None:
        """Let these latents [n] be silent on every input: a column of zeros in the encoder, and what a new latent starts with
        in `latent_parameters`. Their decoder rows stay."""
        self.W_enc[:, latents] = 0.0
        for name, value in self.latent_parameters.items():
            getattr(self, name)[latents] = value

    @torch.no_grad()
    def shift_pre_activations(self, by: Tensor | float) -> None:
        """Add `by` ([d_sae], or one number) to the pre-activations of every input, by moving the encoder's biases.

        The result is that of adding `by` to x @ W_enc, so a negative `by` makes latents fire less."""
        self.b_enc.copy_(self.b_enc.double() + by)


def _kept(sae: SparseAutoencoder, name: str) -> Any:
    for attribute in (f"initial_{name}", name):
        if hasattr(sae, attribute) and not isinstance(getattr(sae, attribute), Tensor):
            return getattr(sae, attribute)
    raise PluginError(
        f"{type(sae).__name__} does not keep its option {name!r}, so it could not be loaded again. In its constructor "
        f"write self.{name} = {name}, or self.initial_{name} = {name} if a tensor is called {name}."
    )


def _keyword_only(architecture: type) -> list[str]:
    parameters = inspect.signature(architecture.__init__).parameters.values()  # type: ignore[misc]
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
