"""The plan of a run: every name found, every option checked and every need met before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saekit.component_option import ComponentOption
from saekit.config import ArchitectureUse, RunConfig, SourceUse, Use, Variant, use_model
from saekit.errors import OptionError, SaekitError, UsageError, under_key
from saekit.kinds import LISTS, OF_THE_RUN, SECTIONS, Section
from saekit.plugins import Registry
from saekit.process_state import kept
from saekit.registered import RegisteredComponent
from saekit.runner.blame import explained, failure, of_variant
from saekit.schedules import Scheduled, extreme_steps, value_at
from saekit.variants import OWN_LISTS, run_configs

ALWAYS_PROVIDED = {"activations"}
GRAPH = "graph"
"""Provided after training by `[graph]`, and during training by a callback that keeps one up to date."""
AFTER_TRAINING = ("metric", "analyzer", "comparison")


@dataclass(frozen=True)
class Part:
    """One component of the plan with its checked options. key: its key in the run file, such as `loss.l1`."""

    key: str
    label: str
    component: RegisteredComponent
    options: dict[str, Any]
    entry: Use

    def build(self, *args: Any) -> Any:
        """The component, ready to use."""
        with under_key(self.key):
            return self.component.build(self.options, *args)

    @property
    def components(self) -> list[RegisteredComponent]:
        """The component, and those that its options name."""
        return [self.component, *_named_by(self.options)]


def _named_by(options: dict[str, Any]) -> list[RegisteredComponent]:
    named = [value for value in options.values() if isinstance(value, ComponentOption)]
    return [component for choice in named for component in (choice.component, *_named_by(choice.options))]


@dataclass
class SAEPlan:
    """The plan for one SAE. `config` is its resolved configuration: run alone, it gives the same plan.

    variant: its name among others; empty if the run trains this one alone.
    sections: the components of each section of the run file, by the section's name.
    facts: what is known of the source.
    """

    variant: str
    config: RunConfig
    sections: dict[str, list[Part]]
    facts: dict[str, Any]

    @property
    def source(self) -> Part:
        """Where activations come from."""
        return self.sections["source"][0]

    @property
    def architecture(self) -> Part:
        """The sparse autoencoder."""
        return self.sections["architecture"][0]

    @property
    def graph(self) -> Part | None:
        """The builder of the feature graph; None without `[graph]`."""
        return next(iter(self.sections["graph"]), None)

    @property
    def parts(self) -> list[Part]:
        """Every component of the run, in the order of the run file's sections."""
        return [part for parts in self.sections.values() for part in parts]

    def build_source(self) -> Any:
        """The source, reading through the cache that the run file names."""
        return _source(self.source)

    @property
    def graph_tokens(self) -> int:
        """How many activations' codes the graph builder is given."""
        graph = self.config.graph
        return (graph.tokens if graph else None) or self.config.evaluation.tokens

    @property
    def total_steps(self) -> int:
        """Optimiser steps in all."""
        return self.config.training.tokens // self.config.training.batch_size

    @property
    def model(self) -> str:
        """The subject model's name, if it is known without loading it."""
        return str(self.facts.get("model", "-"))


@dataclass
class RunPlan:
    """What a run will do: one plan for each SAE that it trains, all on the same activations.

    config: the resolved configuration; run again, it gives the same plan.
    comparisons: what looks at all members together.
    facts: what is known of the source.
    """

    config: RunConfig
    members: list[SAEPlan]
    comparisons: list[Part]
    facts: dict[str, Any]
    warnings: list[str]

    @property
    def source(self) -> Part:
        """Where the activations of all members come from."""
        return self.members[0].source

    @property
    def parts(self) -> list[Part]:
        """Every component of every member, and those that look at all of them."""
        return [*(part for member in self.members for part in member.parts), *self.comparisons]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of each member."""
        return self.members[0].total_steps

    @property
    def model(self) -> str:
        """The subject model's name, if it is known without loading it."""
        return self.members[0].model


def make_plan(config: RunConfig, registry: Registry) -> SAEPlan:
    """The plan of the one SAE that `config` describes when its variants are left out; see `plan_run`."""
    return plan_run(config.model_copy(update={"variant": []}), registry).members[0]


