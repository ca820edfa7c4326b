"""`Trainer`: one SAE on its way, and the step that moves it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from saekit.activations.batch import Activations, SequenceBatch
from saekit.config import TrainingConfig
from saekit.errors import PluginError, RunError
from saekit.graph import FeatureGraph
from saekit.listeners import Listeners
from saekit.numerics import evaluating
from saekit.sae.base import SparseAutoencoder
from saekit.schedules import value_at
from saekit.seeds import seed_for
from saekit.training.firing import FiringStatistics
from saekit.training.losses import (
    GradientGuard,
    Term,
    failed_backward,
    refuse_non_finite,
    refuse_non_finite_gradient,
)
from saekit.training.optimiser import Adam
from saekit.training.step import Step


class Trainer:
    """One SAE with its losses, optimiser, statistics and listeners.

    Listeners may read everything here, and change `sae` and `optimizer` state. Draws belong to `generator`, whose
    state is in the checkpoint, so that a resumed run draws the same.

    sae: sees activations times `scale`, and makes a transcoder's targets times `target_scale`. step: the last `Step`.
    graph: what a callback that provides one has set; losses see it. needs_sequences: whether a loss asks for them.
    losses: its unweighted values by name (detached). fired: [d_sae], in how many rows of the last batch each latent
    fired. number: steps done. tokens: activations seen. variant: its name where the run trains several, else empty.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        terms: list[Term],
        config: TrainingConfig,
        *,
        total_steps: int,
        scale: float,
        device: torch.device,
        listeners: Listeners,
        target_scale: float | None = None,
        variant: str = "",
    ) -> None:
        self.sae, self.terms, self.config, self.listeners = sae, terms, config, listeners
        self.variant = variant
        self.total_steps, self.scale, self.device = total_steps, scale, device
        self.target_scale = scale if target_scale is None else target_scale
        self.named_parameters = [(n, p) for n, p in sae.named_parameters() if p.requires_grad]
        self.named_parameters += [pair for term in terms for pair in term.parameters()]
        self._parameters = [p for _, p in self.named_parameters]
        self.optimizer = Adam(self._parameters, lr=1.0, betas=config.betas, fused=device.type != "mps")
        self.generator = torch.Generator().manual_seed(seed_for(config.seed, "listeners"))
        self.firing = FiringStatistics(sae.d_sae, config.dead_after, device)
        self.guard: GradientGuard | None = GradientGuard(self.named_parameters, terms)
        self.number = 0
        self.graph: FeatureGraph | None = None
        self.needs_sequences = any("sequences" in getattr(term.component, "needs", ()) for term in terms)
        self.step: Step | None = None
        self.fired: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self.grad_norm: Tensor | None = None
        self.last_logged: dict[str, float] = {}
        self._spoke: set[str] = set()
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # losses that the host has not looked at yet

    @property
    def tokens(self) -> int:
        """Activations trained on so far."""
        return self.number * self.config.batch_size

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return value_at(self.config.lr, self.number, self.total_steps)

    def train_on(self, batch: Activations, sequences: SequenceBatch | None = None) -> None:
        """One optimiser step on one batch of activations, and of whole sequences where a loss needs them, unscaled."""
        number = self.number
        self.listeners.emit("step_started", trainer=self, number=number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad(set_to_none=True)  # before the pre-activations are made, so that only one is in memory
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            step = self.step = self._forward(batch, sequences if self.needs_sequences else None)
            values = self._loss_values(step)
        self._move(step, values)
        self.fired = step.code.fired()
        self.firing.update(self.fired, len(batch), number)
        self.number += 1
        self.listeners.emit("step_ended", trainer=self, number=number)

    def _forward(self, batch: Activations, sequences: SequenceBatch | None) -> Step:
        x = batch.x * self.scale  # [batch, d_in]
        target = x if batch.target is None else batch.target * self.target_scale
        code = self.sae.encode(x)
        return Step(
            x=x,
            target=target,
            code=code,
            reconstruction=self.sae.reconstruct(x, code),
            sae=self.sae,
            labels=batch.labels,
            tokens=batch.tokens,
            number=self.number,
            fraction=self.number / max(self.total_steps, 1),
            dead=self.firing.dead,
            n_dead=self.firing.n_dead,
            sequences=None if sequences is None else self._encoded(sequences),
            graph=self.graph,
        )

    def _encoded(self, sequences: SequenceBatch) -> SequenceBatch:
        """The sequences as the SAE sees them, with their code.

        In evaluation mode: a gate that looks at the whole batch in training must neither mix the two streams nor keep
        statistics of a second one."""
        x = sequences.x * self.scale  # [n, T, d_in]
        target = None if sequences.target is None else sequences.target * self.target_scale
        with evaluating(self.sae):
            code = self.sae.encode(x[sequences.mask])
        return dataclasses.replace(sequences, x=x, target=target, code=code)

    def _loss_values(self, step: Step) -> dict[str, Tensor]:
        values = {}
        for term in self.terms:
            if term.weight_at(self.number, self.total_steps) != 0:
                value = term.value(step)
                if value is not None:
                    values[term.label] = value
        return values

    def _move(self, step: Step, values: dict[str, Tensor]) -> None:
        self.losses = {label: value.detach() for label, value in values.items()}
        self._spoke |= set(values)
        weights = {term.label: term.weight_at(self.number, self.total_steps) for term in self.terms}
        total = sum((weights[label] * value for label, value in values.items()), start=step.x.new_zeros(()))
        self.losses["loss"] = total.detach()
        if self.device.type == "cpu":
            refuse_non_finite(self.losses, self.number)  # costs nothing here; elsewhere `read_losses` does it later
        else:
            self._unread.append((self.number, self.losses))
        if self.guard:
            self.guard.watch_losses(values, self._parameters)
        if total.requires_grad:
            try:
                total.backward()
            except RuntimeError as error:
                raise failed_backward([term for term in self.terms if term.label in values], error) from error
        self._guard()
        if total.requires_grad:
            self._finish_step()

    def _guard(self) -> None:
        if self.guard:
            self.guard.watch_parameters()
            if self.number + 1 >= min(self.config.guard_steps, self.total_steps):
                for finding in self.guard.findings(self._spoke):
                    self.listeners.warn(finding)
                self.guard = None

    def _finish_step(self) -> None:
        self.sae.constrain_gradients()
        if self.config.clip:
            self._clip(self.config.clip)
        self.listeners.emit("gradients_ready", trainer=self, number=self.number)
        self.optimizer.step()
        self.sae.constrain_weights()

    def _clip(self, largest: float) -> None:
        """Scale the whole gradient down to norm `largest` where it is longer."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.device.type == "cpu":
            refuse_non_finite_gradient(self.grad_norm, self.losses, self.number)
            if float(self.grad_norm) <= largest:
                return  # a pass over all gradients saved; elsewhere, to ask would be to wait for the device
        torch.nn.utils.clip_grads_with_norm_(self._parameters, largest, self.grad_norm)

    def read_losses(self) -> None:
        """Look at the losses that were computed on a device since the last look; one wait for all of them."""
        for number, values in self._unread:
            refuse_non_finite(values, number)
        self._unread.clear()

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """What is logged of the last step: losses, weights, L0, explained variance of the batch, dead latents."""
        self.read_losses()
        step = self.step
        assert step is not None
        values = {"loss": float(self.losses["loss"])}
        values |= {f"loss/{label}": float(v) for label, v in self.losses.items() if label != "loss"}
        values |= {f"weight/{t.label}": t.weight_at(step.number, self.total_steps) for t in self.terms}
        spread = (step.target - step.target.mean(0)).square().sum()
        values["explained_variance"] = 1.0 - float(step.error.square().sum() / spread.clamp_min(1e-30))
        values["l0"] = float(step.code.count().mean())
        values["dead"] = float(self.firing.n_dead)
        values["lr"] = value_at(self.config.lr, step.number, self.total_steps)
        if self.grad_norm is not None:
            values["grad_norm"] = float(self.grad_norm)
        values["tokens"] = float(self.tokens)
        return values

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) from which `load_state` restores this trainer exactly."""
        self.read_losses()
        tensors = {f"sae.{name}": t for name, t in self.sae.state_dict().items()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{name} is not finite after step {self.number - 1}, so it is not saved; the last checkpoint is from "
                    "before and is kept. Start a run with a lower training.lr."
                )
        for name, parameter in self.named_parameters:
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        tensors |= {f"firing.{name}": t for name, t in self.firing.state_dict().items()}
        tensors["rng.listeners"] = self.generator.get_state()
        tensors["rng.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        values: dict[str, Any] = {
            "scale": self.scale,
            "target_scale": self.target_scale,
            "spoke": sorted(self._spoke),
            "last_logged": self.last_logged,
        }
        values["path"] = self.sae.path_state()
        for prefix, holder in self._stateful():
            for key, value in holder.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}{key}"] = value
                else:
                    values[f"{prefix}{key}"] = _plain_state(value, f"{prefix}{key}")
        return tensors, values

    def load_state(self, number: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state` gave after step `number`."""
        self.number = number
        self.sae.load_state_dict(below("sae.", tensors))
        for name, parameter in self.named_parameters:
            for key, value in below(f"optimizer.{name}.", tensors).items():
                # Adam's moments take the parameter's layout in memory; `step` is a number of its own type.
                like = torch.empty_like(value) if key == "step" else torch.empty_like(parameter)
                self.optimizer.state[parameter][key] = like.copy_(value).to(self.device)
        self.firing.load_state_dict(below("firing.", tensors))
        self.generator.set_state(tensors["rng.listeners"])
        torch.set_rng_state(tensors["rng.torch"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self._spoke = set(values["spoke"])
        self.sae.load_path_state(values["path"])
        self.last_logged = values["last_logged"]
        if number >= self.config.guard_steps:
            self.guard = None
        for prefix, holder in self._stateful():
            state = {**below(prefix, tensors), **below(prefix, values)}
            if state:
                try:
                    holder.load_state_dict(state)
                except Exception as error:
                    raise PluginError(
                        f"{prefix.removesuffix('.')} cannot take back the state it gave to the checkpoint: "
                        f"{type(error).__name__}: {error}. Was its plugin changed since?"
                    ) from error

    def _stateful(self) -> list[tuple[str, Any]]:
        holders = [(f"loss.{t.label}.", t.function) for t in self.terms]
        holders += [(f"listener.{listener.label}.", listener.instance) for listener in self.listeners]
        return [(p, h) for p, h in holders if hasattr(h, "state_dict") and hasattr(h, "load_state_dict")]


def _plain_state(value: Any, key: str) -> Any:
    """`value`, if a JSON file gives it back as it is."""
    if not _is_plain(value):
        raise PluginError(
            f"the state of {key} cannot be saved: {type(value).__name__} {value!r} is more than a checkpoint holds. A "
            "state_dict maps names to tensors, numbers, texts, and lists and dictionaries (with texts as keys) of those."
        )
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def below(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """What stands under names that begin with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
