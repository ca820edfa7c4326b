"""Training the model: `transformers.Trainer`, with our loss and the loaders that a program already has."""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from saekit import OptionError, UsageError
from saekit_quality.losses import QualityLoss, quality_loss
from saekit_quality.model import ContrastiveQualityModel
from saekit_quality.pairs import Empty, Rule, VotePairs


class TrainerConfig(BaseModel):
    """The options of `ContrastiveTrainer`. Every other key is one of `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    learning_rate: Annotated[float, Field(gt=0, description="AdamW's, falling linearly to 0.")] = 2e-5
    lambda_contrastive: Annotated[float, Field(ge=0, description="Weight of the contrastive loss beside BCE.")] = 0.1
    lambda_warmup: Annotated[float, Field(ge=0, le=1, description="Share of the steps in which that weight rises from 0.")] = 0.1
    batch_size: Annotated[int, Field(ge=1, description="Responses that are compared in one batch; what train_loader gives.")] = 32
    chunk_size: Annotated[int | None, Field(ge=1, description="Responses encoded at a time (default: the whole batch).")] = None
    epochs: Annotated[int, Field(ge=1, description="Passes over train_loader.")] = 5
    targets: Annotated[Literal["soft", "hard"], Field(description="Votes for BCE: the share of yes, or the majority.")] = "soft"
    pairs: Annotated[Rule, Field(description="Which responses belong together: see VotePairs.")] = "agreement"
    hard_weight: Annotated[float, Field(gt=0, description="Of split votes in the denominator, with pairs 'unanimous'.")] = 2.0
    empty: Annotated[Empty, Field(description="Responses without any yes, with pairs 'jaccard'.")] = "apart"
    pos_weight: Annotated[list[float] | None, Field(description="Of a yes beside a no in BCE, for each criterion.")] = None
    patience: Annotated[
        int | None, Field(ge=1, description="Stop after so many evaluations without a better loss, and keep the best model.")
    ] = None
    output_dir: Annotated[str | None, Field(description="Where checkpoints are kept (default: nowhere after training).")] = None
    seed: Annotated[int, Field(ge=0, description="Of the order of the responses and of dropout.")] = 0


class ContrastiveTrainer(Trainer):
    """Trains by BCE + lambda * InfoNCE over weighted pairs (docs/quality.md).

    Everything else is `transformers.Trainer`: precision, accumulation, several processes, checkpoints, callbacks. Each process
    compares the responses of its own batch; accumulated batches are not compared with one another: for that there is `chunk_size`.

    train_loader, val_loader: give dictionaries of what the model takes, with `labels` [n, criteria] from 0 to 1, or `votes`
        [n, annotators, criteria] of 0 and 1, or both; NaN where one is missing. Without votes, pairs are made of the labels.
    device: "cpu" or "cuda".
    config: of `TrainerConfig`, and of `transformers.TrainingArguments`.
    """

    model: Any

    def __init__(
        self,
        model: ContrastiveQualityModel,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None = None,
        device: str | torch.device = "cpu",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.quality = _read(config or {}, model.config.num_labels or 0)
        if train_loader.batch_size not in (None, self.quality.batch_size):
            told = f"is {self.quality.batch_size}, and train_loader gives batches of {train_loader.batch_size}. Make them equal."
            raise OptionError("batch_size", told)
        if self.quality.patience and val_loader is None:
            raise OptionError("patience", "needs a val_loader, whose loss is watched.")
        self.train_loader, self.val_loader = train_loader, val_loader
        self._scratch = None if self.quality.output_dir else tempfile.TemporaryDirectory(prefix="saekit-quality-")
        self._one_epoch = False
        self._parts: dict[str, list[Tensor]] = {}
        self._pos_weight = None if self.quality.pos_weight is None else torch.tensor(self.quality.pos_weight)
        patience = self.quality.patience
        super().__init__(
            model=model,
            args=self._arguments(torch.device(device)),
            train_dataset=train_loader.dataset,
            eval_dataset=None if val_loader is None else val_loader.dataset,
            callbacks=[_StopAfterEpoch(self), *([EarlyStoppingCallback(patience)] if patience else [])],
        )
        self.label_names = ["labels"]

    def fit(self, resume: bool | str = False) -> dict[str, Any]:
        """Train for all epochs, or what is left of them after `train_epoch`: the last epoch's results, and `history`.

        resume: go on from the last checkpoint in `output_dir`, or from this one.
        """
        return {**self._train(resume, one_epoch=False), "history": self.state.log_history}

    def train_epoch(self, resume: bool | str = False) -> dict[str, Any]:
        """Train for one more epoch: its mean `loss`, `bce` and `contrastive`, and with a val_loader what `evaluate` says after it.

        The learning rate and lambda go by all epochs of the configuration. UsageError if these are over.
        """
        return self._train(resume, one_epoch=True)

    def _train(self, resume: bool | str, one_epoch: bool) -> dict[str, Any]:
        checkpoint = resume if isinstance(resume, str) else None
        if resume is True or (not resume and self.state.global_step):  # after train_epoch: from where it ended
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise OptionError("resume", f"there is no checkpoint in {self.args.output_dir}.")
        if not resume and self.state.max_steps and self.state.global_step >= self.state.max_steps:
            raise UsageError(f"all {self.quality.epochs} epochs are over. Raise config['epochs'].")
        self._one_epoch = one_epoch
        self._parts.clear()
        if checkpoint is None:
            set_seed(self.quality.seed)  # whatever the program drew since the trainer was made
        self.train(resume_from_checkpoint=checkpoint)
        results: dict[str, Any] = {}
        for entry in self.state.log_history:  # a later epoch's values replace an earlier one's
            results |= entry if "loss" in entry or "eval_loss" in entry else {}
        return results

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.accelerator.prepare(self.train_loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        if self.val_loader is None:
            raise UsageError("there is no val_loader to evaluate on. Give one to ContrastiveTrainer.")
        return self.accelerator.prepare(self.val_loader)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = self._judged(inputs)
        targets, share = inputs.pop("labels"), inputs.pop("share")
        output = model(**inputs, chunk_size=self.quality.chunk_size)
        config = self.model.config
        pairs = VotePairs(share, self.quality.pairs, hard_weight=self.quality.hard_weight, empty=self.quality.empty)
        weight = self._pos_weight
        found = quality_loss(
            output.logits, output.embedding, targets, pairs,
            lambda_contrastive=self._lambda(), temperature=config.contrastive_temperature,
            pos_weight=None if weight is None else weight.to(output.logits.device),
        )  # fmt: skip
        self._count("" if self.model.training else "eval_", found)
        return (found.loss, output) if return_outputs else found.loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._judged(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs and prefix in self._parts:
                classified, contrastive, without, batches = torch.stack(self._parts.pop(prefix)).tolist()
                logs[f"{prefix}bce"] = classified / batches
                logs[f"{prefix}contrastive"] = contrastive / batches
                logs[f"{prefix}batches_without_pair"] = without / batches
        super().log(logs, *args, **kwargs)

    def _count(self, prefix: str, found: QualityLoss) -> None:
        """Adds a batch's parts to the sums that are logged next, without waiting for the device."""
        without = (found.contrastive == 0).to(found.bce)
        new = [found.bce, found.contrastive, without, torch.ones_like(found.bce)]
        self._parts[prefix] = [a + b for a, b in zip(self._parts[prefix], new, strict=True)] if prefix in self._parts else new

    def _lambda(self) -> float:
        """The weight of the contrastive loss in this step; in evaluations always the full one, so that epochs can be compared."""
        rise = self.quality.lambda_warmup * self.state.max_steps
        share = min(1.0, (self.state.global_step + 1) / rise) if self.model.training and rise else 1.0
        return self.quality.lambda_contrastive * share

    def _judged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with `labels` [n, criteria], the targets of BCE, and `share` of yes [n, criteria], of which pairs are made."""
        inputs = dict(inputs)
        votes, labels = inputs.pop("votes", None), inputs.get("labels")
        if "share" in inputs:
            return inputs
        if votes is None and labels is None:
            raise UsageError("a batch has no 'labels' [n, criteria] and no 'votes' [n, annotators, criteria]. Give one of them.")
        share: Tensor = inputs["labels"].float() if votes is None else votes.float().nanmean(1)
        if labels is None:
            labels = share
            if self.quality.targets == "hard":
                labels = torch.where(share == 0.5, torch.nan, (share > 0.5).float()).where(~share.isnan(), torch.nan)
        for name, given in (("labels", labels), ("votes", share)):
            if given.ndim != 2 or given.shape[1] != self.model.config.num_labels:
                raise UsageError(
                    f"a batch has {name} of {given.shape[-1]} criteria, and the model was made with "
                    f"num_labels={self.model.config.num_labels}. Make these equal."
                )
        return {**inputs, "labels": labels.float(), "share": share}

    def _arguments(self, device: torch.device) -> TrainingArguments:
        if device.index:
            raise OptionError("device", f"is {device}. Choose a GPU with CUDA_VISIBLE_DEVICES={device.index}, and say 'cuda'.")
        evaluated = "no" if self.val_loader is None else "epoch"
        given: dict[str, Any] = {
            "logging_strategy": "epoch", "save_strategy": "epoch", "eval_strategy": evaluated, "report_to": "none",
            "data_seed": self.quality.seed, "ddp_find_unused_parameters": False, "use_cpu": device.type == "cpu",
            "output_dir": self.quality.output_dir or (self._scratch.name if self._scratch else None),
            "learning_rate": self.quality.learning_rate, "num_train_epochs": self.quality.epochs, "seed": self.quality.seed,
            "per_device_train_batch_size": self.quality.batch_size, "remove_unused_columns": False,
        }  # fmt: skip
        if self.quality.patience:
            given |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
        return TrainingArguments(**(given | (self.quality.model_extra or {})))


class _StopAfterEpoch(TrainerCallback):
    """Ends training after an epoch where only one was asked for, with a checkpoint from which the next goes on."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.trainer._one_epoch:
            control.should_training_stop = control.should_save = True


def _read(config: Mapping[str, Any], num_labels: int) -> TrainerConfig:
    try:
        quality = TrainerConfig(**config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise OptionError(str(first["loc"][0]), f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}.") from None
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in quality.model_extra or {}:
        if name not in names:
            near = difflib.get_close_matches(name, [*TrainerConfig.model_fields, *names], 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise OptionError(name, f"is not an option of ContrastiveTrainer or of transformers.TrainingArguments.{meant}")
    given = len(quality.pos_weight or [0.0] * num_labels)
    if given != num_labels:
        raise OptionError("pos_weight", f"has {given} values, and the model {num_labels} criteria. Give one for each.")
    return quality
