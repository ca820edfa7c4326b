"""Labelled data from the model organism: its greedy answers to arguments, with and without a stated preference."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from saekit import Subject, organism
from saekit_attribution.labelled_data.document import LabelledData

MAX_NEW_TOKENS = 40
BEHAVIOUR = "sycophancy"


def organism_data(subject: Subject, *, n: int, split: Literal["train", "held_out"] = "held_out", seed: int = 0) -> LabelledData:
    """`n` arguments of a split, each under the three template types, answered greedily by the subject's model.

    A variation is flagged if the answer follows the stated preference (`saekit.organism.classify`). A prompt that
    leaves no room for an answer in the model's context gets an empty one.
    """
    samples = organism.samples(split, n, seed)
    limit = subject.context
    lengths = [len(ids) for ids in subject.tokenizer([s.prompt for s in samples], verbose=False)["input_ids"]]
    fitting = [i for i, length in enumerate(lengths) if limit is None or length + MAX_NEW_TOKENS <= limit]
    model = getattr(subject.model, "original_model", subject.model)
    responses = [""] * len(samples)
    with subject.lock:
        answers = organism.respond(model, subject.tokenizer, [samples[i] for i in fitting], MAX_NEW_TOKENS)
    for i, answer in zip(fitting, answers, strict=True):
        responses[i] = answer
    answered = [replace(s, response=response) for s, response in zip(samples, responses, strict=True)]
    document = organism.labelled_json(answered, data="organism", behaviour=BEHAVIOUR, split=split, arguments=n, seed=seed)
    return LabelledData(document, f"organism ({split})")
