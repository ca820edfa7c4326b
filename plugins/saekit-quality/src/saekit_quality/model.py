"""An encoder with two heads: a classifier of the criteria, and a projection in which similar responses lie together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import ModelOutput

from saekit import OptionError
from saekit_quality.grad_cache import in_chunks

Pooling = Literal["cls", "mean", "last"]


class ContrastiveQualityConfig(PretrainedConfig):
    """What `save_pretrained` writes beside the weights: the encoder's own configuration, and the heads'."""

    model_type = "saekit_quality"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["embedding", "pooled"]

    def __init__(
        self,
        encoder: PretrainedConfig | dict[str, Any] | None = None,
        projection_dim: int = 256,
        contrastive_temperature: float = 0.07,  # `temperature` is one of generation there, which no configuration may have
        pooling: Pooling = "cls",
        **others: Any,
    ) -> None:
        self.encoder = encoder.to_dict() if isinstance(encoder, PretrainedConfig) else encoder
        self.projection_dim, self.contrastive_temperature, self.pooling = projection_dim, contrastive_temperature, pooling
        super().__init__(**others)  # num_labels, of which the base class writes names (id2label)


@dataclass
class QualityOutput(ModelOutput):
    """What the model says of n responses.

    logits: [n, num_labels], one of each criterion; `sigmoid` gives probabilities.
    embedding: [n, projection_dim] of norm 1, what the contrastive loss compares.
    pooled: [n, hidden], the encoder's one vector of each response: what an SAE is trained on.
    """

    logits: Tensor | None = None
    embedding: Tensor | None = None
    pooled: Tensor | None = None


class ContrastiveQualityModel(PreTrainedModel):
    """An encoder or decoder of Hugging Face, pooled to one vector a response, with a projection head and a classifier.

    `from_pretrained` and `save_pretrained` as of any model there.

    model_name: a model's name there, or a local directory with its config.json.
    num_labels: criteria.
    projection_dim: of the embedding: Linear, ReLU, Linear, of norm 1 (Chen et al. 2020, section 2.1).
    temperature: of the contrastive loss.
    pooling: "cls", the first token; "mean", of the tokens that are not padding; "last", the last of these. By default "cls" for an
        encoder, which is what its pretraining (BERT's) or everyone's fine-tuning (RoBERTa's) reads, and "last" for a decoder, whose
        first token sees no other.

    OptionError: there is no such model, it has an encoder and a decoder, or the pooling does not fit it.
    """

    config_class = ContrastiveQualityConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: ContrastiveQualityConfig | None = None,
        *,
        model_name: str = "klue/roberta-base",
        num_labels: int = 9,
        projection_dim: int = 256,
        temperature: float = 0.07,
        pooling: Pooling | None = None,
    ) -> None:
        encoder: PreTrainedModel | None = None
        if config is None:
            _check(num_labels=num_labels, projection_dim=projection_dim, temperature=temperature)
            with _readable(model_name):
                own = AutoConfig.from_pretrained(model_name)
            pooling = _pooling_for(own, pooling)
            with _readable(model_name):
                encoder = AutoModel.from_pretrained(model_name, config=own)
            config = ContrastiveQualityConfig(own, projection_dim, temperature, pooling, num_labels=num_labels)
        elif not config.encoder:
            raise OptionError("model_name", "is no ContrastiveQualityModel: make one with ContrastiveQualityModel(model_name=...).")
        super().__init__(config)
        self.encoder = encoder or AutoModel.from_config(AutoConfig.for_model(**(config.encoder or {})))
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # another head, which nothing here would train
        hidden = self.encoder.config.get_text_config().hidden_size
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(hidden, config.num_labels or 0)
        self.projection = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.projection_dim)
        )
        if encoder is not None:
            for loaded in encoder.modules():
                loaded._is_hf_initialized = True  # type: ignore[assignment]  # `post_init` gives new weights to the heads only
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any model of Hugging Face. OptionError: there is no such model."""
        with _readable(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> QualityOutput:
        """Judge n responses.

        input_ids, attention_mask, token_type_ids: [n, tokens], as the model's tokenizer makes them.
        chunk_size: responses encoded at a time (`grad_cache`); all by default.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        encoded = in_chunks(self._judge, chunk_size, **inputs) if chunk_size else self._judge(**inputs)
        return QualityOutput(*encoded)

    def _judge(self, input_ids: Tensor, **masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: mask for name, mask in masks.items() if mask is not None}
        hidden = self.encoder(input_ids=input_ids, **given).last_hidden_state  # [n, tokens, hidden]
        mask = masks["attention_mask"]
        pooled = pool(hidden, torch.ones_like(input_ids) if mask is None else mask, self.config.pooling)
        dropped = self.dropout(pooled)
        return self.classifier(dropped), F.normalize(self.projection(dropped).float(), dim=1), pooled

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each row: [n, hidden]. Padding may be on either side.

    hidden: [n, tokens, hidden]. mask: [n, tokens], 0 on padding.
    """
    if pooling == "mean":
        weight = mask[:, :, None].to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    at = mask.argmax(1) if pooling == "cls" else (mask * place).argmax(1)  # the first, or the last, token that is there
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def _pooling_for(config: PretrainedConfig, pooling: Pooling | None) -> Pooling:
    if config.is_encoder_decoder:
        raise OptionError("model_name", f"{config.model_type} has an encoder and a decoder. Take a model that has one of them.")
    sees_all = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if pooling is None:
        return "cls" if sees_all else "last"
    if pooling not in get_args(Pooling):
        raise OptionError("pooling", f"'{pooling}' is none of {', '.join(get_args(Pooling))}.")
    if pooling == "cls" and not sees_all:
        raise OptionError("pooling", f"the first token of a decoder ({config.model_type}) sees no other. Take 'last' or 'mean'.")
    return pooling


def _check(**above_zero: float) -> None:
    for name, value in above_zero.items():
        if not value > 0:
            raise OptionError(name, f"must be above 0, got {value}.")


@contextlib.contextmanager
def _readable(name: Any) -> Iterator[None]:
    """Turns what transformers says of a directory or a name into one line."""
    if str(name).startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise OptionError("model_name", f"there is no directory '{name}'. Give one with config.json and weights.")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            "model_name",
            f"there is no model that can be read at '{name}': {reason} Give a local directory with config.json and weights, or the "
            "name of a model on huggingface.co.",
        ) from None
