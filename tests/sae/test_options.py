"""The options of an SAE are read from the attributes that its constructor keeps; one that is not kept is an error at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import saekit
from saekit.builtin.architectures.clipped import Clipped
from saekit.builtin.architectures.jumprelu import JumpReLU
from saekit.builtin.architectures.matryoshka import Matryoshka
from saekit.builtin.architectures.topk import TopK
from saekit.errors import PluginError
from saekit.testing.tiny import tiny_table

D, F = 16, 64


@pytest.mark.parametrize(
    ("sae", "options"),
    [
        (TopK(D, F, k=8), {"decoder_norm": "unit", "k": 8}),
        (TopK(D, F, 12, k=8, skip=True), {"decoder_norm": "unit", "skip": True, "k": 8}),
        (JumpReLU(D, F, threshold=0.3), {"decoder_norm": "unit", "threshold": 0.3, "bandwidth": 0.1}),
        (
            Matryoshka(D, F, k=4, prefixes=[8, 32], threshold_memory=0.9),
            {"decoder_norm": "unit", "k": 4, "threshold_memory": 0.9, "prefixes": [8, 32, 64]},
        ),
    ],
)
def test_what_was_given_from_python_is_recorded_in_the_order_of_the_classes(sae: Any, options: dict[str, Any]) -> None:
    assert list(sae.options().items()) == list(options.items())


def test_an_option_in_units_of_the_activations_is_recorded_as_it_is_now() -> None:
    sae = Clipped(D, F, cap=6.0)
    sae.rescale(2.0)
    assert sae.options()["cap"] == 3.0


class Unkept(TopK):
    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, *, few: int = 8) -> None:
        super().__init__(d_in, d_sae, d_out, k=few)


class Hidden(TopK):
    """A tensor has the name of its option."""

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, *, gain: float = 1.0) -> None:
        super().__init__(d_in, d_sae, d_out)
        self.gain = torch.nn.Parameter(torch.full((d_sae,), gain))


@pytest.mark.parametrize(("architecture", "option"), [(Unkept, "few"), (Hidden, "gain")])
def test_an_option_that_is_not_kept_is_named(architecture: Any, option: str) -> None:
    with pytest.raises(PluginError, match=f"does not keep its option '{option}'.*write self.{option} = {option}"):
        architecture(D, F).options()


def test_a_run_finds_it_out_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "unkept.py").write_text(
        """
from saekit import Component, hookimpl
from saekit.builtin.architectures.topk import TopK

class Unkept(TopK):
    def __init__(self, d_in, d_sae, d_out=None, *, few: int = 8):
        super().__init__(d_in, d_sae, d_out, k=few)

@hookimpl
def saekit_architectures():
    yield Component("unkept", Unkept, "Forgets.")
"""
    )
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({**tiny_table(), "architecture": {"use": "unkept", "d_sae": 64}}), encoding="utf-8")
    with pytest.raises(PluginError, match="does not keep its option 'few'"):
        saekit.run(file, plugins=[tmp_path / "unkept.py"], directory=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
