"""`Foreign`: an SAE of another library in the words of sae_lens, and its way into an architecture of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.component import Component
from saekit.errors import PluginError, UsageError, near_names
from saekit.plugins import OWN_DISTRIBUTION, Registry
from saekit.sae.base import SparseAutoencoder
from saekit.sae.formats import SavedSAE, check_widths, fill


@dataclass(frozen=True)
class Foreign:
    """An SAE as another library keeps it.

    library, architecture: the library, and what it calls the architecture. where: the file that errors name.
    d_in, d_sae, d_out: widths; d_out is None where it is no transcoder. centred: whether b_dec is taken from the input before
    the encoder. skip: whether a linear map of the input is added to what the latents rebuild.
    tensors: in sae_lens's layout and names. cfg: what else the architecture needs, under sae_lens's keys (`k`, ...).
    metadata: what is known about it (model_name, hook_name, ...).
    """

    library: str
    architecture: str
    where: Path | str
    d_in: int
    d_sae: int
    d_out: int | None
    centred: bool
    tensors: dict[str, Tensor]
    cfg: Mapping[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    skip: bool = False


def take_in(foreign: Foreign, registry: Registry) -> SavedSAE:
    """The SAE with the architecture that knows it by its name there, in float32. UsageError where none does."""
    component = _component(foreign, registry)
    try:
        options = component.load().options_from_saelens(foreign.cfg)
    except KeyError as error:
        raise UsageError(
            f"{foreign.where}: key {error} is missing, which {foreign.library}'s {foreign.architecture} has."
        ) from None
    if foreign.skip:
        options["skip"] = True
    options = component.validate(options, str(foreign.where))
    for name, tensor in foreign.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{foreign.where}: {name} holds values that are not finite.")
    check_widths(foreign.tensors, foreign.d_in, foreign.d_sae, foreign.where)
    sae = component.build(options, foreign.d_in, foreign.d_sae, foreign.d_out)
    sae.reads_centred = foreign.centred
    fill(sae, foreign.tensors, foreign.where)
    return SavedSAE(sae, component.qualified_name, {k: v for k, v in foreign.metadata.items() if v is not None})


def _component(foreign: Foreign, registry: Registry) -> Component:
    """The installed architecture that is known to the library by that name; a third party's before a built-in one."""
    found: list[Component] = []
    known: set[str] = set()
    for component in registry.components("architecture"):
        try:
            names = names_in(foreign.library, component.load())
        except PluginError:  # a broken plugin stops only what names it
            continue
        known |= set(names)
        if foreign.architecture in names:
            found.append(component)
    if not found:
        raise UsageError(
            f"{foreign.where}: {foreign.library}'s architecture {foreign.architecture!r} is computed by none that is "
            f"installed.{near_names(foreign.architecture, known)} Known: {', '.join(sorted(known)) or 'none'}. A plugin can "
            "add one (known_as)."
        )
    others = [c for c in found if c.distribution != OWN_DISTRIBUTION]
    if len(others) > 1:
        claims = " and ".join(f"{c.qualified_name} ({c.distribution} {c.version})" for c in others)
        raise UsageError(
            f"{foreign.where}: {claims} both take over {foreign.library}'s {foreign.architecture}. Disable one "
            "(SAEKIT_DISABLE_PLUGINS)."
        )
    return (others or found)[0]


def names_in(library: str, architecture: type[SparseAutoencoder]) -> tuple[str, ...]:
    """What `library` calls what `architecture` can take over."""
    pairs = (name.partition(":") for name in architecture.known_as)
    return tuple(name for of, _, name in pairs if of == library)


def exported_as(library: str, saved: SavedSAE) -> tuple[str, ...]:
    """What `library` calls the architecture of `saved`; a UsageError where it has no such thing."""
    names = names_in(library, type(saved.sae))
    if not names:
        raise UsageError(f"--to {library}: {library} has nothing that computes what {saved.name} does.")
    if saved.sae.d_out != saved.sae.d_in:
        raise UsageError(
            f"--to {library}: the SAE reads width {saved.sae.d_in} and rebuilds width {saved.sae.d_out}; {library}'s "
            "files hold one width."
        )
    return names


def recentred(sae: SparseAutoencoder, centred: bool) -> dict[str, Tensor]:
    """The tensors, in sae_lens's layout, of the same function where b_dec is taken from the input (or is not).

    (x - b_dec) W_enc = x W_enc - b_dec W_enc, so the difference moves into the encoder's biases."""
    tensors = {name: t.detach() for name, t in sae.to_saelens()[1].items()}
    if sae.reads_centred == centred:
        return tensors
    shift = (tensors["b_dec"].double() @ tensors["W_enc"].double()) * (1 if centred else -1)  # [d_sae]
    moved = {"b_enc": shift, "b_gate": shift}
    if "r_mag" in tensors:  # the magnitude reads exp(r_mag) times the gate's product
        moved["b_mag"] = shift * tensors["r_mag"].double().exp()
    for name, by in moved.items():
        if name in tensors:
            tensors[name] = (tensors[name].double() + by).to(tensors[name].dtype)
    return tensors