def plan_run(config: RunConfig, registry: Registry) -> RunPlan:
    """Resolve and check everything that can be checked without loading a model. Raises UsageError or PluginError."""
    source = _part("source", "source", config.source, registry, config)
    with explained([source]), under_key(source.key):
        built = _source(source)
        withheld: dict[str, str] = getattr(built, "withheld", {})
    given = _provided([source.component]) - set(withheld)
    resolved = _with_defaults(config, registry, given, LISTS)
    comparisons = _parts(SECTIONS["comparison"], resolved, registry)
    members = []
    for variant, own in run_configs(config).items():
        with of_variant(variant):
            plan = _plan(variant, _with_defaults(own, registry, given, OWN_LISTS) if variant else resolved, source, registry)
            _check_needs(plan, comparisons, registry, withheld)
            _check_results(plan, comparisons)
            _check_training(plan)
            _try_out([part for section in _LATE for part in plan.sections[section]])
            members.append(plan)
    _try_out(comparisons)
    with explained([source]), under_key(source.key):
        facts = built.peek()
    for plan in members:
        plan.facts = facts
    variants = [_spelt_out(variant, plan.config) for variant, plan in zip(config.variant, members, strict=False)]
    told = [*registry.warnings, *getattr(built, "warnings", ())]
    return RunPlan(resolved.model_copy(update={"variant": variants}), members, comparisons, facts, told)


def _plan(variant: str, config: RunConfig, source: Part, registry: Registry) -> SAEPlan:
    sections = {name: _parts(section, config, registry) for name, section in SECTIONS.items() if name not in OF_THE_RUN}
    return SAEPlan(variant, config, {"source": [source], **sections}, facts={})


def _parts(section: Section, config: RunConfig, registry: Registry) -> list[Part]:
    entries = getattr(config, section.name)
    if section.many:
        return [_part(f"{section.name}.{entry.label}", section.kind, entry, registry, config) for entry in entries]
    return [] if entries is None else [_part(section.name, section.kind, entries, registry, config)]


def _spelt_out(variant: Variant, config: RunConfig) -> Variant:
    """The variant with the default components added to its own lists, as they are in the resolved run file's."""
    lists = {section: getattr(config, section) for section in OWN_LISTS if getattr(variant, section) is not None}
    tables = {
        section: [entry.model_dump(by_alias=True, exclude_none=True) for entry in entries]
        for section, entries in lists.items()
    }
    return variant.model_copy(update=tables)


def _source(part: Part) -> Any:
    entry = part.entry
    assert isinstance(entry, SourceUse)
    if entry.cache is None:
        for key in ("cache_tokens", "cache_dtype"):
            if getattr(entry, key) is not None:
                raise UsageError(f"source.{key}: is of no use without source.cache. Name the cache's directory, or leave it out.")
        return part.build()
    from saekit.activations.cache import CachedSource

    source = part.build()
    if hasattr(source, "push"):
        raise UsageError("source.cache: this source is fed by a program while that runs, so nothing can be cached. Leave it out.")
    return CachedSource(source, entry.cache, dtype=entry.cache_dtype or "float32", tokens=entry.cache_tokens)


def _part(key: str, kind: str, entry: Use, registry: Registry, config: RunConfig) -> Part:
    component = registry.find(kind, entry.use, where=key, requires=config.requires)
    reserved = set(type(entry).model_fields) & set(component.options_model().model_fields)
    if reserved:
        raise UsageError(f"{key}: {component.origin} has options named {sorted(reserved)}, which belong to saekit's own keys.")
    return Part(key, entry.label, component, component.validate(entry.options, key), entry)


def _with_defaults(config: RunConfig, registry: Registry, provided: set[str], sections: tuple[str, ...]) -> RunConfig:
    """The configuration with the components that their plugins mark as default in these sections, if the run can have them."""
    if not config.defaults:
        return config
    added: dict[str, list[Use]] = {}
    for section in sections:
        entries = list(getattr(config, section))
        named = {registry.find(section, e.use, f"{section}.{e.label}", config.requires).qualified_name for e in entries}
        labels = {entry.label for entry in entries}
        defaults = []
        given = provided | ({GRAPH} if config.graph and section in AFTER_TRAINING else set())
        for offered in registry.defaults(section):
            component = registry.find(section, offered.name)  # a third party may override it
            if set(component.needs) <= given and component.qualified_name not in named and component.name not in labels:
                defaults.append(use_model(section)(use=component.name))
                labels.add(component.name)
        added[section] = defaults + entries
    return config.model_copy(update={**added, "defaults": False})


def _provided(components: list[RegisteredComponent]) -> set[str]:
    return ALWAYS_PROVIDED.union(*(c.provides for c in components))


def _check_needs(plan: SAEPlan, comparisons: list[Part], registry: Registry, withheld: dict[str, str]) -> None:
    """Whether the SAE has what its components need, and what those need that compare it with others.

    withheld: what the source could provide but does not with these options, with the fix for each."""
    others = _provided([component for part in plan.parts if part is not plan.source for component in part.components])
    provided = (others | (set(plan.source.component.provides) - set(withheld))) - {GRAPH}
    _check_architecture(plan, registry, withheld, "target" in provided)
    for part in (*plan.parts, *comparisons):
        given = provided | ({GRAPH} if _has_graph(plan, part) else set())
        missing = [need for component in part.components for need in component.needs if need not in given]
        if missing:
            need = missing[0]
            who = f"{part.key}: {part.component.title}"
            if need in withheld:
                raise UsageError(
                    f"{who} needs {need!r}, which source {plan.source.component.name!r} does not provide with these options. "
                    f"{withheld[need]}"
                )
            raise UsageError(f"{who} needs {need!r}, which nothing in this run provides. {_provider(need, part, registry)}")


