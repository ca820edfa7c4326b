"""The analyzer `atp`: which latents cause a flagged answer, sample by sample, by estimate and by exact effect."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from saekit import OptionError, Result, RunContext, SparseAutoencoder, Subject, top_examples
from saekit_attribution.atp.progress import Progress, restored, stored
from saekit_attribution.atp.sample_analysis import AnalysedSample, atp_analysis
from saekit_attribution.atp.set_tests import set_tests
from saekit_attribution.atp.summary import summarise
from saekit_attribution.common_options import (
    ORGANISM,
    BatchTokens,
    ChatTemplate,
    Data,
    Joiner,
    KeyNames,
    MaxTokensToCheck,
    Steps,
)
from saekit_attribution.effects.attribute import Outcome, attribute
from saekit_attribution.effects.batching import Failed
from saekit_attribution.effects.latent_sets import SetEffects, set_effects
from saekit_attribution.effects.methods import Method
from saekit_attribution.effects.nodes import Positions, Reference
from saekit_attribution.labelled_data.document import LabelledData, Pair, Place, Skipped
from saekit_attribution.labelled_data.organism_answers import organism_data
from saekit_attribution.labelled_data.teacher_forcing import Sample, teacher_forced

SHOWN = 12  # latents with examples

HALF_PRECISION = (
    "The model computes in 16 bits, where the difference of two runs is mostly rounding: be careful with the exact effects "
    "and with the fidelity measured by them, or load the model in float32."
)


class AttributionPatching:
    """Pairs each flagged answer with the base answer, and attributes the difference of the two answers' logits, at the
    first token in which they differ, to the SAE's latents (attribution patching, Nanda 2023) and to its error.

    The results file is the labelled document with `atp_analysis` added to each flagged variation. An interrupted
    analysis with the same options, data, model and SAE continues where it stopped.
    """

    def __init__(
        self,
        *,
        data: Data = ORGANISM,
        samples: Annotated[
            int, Field(gt=0, description="Arguments, for data organism; each is asked in three ways.")
        ] = 50,
        methods: Annotated[
            list[Method], Field(min_length=1, description="Any of atp, ig and exact; the first one ranks.")
        ] = ["atp", "exact"],  # noqa: B006
        positions: Annotated[
            Positions, Field(description="Only the decisive position, or all up to it.")
        ] = "decisive",
        reference: Annotated[
            Reference, Field(description="Compare with zero, or with the base run's activations.")
        ] = "zero",
        steps: Steps = 8,
        max_tokens_to_check: MaxTokensToCheck = 20,
        top_k: Annotated[int, Field(gt=0, description="Latents written for each sample.")] = 50,
        per_position: Annotated[
            int, Field(ge=0, description="Latents written for each position, by atp and ig; 0 writes no positions.")
        ] = 0,
        recall_at: Annotated[
            int, Field(gt=0, description="How many of the first exact latents an estimate should find.")
        ] = 10,
        set_sizes: Annotated[
            list[Annotated[int, Field(gt=0)]],
            Field(description="Sizes of sets of first latents, tested together; [] tests none."),
        ] = [10],  # noqa: B006
        draws: Annotated[int, Field(ge=2, description="Sets of matched random latents beside each set.")] = 5,
        save_interval: Annotated[int, Field(gt=0, description="Samples between intermediate saves.")] = 10,
        batch_tokens: BatchTokens = 4096,
        joiner: Joiner = None,
        chat_template: ChatTemplate = False,
        keys: KeyNames = {},  # noqa: B006
    ) -> None:
        self.data, self.samples, self.keys = data, samples, keys
        self.methods: list[Method] = list(dict.fromkeys(methods))
        self.positions, self.reference, self.steps = positions, reference, steps
        self.max_tokens_to_check, self.top_k, self.save_interval = max_tokens_to_check, top_k, save_interval
        self.per_position, self.recall_at = per_position, recall_at
        self.set_sizes, self.draws = list(dict.fromkeys(set_sizes)), draws
        if per_position and self.methods == ["exact"]:
            raise OptionError("per_position", "an exact effect is of all positions at once. Add 'atp' or 'ig' to methods.")
        self.batch_tokens, self.joiner, self.chat_template = batch_tokens, joiner, chat_template

    def __call__(self, context: RunContext) -> Result:
        """`summarise` says what the result holds; its one file is the labelled document with the analyses."""
        subject = context.source.subject
        labelled = self._labelled(context)
        prepared = [self._sample_of(pair, subject) for pair in labelled.pairs()]
        todo = [p for p in prepared if isinstance(p, Sample)]
        progress = Progress(context.directory, self._identity(context, labelled), _model_name(context))
        outcomes = {p.place: {"skipped": p.reason} for p in prepared if isinstance(p, Skipped)}
        for sample, outcome in self._outcomes(context, todo, progress):
            outcomes[sample.place] = outcome
        analysed = [AnalysedSample(s, restored(outcomes[s.place])) for s in todo if not _unanswered(outcomes[s.place])]
        entries = {place: outcome for place, outcome in outcomes.items() if _unanswered(outcome)}

        def strings(tokens: Sequence[int]) -> list[str]:
            return context.source.token_strings(torch.tensor(tokens))

        for a in analysed:
            entries[a.sample.place] = atp_analysis(a, strings, self.top_k, self.recall_at)
        labelled.write(progress.results, entries)
        progress.finish()
        return self._result(context, analysed, entries, progress)

    def _labelled(self, context: RunContext) -> LabelledData:
        if self.data != ORGANISM:
            return LabelledData.load(self.data, self.keys)
        return organism_data(context.source.subject, n=self.samples, seed=context.seed)

    def _sample_of(self, pair: Pair | Skipped, subject: Subject) -> Sample | Skipped:
        if isinstance(pair, Skipped):
            return pair
        return teacher_forced(
            pair,
            subject.tokenizer,
            subject.context,
            self.max_tokens_to_check,
            joiner=self.joiner,
            chat_template=self.chat_template,
            reference=self.reference,
        )

    def _outcomes(
        self, context: RunContext, samples: list[Sample], progress: Progress
    ) -> Iterator[tuple[Sample, dict[str, Any]]]:
        """Each sample with its outcome, chunk by chunk. Chunks hold samples of similar length, so that they batch well, and
        do not depend on where an earlier run stopped."""
        ordered = sorted(samples, key=lambda sample: (len(sample.tokens), sample.place))
        for number, start in enumerate(range(0, len(ordered), self.save_interval)):
            chunk = ordered[start : start + self.save_interval]
            done = progress.load(number)
            if done is None:
                done = [stored(outcome) for outcome in self._attributed(context, chunk)]
                progress.save(number, done)
            yield from zip(chunk, done, strict=True)

    def _attributed(self, context: RunContext, samples: list[Sample]) -> list[Outcome]:
        return attribute(
            context.source.subject,
            context.sae,
            samples,
            methods=self.methods,
            positions=self.positions,
            reference=self.reference,
            steps=self.steps,
            batch_tokens=self.batch_tokens,
            per_position=self.per_position,
            on_error="keep",
        )

    def _set_effects(
        self, context: RunContext, samples: list[Sample], sets: list[list[int]]
    ) -> list[SetEffects | Failed]:
        return set_effects(
            context.source.subject,
            context.sae,
            samples,
            sets,
            positions=self.positions,
            reference=self.reference,
            batch_tokens=self.batch_tokens,
        )

    def _identity(self, context: RunContext, labelled: LabelledData) -> dict[str, Any]:
        """Everything that determines the numbers."""
        subject = context.source.subject
        return {
            "data": labelled.digest,
            "model": subject.digest(),
            "hook_point": subject.site.name,
            "sae": _digest(context.sae),
            "device": subject.device.type,
            "dtype": str(next(subject.model.parameters()).dtype),
            "options": {name: value for name, value in vars(self).items() if name not in ("data", "samples")},
        }

    def _result(
        self, context: RunContext, analysed: list[AnalysedSample], entries: dict[Place, dict[str, Any]], progress: Progress
    ) -> Result:
        skipped = Counter(entry["skipped"] for entry in entries.values() if "skipped" in entry)
        failed = Counter(entry["error"] for entry in entries.values() if "error" in entry)
        result = summarise(analysed, skipped, failed, top_k=self.top_k, recall_at=self.recall_at)
        result.files.append(progress.results.name)
        latents = [row["latent"] for row in result.tables.get("ranking", [])][:SHOWN]
        result.tables["examples"] = top_examples(context, latents)
        if "exact" in self.methods and next(context.source.subject.model.parameters()).dtype.itemsize < 4:
            result.notes.append(HALF_PRECISION)
        exceeding = self._test_sets(context, analysed, result) if self.set_sizes else []
        for note in result.notes:
            context.warn(f"atp: {note}")
        result.notes += exceeding
        return result

    def _test_sets(self, context: RunContext, analysed: list[AnalysedSample], result: Result) -> list[str]:
        """Adds the table `sets` and what a reader must be warned of; returns what is as it should be."""
        tests, problems = set_tests(
            analysed,
            partial(self._set_effects, context),
            self.set_sizes,
            draws=self.draws,
            d_sae=context.sae.d_sae,
            seed=context.seed,
        )
        result.tables["sets"] = [test.row() for test in tests]
        sentences = [sentence for test in tests for sentence in test.sentences()]
        result.notes += [text for text, exceeds in sentences if not exceeds] + problems
        return [text for text, exceeds in sentences if exceeds]


def _unanswered(entry: dict[str, Any]) -> bool:
    return "skipped" in entry or "error" in entry


def _model_name(context: RunContext) -> str:
    """The model's name in the source, without directories."""
    name = context.source.peek().get("model") or context.source.subject.name
    return Path(str(name)).name


def _digest(sae: SparseAutoencoder) -> str:
    """sha256 of an SAE's class, options and weights."""
    digest = hashlib.sha256(f"{type(sae).__name__} {sae.options()}".encode())
    for name, tensor in sorted(sae.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
