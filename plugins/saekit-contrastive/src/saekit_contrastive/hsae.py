"""`hsae`: an SAE of any gating some of whose decoder rows are concept vectors, fixed for good."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from saekit import Choice, ComponentError, Kind, OptionError, RunContext, SparseAutoencoder
from saekit_contrastive.vectors import METHODS, checked, concept_columns, read_vectors, vectors_of

_NAMES_ELSEWHERE = ("saelens_name", "saelens_transcoder", "saelens_skip_transcoder", "known_as")


class HSAE(SparseAutoencoder):
    """An SAE whose latents in `latents` decode to concept vectors that training never moves.

    Everything else is the `base` architecture's: gate, kernels, options, what other libraries call it. An instance is of a
    class made of this one and the base's, so that it is an instance of both.

    The fixed rows have norm 1 whatever `decoder_norm` the base has, receive no gradient, and are put back after every step,
    so that they equal the vectors to the bit. They are rows of W_dec like any other: nothing of them is saved beside it.
    A fixed row alone makes no latent fire: that takes a loss such as `concept`, whose `latents` are to be the same.
    """

    fixed: Tensor
    _latents: Tensor

    def __new__(cls, *args: Any, base: Choice | None = None, **options: Any) -> HSAE:
        """`cls` is already made of both where torch or `copy` makes an instance without calling the constructor."""
        return super().__new__(cls if base is None else _over(base.component.load()))

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        base: Annotated[
            Choice, Kind("architecture"), Field(description="The architecture whose rows are fixed, with its options.")
        ] = Choice(use="topk"),
        fixed_vectors: Annotated[
            str,
            Field(
                description="A .npy or .safetensors file of vectors [n, width], or how to compute one for each concept from "
                "labelled sequences: difference_of_means or logistic_probe."
            ),
        ] = "difference_of_means",
        concepts: Annotated[
            list[str] | None,
            Field(
                min_length=1, description="The labels to compute vectors for, by name; all of the source's by default."
            ),
        ] = None,
        sequences: Annotated[
            int, Field(gt=0, description="Labelled training sequences that vectors are computed from.")
        ] = 512,
        latents: Annotated[
            list[int] | None,
            Field(min_length=1, description="Which latents have the vectors' rows; the first ones by default."),
        ] = None,
    ) -> None:
        try:
            super().__init__(d_in, d_sae, d_out, **base.options)
        except ComponentError as error:
            raise error.within("base") from error
        if concepts is not None and fixed_vectors not in METHODS:
            raise OptionError(
                "concepts", "names labels to compute vectors for, but fixed_vectors is a file. Leave one of them out."
            )
        self._base = base.component.qualified_name
        self.fixed_vectors, self.concepts, self.sequences, self.wanted = fixed_vectors, concepts, sequences, latents
        # Not in the state dict, whose W_dec has the rows: what other libraries open has no place for more.
        self.register_buffer("fixed", self.W_dec.new_empty(0, self.d_out), persistent=False)  # [n, d_out]
        self.register_buffer("_latents", torch.empty(0, dtype=torch.long), persistent=False)  # [n]
        if latents is not None:
            _check_latents(latents, d_sae)
            self._hold(latents)
        self.register_load_state_dict_post_hook(_hold_what_was_loaded)

    @property
    def fixed_latents(self) -> Tensor:
        """The latents whose rows are the vectors, in their order: [n]."""
        return self._latents

    def options(self) -> dict[str, Any]:
        return {
            "base": {"use": self._base, **super().options()},
            "fixed_vectors": self.fixed_vectors,
            "concepts": self.concepts,
            "sequences": self.sequences,
            "latents": self.fixed_latents.tolist() or self.wanted,
        }

    def prepare(self, context: RunContext) -> None:
        """Fix the rows, before the first step. UsageError where the vectors cannot be had, or do not fit."""
        if self.fixed_vectors not in METHODS:
            self.fix(read_vectors(self.fixed_vectors, self.d_out))
            return
        source = context.source
        columns = concept_columns(list(getattr(source, "concepts", None) or []), self.concepts)
        seed = context.config.training.order_seed
        self.fix(
            vectors_of(source, self.fixed_vectors, columns, sequences=self.sequences, seed=seed, output=self.transcoder)
        )

    @torch.no_grad()
    def fix(self, vectors: Tensor) -> None:
        """From now on the decoder rows of the latents are `vectors` [n, d_out], each divided by its norm.

        The encoder of an SAE starts as it would from those rows: their transpose, as long as its columns are now."""
        vectors = checked(vectors, self.d_out)
        latents = list(range(len(vectors))) if self.wanted is None else self.wanted
        _check_latents(latents, self.d_sae)
        if len(latents) != len(vectors):
            raise OptionError(
                "latents", f"names {len(latents)} latents for {len(vectors)} vectors. Name as many, or leave it out."
            )
        rows = functional.normalize(vectors.to(self.W_dec), dim=1)
        index = torch.tensor(latents, device=rows.device)
        self.W_dec[index] = rows
        if not self.transcoder:
            self.W_enc[:, index] = rows.t() * self.W_enc[:, index].norm(dim=0)
        self._hold(latents)

    @torch.no_grad()
    def _hold(self, latents: Iterable[int]) -> None:
        """Keep the decoder rows of `latents` as they are."""
        self._latents = torch.tensor(list(latents), dtype=torch.long, device=self.W_dec.device)
        self.fixed = self.W_dec[self.fixed_latents].clone()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, sample: Tensor) -> None:
        super().initialise(generator, sample)
        self._hold(self.fixed_latents.tolist())

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        super().constrain_gradients()
        if self.W_dec.grad is not None:
            self.W_dec.grad[self.fixed_latents] = 0.0  # which also keeps Adam's moments of these rows at zero

    @torch.no_grad()
    def constrain_weights(self) -> None:
        super().constrain_weights()
        self.W_dec[self.fixed_latents] = self.fixed  # normalising a row again may move it by a rounding

    def path_state(self) -> dict[str, Any]:
        return {**super().path_state(), "fixed_latents": self.fixed_latents.tolist()}

    def load_path_state(self, state: dict[str, Any]) -> None:
        """The weights are there already: the rows they hold are the fixed ones."""
        super().load_path_state(state)
        self._hold(state["fixed_latents"])


@functools.cache
def _over(base: type[SparseAutoencoder]) -> type[HSAE]:
    """The class of an HSAE over `base`; computing what `base` does, it has the base's names in other libraries."""
    if not isinstance(base, type) or not issubclass(base, SparseAutoencoder) or issubclass(base, HSAE):
        raise OptionError("base", "is not an architecture that hsae can stand on. Name another, such as topk.")
    names = {name: getattr(base, name) for name in _NAMES_ELSEWHERE}
    return type(f"HSAE over {base.__name__}", (HSAE, base), {**names, "__doc__": HSAE.__doc__, "__module__": __name__})


def _hold_what_was_loaded(sae: Any, _: Any) -> None:
    sae._hold(sae.fixed_latents.tolist())


def _check_latents(latents: list[int], d_sae: int) -> None:
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise OptionError("latents", f"there is no latent {latent}; there are 0 to {d_sae - 1}.")
    if len(set(latents)) < len(latents):
        raise OptionError("latents", f"{latents} names one twice. A row can be one vector only.")
