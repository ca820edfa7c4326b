"""Which models are encoders, as their config.json tells: they read a whole text or image at once, and do not write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FAMILIES = frozenset(
    (
        "albert", "beit", "bert", "big_bird", "camembert", "clip_vision_model", "convbert", "deberta", "deberta-v2", "deit",
        "dinov2", "distilbert", "electra", "ernie", "esm", "eurobert", "fnet", "funnel", "ibert", "layoutlm", "luke", "mobilebert",
        "modernbert", "mpnet", "nomic_bert", "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer",
        "siglip_vision_model", "squeezebert", "swin", "vit", "vit_mae", "xlm-roberta", "xlm-roberta-xl",
    )
)  # fmt: skip
_WRITE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_READ = ("ForMaskedLM", "ForImageClassification", "ForMaskedImageModeling")


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is that of an encoder, by its type and the class that was saved."""
    saved = config.get("architectures")
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    if config.get("is_decoder") is True or any(name.endswith(_WRITE) for name in names):
        return False
    return config.get("model_type") in _FAMILIES or any(name.endswith(_READ) for name in names)


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is that of a model of images alone."""
    return "image_size" in config and "vocab_size" not in config
