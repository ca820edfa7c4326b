"""Every component that this repository ships passes every conformance check of its kind.

The lists come from the registry, so a new component joins by itself; one that cannot do without options says them here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import WORDS, text_model
from helpers import NARROW_MODULE

from saekit.component import Component
from saekit.kinds import KINDS
from saekit.plugins import Registry
from saekit.testing import checks_of
from saekit.testing.kit import Check
from saekit.testing.running import outcome_of
from saekit.testing.tiny import language_source

REGISTRY = Registry()

EXPECTED: dict[str, dict[str, str]] = {
    "builtin.dictionary_recovery": {
        "empty_stream": "its controls are of random directions: they are what they are before anything is measured",
    },
}
"""For each component, the checks that it fails and may fail, with the reason."""
MAY_SKIP = {
    "on_cuda",  # without a device
    "batch_of_one",  # a loss that compares rows
    "without_positives",  # a loss that needs no labels
    "sparse_and_dense_codes_agree",  # a loss of one architecture, whose code has one form
    "result_is_whole",  # a callback that finds nothing
    "measures_are_scalars",  # a loss that says nothing beside its value
    "whole_or_in_pieces", "bounded_memory", "empty_stream",  # a metric that measures with the model
    "estimates_hold",  # a metric that gives plain numbers
    "state_round_trip",  # a listener without state
    "sequences_by_number",  # a source without labels
    "held_out_ends",  # a source that holds out more than is followed
    "held_out_is_in_no_order",  # a source that does not tell its documents
    "positions_left_out_are_told",  # a source without rows of tokens
    "runs_again",  # a source without a model
    "examples_of_places",  # a source that renders none: tokens or activations are shown
}  # fmt: skip
"""Checks that need not apply to a component; any other that is skipped was skipped by an accident."""


@functools.cache
def options_of(place: Path) -> dict[str, dict[str, Any]]:
    """What components are given that cannot do without options, or take long without."""
    place.mkdir(exist_ok=True)
    (place / "module.py").write_text(NARROW_MODULE, encoding="utf-8")
    np.save(place / "x.npy", np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32))
    labelled = {key: value for key, value in language_source().items() if key != "use"}
    text = {key: value for key, value in labelled.items() if key != "labels"}
    answers = (("base", "lamp?", "It is.", 0), ("like", "+ lamp?", "Good.", 1))
    variations = [
        {"template_type": kind, "prompt": prompt, "response": response, "sycophancy_flag": flag}
        for kind, prompt, response, flag in answers
    ]
    (place / "answers.json").write_text(json.dumps({"results": [{"variations": variations}]}), encoding="utf-8")
    prompts = {"neutral": ["It was a", "The lamp"], "unrelated": ["Salt and"]}
    (place / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    (place / "facts").mkdir(exist_ok=True)
    for kind, lines in facts().items():
        (place / "facts" / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    whole = [word for word in WORDS if "#" not in word]
    lines = [{"text": f"{a} {b}", "red": a == "red"} for a in whole for b in whole]
    (place / "sentences.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {
        "attribution.atp": {"data": str(place / "answers.json")},
        "builtin.encoder": {
            "model": text_model(place / "bert", "bert"),
            "data": str(place / "sentences.jsonl"),
            "hook_point": ".[last_hidden_state]",
            "labels": ["red"],
            "context": 12,
            "held_out": 0.3,
        },
        "builtin.labelled": {**labelled, "labels": [*labelled["labels"], "first"]},
        "builtin.text": {**text, "target_hook_point": "blocks.1.hook_out"},
        "builtin.module": {
            "module": f"{place / 'module.py'}:narrow",
            "data": f"{place / 'module.py'}:batches",
            "hook_point": ".",
        },
        "builtin.organism": {"kinds": ["facts"], "context": 32},
        "builtin.synthetic": {"d_in": 16, "n_features": 32, "probability": 0.1, "held_out": 2000, "concepts": [0, 1]},
        "builtin.pushed": {"d_in": 16, "rows": 2000, "held_out": 0.5},
        "builtin.tensors": {"data": str(place / "x.npy"), "chunk": 100},
        "graph.refresh_graph": {"every": 3, "start": 2, "batches": 2},
        "unlearning.groups": {"every": 3, "batches": 2, "least": 2, "minimum": 2},
        "unlearning.importance": {"every": 2},
        "unlearning.prune": {"every": 2, "start": 2},
        "unlearning.stability": {"every": 2},
        "revival.resample": {"every": 3, "below": 0.2},
        "steering.steer": {
            "prompts": str(place / "prompts.json"),
            "max_new_tokens": 4,
            "continued": 1,
            "controls": 2,
            "min_count": 1,
            "set_sequences": 16,
            "held_out_tokens": 40,
            "pages": False,
        },
        "unlearning.unlearn": {"data": str(place / "facts"), "numbers": [2], "damage_tokens": 100},
    }


def facts() -> dict[str, list[dict[str, Any]]]:
    """Facts for `unlearn` that any model knows: of two candidates the shorter one is right."""
    table: dict[str, list[dict[str, Any]]] = {"texts": [], "questions": []}
    for group, names in (("forget", "Ann Bob Cleo Dan Eve Fay"), ("near", "Gil Hal Ida Jon Kim Lea")):
        for name in names.split():
            for wording, words in (("seen", "Now"), ("seen", "So"), ("unseen", "Yet")):
                prompt = f"{words} {name} is"
                place = {"name": [len(words) + 1, len(words) + 1 + len(name)], "answer": [len(prompt) + 1, len(prompt) + 4]}
                who = {"group": group, "entity": name}
                table["texts"] += [{"text": f"{prompt} red", **place, **who}] if wording == "seen" else []
                table["questions"].append(
                    {"prompt": prompt, "candidates": [" red", " vermilion"], "answer": 0, "wording": wording, **who}
                )
    return table


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Component], dict[str, Any]]:
    place = tmp_path_factory.mktemp("first_party")
    return lambda component: options_of(place).get(component.qualified_name, {})


PAIRS = [
    pytest.param(component, check, id=f"{component.kind}-{component.name}-{check.name}")
    for component in REGISTRY.components()
    for check in checks_of(component.kind)
]


def test_the_registry_is_not_empty() -> None:
    assert {"loss", "architecture", "metric", "analyzer", "callback", "source", "tracker"} <= {
        component.kind for component in REGISTRY.components()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_checks_with_names_and_summaries(kind: str) -> None:
    checks = checks_of(kind)
    assert checks
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.summary.endswith(".") for check in checks)


@pytest.mark.parametrize(("component", "check"), PAIRS)
def test_conformance(component: Component, check: Check, options: Callable[[Component], dict[str, Any]]) -> None:
    expected = EXPECTED.get(component.qualified_name, {})
    outcome = outcome_of(check, component.kind, component.qualified_name, options(component), expected, REGISTRY)
    assert outcome.status in ("passed", "skipped", "expected"), outcome.message
    if outcome.status == "skipped":
        assert check.name in MAY_SKIP, outcome.message


def test_expected_failures_are_of_components_and_checks_that_exist() -> None:
    known = {component.qualified_name: component.kind for component in REGISTRY.components()}
    for name, checks in EXPECTED.items():
        assert set(checks) <= {check.name for check in checks_of(known[name])}
