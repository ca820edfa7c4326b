"""`hsae`: an SAE with any gate in which some decoder rows are concept vectors that never change."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from saekit import ComponentError, ComponentOption, OfKind, OptionError, RunContext, SaeLensFormat, SparseAutoencoder
from saekit_contrastive.vectors import (
    METHODS,
    RANDOM,
    checked,
    concept_columns,
    random_vectors,
    read_vectors,
    vectors_of,
)

if TYPE_CHECKING:
    from saekit.protocols import Source


class HSAE(SparseAutoencoder):
    """An SAE in which the decoder rows of `latents` are concept vectors that training never moves.

    Everything else is that of the `base` architecture: gate, kernels, options, and its names in other libraries. The class of an
    instance derives from this one and from the base's, so it is an instance of both.

    The fixed rows have norm 1 whatever the base's `decoder_norm`, receive no gradient, and are put back after every step, so
    they equal the vectors to the bit. They are rows of W_dec like any other, and nothing else about them is saved. A fixed row
    does not make its latent fire; that takes a loss such as `concept` with the same `latents`.

    With `architecture.from` and an SAE of another architecture, the vectors' latents are added after its own, which keep their
    numbers. At the start they are silent on every input, so that the whole rebuilds what that SAE does.
    """

    fixed: Tensor
    _latents: Tensor

    def __new__(cls, *args: Any, base: ComponentOption | None = None, **options: Any) -> HSAE:
        """Without `base`, torch or `copy` is making an instance of a class that already derives from both."""
        return super().__new__(cls if base is None else _over(base.component.load()))

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        base: Annotated[
            ComponentOption, OfKind("architecture"), Field(description="The architecture whose rows are fixed, with its options.")
        ] = ComponentOption(use="topk"),
        fixed_vectors: Annotated[
            str,
            Field(
                description="A .npy or .safetensors file of vectors [n, width], or how to compute one for each concept from "
                "labelled sequences: difference_of_means or logistic_probe; random for directions that mean nothing, a control."
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
        train: Annotated[
            Literal["all", "added"],
            Field(
                description="added: with architecture.from, only the latents that have the vectors are trained, and everything "
                "else stays as it is, to the bit."
            ),
        ] = "all",
    ) -> None:
        try:
            super().__init__(d_in, d_sae, d_out, **base.options)
        except ComponentError as error:
            raise error.within("base") from error
        if concepts is not None and not _by_label(fixed_vectors):
            raise OptionError(
                "concepts", "names labels to compute vectors for, but fixed_vectors is a file. Leave one of them out."
            )
        self._base = base.component.qualified_name
        self.fixed_vectors, self.concepts, self.sequences, self.wanted = fixed_vectors, concepts, sequences, latents
        self.train_option = train  # `train` is a method of modules
        self._raw: dict[str, Tensor] = {}  # what must not change, in the units of raw activations
        self._unit = 1.0  # what activations are multiplied by now
        # Not in the state dict, which has the rows in W_dec: other libraries would not accept more tensors.
        self.register_buffer("fixed", self.W_dec.new_empty(0, self.d_out), persistent=False)  # [n, d_out]
        self.register_buffer("_latents", torch.empty(0, dtype=torch.long), persistent=False)  # [n]
        if latents is not None:
            _check_latents(latents, d_sae)
            self._hold(latents)
        self.register_load_state_dict_post_hook(_hold_what_was_loaded)

    @property
    def fixed_latents(self) -> Tensor:
        """The latents whose rows are the vectors, in the order of the vectors: [n]. All latents if only those train."""
        return torch.arange(self.d_sae, device=self.W_dec.device) if self._frozen else self._latents

    @property
    def _frozen(self) -> bool:
        """Whether everything but the vectors' latents stays as it is."""
        return self.train_option == "added"

    def options(self) -> dict[str, Any]:
        return {
            "base": {"use": self._base, **super().options()},
            "fixed_vectors": self.fixed_vectors,
            "concepts": self.concepts,
            "sequences": self.sequences,
            "latents": self._latents.tolist() or self.wanted,
            "train": self.train_option,
        }

    @classmethod
    def built_on(
        cls, name: str, base: SparseAutoencoder, options: Mapping[str, Any], source: Source
    ) -> tuple[dict[str, Any], int]:
        """Over any SAE, with a latent more for each vector."""
        if options["latents"] is not None:
            raise OptionError(
                "latents", "names latents of the SAE in architecture.from, but new ones are added after them. Leave it out."
            )
        if _by_label(options["fixed_vectors"]):
            n = len(concept_columns(list(getattr(source, "concepts", None) or []), options["concepts"]))
        else:
            n = len(read_vectors(options["fixed_vectors"], base.d_out))
        added = list(range(base.d_sae, base.d_sae + n))
        return {**options, "base": {"use": name, **base.options()}, "latents": added}, n

    @torch.no_grad()
    def take_over(self, base: SparseAutoencoder) -> None:
        super().take_over(base)
        self._hold(self._latents.tolist())

    def prepare(self, context: RunContext) -> None:
        """Fix the rows before the first step. UsageError if the vectors cannot be computed or do not fit."""
        if self._frozen and context.config.architecture.from_ is None:
            raise OptionError("train", "is \"added\", but there is no SAE to add to. Name one in architecture.from.")
        for name, value in self.latent_parameters.items():  # in the units of training
            getattr(self, name).detach()[self._latents] = value
        if not _by_label(self.fixed_vectors):
            self.fix(read_vectors(self.fixed_vectors, self.d_out))
            return
        source = context.source
        columns = concept_columns(list(getattr(source, "concepts", None) or []), self.concepts)
        if self.fixed_vectors == RANDOM:
            self.fix(random_vectors(len(columns), self.d_out, context.seed))
            return
        seed = context.config.training.order_seed
        self.fix(
            vectors_of(source, self.fixed_vectors, columns, sequences=self.sequences, seed=seed, output=self.transcoder)
        )

    @torch.no_grad()
    def fix(self, vectors: Tensor) -> None:
        """From now on the decoder rows of the latents are `vectors` [n, d_out], each divided by its norm.

        Unless this is a transcoder, the encoder's columns become the transpose of those rows and keep their norms."""
        vectors = checked(vectors, self.d_out)
        latents = list(range(len(vectors))) if self.wanted is None else self.wanted
        _check_latents(latents, self.d_sae)
        if len(latents) != len(vectors):
            raise OptionError(
                "latents", f"names {len(latents)} latents for {len(vectors)} vectors. Name as many, or leave it out."
            )
        rows = functional.normalize(vectors.to(self.W_dec), dim=1)  # [n, d_out]
        index = torch.tensor(latents, device=rows.device)
        self.W_dec[index] = rows
        if not self.transcoder:
            self.W_enc[:, index] = rows.t() * self.W_enc[:, index].norm(dim=0)
        self._hold(latents)

    @torch.no_grad()
    def _hold(self, latents: Iterable[int]) -> None:
        """Keep the decoder rows of `latents` as they are now."""
        self._latents = torch.tensor(list(latents), dtype=torch.long, device=self.W_dec.device)
        self.fixed = self.W_dec[self.fixed_latents].clone()  # [n, d_out]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, sample: Tensor) -> None:
        super().initialise(generator, sample)
        self._hold(self._latents.tolist())

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        super().constrain_gradients()
        if self.W_dec.grad is not None:
            self.W_dec.grad[self.fixed_latents] = 0.0  # which also keeps Adam's moments of these rows at zero
        if self._frozen:
            for name, parameter in self.named_parameters():
                if parameter.grad is not None:
                    parameter.grad[self._untrained(name)] = 0.0

    @torch.no_grad()
    def constrain_weights(self) -> None:
        super().constrain_weights()
        self.W_dec[self.fixed_latents] = self.fixed  # normalising a row again may round it differently

    @torch.no_grad()
    def unscale(self, scale: float, target_scale: float) -> None:
        """As for any SAE. What does not train returns to the bits that it had in the same units."""
        if self._frozen and not self._raw:
            self._raw = {name: tensor.cpu().clone() for name, tensor in self.state_dict().items() if name != "W_dec"}
        super().unscale(scale, target_scale)
        self._unit *= target_scale
        if math.isclose(self._unit, 1.0, rel_tol=1e-6):
            state = self.state_dict()
            for name, tensor in self._raw.items():
                part = self._untrained(name)
                state[name][part] = tensor.to(state[name].device)[part]

    def _untrained(self, name: str) -> Any:
        """The part of the tensor of this name that stays as it is if only the vectors' latents train, as an index."""
        others = torch.ones(self.d_sae, dtype=torch.bool, device=self.W_dec.device)
        others[self._latents] = False
        if name == "W_enc":
            return slice(None), others
        return others if name == "W_dec" or name in self.latent_parameters else ...

    def calibrate(self, batches: Iterator[Tensor]) -> dict[str, float]:
        return {} if self._frozen else super().calibrate(batches)

    def path_state(self) -> dict[str, Any]:
        return {**super().path_state(), "fixed_latents": self._latents.tolist()}

    def load_path_state(self, state: dict[str, Any]) -> None:
        """The weights have already been loaded; the fixed rows are the ones they hold."""
        super().load_path_state(state)
        self._hold(state["fixed_latents"])


@functools.cache
def _over(base: type[SparseAutoencoder]) -> type[HSAE]:
    """The class of an HSAE over `base`. It computes what `base` does, so other libraries know it by the same names."""
    if not isinstance(base, type) or not issubclass(base, SparseAutoencoder) or issubclass(base, HSAE):
        raise OptionError("base", "hsae cannot be built on this. Name another architecture, such as topk.")
    of_base = {"interop": SaeLensFormat.of(base), "option_names": base.option_names}
    return type(f"HSAE over {base.__name__}", (HSAE, base), {**of_base, "__doc__": HSAE.__doc__, "__module__": __name__})


def _hold_what_was_loaded(sae: Any, _: Any) -> None:
    sae._hold(sae._latents.tolist())


def _by_label(fixed_vectors: str) -> bool:
    """Whether there is a vector for each label, rather than for each row of a file."""
    return fixed_vectors in METHODS or fixed_vectors == RANDOM


def _check_latents(latents: list[int], d_sae: int) -> None:
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise OptionError("latents", f"there is no latent {latent}; there are 0 to {d_sae - 1}.")
    if len(set(latents)) < len(latents):
        raise OptionError("latents", f"{latents} names one twice, but a row can be only one vector.")
