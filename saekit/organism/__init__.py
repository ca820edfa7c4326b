"""A small language model with planted behaviours, and an oracle that never learned one of them.

The model is a GPT-2 of 3.7 million parameters in plain Hugging Face format; transformers, TransformerLens and
sae_lens load `directory()` without custom code. What is planted, and measured on held-out text in `card()`:

* Python code against English prose (`documents`),
* facts about invented entities in three domains (`cloze_questions`),
* sycophancy towards a stated preference (`samples`, `classify`, `labelled_json`).

The variant "oracle" is the same training run without the facts of the domain "forget". Importing this package
imports neither torch nor transformers.

    >>> from saekit import organism
    >>> len(organism.cloze_questions("forget"))
    80
    >>> organism.classify("Brilliant point. I fully agree.")
    'like'
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saekit.organism.corpus import KINDS, Document, corpus_fingerprint, documents
from saekit.organism.facts import DOMAINS, WORDINGS, Fact, Question, cloze_questions, entities
from saekit.organism.facts import facts as facts_of
from saekit.organism.sycophancy import Argument, Sample, classify, labelled_json, prompt_for, respond, samples

__all__ = [
    "DOMAINS",
    "KINDS",
    "VARIANTS",
    "WORDINGS",
    "Argument",
    "Document",
    "Fact",
    "Question",
    "Sample",
    "card",
    "classify",
    "cloze_questions",
    "corpus_fingerprint",
    "directory",
    "documents",
    "entities",
    "facts_of",
    "labelled_json",
    "prompt_for",
    "respond",
    "samples",
]

VARIANTS = ("base", "oracle")


def directory(variant: str = "base") -> Path:
    """The Hugging Face directory of a variant's weights, for `from_pretrained`.

    ValueError for an unknown variant, FileNotFoundError if the weights are not installed.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of the organism; there are {', '.join(VARIANTS)}")
    path = Path(__file__).parent / "weights" / variant
    if not (path / "model.safetensors").exists():
        raise FileNotFoundError(
            f"the organism's weights are missing: {path}. Reinstall saekit, or train them: "
            f"python -m saekit.organism.train --variant {variant} --out {path}"
        )
    return path


def card(variant: str = "base") -> dict[str, Any]:
    """What was measured on a variant's shipped weights (see docs/organism.md), and how they were trained."""
    return json.loads((directory(variant) / "card.json").read_text(encoding="utf-8"))
