"""docs/online.md: an SAE that goes on learning follows a model that does, and one that was frozen falls behind."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLLOW = ROOT / "docs" / "examples" / "online" / "follow.py"


@pytest.mark.slow
def test_the_online_sae_follows_and_the_frozen_one_falls_behind() -> None:
    """In little, and with another seed."""
    first, *_, last = runpy.run_path(str(FOLLOW))["follow"](seed=3, steps=600, every=150, freeze_at=300)
    assert first["step"] == 300 and first["online"] == first["frozen"] and first["moved"] == 0
    assert last["moved"] > 0.15
    assert last["online"] > first["online"] - 0.03
    assert last["frozen"] < last["online"] - 0.05


def test_the_page_shows_what_the_script_prints_at_its_ends() -> None:
    """Its table begins where the copy is frozen, ends with the last step, and says of each column what the text claims."""
    page = (ROOT / "docs" / "online.md").read_text(encoding="utf-8")
    rows = [
        [float(cell.replace(",", "")) for cell in row.strip("|").split("|")]
        for row in re.findall(r"^\| [1-6],[05]00 \|.*\|$", page, re.MULTILINE)
    ]
    steps, moved, online, frozen = zip(*rows, strict=True)
    assert list(steps) == list(range(1000, 6001, 500))
    assert moved[0] == 0 and online[0] == frozen[0]
    assert min(online) > 0.97 * online[0] and all(a > b for a, b in zip(online[1:], frozen[1:], strict=True))
