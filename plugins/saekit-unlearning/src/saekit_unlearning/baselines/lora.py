"""Fine-tuning to uniform answers through low-rank adapters (Hu et al. 2021), by peft, merged into the weights at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from saekit import Subject, UsageError, seeded
from saekit_unlearning.baselines.material import Material
from saekit_unlearning.baselines.options import Counts, Number, Positives, Weight
from saekit_unlearning.baselines.training import CHECKPOINTS, WEIGHT, trained, unembedding_of
from saekit_unlearning.baselines.uniform import to_uniform
from saekit_unlearning.edited import Edited
from saekit_unlearning.passages import Site


@dataclass(frozen=True)
class LoRA:
    """Every rate is a setting, after each number of steps in `checkpoints`.

    rank: of the adapters, of which every linear map but the unembedding gets one; their scale is 1 (alpha = rank).
    """

    rates: Positives = (1e-3, 2e-3, 5e-3)
    rank: Number = 4
    weight: Weight = WEIGHT
    checkpoints: Counts = CHECKPOINTS
    name: ClassVar[str] = "lora"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The models that it leaves, each with weights of its own. UsageError without peft."""
        loss = to_uniform(material.site.subject, self.weight)

        def begin(site: Site) -> tuple[Sequence[nn.Parameter], Callable[[], Site]]:
            with seeded(seed, site.subject.device):
                adapted = with_adapters(site.subject.model, self.rank)
            return [p for p in adapted.parameters() if p.requires_grad], lambda: merged(adapted, site)

        for rate in self.rates:
            for step, site in trained(material, seed, loss, rate=rate, checkpoints=self.checkpoints, begin=begin):
                yield Edited(f"rank {self.rank}, rate {rate:g}, {step} steps", site, changed=True)


def with_adapters(model: nn.Module, rank: int) -> Any:
    """peft's wrapper of a model that has adapters inside from now on; only they are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(
            f"the baseline LoRA needs peft ({error}). Install it: pip install 'saekit-unlearning[lora]', or leave LoRA out."
        ) from None
    unembedding = unembedding_of(model)
    linear = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not unembedding
    }
    transposed = "Conv1D" in linear.values()  # GPT-2 keeps its weights as [in, out]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(linear), fan_in_fan_out=transposed)
    return get_peft_model(model, config)


def merged(adapted: Any, site: Site) -> Site:
    """The site in a copy of the adapted model, whose adapters became part of its weights."""
    subject = site.subject
    wrapper, own, target = copy.deepcopy((adapted, subject.site, subject.target_site))
    model = wrapper.merge_and_unload().requires_grad_(False)
    return Site(Subject(model, subject.tokenizer, own, name=subject.name, target_site=target), site.trained)
