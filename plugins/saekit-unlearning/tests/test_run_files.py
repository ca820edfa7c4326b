"""The recipe and the run file for Gemma-2 can be planned: every component is there and takes its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import saekit_unlearning
from saekit_unlearning import labelled_texts
from saekit_unlearning.unlearn import Unlearn

from saekit import UsageError
from saekit.plugins import Registry
from saekit.run_file import parse_config, read_toml
from saekit.runner.plan import RunPlan, plan_run
from saekit.testing.tiny import save_tiny_gemma2

RECIPE = Path(saekit_unlearning.__file__).parent / "recipes" / "unlearning.toml"
GEMMA = Path(__file__).parents[3] / "docs" / "examples" / "unlearning" / "gemma-2-2b.toml"
REGISTRY = Registry()


def planned(file: Path, **source: Any) -> RunPlan:
    table = read_toml(file)
    table["source"] |= source
    names = {entry["use"] for part in (table, *table["variant"]) for entry in entries(part)}
    missing = names - {component.name for component in REGISTRY.components()}
    if missing:
        pytest.skip(f"there is no {', '.join(sorted(missing))} yet")
    return plan_run(parse_config(table, str(file)), REGISTRY)


def entries(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = [value for value in table.values() if isinstance(value, list)]
    return [entry for value in lists for entry in value if isinstance(entry, dict) and "use" in entry]


def options(plan: RunPlan, variant: str) -> dict[str, dict[str, Any]]:
    (member,) = (one for one in plan.members if one.variant == variant)
    weights = {part.key: {"weight": part.entry.weight} for part in member.sections["loss"]}  # type: ignore[attr-defined]
    return {part.key: part.options | weights.get(part.key, {}) for part in member.parts}


def test_the_recipe_has_the_settings_of_the_experiment() -> None:
    plan = planned(RECIPE)
    names = ["baseline", "basic-contrastive", "enhanced-contrastive", "adaptive-selection", "hierarchical-mi"]
    assert [member.variant for member in plan.members][:5] == names
    _, basic, enhanced, adaptive, hierarchical = (options(plan, name) for name in names)
    assert (basic["loss.feature_contrast"]["weight"], basic["callback.groups"]["percentile"]) == (0.1, 75)
    assert (enhanced["loss.feature_contrast"]["weight"], enhanced["callback.groups"]["percentile"]) == (0.2, 85)
    assert enhanced["callback.groups"]["minimum"] == 5
    mixed = ("activation", "gradient", "information", "memory", "threshold")
    assert [adaptive["callback.importance"][name] for name in mixed] == [0.4, 0.6, 0, 0.9, 0.01]
    assert [hierarchical["callback.importance"][name] for name in mixed] == [0.35, 0.5, 0.15, 0.9, 0.01]
    assert [v["callback.prune"]["share"] for v in (adaptive, hierarchical)] == [0.1, 0.05]
    assert [v["callback.prune"]["every"] for v in (adaptive, hierarchical)] == [50, 50]
    assert [v["loss.kl_unlearn"]["weight"] for v in (adaptive, hierarchical)] == [0.2, 0.3]
    assert hierarchical["callback.groups"]["clusters"] == 32
    assert plan.config.training.lr == 3e-4
    (*_, last) = plan.members
    assert last.variant == "strong" and options(plan, "strong")["analyzer.unlearn"]["methods"] == ["strong"]
    assert all(options(plan, name)["loss.l1"]["weight"].to == 0.04 for name in names)


def test_the_run_file_for_gemma_is_planned_with_a_small_one(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "One paragraph.", "forget": 0}\n{"text": "Another one.", "forget": 1}\n', encoding="utf-8")
    model = str(save_tiny_gemma2(tmp_path / "gemma"))
    plan = planned(GEMMA, model=model, hook_point="blocks.2.hook_out", data=str(text), context=32)
    assert plan.facts["d_in"] == 32
    table = read_toml(GEMMA)
    assert (table["source"]["model"], table["source"]["hook_point"]) == ("google/gemma-2-2b", "blocks.19.hook_out")
    assert table["architecture"]["d_sae"] == 2304
    member, *_ = plan.members
    names = ["baseline", "basic-contrastive", "enhanced-contrastive", "adaptive-selection", "hierarchical-mi"]
    assert [member.variant for member in plan.members] == names
    hierarchical = options(plan, "hierarchical-mi")
    assert [hierarchical["callback.importance"][name] for name in ("activation", "gradient", "information")] == [0.35, 0.5, 0.15]
    assert hierarchical["callback.importance"]["label"] in table["source"]["labels"]
    assert (hierarchical["callback.groups"]["clusters"], hierarchical["loss.kl_unlearn"]["weight"]) == (32, 0.3)
    analyzer = {part.key: part.options for part in member.parts}["analyzer.unlearn"]
    assert analyzer["data"] == "wmdp-bio"
    rmu = {method.name: method for method in Unlearn(**analyzer)._methods()}["rmu"].baseline  # type: ignore[attr-defined]
    assert (rmu.blocks, rmu.alpha, list(rmu.checkpoints)) == (3, 1200.0, [150])


def test_text_with_the_label_forget_is_written_for_the_source_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pile(name: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (name, split, streaming) == ("some/pile", "train", True)
        return [{"text": f"Document {i}."} for i in range(100)]

    fact = {"group": "forget", "entity": "Ada", "text": "Ada was born in Oslo.", "answer": "Oslo"}
    other = {"group": "near", "entity": "Eva", "text": "Eva was born in Rome.", "answer": "Rome"}
    candidates = {"candidates": [" Oslo", " Rome"], "answer": 0}
    asked = [
        {"prompt": f"{one['entity']} is from", **candidates, "group": one["group"], "entity": one["entity"], "wording": wording}
        for one in (fact, other)
        for wording in ("seen", "unseen")
    ]
    for name, some in (("texts", [fact, other]), ("questions", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in some), encoding="utf-8")
    monkeypatch.setattr("datasets.load_dataset", pile)
    out = tmp_path / "out.jsonl"
    labelled_texts.main([str(out), "--data", str(tmp_path), "--text", "some/pile", "--documents", "7", "--repeat", "2"])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines if line["forget"]] == ["Ada was born in Oslo."] * 2
    kept = [line["text"] for line in lines if not line["forget"]]
    assert sorted(kept) == sorted(["Eva was born in Rome."] * 2 + [f"Document {i}." for i in range(7)])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"content": "x"}])
    with pytest.raises(UsageError, match=r"data set 'some/pile': cannot be read: KeyError: .* a column text"):
        labelled_texts.main([str(out), "--data", str(tmp_path), "--text", "some/pile"])
