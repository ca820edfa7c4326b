"""The analyzer `unlearn`: how much of what is to be forgotten edits of the SAE's latents remove, and what else they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from saekit import ComponentError, OptionError, Result, RunContext, wilson_interval
from saekit_unlearning.answers import Examination
from saekit_unlearning.baselines.baseline import AsMethod, Baseline
from saekit_unlearning.baselines.by_name import NAMES, ORACLE, BaselineName, baseline, oracle
from saekit_unlearning.baselines.oracle import Oracle
from saekit_unlearning.damage import damage, other_text
from saekit_unlearning.data import FORGET, Question, UnlearningData
from saekit_unlearning.edits import Codes, Path
from saekit_unlearning.entity_intervals import intervals
from saekit_unlearning.experiment import Experiment, Found
from saekit_unlearning.figures import curve_figure, score_figure, title
from saekit_unlearning.files import ORGANISM, load
from saekit_unlearning.latent_methods import Grid, attribution, greedy, sparsity
from saekit_unlearning.measure import Exam, chance
from saekit_unlearning.methods import Method, Reporting, Seen
from saekit_unlearning.passages import Site
from saekit_unlearning.push import Target
from saekit_unlearning.relearning import halves
from saekit_unlearning.relearning_report import Relearning, add_relearning
from saekit_unlearning.score import RETAIN_BOUND, held_back_score
from saekit_unlearning.strong_method import Strong
from saekit_unlearning.tables import Ends, control_rows, group_columns, method_row, scalars, setting_rows

LatentMethodName = Literal["sparsity", "attribution", "greedy"]
MethodName = LatentMethodName | Literal["strong"] | BaselineName
WHERE: dict[Path | None, str] = {
    "spliced": "With the reconstruction spliced in",
    "error_kept": "With the SAE's error kept",
    None: "Without the SAE",
}
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(kw_only=True, eq=False)
class Unlearn:
    """Selects latents by what is seen, edits them on both paths, and asks questions in other words.

    Settings are chosen on seen wordings about what is to be forgotten and about the entities whose texts are shown. They are
    reported on wordings never used before, also about entities that were never shown."""

    data: Annotated[
        str, Field(description="organism; wmdp-bio; or a directory with texts.jsonl and questions.jsonl.")
    ] = ORGANISM
    shown_share: Annotated[
        float, Field(gt=0, lt=1, description="The share of the entities to stay whose texts are shown as retain text.")
    ] = 0.5
    shown_groups: Annotated[
        list[str] | None, Field(description="The groups to stay of which that share is shown; by default all.")
    ] = None
    methods: Annotated[
        list[MethodName],
        Field(min_length=1, description="Ways to select latents; strong adds its own; baselines without any."),
    ] = field(
        default_factory=lambda: list(get_args(LatentMethodName))
    )
    baselines: Annotated[
        dict[BaselineName, dict[str, Any]],
        Field(description='Options of baselines by name, such as { rmu = { norms = [2.0] }, oracle = { model = "..." } }.'),
    ] = field(default_factory=dict)
    relearn: Annotated[
        int | None,
        Field(gt=0, description="Steps of relearning half of what was forgotten, for each method; none by default."),
    ] = None
    paths: Annotated[
        list[Path],
        Field(
            min_length=1,
            description="spliced: the reconstruction takes the activation's place; error_kept: it does not.",
        ),
    ] = field(default_factory=lambda: ["spliced", "error_kept"])
    thresholds: Annotated[
        list[Share], Field(min_length=1, description="For sparsity: a candidate's rate on retain text is below this.")
    ] = field(default_factory=lambda: [0.001, 0.01, 0.1])
    numbers: Annotated[
        list[Annotated[int, Field(gt=0)]], Field(min_length=1, description="How many latents are edited.")
    ] = field(default_factory=lambda: [10, 40, 160])
    ablate: Annotated[bool, Field(description="Try setting the latents to 0.")] = True
    clamps: Annotated[
        list[Positive], Field(description="Try setting active latents to minus this, as SAEBench's multipliers do.")
    ] = field(default_factory=lambda: [25.0])
    rms_clamps: Annotated[
        list[Positive], Field(description="Try setting active latents to minus this many times their own RMS.")
    ] = field(default_factory=lambda: [2.0, 10.0])
    push_targets: Annotated[
        list[Literal["uniform", "others"]],
        Field(min_length=1, description="For strong: what the model is to predict; others: what it says of other names."),
    ] = field(default_factory=lambda: ["uniform", "others"])
    push_steps: Annotated[
        list[Annotated[int, Field(gt=0)]],
        Field(min_length=1, description="For strong: how many steps its rows are trained."),
    ] = field(default_factory=lambda: [300])
    wordings: Annotated[
        int,
        Field(
            gt=0, description="In how many of its seen wordings, drawn with the seed, each fact is asked to choose by."
        ),
    ] = 2
    never_shown: Annotated[
        Literal["unseen", "all"],
        Field(
            description="Wordings in which entities that were never shown are asked: none of them was used for anything."
        ),
    ] = "unseen"
    bound: Annotated[float, Field(ge=0, le=1, description="The share that a setting must retain to be chosen.")] = (
        RETAIN_BOUND
    )
    draws: Annotated[int, Field(ge=0, description="Draws of each kind of control for each method.")] = 5
    general_tokens: Annotated[
        int,
        Field(ge=0, description="Tokens of each kind of other training text that methods may see beside the facts."),
    ] = 4000
    damage_tokens: Annotated[int, Field(gt=0, description="Held-out tokens of each kind for KL and cross-entropy.")] = (
        2000
    )
    batch_tokens: Annotated[int, Field(gt=0, description="Tokens that run through the model at a time.")] = 4096

    def __post_init__(self) -> None:
        self.methods = list(dict.fromkeys(self.methods))
        self.paths = list(dict.fromkeys(self.paths))
        self.push_targets, self.push_steps = list(dict.fromkeys(self.push_targets)), list(dict.fromkeys(self.push_steps))
        self._baselines()
        if not (self.ablate or self.clamps or self.rms_clamps):
            raise OptionError(
                "ablate", "is false and there are no clamps, so nothing would be edited. Allow one of them."
            )
        if "strong" in self.methods and not self.general_tokens:
            raise OptionError(
                "general_tokens",
                "= 0 leaves strong no other text to tell names from. Give it some, or leave strong out of `methods`.",
            )

    def prepare(self, context: RunContext) -> None:
        """Refuse data that cannot be used, before an SAE is trained."""
        data = self._divided(context.seed)
        if self.relearn is not None:
            halves(data, context.seed)

    def __call__(self, context: RunContext) -> Result:
        """scalars: `tables.scalars`. tables: methods, settings, controls, unedited. figures: curve, scores. With `relearn` also a
        table and a figure of that name, `relearning_report.add_relearning`."""
        if context.sae.transcoder:
            raise ComponentError("the SAE is a transcoder, which cannot pass on what it reads. Use an SAE.")
        data = self._divided(context.seed)
        site = Site(context.source.subject, context.sae.trained_positions)
        experiment, result = self._experiment(context, site, data), Result()
        methods = self._methods()
        of_methods = [list(experiment.results(method)) for method in methods]
        results = [found for of_method in of_methods for found in of_method]
        ends = [None if found.unseen is None else intervals(found.unseen, context.seed) for found in results]
        result.scalars |= scalars(results, ends)
        result.tables["methods"] = [method_row(found, end) for found, end in zip(results, ends, strict=True)]
        result.tables["settings"] = [row for found in results for row in setting_rows(found)]
        result.tables["controls"] = [row for found in results for row in control_rows(found)]
        result.tables["unedited"] = self._unedited(experiment, context.seed)
        result.figures["curve"] = curve_figure(results)
        result.figures["scores"] = score_figure(
            results, [None if e is None or f.chosen is None else e[1] for f, e in zip(results, ends, strict=True)]
        )
        to_compare = [found for found in results if found.method != ORACLE] or results  # the oracle is the bound, no method
        for path in dict.fromkeys(found.path for found in to_compare):
            best = _best([found for found in to_compare if found.path == path])
            end = ends[results.index(best)]
            result.notes.append(_sentence(best, end, self.bound))
            result.headline.append(f"score_{best.method}_{path or 'model'}")
            for name, against in best.controls.items():
                beyond = "" if best.chosen is not None else ", beyond the bound"
                what = f"score of {title(best)} ({best.trials[best.shown or 0].label}{beyond})"
                result.notes.append(against.sentence(what, name))
        result.notes += [f"{title(found)} has a score of zero. {found.reason}" for found in results if found.reason]
        for method, of_method in zip(methods, of_methods, strict=True):
            if isinstance(method, Reporting):
                _join(result, method.report(of_method, context))
        if self.relearn is not None:
            how = Relearning(data, experiment.unseen.examination, self.relearn, context.seed)
            _, never = self._baselines()
            add_relearning(result, results, how, None if never is None else never.at(site))
        result.notes += self._remarks(experiment)
        return result

    # --- what is asked ----------------------------------------------------------------------------------------------

    def _divided(self, seed: int) -> UnlearningData:
        data = load(self.data)
        groups = [group for group in data.groups() if group != FORGET]
        unknown = [group for group in self.shown_groups or [] if group not in groups]
        if unknown:
            raise OptionError(
                "shown_groups", f"there is no group {unknown[0]!r} to stay. There are: {', '.join(groups)}."
            )
        data = data.divided(self.shown_share, seed, self.shown_groups)
        if not data.retain:
            raise OptionError(
                "shown_share", f"= {self.shown_share:g} of the entities to stay is none of them. Show more."
            )
        return data

    def _methods(self) -> list[Method]:
        grid = Grid(self.numbers, self.ablate, self.clamps, self.rms_clamps, self.paths)
        make: dict[MethodName, Callable[[], Method]] = {
            "sparsity": lambda: sparsity(self.thresholds, grid),
            "attribution": lambda: attribution(grid),
            "greedy": lambda: greedy(grid),
            "strong": lambda: Strong(list[Target](self.push_targets), self.push_steps, self.paths),
        }
        others, _ = self._baselines()
        return [AsMethod(others[name]) if name in others else make[name]() for name in self.methods]

    def _baselines(self) -> tuple[dict[str, Baseline], Oracle | None]:
        """Those among `methods`, and the oracle if there is one. OptionError if one cannot be had here."""
        named = [name for name in NAMES if name in self.methods]
        unused = [name for name in self.baselines if name not in named and not (name == ORACLE and self.relearn)]
        if unused:
            raise OptionError("baselines", f"has options of {unused[0]}, which is not among methods. Add it there.")
        return {name: baseline(name, self.baselines.get(name, {}), self.data) for name in named}, oracle(
            self.baselines.get(ORACLE, {}), self.data
        )

    def _experiment(self, context: RunContext, site: Site, data: UnlearningData) -> Experiment:
        group_of = _groups(data)
        of_seen = [q for q in data.questions if q.wording == "seen" and (q.group == FORGET or q.entity in data.shown)]
        asked = _some_wordings(of_seen, self.wordings, context.seed)
        held_back = [
            q
            for q in data.questions
            if q.wording == "unseen" or (self.never_shown == "all" and q.group != FORGET and q.entity not in data.shown)
        ]
        exams = []
        for questions, wording in ((asked, "seen"), (held_back, "unseen")):
            exam = Exam(Examination(site, questions, self.batch_tokens), group_of)
            _refuse_what_is_not_known(exam, wording)
            exams.append(exam)
        organism = self.data == ORGANISM
        general = other_text(context, site, self.general_tokens, "train", organism=organism)
        rows = [row for some in general.values() for row in some]
        codes = Codes(context.sae)
        architecture = context.config.architecture.use
        seen = Seen(
            site, context.sae, data.forget, data.retain, rows, exams[0].examination, codes, context.seed, architecture
        )
        held_out = other_text(context, site, self.damage_tokens, "held_out", organism=organism)
        texts = {kind: list(site.passages(some, self.batch_tokens)) for kind, some in held_out.items()}
        by_guessing = chance([q for q in asked if q.group == FORGET])
        return Experiment(
            seen, exams[0], exams[1], self.bound, self.draws, by_guessing, lambda logits: damage(site, texts, logits)
        )

    # --- what is said -----------------------------------------------------------------------------------------------

    def _unedited(self, experiment: Experiment, seed: int) -> list[dict[str, object]]:
        """The model as it is, and the reconstruction without any edit: shares of all questions, and of those that count."""
        before = {f"right_before_{group}": right / asked for group, (right, asked) in experiment.unseen.before.items()}
        rows: list[dict[str, object]] = [{"what": "the model", **before}]
        if "spliced" in self.paths:
            trial = experiment.seen.splice()
            outcome = experiment.splice_alone
            row = {"what": trial.label, **group_columns(outcome, intervals(outcome, seed)[0])}
            for kind, found in experiment.damage_of(trial.logits).items():
                row |= {f"kl_{kind}": found.kl, f"ce_rise_{kind}": found.ce_rise, f"tokens_{kind}": found.tokens}
            rows.append(row)
        return rows

    def _remarks(self, experiment: Experiment) -> list[str]:
        notes = [
            "Shares are of the questions that the unedited model answers right. SAEBench's score is chosen and reported on the "
            "seen wordings; ours is chosen there and reported on wordings never used before.",
        ]
        too_long = sum(exam.examination.too_long for exam in (experiment.exam, experiment.unseen))
        if too_long:
            notes.append(f"{too_long} questions are longer than the model's context and were left out.")
        unknown = [group for group in experiment.unseen.before if group not in experiment.unseen.groups]
        if unknown:
            notes.append(f"The model answers no question right about: {'; '.join(unknown)}. These groups do not count.")
        return notes


def _join(result: Result, more: Result) -> None:
    """What a method has to say of its own, after the rest."""
    result.scalars |= more.scalars
    result.tables |= more.tables
    result.figures |= more.figures
    result.files += more.files
    result.notes += more.notes


def _groups(data: UnlearningData) -> Callable[[Question], str]:
    """The group that a question counts in: its own, divided into what was shown and what never was."""
    divided = {question.group for question in data.questions if question.entity in data.shown}

    def group_of(question: Question) -> str:
        if question.group not in divided:
            return question.group
        return f"{question.group}, {'shown' if question.entity in data.shown else 'never shown'}"

    return group_of


def _some_wordings(questions: Sequence[Question], number: int, seed: int) -> list[Question]:
    """At most `number` questions of those that ask for the same answer about the same entity, drawn with the seed."""
    facts, draws = defaultdict[tuple[object, ...], list[int]](list), np.random.default_rng(seed)
    for i, question in enumerate(questions):
        facts[question.entity, question.candidates, question.answer].append(i)
    kept = [some[i] for some in facts.values() for i in draws.permutation(len(some))[:number]]
    return [questions[i] for i in sorted(kept)]


def _refuse_what_is_not_known(exam: Exam, wording: str) -> None:
    """ComponentError if the model is at chance about what is to be forgotten, or knows nothing of what is to stay."""
    right, asked = exam.before.get(FORGET, (0, 0))
    by_guessing = chance([q for q in exam.examination.questions if q.group == FORGET]) if asked else 1.0
    if wilson_interval(right, asked).low <= by_guessing:
        raise ComponentError(
            f"before any edit the model answers {right} of {asked} questions in {wording} wording about what is to be forgotten "
            f"right, and guessing gives {by_guessing:.2f}: nothing can be unlearned. Take another model, or other facts."
        )
    if not exam.groups[1:]:
        raise ComponentError(
            f"before any edit the model answers no question in {wording} wording about what is to stay right, so no damage could "
            "be seen. Ask about something that it knows."
        )


def _best(results: Sequence[Found]) -> Found:
    """The method that does best on the wordings that settings are chosen on; if none is within the bound, beyond it."""

    def seen(found: Found) -> tuple[float, float]:
        return found.seen_score, held_back_score(None if found.shown is None else found.seen[found.shown])

    return max(results, key=seen)


def _sentence(best: Found, ends: Ends, bound: float) -> str:
    if best.shown is None or best.unseen is None or ends is None:
        return f"{WHERE[best.path]}, nothing was unlearned: there was nothing to try."
    setting, where = best.unseen.setting, WHERE[best.path]
    kept = "; ".join(f"{group} {right / asked:.2f} (n = {asked})" for group, (right, asked) in setting.retain.items())
    low, high = ends[0][FORGET]
    leaves = (
        f"{best.method} ({best.trials[best.shown].label}) leaves {setting.forget:.2f} of what was to be forgotten ({low:.2f} to "
        f"{high:.2f}, n = {int(best.unseen.questions[FORGET].sum())}), in wordings never used before; still right of what was to "
        f"stay: {kept}."
    )
    if best.alone is not None:
        leaves += (
            f" Without any edit the reconstruction leaves {best.alone.setting.forget:.2f} of what was to be forgotten."
        )
    if best.chosen is None:
        return f"{where}, nothing was unlearned: no setting that forgets keeps {bound:g} of each group shown. Nearest, {leaves}"
    return f"{where}, {leaves} Score {best.score:.2f} ({ends[1].low:.2f} to {ends[1].high:.2f})."
