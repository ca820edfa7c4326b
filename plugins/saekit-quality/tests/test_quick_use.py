"""The quick use on the page, as it is written there, with a local directory in place of the model's name."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[3] / "docs" / "quality.md"


def test_the_quick_use_of_the_page(roberta, kit, tmp_path, monkeypatch) -> None:
    use, module = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[:2]
    (tmp_path / "contrastive_learning.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    names = {
        "train_loader": kit.loader(64, 3, 32),
        "val_loader": kit.loader(32, 3, 32, seed=1),
        "device": torch.device("cpu"),
    }
    for loader in (names["train_loader"], names["val_loader"]):
        for row in loader.dataset:
            row["votes"] = row["votes"].repeat(1, 3)  # nine criteria
    exec(compile(use.replace("klue/roberta-base", str(roberta)), str(PAGE), "exec"), names)
    assert names["results"]["loss"] > 0 and names["results"]["eval_bce"] > 0
    assert names["results"]["epoch"] == 1 and names["results"]["step"] == 2
    assert names["model"].config.num_labels == 9 and names["model"].projection[-1].out_features == 256
