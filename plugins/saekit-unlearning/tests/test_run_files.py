"""The recipe and the run file for Gemma-2 can be planned: every component is there and takes its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import saekit_unlearning
from saekit_unlearning.unlearn import Unlearn

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
    assert all(options(plan, name)["loss.l1"]["weight"].to == 0.04 for name in names)


def test_the_run_file_for_gemma_is_planned_with_a_small_one(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One paragraph.\n\nAnother one.\n", encoding="utf-8")
    model = str(save_tiny_gemma2(tmp_path / "gemma"))
    plan = planned(GEMMA, model=model, hook_point="blocks.2.hook_out", data=str(text), context=32)
    assert plan.facts["d_in"] == 32
    table = read_toml(GEMMA)
    assert (table["source"]["model"], table["source"]["hook_point"]) == ("google/gemma-2-2b", "blocks.19.hook_out")
    assert table["architecture"]["d_sae"] == 2304
    (member, *_) = plan.members
    analyzer = {part.key: part.options for part in member.parts}["analyzer.unlearn"]
    assert analyzer["data"] == "wmdp-bio"
    rmu = {method.name: method for method in Unlearn(**analyzer)._methods()}["rmu"].baseline  # type: ignore[attr-defined]
    assert (rmu.blocks, rmu.alpha, list(rmu.checkpoints)) == (3, 1200.0, [150])
