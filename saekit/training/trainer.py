"""`Trainer`: one SAE in training, and the optimiser step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.batch import Activations, SequenceBatch
from saekit.config import TrainingConfig
from saekit.errors import PluginError
from saekit.graph import FeatureGraph
from saekit.listeners import Listeners
from saekit.numerics import evaluating
from saekit.process_state import kept
from saekit.protocols import Training
from saekit.sae.base import SparseAutoencoder
from saekit.schedules import value_at
from saekit.seeds import seed_for
from saekit.training.firing import FiringStatistics
from saekit.training.loss_input import Step
from saekit.training.loss_terms import (
    GradientGuard,
    Term,
    failed_backward,
    refuse_non_finite,
    refuse_non_finite_gradient,
)
from saekit.training.measures import has_measures, measures_of
from saekit.training.optimiser import Adam


class Trainer(Training):
    """One SAE with its losses, optimiser, statistics and listeners. What listeners see of it is `Training`.

    terms: its losses with their weights.
    needs_sequences: whether one of them asks for whole sequences.
    guard: until the gradient guard has spoken.
    grad_norm: of the last gradient, before clipping.
    last_logged: the last values that were logged.
    spoke: the losses that have ever been active. What a checkpoint keeps of it is in `training/state.py`.
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
        self.provided: dict[str, Tensor] = {}
        self.needs_sequences = any("sequences" in getattr(term.component, "needs", ()) for term in terms)
        self.losses: dict[str, Tensor] = {}
        self.grad_norm: Tensor | None = None
        self.last_logged: dict[str, float] = {}
        self.spoke: set[str] = set()
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # losses that have not been checked yet

    @property
    def tokens(self) -> int:
        """How many activations it has been trained on."""
        return self.number * self.config.batch_size

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return value_at(self.config.lr, self.number, self.total_steps)

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the run."""
        self.listeners.warn(message)

    @torch.no_grad()
    def retire(self, latents: Tensor) -> None:
        """Take these latents [n] out of the dictionary for the rest of training."""
        self.sae.silence(latents)
        self.firing.retire(latents)
        for parameter, by_latent in self._of_latents():
            moments = self.optimizer.state[parameter]
            for name in moments.keys() & {"exp_avg", "exp_avg_sq"}:  # absent until a loss has reached the parameter
                by_latent(moments[name])[latents] = 0.0

    def _of_latents(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """The parameters that have a part for each latent, and how to turn one so that latents come first."""
        sae = self.sae
        plain = [sae.W_dec, *(getattr(sae, name) for name in sae.latent_parameters)]
        return [(sae.W_enc, Tensor.t), *((parameter, Tensor.detach) for parameter in plain)]

    def _hold_retired(self) -> None:
        """Remove every gradient of retired latents, so that no loss moves them."""
        for parameter, by_latent in self._of_latents():
            if parameter.grad is not None:
                by_latent(parameter.grad).masked_fill_(self.firing.retired.view(-1, *[1] * (parameter.dim() - 1)), 0.0)

    def train_on(self, batch: Activations, sequences: SequenceBatch | None = None) -> None:
        """One optimiser step on a batch of activations, and on whole sequences if a loss needs them, as the source gives
        them."""
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
        if self.firing.n_retired:
            self.sae.silence(self.firing.retired_latents)  # whatever a callback has made of them

    def _forward(self, batch: Activations, sequences: SequenceBatch | None) -> Step:
        step = Step.of(
            self.sae,
            batch,
            self.scale,
            self.target_scale,
            number=self.number,
            fraction=self.number / max(self.total_steps, 1),
            dead=self.firing.dead,
            n_dead=self.firing.n_dead,
            graph=self.graph,
            provided=self.provided,
        )
        if sequences is not None:
            step.sequences = self._encoded(sequences)
        return step

    def _encoded(self, sequences: SequenceBatch) -> SequenceBatch:
        """The sequences as the SAE sees them, with their code.

        They are encoded in evaluation mode: a gate that looks at the whole batch in training must not mix the two streams, and
        its statistics are those of the first."""
        x = sequences.x * self.scale  # [n, T, d_in]
        target = None if sequences.target is None else sequences.target * self.target_scale
        with evaluating(self.sae):
            code = self.sae.encode(x[sequences.mask])
        return dataclasses.replace(sequences, x=x, target=target, code=code)

    def _loss_values(self, step: Step) -> dict[str, Tensor]:
        values = {}
        for term in self.terms:
            if term.weight_at(self.number, self.total_steps) != 0:
                with kept(term.component.origin, self.listeners.warn, in_a_step=True):
                    value = term.value(step)
                if value is not None:
                    values[term.label] = value
        return values

    def _move(self, step: Step, values: dict[str, Tensor]) -> None:
        self.losses = {label: value.detach() for label, value in values.items()}
        self.spoke |= set(values)
        weights = {term.label: term.weight_at(self.number, self.total_steps) for term in self.terms}
        total = sum((weights[label] * value for label, value in values.items()), start=step.x.new_zeros(()))
        self.losses["loss"] = total.detach()
        if self.device.type == "cpu":
            refuse_non_finite(self.losses, self.number)  # free on the CPU; on a device `read_losses` does it later
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
                for finding in self.guard.findings(self.spoke):
                    self.listeners.warn(finding)
                self.guard = None

    def _finish_step(self) -> None:
        self.sae.constrain_gradients()
        if self.firing.n_retired:
            self._hold_retired()
        if self.config.clip:
            self._clip(self.config.clip)
        self.listeners.emit("gradients_ready", trainer=self, number=self.number)
        self.optimizer.step()
        self.sae.constrain_weights()

    def _clip(self, largest: float) -> None:
        """Scale the whole gradient down to norm `largest` if it is longer."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.device.type == "cpu":
            refuse_non_finite_gradient(self.grad_norm, self.losses, self.number)
            if float(self.grad_norm) <= largest:
                return  # saves a pass over all gradients; on a device, asking would mean waiting for it
        torch.nn.utils.clip_grads_with_norm_(self._parameters, largest, self.grad_norm)

    def read_losses(self) -> None:
        """Check the losses that were computed on a device since the last call, with one wait for all of them."""
        for number, values in self._unread:
            refuse_non_finite(values, number)
        self._unread.clear()

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """What is logged about the last step: losses, weights, L0, explained variance of the batch, dead latents, and what
        losses and callbacks say of it."""
        self.read_losses()
        step = self.step
        values = {"loss": float(self.losses["loss"])}
        values |= {f"loss/{label}": float(v) for label, v in self.losses.items() if label != "loss"}
        values |= {f"weight/{t.label}": t.weight_at(step.number, self.total_steps) for t in self.terms}
        spread = (step.target - step.target.mean(0)).square().sum()
        values["explained_variance"] = 1.0 - float(step.error.square().sum() / spread.clamp_min(1e-30))
        values["l0"] = float(step.code.count().mean())
        values["dead"] = float(self.firing.n_dead)
        if self.firing.n_retired:
            values["retired"] = float(self.firing.n_retired)
        values["lr"] = value_at(self.config.lr, step.number, self.total_steps)
        if self.grad_norm is not None:
            values["grad_norm"] = float(self.grad_norm)
        values["tokens"] = float(self.tokens)
        return values | self._said()

    def _said(self) -> dict[str, float]:
        """What `measures` of the losses that were active in the last step, and of the callbacks, return."""
        speakers: list[tuple[str, str, Any, Any]] = [
            (term.label, term.component.origin, term.function, self.step) for term in self.terms if term.label in self.losses
        ]
        speakers += [
            (listener.label.rpartition(".")[2], listener.origin, listener.instance, self)
            for listener in self.listeners
            if listener.vital
        ]
        values: dict[str, float] = {}
        said_by: dict[str, str] = {}
        for label, origin, speaker, about in speakers:
            if not has_measures(speaker):
                continue
            for name, value in measures_of(speaker, about, label=label, origin=origin, warn=self.warn).items():
                if name in values:
                    raise PluginError(
                        f"{said_by[name]} and {origin} both log {name!r}. Give one of them another `name` in the run file."
                    )
                values[name], said_by[name] = value, origin
        return values
