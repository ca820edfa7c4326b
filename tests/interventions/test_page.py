"""The examples of docs/interventions.md, run from top to bottom as the one session that they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interventions.models import D_SAE, TOKENS, D, language_case

import saekit
from saekit.builtin.architectures.topk import TopK

PAGE = Path(__file__).parents[2] / "docs" / "interventions.md"


@pytest.fixture
def session(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """What the page's blocks have left behind."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_gpt2, "my-model")
    text = PAGE.read_text(encoding="utf-8")
    case = language_case(tiny_gpt2)
    for number, run in enumerate(sorted(set(re.findall(r"runs/[\w-]+/sae", text)))):
        sae = TopK(D, D_SAE, k=4)
        with torch.no_grad():
            sample = case.activation("blocks.1.hook_out", TOKENS).reshape(-1, D)
        sae.initialise(torch.Generator().manual_seed(number), sample)
        saekit.save_sae(sae, run, name="topk")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    names["printed"] = capsys.readouterr().out
    return names


def test_the_page_says_what_happens(session: dict[str, Any]) -> None:
    plain = session["model"](**session["inputs"]).logits
    assert not torch.allclose(session["steered"], plain)
    assert not torch.allclose(session["edited"], plain)
    assert session["attached"].changed == 7  # the last of 8 tokens is never read again
    width = session["inputs"]["input_ids"].numel()
    assert "'blocks.1.hook_in' is not downstream of the edit at 'transformer.h.1.mlp'" in session["printed"]
    assert session["changed"].shape == (width, D_SAE)
    assert all(pair.before in session["printed"] for pair in session["pairs"])
    assert session["strength"].grad.shape == (1, width) and session["strength"].grad.abs().min() > 0


def test_every_edit_and_mode_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [str(mode) for mode in saekit.Mode if f'`"{mode}"`' not in text] == []
    public = {name: getattr(saekit, name) for name in saekit.__all__ if name.islower()}
    edits = [n for n, function in public.items() if function.__module__ == "saekit.interventions.edits"]
    assert [name for name in edits if f"`{name}" not in text] == []