def _check_results(plan: SAEPlan, comparisons: list[Part]) -> None:
    """Analyzers, comparisons and callbacks with a result are kept by their labels."""
    analyzers = {part.label: part for part in (*plan.sections["analyzer"], *comparisons)}
    for part in plan.sections["callback"]:
        if part.label in analyzers and hasattr(part.component.load(), "result"):
            raise UsageError(
                f"{part.key}: has a result, and so has {analyzers[part.label].key}: both would be written to "
                f"analysis/{part.label}. Give one of them another `name`."
            )


def _has_graph(plan: SAEPlan, part: Part) -> bool:
    """Whether `part` has a graph: after training that of `[graph]`, during training that of a callback that keeps one."""
    if part.component.kind in AFTER_TRAINING:
        return plan.graph is not None
    return any(GRAPH in component.provides for callback in plan.sections["callback"] for component in callback.components)


def _provider(need: str, part: Part, registry: Registry) -> str:
    """What provides the thing that `part` needs, in a sentence or two."""
    if need == GRAPH and part.component.kind in AFTER_TRAINING:
        builders = ", ".join(c.name for c in registry.components("graph_builder")) or "none"
        return f'Add a table [graph] with use = "..."; installed graph builders: {builders}.'
    providers = [c for c in registry.components() if need in c.provides]
    named = ", ".join(f"{c.kind} {c.name!r} ({c.distribution})" for c in providers)
    if need == GRAPH:
        who = named or "no installed callback"
        return f"[graph] is built after training; during training {who} keeps one. Leave {part.label!r} out, or add that."
    if providers:
        return f"It is provided by {named}."
    return f"No installed plugin provides it. Install one that does, or leave {part.label!r} out of the run."


def _check_architecture(plan: SAEPlan, registry: Registry, withheld: dict[str, str], has_target: bool) -> None:
    """An architecture may refuse options that only a transcoder can have."""
    check = getattr(plan.architecture.component.load(), "check", None)  # its target may be anything until it is built
    try:
        if check is not None:
            with kept(plan.architecture.component.origin, registry.warn):
                check(plan.architecture.options, transcoder=has_target)
    except OptionError as error:
        source = plan.source.component.name
        fix = withheld.get("target", f"Source {source!r} gives no target: choose another source, or leave {error.option} out.")
        raise UsageError(f"{error.under(plan.architecture.key)} {fix}") from None
    except SaekitError:
        raise
    except (Exception, SystemExit) as error:
        raise failure(plan.architecture, error) from error


_LATE = ("loss", "graph", "metric", "analyzer")
"""Sections of an SAE whose components the run builds only after it has opened its data, or after hours of training."""


def _try_out(parts: list[Part]) -> None:
    """Build once what the run itself builds late, so that what its constructor refuses is told now."""
    for part in parts:
        with explained([part]):
            part.build()


def _check_training(plan: SAEPlan) -> None:
    config, training = plan.config, plan.config.training
    architecture = config.architecture
    assert isinstance(architecture, ArchitectureUse)
    if architecture.d_sae is None and architecture.from_ is None:
        raise UsageError("architecture.d_sae: is missing. Say how many latents, for example d_sae = 4096.")
    if training.tokens == 0 and architecture.from_ is None:
        raise UsageError(
            "training.tokens: 0 trains nothing, which makes sense only for an SAE that exists already. "
            "Name it in architecture.from, or give tokens."
        )
    if 0 < training.tokens < training.batch_size:
        raise UsageError(
            f"training.tokens: {training.tokens} is less than one batch of {training.batch_size}. Give more tokens, or "
            "lower training.batch_size."
        )
    if training.tokens and not plan.sections["loss"]:
        raise UsageError('loss: is missing; nothing would be learned. Add [[loss]] with use = "mse".')
    if training.tokens == 0:
        return
    if not any(any(_extremes(part.entry.weight, plan)) for part in plan.sections["loss"]):  # type: ignore[attr-defined]
        raise UsageError("loss: every weight is zero throughout; nothing would be learned.")
    lowest, highest = _extremes(training.lr, plan)
    if lowest < 0 or highest == 0:
        step, _ = extreme_steps(training.lr, plan.total_steps)
        raise UsageError(f"training.lr: is {lowest:g} at step {step}. A learning rate is not negative, nor always zero.")


def _extremes(value: Scheduled, plan: SAEPlan) -> tuple[float, float]:
    """The smallest and the largest value that a schedule takes in the run."""
    lowest, highest = (value_at(value, step, plan.total_steps) for step in extreme_steps(value, plan.total_steps))
    return lowest, highest
